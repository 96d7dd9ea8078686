"""KVM's system calls in the v7 series and in Linux 6.12: slots, attributes, vCPUs, errors, events."""

from __future__ import annotations

import errno
import struct
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.rmp import IMMUTABLE
from snpbook.spec.status import Status
from snpbook.trace import Ioctl, SystemCall
from tests.host.sev_hosts import (
    CREATE_VCPU,
    GUEST_MEMFD,
    MIB,
    PAGE,
    SET_REGION,
    SET_REGION2,
    Handle,
    Host,
    refused,
)
from tests.host.vms import ERAS, PAGES, launch_update, memory_map, new_vm, shared_of
from tests.machines import booted, frame_of, launched

RUN, SET_REGS, SET_MP_STATE = 0xAE80, 0x4090AE82, 0x4004AE99
PRIVATE, READ, WRITE = 8, 1, 2


def private_file(vm: Handle, pages: int) -> int:
    """A file for private pages: its descriptor."""
    process = vm.host.process
    if vm.host.kernel.era.name == "rfc-v7":
        fd = process.memfd_restricted()
        process.ftruncate(fd, pages * PAGE)
        return fd
    return int(process.ioctl(vm.fd, GUEST_MEMFD, bytearray(struct.pack("<QQ48x", pages * PAGE, 0))))


def set_slot(vm: Handle, number: int, gfn: int, pages: int, fd: int, offset: int = 0) -> None:
    process = vm.host.process
    call = SET_REGION if vm.host.kernel.era.name == "rfc-v7" else SET_REGION2
    user = process.mmap(max(pages, 1) * PAGE)
    region = struct.pack("<IIQQQQII112x", number, 4, gfn * PAGE, pages * PAGE, user, offset * PAGE, fd, 0)
    process.ioctl(vm.fd, call, bytearray(region))


def attributes(vm: Handle, gpa: int, size: int, value: int) -> tuple[int, int]:
    """KVM_SET_MEMORY_ATTRIBUTES: address and size as they come back, also from a call that fails."""
    buffer = bytearray(struct.pack("<QQQQ", gpa, size, value, 0))
    call = 0xC020AED3 if vm.host.kernel.era.name == "rfc-v7" else 0x4020AED2
    try:
        vm.host.process.ioctl(vm.fd, call, buffer)
    finally:
        address, left = struct.unpack_from("<QQ", buffer)
    return address, left


def frame(vm: Handle, gfn: int) -> int:
    return frame_of(vm.vm, gfn * PAGE) >> 12


def entry(vm: Handle, gfn: int) -> Any:
    return vm.host.system.machine.rmp.entry(frame(vm, gfn))


# Slots.


@ERAS
def test_slots_do_not_overlap_and_do_not_change(era: str) -> None:
    vm = new_vm(Host(era))
    fd = private_file(vm, PAGES)
    with refused(errno.EINVAL):
        set_slot(vm, 0, 0x1000, PAGES, fd)
    for gfn in (0, 1, 511):
        with refused(errno.EEXIST):
            set_slot(vm, 1, gfn, PAGES, fd)
    set_slot(vm, 1, 512, PAGES, fd)
    with refused(errno.EINVAL):
        set_slot(vm, 2, 0x2000, 2 * PAGES, private_file(vm, PAGES))
    with refused(errno.EINVAL):
        set_slot(vm, 2, (1 << 36) - 511, PAGES, private_file(vm, PAGES))
    assert vm.vm.slots.of(511) is vm.vm.slots.get(0)
    assert vm.vm.slots.of(512) is vm.vm.slots.get(1)
    assert vm.vm.slots.of(1024) is None


def test_a_page_of_a_file_in_two_slots_belongs_to_one_guest_page() -> None:
    """The series does not look; Linux refuses the second slot."""
    vm = new_vm(Host("rfc-v7"))
    set_slot(vm, 1, 0x1000, PAGES, next(fd for fd, file in vm.host.process._files.items() if file is vm.private.file))
    vm.make_private(range(5, 6))
    page = frame(vm, 5)
    vm.make_private(range(0x1005, 0x1006))
    assert vm.host.system.machine.rmp.entry(page).gfn == 0x1005
    vm = new_vm(Host())
    with refused(errno.EINVAL):
        set_slot(vm, 1, 0x1000, PAGES, next(fd for fd, file in vm.host.process._files.items() if file is vm.private))


# Attributes.


@ERAS
@pytest.mark.parametrize(
    ("gpa", "size", "value"),
    [
        (0, 0, PRIVATE),
        (1, PAGE, PRIVATE),
        (0, PAGE + 1, PRIVATE),
        (2 * PAGE, 2**64 - PAGE, PRIVATE),
        (0, PAGE, READ),
        (0, PAGE, PRIVATE | WRITE),
    ],
)
def test_attributes_refused(era: str, gpa: int, size: int, value: int) -> None:
    vm = new_vm(Host(era), 8)
    with refused(errno.EINVAL):
        attributes(vm, gpa, size, value)
    assert not vm.vm.is_private(range(8)).any()


def test_attributes_in_and_out() -> None:
    """The series gives back what is left to do, which is nothing; Linux only reads the structure."""
    assert attributes(new_vm(Host("rfc-v7")), 0x5000, 3 * PAGE, PRIVATE) == (0x8000, 0)
    assert attributes(new_vm(Host()), 0x5000, 3 * PAGE, PRIVATE) == (0x5000, 3 * PAGE)


def test_series_attributes_assign_and_release_pages() -> None:
    vm = new_vm(Host("rfc-v7"))
    rmp = vm.host.system.machine.rmp
    table = rmp.load(range(rmp.entries)).copy()
    vm.make_private(range(5, 8))
    assert vm.vm.is_private(range(4, 9)).tolist() == [False, True, True, True, False]
    assert [(e.assigned, e.asid, e.gfn, e.immutable, e.validated) for e in (entry(vm, gfn) for gfn in (5, 6, 7))] == [
        (1, vm.vm.asid, gfn, 0, 0) for gfn in (5, 6, 7)
    ]
    vm.make_private(range(5, 8), private=False)
    assert not vm.vm.is_private(range(512)).any()
    assert np.array_equal(rmp.load(range(rmp.entries)), table)


def test_later_attributes_leave_memory_and_rmp_alone() -> None:
    vm = new_vm(Host())
    before = memory_map(vm.host.system)
    vm.make_private(range(5, 8))
    assert vm.vm.is_private(range(4, 9)).tolist() == [False, True, True, True, False]
    assert vm.private.pages.resident == 0
    assert memory_map(vm.host.system) == before


@ERAS
def test_setting_private_twice_keeps_what_the_guest_validated(era: str) -> None:
    """v7 does not ask whether a page is assigned; RMPUPDATE to the same owner changes nothing."""
    guest = launched(booted(era=era), memory="16 MiB")
    guest.boot()
    vmm, rmp = guest.vmm, guest.system.machine.rmp
    page = frame_of(vmm.vm, 0x100000) >> 12
    before = rmp.entry(page)
    assert before.validated
    request = struct.pack("<QQQQ", 0x100000, PAGE, PRIVATE, 0)
    vmm.process.ioctl(vmm.vm_fd, 0xC020AED3 if era == "rfc-v7" else 0x4020AED2, request)
    assert rmp.entry(page) == before


@ERAS
def test_attributes_outlive_and_precede_slots(era: str) -> None:
    vm = new_vm(Host(era), 8)
    vm.make_private(range(1 << 34, (1 << 34) + 1))
    assert vm.vm.is_private(range(1 << 34, (1 << 34) + 2)).tolist() == [True, False]
    vm.make_private(range(4))
    set_slot(vm, 0, 0, 0, 0)
    assert vm.vm.is_private(range(8)).tolist() == [True] * 4 + [False] * 4


def test_series_a_refused_rmpupdate_is_only_logged() -> None:
    vm = new_vm(Host("rfc-v7"))
    page, rmp = np.array([frame(vm, 3)], np.uint64), vm.host.system.machine.rmp
    words = rmp.load(page).copy()
    words[0, 0] |= np.uint64(IMMUTABLE)  # HV-Fixed, as only the firmware makes pages
    rmp.store(page, words)
    vm.make_private(range(3, 4))
    assert vm.vm.is_private(range(3, 4)).all()
    assert "kvm: failed to update memory attributes" in vm.host.kernel.dmesg


def test_series_memory_that_is_out_is_only_logged_by_attributes() -> None:
    host = Host("rfc-v7")
    log = host.system.record()
    vm = new_vm(host, 40 * MIB // PAGE)
    blocked = host.kernel.memory.take(host.kernel.memory.free - 9)
    vm.make_private(range(16))
    assert "kvm: no memory for private pages from gfn 0x9" in host.kernel.dmesg
    assert log.of(Ioctl, "KVM_SET_MEMORY_ATTRIBUTES")[0].errno == 0
    assert len(blocked)


# vCPUs.


@ERAS
def test_vcpus_have_one_number_each(era: str) -> None:
    vm = new_vm(Host(era), 8)
    vm.create_vcpu(0)
    with refused(errno.EEXIST):
        vm.create_vcpu(0)
    for number in (1024, -1):
        with refused(errno.EINVAL):
            vm.create_vcpu(number)
    assert list(vm.vm.vcpus) == [0]


@ERAS
def test_running_before_the_launch_and_registers_after_it(era: str) -> None:
    vm = new_vm(Host(era), 8)
    process, fds = vm.host.process, [vm.create_vcpu(0), vm.create_vcpu(1)]
    with refused(errno.EINVAL):
        process.ioctl(fds[0], RUN)
    process.ioctl(fds[1], SET_REGS, bytes(144))
    vm.snp_start()
    vm.snp_finish()
    with refused(errno.EINVAL):
        process.ioctl(fds[1], SET_REGS, bytes(144))


@ERAS
def test_a_vcpu_made_after_the_launch_has_nothing_to_run(era: str) -> None:
    vm = new_vm(Host(era), 8)
    vm.snp_start()
    vm.snp_finish()
    late = vm.create_vcpu(7)
    with refused(errno.EAGAIN):
        vm.host.process.ioctl(late, RUN)
    vm.host.process.ioctl(late, SET_MP_STATE, struct.pack("<I", 0))
    with refused(errno.EINVAL):
        vm.host.process.ioctl(late, RUN)


# Private pages and the ASID.


def test_private_pages_before_the_launch_keep_the_asid_closed() -> None:
    vm = new_vm(Host("rfc-v7"))
    vm.make_private(range(8))
    with refused(errno.EIO, Status.INVALID_CONFIG):
        vm.snp_start()
    vm.make_private(range(8), private=False)
    vm.snp_start()
    vm = new_vm(Host())
    vm.make_private(range(8))
    vm.snp_start()


@ERAS
def test_a_launch_leaves_attributes_beside_it_alone(era: str) -> None:
    vm = new_vm(Host(era))
    vm.snp_start()
    vm.make_private(range(5, 6))
    launch_update(vm, 2, 2)
    assert vm.vm.is_private(range(7)).tolist() == [False, False, True, True, False, True, False]
    assert vm.states(range(2, 4)) == [PageState.GUEST_VALID] * 2


# Calls are traced with their errno.


@ERAS
def test_every_call_leaves_an_event(era: str) -> None:
    host = Host(era)
    log = host.system.record()
    vm = new_vm(host, 8)
    with refused(errno.EINVAL):
        vm.snp_finish()
    with refused(errno.EBADF):
        host.process.close(77)
    slot = "KVM_SET_USER_MEMORY_REGION" if era == "rfc-v7" else "KVM_SET_USER_MEMORY_REGION2"
    calls = [(event.name, event.arguments.get("id"), event.errno) for event in log.of(Ioctl)]
    assert calls[:2] == [
        ("KVM_CREATE_VM", None, 0),
        ("KVM_MEMORY_ENCRYPT_OP", "SNP_INIT" if era == "rfc-v7" else "INIT2", 0),
    ]
    assert calls[-2:] == [(slot, None, 0), ("KVM_MEMORY_ENCRYPT_OP", "SNP_LAUNCH_FINISH", errno.EINVAL)]
    assert [(event.name, event.errno) for event in log.of(SystemCall)][-1] == ("close", errno.EBADF)
    with refused(errno.EINVAL):
        host.process.ioctl(vm.fd, CREATE_VCPU, 1024)
    assert log.of(Ioctl)[-1].arguments == {"argument": 1024}


# The driver's pages.


def test_the_driver_takes_back_what_it_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    before = memory_map(host.system)
    with monkeypatch.context() as patch:
        host.spoil(patch, Command.SNP_PLATFORM_STATUS, Status.HWERROR_PLATFORM)
        with refused(errno.EIO, Status.HWERROR_PLATFORM):
            host.kernel.ccp.platform_status()
    assert memory_map(host.system) == before


def test_the_hypervisor_state_is_rmpupdates_to_give() -> None:
    """Nothing but RMPUPDATE frees a page: the driver's own way back from Reclaim."""
    host = Host()
    kernel, rmp = host.kernel, host.system.machine.rmp
    pages = kernel.ccp.donate(2)
    assert rmp.states(pages).tolist() == [PageState.FIRMWARE] * 2
    assert kernel.cpu.rmpupdate(pages, np.zeros(2, np.uint64), HYPERVISOR).all()
    assert kernel.cpu.rmpupdate(pages, np.zeros(2, np.uint64), NewState(assigned=True, asid=1)).all()
    kernel.ccp.take_back(pages)
    assert rmp.states(pages).tolist() == [PageState.HYPERVISOR] * 2


def test_slots_show_the_processs_memory() -> None:
    """What the process stores, KVM reads at the guest address, and the other way round."""
    vm = new_vm(Host())
    vm.host.process.store(shared_of(vm) + 0x1FFE, b"four")
    assert vm.vm.read(0x1FFE, 4) == b"four"
    vm.vm.write(0x2FFF, b"ab")
    assert vm.host.process.load(shared_of(vm) + 0x2FFF, 2) == b"ab"
    with refused(errno.EFAULT):
        vm.vm.read(PAGES * PAGE - 1, 2)
