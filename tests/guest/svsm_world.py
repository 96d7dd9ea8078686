"""A guest at VMPL2 above the sample SVSM, shared by tests, and calls by registers typed again from the documents."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import numpy as np

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.snapshot import Snapshot
from snpbook.host.kvm.vm import Vm
from snpbook.spec.vmcb import VMCB
from snpbook.system import Guest
from tests.machines import PAGE, booted, frame_of, launched

GHCB_MSR = 0xC0010130
AREA = 0x81F000
"""The calling area that the guest's kernel has chosen."""
BUFFER = AREA + 8
TABLES, SECRETS, CPUID, STATE, FIRST_VMSA = 0xFEF00000, 0xFEF10000, 0xFEF11000, 0xFEF12000, 0xFEF14000
"""The SVSM's own pages."""
CODE = 0xFFFE8000
"""Its image."""
OK, UNSUPPORTED_PROTOCOL, UNSUPPORTED_CALL, ADDRESS, PARAMETER, REQUEST, BUSY = (
    0, 0x80000001, 0x80000002, 0x80000003, 0x80000005, 0x80000006, 0x80000007,
)  # fmt: skip
SIZE_MISMATCH, UNCHANGED = 0x80001006, 0x80001010
CORE, ATTEST, VTPM = 0, 1, 2
REMAP, PVALIDATE, CREATE, DELETE = range(4)
VALIDATE, IGNORE = 4, 8
SPARE = 0x300
"""The first of the guest's pages that tests use."""
Registers = tuple[int, int, int, int]


@cache
def _booted(product: str, vcpus: int) -> tuple[Guest, Snapshot]:
    guest = launched(booted(product, era="svsm-host"), memory="12 MiB", vcpus=vcpus, svsm=True)
    guest.boot()
    return guest, guest.system.snapshot()


def fresh(product: str = "milan", vcpus: int = 2) -> Guest:
    """A guest that has booted and done nothing since."""
    guest, snapshot = _booted(product, vcpus)
    snapshot.restore()
    return guest


async def call(
    cpu: GuestCpu, protocol: int, number: int, rcx: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0, *, area: int = AREA
) -> Registers:
    """One call: RAX, RCX, RDX and R8 as the SVSM leaves them. It must have taken the call."""
    await cpu.write(area, b"\1")
    found = await enter(cpu, protocol << 32 | number, rcx, rdx, r8, r9)
    assert await cpu.read(area, 1) == b"\0", "the SVSM has not taken the call"
    return found


async def enter(cpu: GuestCpu, rax: int, rcx: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0) -> Registers:
    """Have VMPL0 run with these registers: what they are afterwards."""
    await cpu.wrmsr(GHCB_MSR, 0x016)
    await cpu.load(rax=rax, rcx=rcx, rdx=rdx, r8=r8, r9=r9)
    await cpu.vmgexit()
    found: Registers = await cpu.look("rax", "rcx", "rdx", "r8")
    return found


def calls(guest: Guest, *requests: tuple[int, ...]) -> list[int]:
    """Several calls (protocol, number, registers): their codes."""

    async def program(cpu: GuestCpu) -> list[int]:
        return [(await call(cpu, *request))[0] for request in requests]

    codes: list[int] = guest.run(program)
    return codes


async def pvalidate(
    cpu: GuestCpu, *entries: int, next_: int = 0, at: int = BUFFER, area: int = AREA
) -> tuple[int, int]:
    """PVALIDATE of a list: the code, and `next` afterwards."""
    await cpu.write(at, struct.pack("<HHI", len(entries), next_, 0) + struct.pack(f"<{len(entries)}Q", *entries))
    code, *_ = await call(cpu, CORE, PVALIDATE, at, area=area)
    told = struct.unpack("<HH", await cpu.read(at, 4))
    assert told[0] == len(entries)
    return code, told[1]


def run(guest: Guest, body: Callable[[GuestCpu], Awaitable[Any]], vcpu: int = 0) -> Any:
    """A program of the guest's, by which everything else is imported."""

    async def program(cpu: GuestCpu) -> Any:
        return await body(cpu)

    return guest.run(program, vcpu)


def give_page(vm: Vm, frame: int, gfn: int) -> None:
    """What a hostile host can do: a page that the guest has somewhere goes to another of its addresses."""
    state = NewState(assigned=True, asid=vm.asid)
    codes = vm.kernel.cpu.rmpupdate(range(frame, frame + 1), np.array([gfn], np.uint64), state)
    assert not codes.any()
    vm.mmu.tables.map(gfn, np.array([frame], np.uint64))


def frame(guest: Guest, gpa: int) -> int:
    return frame_of(guest.vmm.vm, gpa) >> 12


def rights(guest: Guest, gpa: int) -> tuple[list[int], bool, bool]:
    """By the RMP: the permissions of VMPL 0 to 3, whether the page is a save area, whether it is validated."""
    _, high = (int(word) for word in guest.system.machine.rmp.peek(range(frame(guest, gpa), frame(guest, gpa) + 1))[0])
    entry = guest.system.machine.rmp.entry(frame(guest, gpa))
    return [high >> 8 * vmpl & 0xFF for vmpl in range(4)], bool(entry.vmsa), bool(entry.validated)


def ended(guest: Guest, vcpu: int = 0) -> tuple[int, int]:
    """Reason set and reason of a termination request."""
    value = VMCB.unpack(guest.system.machine.dram.read(guest.vmm.vcpus[vcpu].vmcb, PAGE)).ghcb_gpa
    assert value & 0xFFF == 0x100, hex(value)
    return value >> 12 & 0xF, value >> 16 & 0xFF
