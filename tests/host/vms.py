"""SNP guests by system calls in each era: one with a private slot, and everything that a host remembers."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.system import System
from tests.host.sev_hosts import DEFAULT, PAGE, SNP, Handle, Host

PAGES = 512
SNP_INIT = 22
"""Of the v7 series; Linux gave the number to INIT2."""
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])


def snp_vm(host: Host) -> Handle:
    """An initialised SNP guest without memory."""
    if host.kernel.era.name == "rfc-v7":
        vm = host.vm(DEFAULT)
        vm.op(SNP_INIT, bytes(8))
    else:
        vm = host.vm(SNP)
        vm.init2()
    return vm


def new_vm(host: Host, pages: int = PAGES) -> Handle:
    """One with a private slot of number 0 at guest address 0."""
    vm = snp_vm(host)
    vm.add_private_memory(pages)
    return vm


def shared_of(vm: Handle) -> int:
    """The process's address of the shared side of slot 0."""
    slot = vm.vm.slots.get(0)
    assert slot is not None
    return slot.user * PAGE


def launch_update(vm: Handle, gfn: int, pages: int, kind: int = 1) -> None:
    """SNP_LAUNCH_UPDATE of pages of slot 0 from their shared side, made private first where the era wants that."""
    address = shared_of(vm) + gfn * PAGE
    if vm.host.kernel.era.name == "rfc-v7":
        vm.snp_update_v7(address, pages * PAGE, kind)
        return
    vm.make_private(range(gfn, gfn + pages))
    assert vm.snp_update(gfn, address, pages * PAGE, kind)[2] == 0


def memory_map(system: System) -> tuple[Any, ...]:
    """The whole RMP, counters included; the allocator's list; how many pages are out, and how many pinned."""
    machine, memory = system.machine, system.host.memory
    table = machine.dram.read(machine.map.rmp.base, machine.map.rmp.end + 1 - machine.map.rmp.base)
    return table, list(memory._free), memory.allocated, memory.pinned
