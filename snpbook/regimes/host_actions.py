"""What Linux does behind a guest's back to its private pages, and whether the guest still reads what it wrote.

Why pages of an encrypted guest are pinned: a page that moves decrypts to something else. Sources: APM2 15.34.9; Linux
mm/migrate.c, mm/compaction.c, mm/vmscan.c, mm/ksm.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from snpbook.host.page_moves import compact, fragment, mergeable, migrate, swap_out
from snpbook.regimes.regime import FIRST, Regime
from snpbook.spec.private_memory import Backend
from snpbook.spec.uapi_kvm import Ioctl
from snpbook.spec.uapi_kvm_structs import ENC_REGION

TEXT = b"what the guest wrote"
COUNT = 16


class Action(StrEnum):
    """What the host's memory management does."""

    MIGRATE = "migrate"
    COMPACT = "compact"
    SWAP = "swap"
    KSM = "ksm"


@dataclass(frozen=True, slots=True)
class Acted:
    """`taken` of `COUNT` private pages moved, or could be merged; `read` is what the guest finds in them afterwards."""

    action: Action
    taken: int
    read: tuple[bytes, ...]

    @property
    def intact(self) -> bool:
        """Whether the guest reads what it wrote, in every page."""
        return set(self.read) == {TEXT}


def act(action: Action, kind: str, backend: str, *, pinned: bool = True) -> Acted:
    """Do it to pages in which a guest wrote the same text. Without `pinned` a registration is taken back before.

    `ValueError` where there is none, and for an SNP guest, whose pages would be the hypervisor's with it. KSM only
    counts what it would merge.
    """
    regime, gfns = Regime(kind, backend), range(FIRST, FIRST + COUNT)
    regime.guest.launch()
    regime.convert(gfns, private=True)
    regime.touch(gfns, TEXT)
    if not pinned:
        _unregister(regime)
    taken = _DO[action](regime, gfns)
    return Acted(action, taken, tuple(regime.read(gfn, len(TEXT)) for gfn in gfns))


def _unregister(regime: Regime) -> None:
    if regime.cell.backend is not Backend.REGISTERED:
        raise ValueError(f"{regime.cell.backend} memory is not registered: its pages stay as long as they are there")
    if regime.kind == "snp":
        raise ValueError("an SNP guest does not outlive its registration: its pages go back to the hypervisor with it")
    vmm = regime.vmm
    for block in vmm.blocks:
        region = ENC_REGION.pack(addr=block.address, size=block.size)
        vmm.process.ioctl(vmm.vm_fd, Ioctl.MEMORY_ENCRYPT_UNREG_REGION, region)


def _migrate(regime: Regime, gfns: range) -> int:
    return int(migrate(regime.private_files(gfns)).sum())


def _swap(regime: Regime, gfns: range) -> int:
    """The frames are somebody else's before the pages come back."""
    frames = regime.frames(gfns)
    gone = swap_out(regime.private_files(gfns))
    for frame in frames[gone].tolist():
        regime.host.memory.claim(range(frame, frame + 1))
    return int(gone.sum())


def _compact(regime: Regime, gfns: range) -> int:
    """Free memory is in pieces first, each a page short of 2 MB, so that there is something to win."""
    before = regime.frames(gfns)
    fragment(regime.host.memory)
    shared = regime.vmm.process.space.files(regime.user_pages(gfns))
    compact(regime.host.memory, dict.fromkeys(file for file, _ in (*regime.private_files(gfns), *shared)))
    return int((regime.frames(gfns) != before).sum())


def _ksm(regime: Regime, gfns: range) -> int:
    return mergeable(regime.private_files(gfns))


_DO: Mapping[Action, Callable[[Regime, range], int]] = {
    Action.MIGRATE: _migrate,
    Action.SWAP: _swap,
    Action.COMPACT: _compact,
    Action.KSM: _ksm,
}
