"""The end of a VM, at any stage and out of memory: every page and every RMP entry is as it was after boot."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from snpbook.host.kvm import Vm
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.status import Status
from snpbook.system import System
from tests.host.vms import PRIVATE, memory_map, new_vm, refused, spoil
from tests.machines import MIB, PAGE, booted, launched

STAGES: dict[str, Callable[[System], Vm]] = {
    "created": lambda system: system.create_vm(vcpus=3).vmm.vm,
    "launched": lambda system: launched(system, vcpus=3).vmm.vm,
    "booted": lambda system: (guest := launched(system), guest.boot())[0].vmm.vm,
    "reported": lambda system: (guest := launched(system), guest.request_report(b""))[0].vmm.vm,
}


@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_destroy_gives_everything_back(stage: str, name: str) -> None:
    """The whole table, counters included, and the allocator's list are those of the fresh boot."""
    system = booted(name)
    before = memory_map(system)
    STAGES[stage](system).destroy()
    assert memory_map(system) == before


def test_destroy_after_a_failed_launch() -> None:
    system = booted()
    before = memory_map(system)
    vm = new_vm(system)
    vm.snp_launch_start(DEFAULT_POLICY)
    vm.set_memory_attributes(0, 8 * PAGE, PRIVATE)
    vm.slots[0].shared.write(20 * PAGE, b"\xff" * PAGE)
    with refused(errno.EIO, Status.INVALID_PARAM):
        vm.snp_launch_update(20 * PAGE, PAGE, LaunchPage.CPUID)
    vm.destroy()
    assert memory_map(system) == before


def test_ten_guests_one_after_the_other_cost_nothing() -> None:
    system = booted()
    before = memory_map(system)
    for _ in range(10):
        guest = launched(system, memory="16 MiB")
        guest.boot()
        guest.vmm.vm.destroy()
    assert memory_map(system) == before
    assert system.processor.guest_count == 0


def test_asids_are_used_again_only_after_a_flush() -> None:
    system = booted()
    kvm = system.host.kvm
    vms = [kvm.create_vm() for _ in range(99)]
    assert [vm.asid for vm in vms] == list(range(1, 100))
    for _ in range(2):
        with refused(errno.EBUSY):
            kvm.create_vm()
    allocated = system.host.memory.allocated
    with refused(errno.EBUSY):
        kvm.create_vm()
    assert system.host.memory.allocated == allocated
    vms[41].destroy()
    vms[17].destroy()
    log = system.record()
    assert kvm.create_vm().asid == 18
    assert [event.name for event in log.of(type(log.events[0])) if event.name] == ["SNP_DF_FLUSH"]
    assert kvm.create_vm().asid == 42, "one flush served both"
    with refused(errno.EBUSY):
        kvm.create_vm()


def test_an_asid_is_dirty_until_the_flush_and_then_runs_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    system = booted()
    kvm = system.host.kvm
    first = launched(system)
    first.boot()
    others = [kvm.create_vm() for _ in range(98)]
    first.vmm.vm.destroy()
    with monkeypatch.context() as patch:
        spoil(patch, system, Command.SNP_DF_FLUSH, Status.WBINVD_REQUIRED)
        with refused(errno.EBUSY):
            kvm.create_vm()
    second = launched(system)
    assert second.vmm.vm.asid == 1
    assert len(second.request_report(b"again")) == 1184
    assert len(others) == 98


# Out of memory.


def test_too_little_memory_for_the_image_leaves_nothing_behind() -> None:
    system = booted(installed=64 * MIB)
    before = memory_map(system)
    blocked = system.host.memory.take(system.host.memory.free - 10)
    with refused(errno.ENOMEM):
        system.create_vm()
    for page in blocked:
        system.host.memory.release(range(int(page), int(page) + 1))
    assert memory_map(system) == before


@pytest.mark.parametrize(
    ("left", "number"), [(1, errno.ENOTTY), (10, errno.ENOMEM), (40, errno.ENOMEM), (70, errno.ENOMEM)]
)
def test_out_of_memory_in_the_middle_of_a_launch(left: int, number: int) -> None:
    """No page for the context is ENOTTY, as KVM has it for whatever its making fails of."""
    system = booted(installed=64 * MIB)
    before = memory_map(system)
    guest = system.create_vm(vcpus=2)
    blocked = system.host.memory.take(system.host.memory.free - left)
    with refused(number):
        guest.launch()
    guest.vmm.vm.destroy()
    for page in blocked:
        system.host.memory.release(range(int(page), int(page) + 1))
    assert memory_map(system) == before


def test_out_of_memory_in_the_running_guest() -> None:
    system = booted(installed=64 * MIB)
    before = memory_map(system)
    guest = launched(system, memory="64 MiB")
    with refused(errno.ENOMEM):
        guest.boot()
    guest.vmm.vm.destroy()
    assert memory_map(system) == before
