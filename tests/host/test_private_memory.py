"""The cells of private memory that exist and those that do not, 2 MB pages, guests that boot, registered SNP guests."""

from __future__ import annotations

import errno
import re
from typing import Any

import pytest

from snpbook.host.huge_pages import HugeAnonymousMemory
from snpbook.host.page_fault import Sigbus
from snpbook.host.refusal import KernelError
from snpbook.spec.private_memory import CELLS, HOOKS, KINDS, Backend, NoSuchCell, cell
from tests.host.regimes import FIRST, MIB, PAGE, Regime

# Large pages.


def test_a_part_of_a_large_page_made_shared_splits_it() -> None:
    regime = Regime("snp", "restricted", huge=True, discard=False)
    regime.guest.launch()
    regime.convert(range(0xA00, 0xC00), private=True)
    before = regime.sample("large")
    assert before.pages.large == 1
    regime.convert(range(0xA10, 0xA11), private=False)
    after = regime.sample("split")
    assert (after.pages.large, after.work.psmashes - before.work.psmashes) == (0, 1)
    assert after.pages.assigned == before.pages.assigned - 1
    regime.convert(range(0xA00, 0xC00), private=False)
    assert regime.sample("shared").pages.assigned == before.pages.assigned - 512


# What cannot be.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", list(Backend))
def test_a_cell_that_never_existed_is_refused_by_name(kind: str, backend: Backend) -> None:
    if (kind, backend) in CELLS:
        assert cell(kind, backend).backend is backend
    else:
        with pytest.raises(NoSuchCell, match=re.escape(f"a {kind} guest has no {backend} memory: ")):
            Regime(kind, backend)


def test_unknown_names() -> None:
    with pytest.raises(NoSuchCell, match="no kind of guest 'tdx'"):
        cell("tdx", "lazy")
    with pytest.raises(NoSuchCell, match="no back end 'pinned'"):
        cell("snp", "pinned")


def test_every_hook_says_what_each_needs_and_what_became_of_it() -> None:
    assert [hook.name for hook in HOOKS] == [
        "private_mem_enabled", "fault_is_private", "update_mem_attr", "invalidate_restricted_mem",
        "rmp_page_level_adjust",
    ]  # fmt: skip
    assert all(getattr(hook, name) for hook in HOOKS for name in hook.__slots__)


def fails(number: int) -> Any:
    return pytest.raises(KernelError, match=f"^{errno.errorcode[number]}")


# A guest that boots by itself.


@pytest.mark.parametrize(("backend", "huge", "exits"), [
    ("registered", False, (4000, 4200)), ("restricted", False, (4000, 4200)), ("restricted", True, (900, 1100)),
    ("guest_memfd", False, (4000, 4200)),
])  # fmt: skip
def test_an_snp_guest_accepts_all_of_its_memory(backend: str, huge: bool, exits: tuple[int, int]) -> None:
    """Through its own page state changes; a 2 MB entry saves it 511 faults."""
    regime = Regime("snp", backend, huge=huge)
    regime.guest.launch()
    assert regime.guest.boot() > 15 * MIB
    sample = regime.sample("booted")
    assert sample.pages.assigned == (regime.memory >> 12) + 16 - 3 + 1, "all but the three shared pages, and the VMSA"
    assert sample.pages.large == 6 * huge
    assert exits[0] < sample.work.exits < exits[1]


def test_in_place_an_access_on_the_other_side_converts_the_page() -> None:
    """Series v6 took an RMP fault for an implicit conversion (unconfirmed)."""
    regime = Regime("snp", "registered")
    regime.guest.launch()
    before = regime.sample("launched").pages.assigned
    regime.touch(range(FIRST, FIRST + 1), b"private")
    assert regime.read(FIRST, 7) == b"private"
    assert regime.sample("touched").pages.assigned == before + 1


def test_in_place_with_huge_pages_of_the_vmm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a huge one made private: its neighbours are in the way of the VMM until the mapping is split."""
    monkeypatch.setattr(HugeAnonymousMemory, "huge", True)
    regime = Regime("snp", "registered")
    regime.guest.launch()
    vmm = regime.guest.vmm
    user = vmm.user(FIRST * PAGE) // PAGE
    regime.convert(range(FIRST, FIRST + 512), private=True)
    assert regime.sample("large").pages.large == 1
    regime.touch(range(FIRST, FIRST + 2), b"private")
    assert regime.sample("smashed").pages.large == 0
    regime.convert(range(FIRST + 8, FIRST + 16), private=False)
    assert vmm.process.space.is_large(range(user, user + 512)).all()
    vmm.write((FIRST + 8) * PAGE, b"shared")
    assert not vmm.process.space.is_large(range(user, user + 512)).any()
    with pytest.raises(Sigbus):
        vmm.write(FIRST * PAGE, b"oops")
    assert regime.read(FIRST, 7) == b"private"


def test_memory_that_is_not_registered_is_not_launched_nor_converted() -> None:
    regime = Regime("snp", "registered")
    vmm = regime.guest.vmm
    for block in vmm.blocks:
        region = block.address.to_bytes(8, "little") + block.size.to_bytes(8, "little")
        vmm.process.ioctl(vmm.vm_fd, 0x8010AEBC, region)
    with fails(errno.EINVAL):
        regime.convert(range(FIRST, FIRST + 1), private=True)
    with fails(errno.EINVAL):
        regime.guest.launch()


def test_letting_a_region_go_gives_its_pages_back_first() -> None:
    regime = Regime("snp", "registered")
    regime.guest.launch()
    regime.convert(range(FIRST, FIRST + 100), private=True)
    regime.guest.vmm.close()
    assert regime.host.memory.pinned == 0
    free = regime.host.memory.holes(range(regime.host.memory.end))
    assert all(regime.system.machine.rmp.states(pages).max() <= 2 for pages in free), "hypervisor pages"
