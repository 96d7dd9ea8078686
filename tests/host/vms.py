"""VMs at the level of system calls: one with a slot, how a call is refused, a firmware that can be spoilt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from snpbook.host.kvm import Vcpu, Vm
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.kvm import MemoryAttribute
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.spec.vmsa import reset_vmsa
from snpbook.system import System
from tests.machines import MIB, booted

RAM = 2 * MIB
PRIVATE, SHARED = MemoryAttribute.PRIVATE, MemoryAttribute(0)


def new_vm(system: System | None = None, size: int = RAM) -> Vm:
    """A VM with one private slot at 0."""
    kvm = (system or booted()).host.kvm
    vm = kvm.create_vm()
    vm.set_memory_region(0, 0, kvm.user_memory(size), kvm.restricted_file(size))
    return vm


@contextmanager
def refused(number: int, firmware: Status | None = None) -> Iterator[None]:
    with pytest.raises(KernelError) as caught:
        yield
    assert isinstance(caught.value, OSError)
    assert (caught.value.errno, caught.value.firmware) == (number, firmware)


def states(system: System, frames: Any) -> set[int]:
    return {int(system.machine.rmp.states(range(int(f), int(f) + 1))[0]) for f in frames}


def with_vcpu(vm: Vm) -> Vcpu:
    vcpu = vm.create_vcpu(0)
    vcpu.set_registers(reset_vmsa(0xFFFFFFF0, 0xA00F11, 1))
    return vcpu


def spoil(monkeypatch: pytest.MonkeyPatch, system: System, command: Command, status: Status, after: int = 0) -> None:
    """Let the firmware answer `status` to a command, from its call number `after` on."""
    processor, calls = system.processor, 0
    handlers = dict(processor._commands)
    layout, handler, run_handler = handlers[command]

    def failing(psp: Any, buffer: Any, *pages: range) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise FirmwareRefusal(status, "spoilt")
        return run_handler(psp, buffer, *pages) if pages and run_handler else handler(psp, buffer)

    handlers[command] = (layout, failing, failing)
    monkeypatch.setattr(processor, "_commands", handlers)


def memory_map(system: System) -> tuple[Any, ...]:
    machine = system.machine
    table = machine.dram.read(machine.map.rmp.base, machine.map.rmp.end + 1 - machine.map.rmp.base)
    return table, list(system.host.memory._free), system.host.memory.allocated
