"""SNP's instructions as machine code has them: opcode bytes, flags of those on the RMP, and RDX with rights in it.

Sources: Linux (RMPUPDATE, PSMASH, PVALIDATE, RMPREAD), LLVM X86InstrSNP.td; the operand as COCONUT-SVSM uses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, IntFlag
from itertools import chain

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits


class RFlag(IntFlag):
    """The arithmetic flags of RFLAGS."""

    CARRY = 1 << 0
    PARITY = 1 << 2
    AUXILIARY = 1 << 4
    ZERO = 1 << 6
    SIGN = 1 << 7
    OVERFLOW = 1 << 11


class RmpInstruction(Enum):
    """The instructions on the RMP by their opcodes."""

    RMPUPDATE = bytes([0xF2, 0x0F, 0x01, 0xFE])
    PSMASH = bytes([0xF3, 0x0F, 0x01, 0xFF])
    RMPREAD = bytes([0xF2, 0x0F, 0x01, 0xFD])
    PVALIDATE = bytes([0xF2, 0x0F, 0x01, 0xFF])
    RMPADJUST = bytes([0xF3, 0x0F, 0x01, 0xFE])
    RMPQUERY = bytes([0xF3, 0x0F, 0x01, 0xFD])

    @property
    def length(self) -> int:
        """Bytes of machine code."""
        return len(self.value)

    @property
    def flags(self) -> RFlag:
        """The flags that it sets or clears; it leaves the others."""
        by_code = RFlag.PARITY | RFlag.AUXILIARY | RFlag.ZERO | RFlag.SIGN | RFlag.OVERFLOW
        return by_code | RFlag.CARRY if self is RmpInstruction.PVALIDATE else by_code

    @property
    def any_mode(self) -> bool:
        """Whether it exists outside 64-bit mode too."""
        return self is RmpInstruction.PVALIDATE


class CallInstruction(Enum):
    """The instructions by which a guest calls its hypervisor; without SEV-ES the bytes of VMGEXIT are VMMCALL too."""

    VMGEXIT = bytes([0xF3, 0x0F, 0x01, 0xD9])
    VMMCALL = bytes([0x0F, 0x01, 0xD9])

    @property
    def length(self) -> int:
        """Bytes of machine code."""
        return len(self.value)


class Opcode(Enum):
    """Other instructions that a hypervisor may intercept, in the form in which a guest program executes them (APM3).

    Prefixes stand in front: operand size in word port accesses, REP in strings.
    """

    WBINVD = bytes([0x0F, 0x09])
    INVD = bytes([0x0F, 0x08])
    MONITOR = bytes([0x0F, 0x01, 0xC8])
    MWAIT = bytes([0x0F, 0x01, 0xC9])
    RDTSCP = bytes([0x0F, 0x01, 0xF9])
    READ_DR7 = bytes([0x0F, 0x21, 0xF8])
    LOAD_CR = bytes([0x0F, 0x22])
    WRITE_DR7 = bytes([0x0F, 0x23, 0xF8])
    WRMSR = bytes([0x0F, 0x30])
    RDTSC = bytes([0x0F, 0x31])
    RDMSR = bytes([0x0F, 0x32])
    RDPMC = bytes([0x0F, 0x33])
    CPUID = bytes([0x0F, 0xA2])
    HLT = bytes([0xF4])
    PAUSE = bytes([0xF3, 0x90])
    IN_8 = bytes([0xEC])
    IN_16 = bytes([0x66, 0xED])
    IN_32 = bytes([0xED])
    OUT_8 = bytes([0xEE])
    OUT_16 = bytes([0x66, 0xEF])
    OUT_32 = bytes([0xEF])
    INS_8 = bytes([0xF3, 0x6C])
    INS_16 = bytes([0xF3, 0x66, 0x6D])
    INS_32 = bytes([0xF3, 0x6D])
    OUTS_8 = bytes([0xF3, 0x6E])
    OUTS_16 = bytes([0xF3, 0x66, 0x6F])
    OUTS_32 = bytes([0xF3, 0x6F])
    LOAD_8 = bytes([0x8A])
    LOAD_16 = bytes([0x66, 0x8B])
    LOAD_32 = bytes([0x8B])
    LOAD_64 = bytes([0x48, 0x8B])
    STORE_8 = bytes([0x88])
    STORE_16 = bytes([0x66, 0x89])
    STORE_32 = bytes([0x89])
    STORE_64 = bytes([0x48, 0x89])

    @classmethod
    def of_size(cls, name: str, size: int) -> bytes:
        """The form of an instruction for an operand of `size` bytes; empty where there is none."""
        found = cls.__members__.get(f"{name}_{8 * size}")
        return b"" if found is None else found.value


def decode(code: bytes) -> RmpInstruction | CallInstruction | None:
    """The instruction at the start of `code`, or None; forms with further prefixes are not known (MODEL)."""
    known: Iterable[RmpInstruction | CallInstruction] = chain(RmpInstruction, CallInstruction)
    return next((found for found in known if code.startswith(found.value)), None)


RIGHTS_OPERAND = Layout(
    "RightsOperand",
    8,
    Cite("APM2", "RMPADJUST and RMPQUERY, RDX"),
    [
        bits("vmpl", 0, 8, 0, 8, note="whose rights"),
        bits("permissions", 0, 8, 8, 8, note="see VmplPermission"),
        bits("vmsa", 0, 8, 16, note="the page may be run as a VMSA"),
    ],
)
"""RDX: what RMPADJUST grants, and what RMPQUERY finds (there inferred, and the bits behind it are zero, MODEL)."""
