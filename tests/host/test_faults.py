"""Nested faults: conversions that the VMM is told of, faults without progress, one guest beside another."""

from __future__ import annotations

import errno

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.host.kvm.run import FAULT_LIMIT
from snpbook.spec.pages import PageState
from snpbook.trace import VmExit
from tests.host.askers import Asker, fails
from tests.machines import MIB, PAGE, booted, frame_of, launched

GPA = 0x400000
ERAS = pytest.mark.parametrize(("era", "reason", "flag"), [("rfc-v7", 38, 1), ("mainline", 39, 8)])


async def read(cpu: GuestCpu, address: int = GPA) -> bytes:
    data: bytes = await cpu.read(address, 16)
    return data


def memory_fault(asker: Asker, address: int = GPA) -> tuple[int, ...]:
    """KVM_RUN into a memory fault: the exit reason, flags, guest address and size."""
    asker.vcpu.executor.start(lambda cpu: read(cpu, address))
    if asker.kernel.era.memory_fault_fails:
        with fails(errno.EFAULT):
            asker.enter()
    else:
        asker.enter()
    return (asker.reason, *asker.exit("<QQQ"))


@ERAS
def test_an_access_on_the_wrong_side(era: str, reason: int, flag: int) -> None:
    """A private access to a page that is shared for the host, and one to what no slot holds."""
    asker = Asker(era)
    asker.vm.private.mark(range(GPA >> 12, (GPA >> 12) + 1), False)
    asker.vm.mmu.unmap(range(GPA >> 12, (GPA >> 12) + 1))
    assert memory_fault(asker) == (reason, flag, GPA, PAGE)
    asker.restored()
    assert memory_fault(asker, 256 * MIB) == (reason, flag, 256 * MIB, PAGE)


@pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
def test_an_implicit_conversion_goes_to_the_vmm_once(era: str) -> None:
    """It makes the page private again, and the guest gets a #VC for what it has not validated."""
    asker = Asker(era)
    gfns = range(GPA >> 12, (GPA >> 12) + 1)
    asker.vm.private.mark(gfns, False)
    asker.vm.mmu.unmap(gfns)
    slot = asker.vm.slots.of(gfns.start)
    (getattr(slot.private, "punch", None) or slot.private.file.pages.punch)(slot.offsets(gfns))
    with pytest.raises(RuntimeError, match="SHUTDOWN"):
        asker.guest.run(read)
    assert asker.vm.is_private(gfns).all()
    frame = frame_of(asker.vm, GPA) >> 12
    assert asker.system.machine.rmp.states(range(frame, frame + 1))[0] == PageState.GUEST_INVALID


def test_a_guest_that_gets_nowhere_is_stopped() -> None:
    """The host takes the page from under the guest and maps it again: real hardware would fault for ever."""
    asker = Asker()
    frame = frame_of(asker.vm, GPA) >> 12
    asker.kernel.cpu.rmpupdate(range(frame, frame + 1), range(1), NewState(assigned=True, asid=77))
    log = asker.system.record()
    with fails(errno.ELOOP):
        asker.guest.run(read)
    assert len(log.of(VmExit)) == FAULT_LIMIT + 1


def test_a_page_converted_to_and_fro_for_ever_stops_the_guest() -> None:
    """The VMM is asked for the same page again and again: PVALIDATE through a shared mapping of a private page."""
    asker = Asker()

    async def program(cpu: GuestCpu) -> None:
        while True:
            await cpu.write(asker.place.request, b"shared")
            await cpu.pvalidate(asker.place.request, 1)

    with fails(errno.ELOOP):
        asker.guest.run(program)


@pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
def test_one_guest_cannot_see_another(era: str) -> None:
    """Two guests on one host, each with its own RAM at the same addresses."""
    system = Asker(era).system
    guests = [launched(system, memory="12 MiB") for _ in range(2)]

    async def write(cpu: GuestCpu, data: bytes) -> None:
        await cpu.write(0x500000, data)

    for number, guest in enumerate(guests):
        guest.boot()
        guest.run(lambda cpu, number=number: write(cpu, bytes([number + 1]) * 16))
    assert [guest.run(lambda cpu: read(cpu, 0x500000)) for guest in guests] == [b"\1" * 16, b"\2" * 16]


def test_a_vcpu_that_has_been_halted_goes_on() -> None:
    """A HLT of a guest in the clear: KVM_RUN again, and the guest is behind it."""
    guest = launched(booted())

    async def program(cpu: GuestCpu) -> str:
        await cpu.hlt()
        return "behind it"

    guest.vmm.vcpus[0].executor.start(program)
    guest.vmm.run(0)
    guest.vmm.run(0)
    assert guest.vmm.vcpus[0].executor.outcome == "behind it"
