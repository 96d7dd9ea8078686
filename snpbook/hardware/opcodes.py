"""The RMP instructions on raw registers, for whoever runs machine code: RAX, RCX and RDX in, results and flags out.

The rules are those of `HostCpu` and of `core_rmp`; here operands are taken apart and results put together. Bits 11:0 of
addresses and reserved operand bits are ignored (MODEL). Sources: APM2 15.36.3 to 15.36.9; opcodes in `spec.opcodes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.hardware.core import GuestCore
from snpbook.hardware.core_rmp import adjust_rights, privilege_fault, query_rights, validate_pages
from snpbook.hardware.dram import whole
from snpbook.hardware.exits import GeneralProtection, GuestException, InvalidOpcode
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.walker import Fault
from snpbook.spec.layout import Record
from snpbook.spec.opcodes import RIGHTS_OPERAND, RFlag, RmpInstruction
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, PageSize
from snpbook.spec.rmp import ASID_LIMIT, GFN_LIMIT, GFN_SHIFT, RMPUPDATE_STATE, RmpCode
from snpbook.spec.vmcb import Vector
from snpbook.spec.vmsa import CS_LONG, EFER_LMA

_WORD, _HALF_WORD = 2**64 - 1, 2**32 - 1
_NO_FLAG = RFlag(0)


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers after an instruction; `flags` holds those of its flags (`RmpInstruction.flags`) that are set."""

    rax: int
    rcx: int
    rdx: int
    flags: RFlag


def execute_host(cpu: HostCpu, instruction: RmpInstruction, rax: int, rcx: int, rdx: int) -> Registers:
    """Execute an instruction on the host, in 64-bit mode at CPL 0; host virtual addresses are physical ones (MODEL).

    RMPUPDATE reads its operand at RCX; what an RMP entry cannot hold is FAIL_INPUT (MODEL). RMPREAD stores its result
    there, after a success alone (MODEL). Raises `InvalidOpcode`; `HostPageFault` where the result may not be stored;
    `GeneralProtection` where RCX leads out of memory (MODEL). `ValueError` where a register has no 64 bits.
    """
    _check(rax=rax, rcx=rcx, rdx=rdx)
    cpu.require(instruction.name)
    pages = range(rax >> PAGE_SHIFT, (rax >> PAGE_SHIFT) + 1)
    match instruction:
        case RmpInstruction.RMPUPDATE:
            _check_memory(cpu, instruction, rcx)
            state = RMPUPDATE_STATE.unpack(cpu.read(rcx, RMPUPDATE_STATE.size))
            gfn = state.gpa >> GFN_SHIFT
            if gfn >= GFN_LIMIT or state.asid >= ASID_LIMIT:
                return _answer(RmpCode.FAIL_INPUT, rcx, rdx)
            new = NewState(bool(state.assigned), state.asid, bool(state.immutable), state.page_size == PageSize.SIZE_2M)
            return _answer(cpu.rmpupdate(pages, range(gfn, gfn + 1), new)[0], rcx, rdx)
        case RmpInstruction.PSMASH:
            return _answer(cpu.psmash(pages)[0], rcx, rdx)
        case RmpInstruction.RMPREAD:
            _check_memory(cpu, instruction, rcx)
            codes, result = cpu.rmpread(pages)
            if codes[0] == RmpCode.SUCCESS:
                cpu.write(rcx, result[0])
            return _answer(codes[0], rcx, rdx)
    raise InvalidOpcode(f"{instruction.name} is an SNP guest's instruction", "guest mode", "the host", "APM2 15.36.6")


def execute_guest(core: GuestCore, instruction: RmpInstruction, rax: int, rcx: int, rdx: int) -> Registers | Fault:
    """Execute an instruction in a guest: the registers after it, or the fault that came instead.

    Outside 64-bit mode PVALIDATE takes EAX, ECX and EDX, and the others do not exist (from memory). The host's
    instructions answer FAIL_PERMISSION, PSMASH of an odd address FAIL_INPUT. RMPQUERY leaves RCX and RDX as they are
    where it fails (MODEL).
    """
    _check(rax=rax, rcx=rcx, rdx=rdx)
    long = core.registers["efer"] & EFER_LMA and core.registers["cs"].attrib & CS_LONG
    if not long and not instruction.any_mode:
        return GuestException(Vector.UD, 0, 0)
    address = (rax if long else rax & _HALF_WORD) & ~(PAGE_SIZE - 1)
    match instruction:
        case RmpInstruction.PVALIDATE:
            return _pvalidate(core, address, rcx, rdx)
        case RmpInstruction.RMPADJUST:
            return _rmpadjust(core, address, rcx, rdx)
        case RmpInstruction.RMPQUERY:
            return _rmpquery(core, address, rcx, rdx)
    return _host_instruction(core, instruction, address, rcx, rdx)


def _pvalidate(core: GuestCore, address: int, rcx: int, rdx: int) -> Registers | Fault:
    done, fault = validate_pages(core, address, 1, bool(rdx & 1), bool(rcx & 1))
    if fault is not None:
        return fault
    return _answer(done[0].codes[0], rcx, rdx, RFlag.CARRY if done[0].unchanged[0] else _NO_FLAG)


def _rmpadjust(core: GuestCore, address: int, rcx: int, rdx: int) -> Registers | Fault:
    rights = _rights(rdx)
    done, fault = adjust_rights(core, address, 1, rights.vmpl, rights.permissions, bool(rights.vmsa), bool(rcx & 1))
    return _answer(done[0].codes[0], rcx, rdx) if fault is None else fault


def _rmpquery(core: GuestCore, address: int, rcx: int, rdx: int) -> Registers | Fault:
    target = _rights(rdx).vmpl
    done, fault = query_rights(core, address, 1, target)
    if fault is not None:
        return fault
    found = done[0]
    if found.codes[0] == RmpCode.SUCCESS:
        held = RIGHTS_OPERAND.pack(vmpl=target, permissions=found.permissions[0], vmsa=int(found.vmsa[0]))
        rcx, rdx = int(found.large[0]), int.from_bytes(held, "little")
    return _answer(found.codes[0], rcx, rdx)


def _rights(rdx: int) -> Record:
    return RIGHTS_OPERAND.unpack(rdx.to_bytes(RIGHTS_OPERAND.size, "little"))


def _host_instruction(
    core: GuestCore, instruction: RmpInstruction, address: int, rcx: int, rdx: int
) -> Registers | Fault:
    """A host's instruction in guest mode: never more than a code."""
    refused = privilege_fault(core, instruction.name, address)
    if refused is not None:
        return refused
    if instruction is RmpInstruction.PSMASH and (address >> PAGE_SHIFT) % PAGES_PER_LARGE:
        return _answer(RmpCode.FAIL_INPUT, rcx, rdx)
    return _answer(RmpCode.FAIL_PERMISSION, rcx, rdx)


def _check(**registers: int) -> None:
    for name, value in registers.items():
        if not 0 <= whole(name, value) <= _WORD:
            raise ValueError(f"{name} = {value:#x}: a register holds 64 bits")


def _check_memory(cpu: HostCpu, instruction: RmpInstruction, address: int) -> None:
    if address + RMPUPDATE_STATE.size > cpu.memory_map.top:
        rule = f"{instruction.name}: RCX names {RMPUPDATE_STATE.size} bytes of memory"
        raise GeneralProtection(rule, f"below {cpu.memory_map.top:#x}", address, "MODEL")


def _answer(code: int, rcx: int, rdx: int, carry: RFlag = _NO_FLAG) -> Registers:
    """RAX and the flags of a return code; AF and OF are clear as after a logical operation (from memory)."""
    code = int(code)
    flags = carry | (_NO_FLAG if code else RFlag.ZERO) | (_NO_FLAG if code.bit_count() % 2 else RFlag.PARITY)
    return Registers(code, rcx, rdx, flags)
