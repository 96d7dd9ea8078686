"""KVM's system calls as the v7 series has them: slots, attributes, vCPUs, errors, events."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.host.ccp import Ccp
from snpbook.host.run import run
from snpbook.spec.commands import Command
from snpbook.spec.kvm import MemoryAttribute
from snpbook.spec.pages import PageState
from snpbook.spec.rmp import IMMUTABLE
from snpbook.spec.status import Status
from snpbook.spec.vmsa import reset_vmsa
from snpbook.trace import Ioctl, Message
from tests.host.vms import PRIVATE, RAM, SHARED, memory_map, new_vm, refused, spoil, states
from tests.machines import MIB, PAGE, booted, frame_of, launched

# Slots.


def test_slots_do_not_overlap_and_do_not_change() -> None:
    system = booted()
    kvm, vm = system.host.kvm, new_vm(system)
    new = kvm.user_memory(RAM), kvm.restricted_file(RAM)
    with refused(errno.EINVAL):
        vm.set_memory_region(0, 0x1000, *new)
    for gfn in (0, 1, 511):
        with refused(errno.EEXIST):
            vm.set_memory_region(1, gfn, *new)
    vm.set_memory_region(1, 512, *new)
    with refused(errno.EINVAL):
        vm.set_memory_region(2, 0x2000, kvm.user_memory(2 * RAM), kvm.restricted_file(RAM))
    with refused(errno.EINVAL):
        vm.set_memory_region(2, (1 << 36) - 511, *new)
    assert vm.slot_of(511) is vm.slots[0]
    assert vm.slot_of(512) is vm.slots[1]
    assert vm.slot_of(1024) is None


# Attributes.


@pytest.mark.parametrize(
    ("gpa", "size", "attributes"),
    [
        (0, 0, PRIVATE),
        (1, PAGE, PRIVATE),
        (0, PAGE + 1, PRIVATE),
        (0, -PAGE, PRIVATE),
        (0, PAGE, MemoryAttribute.READ),
        (0, PAGE, PRIVATE | MemoryAttribute.WRITE),
    ],
)
def test_attributes_refused(gpa: int, size: int, attributes: MemoryAttribute) -> None:
    vm = new_vm()
    with refused(errno.EINVAL):
        vm.set_memory_attributes(gpa, size, attributes)
    assert not vm.is_private(range(512)).any()


def test_attributes_assign_and_release_pages() -> None:
    system = booted()
    vm = new_vm(system)
    table = system.machine.rmp.load(range(system.machine.rmp.entries)).copy()
    vm.set_memory_attributes(0x5000, 3 * PAGE, PRIVATE)
    assert vm.is_private(range(4, 9)).tolist() == [False, True, True, True, False]
    frames = [frame_of(vm, gpa) >> 12 for gpa in (0x5000, 0x6000, 0x7000)]
    entries = [system.machine.rmp.entry(frame) for frame in frames]
    assert [(e.assigned, e.asid, e.gfn, e.immutable, e.validated) for e in entries] == [
        (1, vm.asid, gfn, 0, 0) for gfn in (5, 6, 7)
    ]
    vm.set_memory_attributes(0x5000, 3 * PAGE, SHARED)
    assert not vm.is_private(range(512)).any()
    assert np.array_equal(system.machine.rmp.load(range(system.machine.rmp.entries)), table)


def test_setting_private_twice_keeps_what_the_guest_validated() -> None:
    """v7 does not ask whether a page is assigned; RMPUPDATE to the same owner changes nothing."""
    guest = launched()
    guest.boot()
    vm = guest.vmm.vm
    frame = frame_of(vm, 0x100000) >> 12
    before = guest.system.machine.rmp.entry(frame)
    assert before.validated
    vm.set_memory_attributes(0x100000, PAGE, PRIVATE)
    assert guest.system.machine.rmp.entry(frame) == before


def test_attributes_outlive_and_precede_slots() -> None:
    vm = new_vm()
    vm.set_memory_attributes(1 << 46, PAGE, PRIVATE)
    assert vm.is_private(range(1 << 34, (1 << 34) + 2)).tolist() == [True, False]


def test_a_refused_rmpupdate_is_only_logged() -> None:
    system = booted()
    vm, log = new_vm(system), system.record()
    frame = frame_of(vm, 0x3000) >> 12
    entry = system.machine.rmp.load(np.array([frame], np.uint64)).copy()
    entry[0, 0] |= np.uint64(IMMUTABLE)  # HV-Fixed, as only the firmware makes pages
    system.machine.rmp.store(np.array([frame], np.uint64), entry)
    vm.set_memory_attributes(0x3000, PAGE, PRIVATE)
    assert vm.is_private(range(3, 4)).all()
    assert any("failed to update memory attributes" in event.text for event in log.of(Message))


def test_memory_that_is_out_is_only_logged_by_attributes() -> None:
    system = booted(installed=64 * MIB)
    vm, log = new_vm(system, 40 * MIB), system.record()
    vm.set_memory_attributes(0, 40 * MIB, PRIVATE)
    assert any("no memory for private pages from gfn 0x1b" in event.text for event in log.of(Message))
    assert log.of(Ioctl, "KVM_SET_MEMORY_ATTRIBUTES")[0].errno == 0


def test_a_page_in_two_slots_belongs_to_one_guest_page() -> None:
    system = booted()
    kvm, vm = system.host.kvm, new_vm(system)
    vm.set_memory_region(1, 0x1000, kvm.user_memory(RAM), vm.slots[0].restricted)
    vm.set_memory_attributes(0x5000, PAGE, PRIVATE)
    frame = frame_of(vm, 0x5000) >> 12
    vm.set_memory_attributes(0x1005000, PAGE, PRIVATE)
    assert system.machine.rmp.entry(frame).gfn == 0x1005


# vCPUs.


def test_vcpus_have_one_number_each() -> None:
    vm = new_vm()
    vm.create_vcpu(0)
    with refused(errno.EEXIST):
        vm.create_vcpu(0)
    assert [vcpu.number for vcpu in vm.vcpus] == [0]


def test_running_before_the_launch_and_registers_after_it() -> None:
    guest = booted().create_vm(vcpus=2)
    with refused(errno.EINVAL):
        run(guest.vmm.vcpus[0])
    guest.launch()
    with refused(errno.EINVAL):
        guest.vmm.vcpus[1].set_registers(reset_vmsa(0, 0, 1))


def test_a_vcpu_made_after_the_launch_has_nothing_to_run() -> None:
    guest = launched()
    late = guest.vmm.vm.create_vcpu(7)
    with refused(errno.EINVAL):
        run(late)


# Calls are traced with their errno.


def test_every_call_leaves_an_event() -> None:
    system = booted()
    log = system.record()
    vm = new_vm(system)
    with refused(errno.EINVAL):
        vm.snp_launch_finish()
    assert [(event.name, event.errno) for event in log.of(Ioctl)] == [
        ("KVM_CREATE_VM", 0), ("SNP_INIT", 0), ("KVM_SET_USER_MEMORY_REGION", 0), ("SNP_LAUNCH_FINISH", errno.EINVAL),
    ]  # fmt: skip


def test_the_driver_takes_back_what_it_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    before = memory_map(system)
    ccp: Ccp = system.host.ccp
    with monkeypatch.context() as patch:
        spoil(patch, system, Command.SNP_PLATFORM_STATUS, Status.HWERROR_PLATFORM)
        with refused(errno.EIO, Status.HWERROR_PLATFORM):
            ccp.platform_status()
    guest = launched(system)
    assert guest.vmm.vm.gctx is not None
    with refused(errno.EIO, Status.INVALID_PARAM):
        ccp.guest_request(guest.vmm.vm.gctx, bytes(PAGE))
    guest.vmm.vm.destroy()
    assert memory_map(system) == before


def test_the_hypervisor_state_is_rmpupdates_to_give() -> None:
    """Nothing but RMPUPDATE frees a page: the driver's own way back from Reclaim."""
    system = booted()
    pages = system.host.ccp.donate(2)
    assert states(system, pages) == {PageState.FIRMWARE}
    assert system.host.cpu.rmpupdate(pages, np.zeros(2, np.uint64), HYPERVISOR).all()
    assert system.host.cpu.rmpupdate(pages, np.zeros(2, np.uint64), NewState(assigned=True, asid=1)).all()
    system.host.ccp.take_back(pages)
    assert states(system, pages) == {PageState.HYPERVISOR}
