"""What a guest program holds of the machine: its CPU, whose instructions it awaits.

Operands are checked here; what an instruction then does is the core's business, and when it is done the executor's.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from snpbook.hardware import guest_instructions
from snpbook.hardware.dram import Bytes, flag, whole
from snpbook.hardware.exits import GuestException
from snpbook.hardware.operations import (
    REGISTER_SIZE,
    Exchange,
    Execute,
    Invlpg,
    Load,
    Look,
    Operation,
    Read,
    Touch,
    Write,
)
from snpbook.hardware.requests import Requests
from snpbook.hardware.rmp_operations import Pvalidate, Rmpadjust, Rmpquery
from snpbook.spec.cpuid import Registers
from snpbook.spec.opcodes import CallInstruction, Opcode
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE
from snpbook.spec.vmsa import LOADABLE_REGISTERS, VMSA

_LOW = (1 << 32) - 1
VECTORS = 256


class ProgramFailure(Exception):
    """A guest program that gave up: the program has ended, the vCPU is halted, and this is its outcome."""


Program = Callable[["GuestCpu"], Coroutine[Operation, Any, Any]]
Handler = Callable[["GuestCpu", GuestException], Coroutine[Operation, Any, bool | GuestException]]


class GuestCpu:
    """What a guest program can do. Addresses are guest virtual, which are physical before paging.

    Operands that no instruction could have are refused with `ValueError` or `TypeError` where they are given; what
    the machine refuses comes as a `GuestException` out of the `await`, or goes to a handler. #VC is raised for what
    the hypervisor has intercepted.
    """

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}

    def read(self, address: int, size: int) -> Operation:
        """Bytes at a virtual address."""
        return Read(*_range(address, size))

    def touch(self, address: int, count: int) -> Operation:
        """Read the first and the last byte of each of `count` pages, for what that does to caches alone."""
        return Touch(*_pages("a run of touches", address, count, False)[:2])

    def write(self, address: int, data: bytes) -> Operation:
        """Store bytes at a virtual address."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data = {data!r}: bytes")
        data = bytes(data)
        return Write(_range(address, len(data))[0], data)

    def exchange(self, address: int, data: bytes) -> Operation:
        """XCHG: store bytes at a virtual address, up to a register's size; the bytes that were there."""
        if not 0 < len(data) <= REGISTER_SIZE:
            raise ValueError(f"data of {len(data)} bytes: XCHG takes 1 to {REGISTER_SIZE}")
        return Exchange(_range(address, len(data))[0], bytes(data))

    def pvalidate(self, address: int, count: int, *, validate: bool = True, large: bool = False) -> Operation:
        """PVALIDATE `count` pages: (return codes, carry flags), one per page. Before an exception some may be done."""
        return Pvalidate(*_pages("PVALIDATE", address, count, large), flag("validate", validate))

    def rmpadjust(
        self, address: int, count: int, *, vmpl: int, permissions: int, vmsa: bool = False, large: bool = False
    ) -> Operation:
        """RMPADJUST `count` pages: give `vmpl` the `permissions` (`VmplPermission` bits); return codes, one per page.

        `vmsa` marks the pages as VMSAs, or no longer so, where VMPL0 does it.
        """
        run = _pages("RMPADJUST", address, count, large)
        return Rmpadjust(*run, _operand("vmpl", vmpl, 8), _operand("permissions", permissions, 8), flag("vmsa", vmsa))

    def rmpquery(self, address: int, count: int, *, vmpl: int) -> Operation:
        """RMPQUERY `count` pages: (return codes, 2 MB entries, permissions of `vmpl`, VMSA bits), one per page."""
        return Rmpquery(*_pages("RMPQUERY", address, count, False), _operand("vmpl", vmpl, 8))

    def cpuid(self, leaf: int, subleaf: int = 0) -> Operation:
        """CPUID: EAX to EDX as `Registers`."""
        operands = {"rax": _operand("leaf", leaf, 32), "rcx": _operand("subleaf", subleaf, 32)}
        return Execute(guest_instructions.cpuid, operands, result=_four_registers, opcode=Opcode.CPUID.value)

    def rdmsr(self, msr: int) -> Operation:
        return Execute(guest_instructions.rdmsr, {"rcx": _word("msr", msr)}, result=_edx_eax, opcode=Opcode.RDMSR.value)

    def wrmsr(self, msr: int, value: int) -> Operation:
        value = _word("value", value)
        operands = {"rcx": _word("msr", msr), "rax": value & _LOW, "rdx": value >> 32}
        return Execute(guest_instructions.wrmsr, operands, opcode=Opcode.WRMSR.value)

    def port_in(self, port: int, size: int = 1) -> Operation:
        """IN of 1, 2 or 4 bytes."""
        operands = {"rdx": _port(port, size)}
        return Execute(guest_instructions.port_in, operands, (size,), _RAX_OF_SIZE[size], Opcode.of_size("IN", size))

    def port_out(self, port: int, value: int, size: int = 1) -> Operation:
        """OUT of 1, 2 or 4 bytes."""
        operands = {"rdx": _port(port, size), "rax": _operand("value", value, 8 * size)}
        return Execute(guest_instructions.port_out, operands, (size,), opcode=Opcode.of_size("OUT", size))

    def port_string(self, port: int, address: int, count: int, size: int = 1, *, is_in: bool) -> Operation:
        """REP INS or REP OUTS: `count` elements of 1, 2 or 4 bytes from a port to memory, or the other way."""
        operands = {
            "rdx": _port(port, size),
            "rcx": _word("count", count),
            "rdi" if is_in else "rsi": _range(address, count * size)[0],
        }
        code = Opcode.of_size("INS" if is_in else "OUTS", size)
        return Execute(guest_instructions.port_string, operands, (size, is_in), opcode=code)

    def rdtsc(self) -> Operation:
        """The time-stamp counter."""
        return Execute(guest_instructions.rdtsc, result=_edx_eax, opcode=Opcode.RDTSC.value)

    def rdtscp(self) -> Operation:
        """The time-stamp counter and TSC_AUX."""
        return Execute(guest_instructions.rdtscp, result=_edx_eax_and_ecx, opcode=Opcode.RDTSCP.value)

    def rdpmc(self, counter: int) -> Operation:
        """A performance counter."""
        operands = {"rcx": _operand("counter", counter, 32)}
        return Execute(guest_instructions.rdpmc, operands, result=_edx_eax, opcode=Opcode.RDPMC.value)

    def rdrand(self) -> Operation:
        """64 bits of the processor's random source."""
        return Execute(guest_instructions.rdrand, result=_rax)

    def read_dr7(self) -> Operation:
        return Execute(guest_instructions.read_dr7, result=_rax, opcode=Opcode.READ_DR7.value)

    def load(self, **registers: int) -> Operation:
        """Set registers by their VMSA names, such as cr3 or efer: those of `LOADABLE_REGISTERS`."""
        for name, value in registers.items():
            if name not in LOADABLE_REGISTERS:
                raise ValueError(f"{name}: not a register that software loads by its own instructions")
            _word(name, value)
        return Load(registers)

    def invlpg(self, address: int) -> Operation:
        """INVLPG: drop the translations of the page at a virtual address."""
        return Invlpg(_range(address, 0)[0])

    def look(self, *names: str) -> Operation:
        """Registers by their VMSA names, as a tuple of values."""
        for name in names:
            if name not in VMSA.fields:
                raise ValueError(f"{name}: no register of a VMSA")
        return Look(names)

    def vmgexit(self) -> Operation:
        """Leave to the hypervisor with a request in the GHCB or in its MSR; without SEV-ES it is VMMCALL."""
        return Execute(guest_instructions.vmgexit, opcode=CallInstruction.VMGEXIT.value)

    def request(self, address: int, page: bytes, requests: Bytes, done: Bytes) -> Operation:
        """The GHCB at `address` filled with `page` and, in its shared buffer, the first of `requests` (n, size);
        VMGEXIT; and the answer: (how many requests were served, the page as the last of them left it).

        It is more than one where the hypervisor went on to the following ones; the buffers of all but the last then
        began with `done` (n, m).
        """
        if len(page) != PAGE_SIZE or not len(requests) or len(done) != len(requests):
            raise ValueError(
                f"{len(page)} bytes, {len(requests)} requests, {len(done)} outcomes: a page, and one of each"
            )
        return Requests(_range(address, len(page))[0], page, requests, done)

    def vmmcall(self) -> Operation:
        return Execute(guest_instructions.vmmcall, opcode=CallInstruction.VMMCALL.value)

    def sysret(self) -> Operation:
        """SYSRET: go on as a program of the user, at CPL 3."""
        return Execute(guest_instructions.sysret)

    def syscall(self) -> Operation:
        """SYSCALL: go on as the kernel, at CPL 0."""
        return Execute(guest_instructions.syscall)

    def hlt(self) -> Operation:
        return Execute(guest_instructions.hlt, opcode=Opcode.HLT.value)

    def pause(self) -> Operation:
        return Execute(guest_instructions.pause, opcode=Opcode.PAUSE.value)

    def wbinvd(self) -> Operation:
        return Execute(guest_instructions.wbinvd, opcode=Opcode.WBINVD.value)

    def invd(self) -> Operation:
        return Execute(guest_instructions.invd, opcode=Opcode.INVD.value)

    def monitor(self, address: int) -> Operation:
        return Execute(guest_instructions.monitor, {"rax": _word("address", address)}, opcode=Opcode.MONITOR.value)

    def mwait(self) -> Operation:
        return Execute(guest_instructions.mwait, opcode=Opcode.MWAIT.value)

    def set_handler(self, vector: int, handler: Handler | None) -> None:
        """Install the handler of an exception vector, or None to have the exception raised out of the await again.

        It runs on top of what was interrupted. Where it returns True it has done the instruction, with the results
        in the registers; where it returns an exception, the instruction raises that one; else the operation goes on
        with the same instruction. After an injected event the operation goes on in either case.
        """
        if not 0 <= whole("vector", vector) < VECTORS:
            raise ValueError(f"vector = {vector}: 0 to {VECTORS - 1}")
        self.handlers.pop(vector, None)
        if handler is not None:
            self.handlers[vector] = handler


def _four_registers(registers: Mapping[str, int]) -> Registers:
    return Registers(*(registers[name] & _LOW for name in ("rax", "rbx", "rcx", "rdx")))


def _edx_eax(registers: Mapping[str, int]) -> int:
    return (registers["rdx"] & _LOW) << 32 | registers["rax"] & _LOW


def _edx_eax_and_ecx(registers: Mapping[str, int]) -> tuple[int, int]:
    return _edx_eax(registers), registers["rcx"] & _LOW


def _rax(registers: Mapping[str, int]) -> int:
    return registers["rax"]


def _al(registers: Mapping[str, int]) -> int:
    return registers["rax"] % (1 << 8)


def _ax(registers: Mapping[str, int]) -> int:
    return registers["rax"] % (1 << 16)


def _eax(registers: Mapping[str, int]) -> int:
    return registers["rax"] & _LOW


_RAX_OF_SIZE = {1: _al, 2: _ax, 4: _eax}


def _port(port: int, size: int) -> int:
    if whole("size", size) not in _RAX_OF_SIZE or not 0 <= whole("port", port) <= (1 << 16) - size:
        raise ValueError(f"port = {port:#x}, size = {size}: 16 bits, and 1, 2 or 4 bytes")
    return port


def _word(name: str, value: int) -> int:
    if not 0 <= whole(name, value) < 2**64:
        raise ValueError(f"{name} = {value:#x}: a register holds 64 bits")
    return value


def _operand(name: str, value: int, bits: int) -> int:
    if not 0 <= whole(name, value) < 1 << bits:
        raise ValueError(f"{name} = {value:#x}: the operand holds {bits} bits")
    return value


def _pages(name: str, address: int, count: int, large: bool) -> tuple[int, int, bool]:
    """The operands of an RMP instruction on a run of pages."""
    if whole("count", count) < 0:
        raise ValueError(f"count = {count}: pages from the first on")
    address, _ = _range(address, count * (LARGE_PAGE_SIZE if flag("large", large) else PAGE_SIZE))
    if address % PAGE_SIZE:
        raise ValueError(f"address = {address:#x}: {name} takes a page, a multiple of {PAGE_SIZE:#x}")
    return address, count, large


def _range(address: int, size: int) -> tuple[int, int]:
    address, size = whole("address", address), whole("size", size)
    if address < 0 or size < 0 or address + size > 2**64:
        raise ValueError(f"address = {address:#x}, size = {size:#x}: outside the 64-bit address space")
    return address, size
