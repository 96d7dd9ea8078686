"""Faults whose cause is the RMP: 2 MB entries that KVM splits, and those where it can do nothing but log."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.host.steps import finish
from tests.host.askers import RUN, Asker, fails
from tests.machines import frame_of

LARGE_GFN = 0x400
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])


async def validate(cpu: GuestCpu, gfn: int) -> list[int]:
    codes, _ = await cpu.pvalidate(gfn << 12, 1)
    return [int(code) for code in codes]


async def touch(cpu: GuestCpu, gfn: int) -> bytes:
    data: bytes = await cpu.read(gfn << 12, 16)
    return data


class Large(Asker):
    """A guest of which 2 MB from `LARGE_GFN` on lie in a row, under one RMP entry, mapped page by page."""

    def __init__(self, era: str) -> None:
        super().__init__(era)
        vm, cpu = self.vm, self.kernel.cpu
        slot = vm.slots.of(LARGE_GFN)
        gfns = range(LARGE_GFN, LARGE_GFN + 512)
        vm.mmu.unmap(gfns)
        self.block = self.kernel.memory.allocate(512, 512)
        pages = getattr(slot.private, "pages", None) or slot.private.file.pages
        offsets = slot.offsets(gfns)
        pages._frames[offsets.start : offsets.stop] = np.arange(self.block.start, self.block.stop, dtype=np.uint64)
        codes = cpu.rmpupdate(self.block[:1], gfns[:1], NewState(assigned=True, asid=vm.asid, large=True))
        assert not codes.any()

    def entry(self, page: int) -> tuple[bool, bool, int]:
        """Assigned, large, and the guest page of an RMP entry."""
        entry = self.system.machine.rmp.entry(page)
        return bool(entry.assigned), bool(entry.page_size), int(entry.gpa if hasattr(entry, "gpa") else entry.gfn)

    @property
    def messages(self) -> list[str]:
        return [line for line in self.kernel.log.lines if line.startswith("SEV: ")]


@ERAS
def test_a_4k_pvalidate_of_a_large_entry_splits_it(era: str) -> None:
    guest = Large(era)
    gfn = LARGE_GFN + 7
    assert guest.entry(guest.block.start)[1]
    assert guest.drive(lambda cpu: validate(cpu, gfn)) == [0]
    assert all(guest.entry(page)[:2] == (True, False) for page in guest.block)
    assert guest.messages == []


@ERAS
def test_512_mappings_go_from_the_faulting_page_on(era: str) -> None:
    """Not from the beginning of the 2 MB: what lies before stays mapped."""
    guest = Large(era)
    tables, first = guest.vm.mmu.tables, LARGE_GFN + 0x100
    tables.map(LARGE_GFN, np.arange(guest.block.start, guest.block.stop, dtype=np.uint64))
    executor = guest.vcpu.executor
    executor.start(lambda cpu: validate(cpu, first))
    steps = guest.vmm.process.calling(guest.vmm.handles[0].fd, RUN)
    while next(steps).name != "RMP fault: zap":
        pass
    assert tables.mapped(range(first, first + 1)) == 1
    assert next(steps).name == "enter the guest"
    assert tables.mapped(range(first, first + 1)) == 0
    assert tables.mapped(range(LARGE_GFN, LARGE_GFN + 512)) == 0x100
    finish(steps)
    assert executor.outcome == [0]


def test_psmash_is_repeated_while_the_entry_is_in_use() -> None:
    guest = Large("mainline")
    guest.system.machine.in_use.add(guest.block.start + 3)
    guest.vcpu.executor.start(lambda cpu: validate(cpu, LARGE_GFN))
    steps, tries = guest.vmm.process.calling(guest.vmm.handles[0].fd, RUN), 0
    for step in steps:
        tries += step.name == "RMP fault: PSMASH"
        if tries == 3:
            guest.system.machine.in_use.discard(guest.block.start + 3)
    assert tries == 3
    assert guest.vcpu.executor.outcome == [0]
    assert guest.messages == []


def test_an_entry_that_stays_in_use() -> None:
    """Linux would try for ever."""
    guest = Large("mainline")
    guest.system.machine.in_use.add(guest.block.start)
    with fails(errno.ELOOP):
        guest.drive(lambda cpu: validate(cpu, LARGE_GFN))


def test_the_v7_series_tries_once() -> None:
    """And unmaps; the guest faults again, until the other is done."""
    guest = Large("rfc-v7")
    guest.system.machine.in_use.add(guest.block.start)
    guest.vcpu.executor.start(lambda cpu: validate(cpu, LARGE_GFN))
    steps, tries = guest.vmm.process.calling(guest.vmm.handles[0].fd, RUN), 0
    for step in steps:
        tries += step.name == "RMP fault: PSMASH"
        if tries == 2:
            guest.system.machine.in_use.discard(guest.block.start)
    assert guest.vcpu.executor.outcome == [0]
    place = f"GPA {LARGE_GFN << 12:#x} PFN {guest.block.start:#x}"
    assert guest.messages == [f"SEV: Unable to split RMP entry for {place} ret 3"]


def test_another_vcpu_was_faster() -> None:
    """PSMASH fails on what is split by now, and that is what was wanted."""
    guest = Large("mainline")
    guest.vcpu.executor.start(lambda cpu: validate(cpu, LARGE_GFN))
    for step in guest.vmm.process.calling(guest.vmm.handles[0].fd, RUN):
        if step.name == "RMP fault: PSMASH":
            guest.kernel.cpu.psmash(guest.block[:1])
    assert guest.vcpu.executor.outcome == [0]
    assert guest.messages == []


# Livelocks: real guests would fault for ever.


@ERAS
def test_an_entry_of_another_guest(era: str) -> None:
    """A 4 KB entry counts as spurious; the v7 series tries to split it all the same."""
    guest = Asker(era)
    gfn = 0x410
    frame = frame_of(guest.vm, gfn << 12) >> 12
    guest.kernel.cpu.rmpupdate(range(frame, frame + 1), range(1), NewState(assigned=True, asid=77))
    with fails(errno.ELOOP):
        guest.drive(lambda cpu: touch(cpu, gfn))
    told = guest.log(f"SEV: Unable to split RMP entry for GPA {gfn << 12:#x}")
    assert told is (era == "rfc-v7")


@ERAS
def test_an_entry_that_nobody_has(era: str) -> None:
    guest = Asker(era)
    gfn = 0x411
    frame = frame_of(guest.vm, gfn << 12) >> 12
    guest.kernel.cpu.rmpupdate(range(frame, frame + 1), range(1), HYPERVISOR)
    with fails(errno.ELOOP):
        guest.drive(lambda cpu: touch(cpu, gfn))
    place = f"GPA {gfn << 12:#x} PFN {frame:#x}"
    assert guest.log(f"SEV: Unexpected RMP fault, no assigned RMP entry found for {place} error 0")


def test_a_shared_page_that_became_assigned() -> None:
    """The host's own mistake: the guest writes to its GHCB, which is now somebody's private page."""
    guest = Asker("mainline")
    gfn = guest.ghcb >> 12
    slot = guest.vm.slots.of(gfn)
    frame = int(slot.shared_frames(guest.vm.process.space, range(gfn, gfn + 1))[0])
    guest.kernel.cpu.rmpupdate(range(frame, frame + 1), range(1), NewState(assigned=True, asid=77))

    async def write(cpu: GuestCpu) -> None:
        await cpu.write(guest.ghcb, b"x")

    with fails(errno.ELOOP):
        guest.drive(write)
    assert guest.log(f"SEV: Unexpected RMP fault for non-private GPA {guest.ghcb:#x}")
