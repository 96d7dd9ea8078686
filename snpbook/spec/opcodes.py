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
