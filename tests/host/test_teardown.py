"""The end of a VM, at any stage and out of memory: every page and every RMP entry is as it was after boot."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import permutations

import pytest

from snpbook.host.refusal import KernelError
from snpbook.spec.pages import LaunchPage
from snpbook.spec.status import Status
from snpbook.system import Guest, System
from tests.host.sev_hosts import PAGE, Host, refused
from tests.host.vms import ERAS, launch_update, memory_map, new_vm, shared_of
from tests.machines import MIB, booted, launched


def _booted(system: System) -> Guest:
    guest = launched(system, memory="12 MiB", vcpus=3)
    guest.boot()
    return guest


def _reported(system: System) -> Guest:
    guest = launched(system, memory="12 MiB")
    guest.request_report(b"")
    return guest


STAGES: dict[str, Callable[[System], Guest]] = {
    "created": lambda system: system.create_vm(vcpus=3),
    "launched": lambda system: launched(system, vcpus=3),
    "booted": _booted,
    "reported": _reported,
}


@ERAS
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_the_end_of_its_process_gives_everything_back(stage: str, name: str, era: str) -> None:
    """The whole table, counters included, and the allocator's list are those of the fresh boot."""
    system = booted(name, era=era)
    before = memory_map(system)
    STAGES[stage](system).vmm.close()
    assert memory_map(system) == before
    assert system.processor.guest_count == 0


@ERAS
def test_a_vm_lives_as_long_as_anything_that_refers_to_it(era: str) -> None:
    """VM, vCPU and (in Linux 6.12) guest_memfd: in any order the last to be closed ends it."""
    host = Host(era)
    before = memory_map(host.system)
    for order in permutations(range(3)):
        vm = new_vm(host, 8)
        private = next(
            fd for fd, file in host.process._files.items() if getattr(vm.private, "file", vm.private) is file
        )
        vm.create_vcpu(0)
        vm.snp_start()
        vm.make_private(range(4))
        launch_update(vm, 4, 2)
        vm.snp_finish()
        address, kvm = shared_of(vm), vm.vm
        fds = [vm.fd, vm.vcpus[0], private]
        for step in order:
            assert host.kernel.kvm.vms == [kvm] or (era == "rfc-v7" and step == 2)
            host.process.close(fds[step])
        assert not host.kernel.kvm.vms
        host.process.munmap(address, 8 * PAGE)
        assert memory_map(host.system) == before


@ERAS
def test_after_a_failed_launch(era: str) -> None:
    host = Host(era)
    before = memory_map(host.system)
    vm = new_vm(host, 32)
    vm.snp_start()
    vm.make_private(range(8))
    address = shared_of(vm)
    host.process.store(address + 20 * PAGE, b"\xff" * PAGE)  # a CPUID page with too many entries
    with refused(errno.EIO, Status.INVALID_PARAM):
        launch_update(vm, 20, 1, LaunchPage.CPUID)
    for fd in [fd for fd in host.process._files if fd not in (host.sev_fd, host.kvm_fd)]:
        host.process.close(fd)
    host.process.munmap(address, 32 * PAGE)
    assert memory_map(host.system) == before


@ERAS
def test_ten_guests_one_after_the_other_cost_nothing(era: str) -> None:
    system = booted(era=era)
    before = memory_map(system)
    for _ in range(10):
        guest = launched(system, memory="12 MiB")
        guest.boot()
        guest.vmm.close()
    assert memory_map(system) == before
    assert system.processor.guest_count == 0


# Out of memory.


def give_back(system: System, blocked: list[int]) -> None:
    for page in blocked:
        system.host.memory.release(range(page, page + 1))


@ERAS
def test_too_little_memory_for_the_image_leaves_nothing_behind(era: str) -> None:
    system = booted(installed=64 * MIB, era=era)
    before = memory_map(system)
    blocked = system.host.memory.take(system.host.memory.free - 10).tolist()
    with refused(errno.ENOMEM):
        system.create_vm()
    give_back(system, blocked)
    assert memory_map(system) == before


@ERAS
@pytest.mark.parametrize("left", [0, 1, 10, 40])
def test_out_of_memory_in_the_middle_of_a_launch(era: str, left: int) -> None:
    """ENOTTY for no context; Linux has EIO for a first page that gets no memory."""
    system = booted(installed=64 * MIB, era=era)
    before = memory_map(system)
    guest = system.create_vm(vcpus=2)
    blocked = system.host.memory.take(system.host.memory.free - left).tolist()
    with pytest.raises(KernelError) as failure:
        guest.launch()
    assert failure.value.errno in (errno.ENOMEM, errno.ENOTTY, errno.EIO)
    assert failure.value.firmware is None
    guest.vmm.close()
    give_back(system, blocked)
    assert memory_map(system) == before


@ERAS
def test_out_of_memory_in_the_running_guest(era: str) -> None:
    system = booted(installed=64 * MIB, era=era)
    before = memory_map(system)
    guest = launched(system, memory="64 MiB")
    with refused(errno.ENOMEM):
        guest.boot()
    guest.vmm.close()
    assert memory_map(system) == before
