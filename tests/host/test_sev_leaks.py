"""A launch without memory, or that the firmware refuses, at every step: nothing is lost but what a list names."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from snpbook.host.refusal import KernelError
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.host.sev_hosts import DEFAULT, PAGE, SEV_ES, SNP, Handle, Host
from tests.host.test_sev_legacy import FINISH, MEASURE, SNP_OFF, UPDATE_VMSA, blob, start, update

PAGES = 4


def snp(host: Host, vm: Handle) -> None:
    """A whole launch of an SNP guest."""
    vm.init2()
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    shared, _ = vm.add_private_memory(PAGES)
    vm.make_private(range(PAGES))
    vm.snp_start()
    vm.snp_update(0, shared, PAGES * PAGE)
    vm.snp_finish()


def series(host: Host, vm: Handle) -> None:
    """The same in the v7 series."""
    vm.op(22, bytes(8))
    vm.create_vcpu(0)
    shared, _ = vm.add_private_memory(PAGES)
    vm.snp_start()
    vm.snp_update_v7(shared, PAGES * PAGE)
    vm.snp_finish()


def sev_es(host: Host, vm: Handle) -> None:
    """A whole launch of a SEV-ES guest."""
    vm.init2()
    vm.create_vcpu(0)
    memory = host.process.mmap(PAGES * PAGE)
    start(vm, 4)
    update(vm, memory, PAGES * PAGE)
    vm.op(UPDATE_VMSA)
    blob(vm, MEASURE, host.put(bytes(48)), 48)
    vm.op(FINISH)


LAUNCHES: dict[str, tuple[dict[str, Any], int, Callable[[Host, Handle], None]]] = {
    "snp": ({}, SNP, snp),
    "series": ({"era": "rfc-v7"}, DEFAULT, series),
    "sev-es": (SNP_OFF, SEV_ES, sev_es),
}
"""With SNP up a legacy command that fails half-way keeps a command buffer for ever: the driver's tests have that."""


class Attempts:
    """Launches on one host, of which each must leave the host as it found it."""

    def __init__(self, name: str) -> None:
        options, self.kind, self.launch = LAUNCHES[name]
        self.host = Host(**options)
        self.attempt()
        self.free = self.host.free

    def attempt(self) -> KernelError | None:
        """A launch and its end, to whatever it comes: what it failed with."""
        host, failure = self.host, None
        before = set(host.process._files)
        try:
            vm = host.vm(self.kind)
            self.launch(host, vm)
        except KernelError as error:
            failure = error
        for fd in sorted(set(host.process._files) - before):
            host.process.close(fd)
        for mapping in list(host.process.space._mappings):
            if host.scratch >> 12 not in mapping.pages:
                host.process.munmap(mapping.pages.start << 12, len(mapping.pages) << 12)
        return failure

    def check(self) -> int:
        """Free pages are the hypervisor's, the others are named: how many are lost."""
        host = self.host
        leaks = host.kernel.ccp.leaks
        lost = {page for run in (*leaks.listed, *leaks.forgotten) for page in run}
        assert host.kernel.memory.pinned == len(lost)
        assert host.free == self.free - len(lost)
        rmp = host.system.machine.rmp
        for run in host.kernel.memory._free:
            if host.kernel.ccp.snp_initialised:
                assert (rmp.states(run) == PageState.HYPERVISOR).all(), run
            assert not lost & set(run)
        assert not host.kernel.kvm.vms
        return len(lost)


@pytest.mark.parametrize("name", LAUNCHES)
def test_memory_that_ends_at_any_point(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(name)
    memory, left = attempts.host.kernel.memory, 0
    real = memory.allocate

    def failing(count: int, align: int = 1) -> range:
        nonlocal left
        left -= 1
        if left < 0:
            raise KernelError(errno.ENOMEM, "free host memory", count, 0)
        return real(count, align)

    monkeypatch.setattr(memory, "allocate", failing)
    causes = []
    for room in range(200):
        left = room
        failure = attempts.attempt()
        assert attempts.check() == 0
        if failure is None:
            break
        causes.append(failure.errno)
    assert failure is None
    assert len(causes) >= 6
    assert set(causes) <= {errno.ENOMEM, errno.ENOTTY, errno.EIO, errno.EFAULT}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_firmware_that_refuses_at_any_point(name: str) -> None:
    """Each command of a launch and its end is refused once."""
    attempts = Attempts(name)
    processor, at = attempts.host.system.processor, 0
    real, real_run = processor.execute, processor.execute_run
    lost = 0

    def execute(command: int, address: int) -> int:
        nonlocal at
        at -= 1
        return int(Status.HWERROR_PLATFORM) if at == -1 else real(command, address)

    def execute_run(command: int, address: int, pages: range) -> tuple[int, int]:
        nonlocal at
        at -= 1
        return (0, int(Status.HWERROR_PLATFORM)) if at == -1 else real_run(command, address, pages)

    for name_of, replacement in (("execute", execute), ("execute_run", execute_run)):
        setattr(processor, name_of, replacement)
    refused: list[Any] = []
    for step in range(60):
        at = step
        failure = attempts.attempt()
        lost = attempts.check()
        if at >= 0:
            break
        refused.append(failure and failure.firmware)
    assert at >= 0, "all commands were refused once"
    assert Status.HWERROR_PLATFORM in refused
    assert len(refused) >= 8
    assert lost <= 12, "what the firmware did not give back"
