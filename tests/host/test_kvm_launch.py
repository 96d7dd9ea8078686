"""The launch through KVM: out of order, refused and undone, one shot at its end."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.rmp import IMMUTABLE
from snpbook.spec.status import Status
from snpbook.spec.vmsa import reset_vmsa
from tests.host.vms import PRIVATE, RAM, SHARED, new_vm, refused, spoil, states, with_vcpu
from tests.machines import PAGE, booted, frame_of, launched


def test_launch_calls_out_of_order() -> None:
    vm = new_vm()
    with refused(errno.EINVAL):
        vm.snp_launch_update(0, PAGE, LaunchPage.NORMAL)
    with refused(errno.EINVAL):
        vm.snp_launch_finish()
    vm.snp_launch_start(DEFAULT_POLICY)
    with refused(errno.EINVAL):
        vm.snp_launch_start(DEFAULT_POLICY)


@pytest.mark.parametrize(
    ("gpa", "size"), [(0, 100), (5, PAGE), (0, -PAGE), (RAM, PAGE), (RAM - PAGE, 2 * PAGE), (1 << 40, PAGE)]
)
def test_launch_update_ranges(gpa: int, size: int) -> None:
    system = booted()
    vm = new_vm(system)
    vm.snp_launch_start(DEFAULT_POLICY)
    allocated = system.host.memory.allocated
    with refused(errno.EINVAL):
        vm.snp_launch_update(gpa, size, LaunchPage.NORMAL)
    assert system.host.memory.allocated == allocated


def test_launch_update_of_nothing_does_nothing() -> None:
    vm = new_vm()
    vm.snp_launch_start(DEFAULT_POLICY)
    vm.snp_launch_update(0, 0, LaunchPage.NORMAL)
    assert vm.slots[0].restricted.resident == 0


def test_a_refused_policy_is_undone_and_may_be_mended() -> None:
    system = booted()
    vm = new_vm(system)
    table = system.machine.rmp.load(range(system.machine.rmp.entries)).copy()
    allocated, guests = system.host.memory.allocated, system.processor.guest_count
    with refused(errno.EIO, Status.POLICY_FAILURE):
        vm.snp_launch_start(0)
    assert vm.gctx is None
    assert np.array_equal(system.machine.rmp.load(range(system.machine.rmp.entries)), table)
    assert (system.host.memory.allocated, system.processor.guest_count) == (allocated, guests)
    vm.snp_launch_start(DEFAULT_POLICY)


def test_private_pages_before_the_launch_keep_the_asid_closed() -> None:
    vm = new_vm()
    vm.set_memory_attributes(0, 8 * PAGE, PRIVATE)
    with refused(errno.EIO, Status.INVALID_CONFIG):
        vm.snp_launch_start(DEFAULT_POLICY)
    vm.set_memory_attributes(0, 8 * PAGE, SHARED)
    vm.snp_launch_start(DEFAULT_POLICY)


def test_a_refused_activation_is_undone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    vm = new_vm(system)
    with monkeypatch.context() as patch:
        spoil(patch, system, Command.SNP_ACTIVATE, Status.DF_FLUSH_REQUIRED)
        with refused(errno.EIO, Status.DF_FLUSH_REQUIRED):
            vm.snp_launch_start(DEFAULT_POLICY)
    assert (vm.gctx, system.processor.guest_count) == (None, 0)
    vm.snp_launch_start(DEFAULT_POLICY)


def test_no_context_is_enotty(monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    vm = new_vm(system)
    allocated = system.host.memory.allocated
    with monkeypatch.context() as patch:
        spoil(patch, system, Command.SNP_GCTX_CREATE, Status.INVALID_CONFIG)
        with refused(errno.ENOTTY, Status.INVALID_CONFIG):
            vm.snp_launch_start(DEFAULT_POLICY)
    assert system.host.memory.allocated == allocated
    vm.snp_launch_start(DEFAULT_POLICY)


def test_launched_pages_are_private_and_the_guests() -> None:
    """KVM sets the attribute by itself."""
    system = booted()
    vm = new_vm(system)
    vm.snp_launch_start(DEFAULT_POLICY)
    vm.set_memory_attributes(5 * PAGE, PAGE, PRIVATE)
    vm.snp_launch_update(2 * PAGE, 2 * PAGE, LaunchPage.NORMAL)
    assert vm.is_private(range(7)).tolist() == [False, False, True, True, False, True, False]
    assert states(system, vm.slots[0].restricted.get(range(2, 4))) == {PageState.GUEST_VALID}


def test_an_assigned_page_is_efault_at_once() -> None:
    system = booted()
    vm = new_vm(system)
    vm.snp_launch_start(DEFAULT_POLICY)
    vm.set_memory_attributes(0x2000, PAGE, PRIVATE)
    with refused(errno.EFAULT):
        vm.snp_launch_update(0, 4 * PAGE, LaunchPage.NORMAL)
    assert states(system, vm.slots[0].restricted.get(range(2))) == {PageState.HYPERVISOR}
    assert not vm.is_private(range(2)).any()
    vm.snp_launch_update(0, 2 * PAGE, LaunchPage.NORMAL)
    with refused(errno.EFAULT):
        vm.snp_launch_update(PAGE, PAGE, LaunchPage.NORMAL)


@pytest.mark.parametrize("when", ["first", "middle", "rmpupdate"])
def test_a_failed_launch_update_returns_every_page_of_the_call(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    vm = new_vm(system)
    vm.snp_launch_start(DEFAULT_POLICY)
    frames = vm.slots[0].restricted.get(range(8)).copy()
    gctx = vm.gctx
    assert gctx is not None
    before = system.processor.context(gctx).launch_digest
    table = system.machine.rmp.load(range(system.machine.rmp.entries)).copy()
    if when == "first":
        vm.slots[0].shared.write(3 * PAGE, b"\xff" * PAGE)  # a CPUID page with too many entries
        with refused(errno.EIO, Status.INVALID_PARAM):
            vm.snp_launch_update(3 * PAGE, PAGE, LaunchPage.CPUID)
    elif when == "middle":
        vm.slots[0].shared.write(4 * PAGE, b"\xff" * PAGE)
        with refused(errno.EIO, Status.INVALID_PARAM):
            vm.snp_launch_update(0, 8 * PAGE, LaunchPage.CPUID)
        assert system.processor.context(gctx).launch_digest != before, "four pages were measured: that stays"
    else:
        entry = table[int(frames[5])].copy().reshape(1, 2)
        entry[0, 0] |= np.uint64(IMMUTABLE)
        table[int(frames[5])] = entry
        system.machine.rmp.store(frames[5:6], entry)
        with refused(errno.EFAULT):
            vm.snp_launch_update(0, 8 * PAGE, LaunchPage.NORMAL)
    assert np.array_equal(system.machine.rmp.load(range(system.machine.rmp.entries)), table)
    assert not vm.is_private(range(8)).any()
    vm.slots[0].shared.write(0, bytes(8 * PAGE))
    vm.snp_launch_update(0, 5 * PAGE, LaunchPage.CPUID)


def test_after_finish_the_firmware_refuses_pages() -> None:
    guest = launched()
    with refused(errno.EIO, Status.INVALID_GUEST_STATE):
        guest.vmm.vm.snp_launch_update(0x100000, PAGE, LaunchPage.NORMAL)
    assert states(guest.system, [frame_of(guest.vmm.vm, 0x100000) >> 12]) == {PageState.HYPERVISOR}


def test_finish_needs_registers() -> None:
    vm = new_vm()
    vm.create_vcpu(0)
    vm.snp_launch_start(DEFAULT_POLICY)
    with refused(errno.EINVAL):
        vm.snp_launch_finish()
    with_registers = vm.vcpus[0]
    with_registers.set_registers(reset_vmsa(0xFFFFFFF0, 0, 1))
    vm.snp_launch_finish()
    assert with_registers.encrypted


def test_a_second_finish() -> None:
    """EINVAL because the VMSA is taken; without a vCPU it is the firmware that answers."""
    vm = new_vm()
    vm.snp_launch_start(DEFAULT_POLICY)
    vm.snp_launch_finish()
    with refused(errno.EIO, Status.INVALID_GUEST_STATE):
        vm.snp_launch_finish()
    vm = new_vm()
    with_vcpu(vm)
    vm.snp_launch_start(DEFAULT_POLICY)
    vm.snp_launch_finish()
    with refused(errno.EINVAL):
        vm.snp_launch_finish()


def test_finish_is_one_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    vm = new_vm(system)
    vcpu = with_vcpu(vm)
    vm.snp_launch_start(DEFAULT_POLICY)
    with monkeypatch.context() as patch:
        spoil(patch, system, Command.SNP_LAUNCH_FINISH, Status.POLICY_FAILURE)
        with refused(errno.EIO, Status.POLICY_FAILURE):
            vm.snp_launch_finish()
    assert vcpu.encrypted
    assert not vm.launched
    with refused(errno.EINVAL):
        vm.snp_launch_finish()
    vm.destroy()


def test_a_refused_vmsa_is_reclaimed_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    vm = new_vm(system)
    first, second = with_vcpu(vm), vm.create_vcpu(1)
    second.set_registers(reset_vmsa(0, 0, 1))
    vm.snp_launch_start(DEFAULT_POLICY)
    with monkeypatch.context() as patch:
        spoil(patch, system, Command.SNP_LAUNCH_UPDATE, Status.INVALID_PAGE_STATE, after=1)
        with refused(errno.EIO, Status.INVALID_PAGE_STATE):
            vm.snp_launch_finish()
    assert (first.encrypted, second.encrypted) == (True, False)
    assert states(system, second.vmsa) == {PageState.HYPERVISOR}
    assert states(system, first.vmsa) == {PageState.GUEST_VALID}
    vm.destroy()
