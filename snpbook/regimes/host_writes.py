"""A VMM with a bug writes where a guest has private memory, and the kernel itself does: who notices?

Why series v7 took private memory out of the VMM's reach. Sources: RFC v7 letter, patches 18 to 23; UPM v10.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from snpbook.host.page_fault import Oops, Sigbus, store_as_kernel
from snpbook.regimes.regime import FIRST, Regime
from snpbook.spec.pages import PAGE_SHIFT

TEXT = b"what the guest wrote"
OOPS = b"oops"


class Damage(StrEnum):
    """What comes of it."""

    SILENT = "the write succeeds, and the guest's page is corrupt"
    STOPPED = "the writer is stopped, and the guest's page is whole"
    ELSEWHERE = "the write goes to a separate shared page, and the guest's page is whole"


@dataclass(frozen=True, slots=True)
class Write:
    """What a write did, what the guest reads afterwards, and how the writer was stopped, if so."""

    damage: Damage
    read: bytes
    stopped: str = ""


def by_vmm(kind: str, backend: str) -> Write:
    """The VMM writes to its own mapping of the guest's memory."""
    regime = _written(kind, backend)
    try:
        regime.vmm.write(FIRST << PAGE_SHIFT, OOPS)
    except Sigbus as error:
        return Write(Damage.STOPPED, regime.read(FIRST, len(TEXT)), str(error))
    read = regime.read(FIRST, len(TEXT))
    return Write(Damage.ELSEWHERE if read == TEXT else Damage.SILENT, read)


def by_kernel(kind: str, backend: str) -> tuple[Write, tuple[str, ...]]:
    """The kernel clears the frame of a private page through its own map of memory; and what it logs of that."""
    regime = _written(kind, backend)
    known, frame = len(regime.host.log.lines), int(regime.frames(range(FIRST, FIRST + 1))[0])
    stopped = ""
    try:
        store_as_kernel(regime.host, frame << PAGE_SHIFT, OOPS)
    except Oops as error:
        stopped = str(error)
    damage = Damage.STOPPED if stopped else Damage.SILENT
    return Write(damage, regime.read(FIRST, len(TEXT)), stopped), tuple(regime.host.log.lines[known:])


def _written(kind: str, backend: str) -> Regime:
    regime, page = Regime(kind, backend), range(FIRST, FIRST + 1)
    regime.guest.launch()
    regime.convert(page, private=True)
    regime.touch(page, TEXT)
    return regime
