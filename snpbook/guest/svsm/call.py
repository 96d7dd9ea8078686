"""One call of the guest, what it is answered, and the processor that serves it.

The arguments are registers of the caller's save area, which nobody runs meanwhile. Source: COCONUT-SVSM
kernel/src/protocols/mod.rs.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.svsm.guest_memory import GuestMemory
from snpbook.guest.svsm.places import Places
from snpbook.guest.svsm.registry import Registry
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.svsm import PROTOCOL_SHIFT
from snpbook.spec.vmsa import VMSA

ARGUMENTS = ("rax", "rcx", "rdx", "r8", "r9")
_FIRST, _LAST = VMSA.fields["rax"], VMSA.fields["r9"]
_WORD = 8


@dataclass(frozen=True, slots=True)
class Call:
    """The registers of a caller."""

    rax: int
    rcx: int
    rdx: int
    r8: int
    r9: int

    @property
    def protocol(self) -> int:
        return self.rax >> PROTOCOL_SHIFT

    @property
    def number(self) -> int:
        return self.rax & (1 << PROTOCOL_SHIFT) - 1

    @classmethod
    async def of(cls, cpu: GuestCpu, vmsa: int) -> Call:
        """What stands in a save area."""
        raw = await cpu.read(vmsa + _FIRST.offset, _LAST.offset + _WORD - _FIRST.offset)
        places = [VMSA.offset(name) - _FIRST.offset for name in ARGUMENTS]
        return cls(*(int.from_bytes(raw[place : place + _WORD], "little") for place in places))


@dataclass(frozen=True, slots=True)
class Answer:
    """Registers that a call returns beside RAX; None for one that stays as it is."""

    rcx: int | None = None
    rdx: int | None = None
    r8: int | None = None


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor at VMPL0, by its number."""

    number: int
    ghcb: Ghcb
    registry: Registry

    @property
    def cpu(self) -> GuestCpu:
        return self.ghcb.cpu

    @property
    def places(self) -> Places:
        return self.registry.places

    @property
    def memory(self) -> GuestMemory:
        return GuestMemory(self.registry)

    async def features(self) -> int:
        """SEV_FEATURES of the guest that calls."""
        entry = await self.registry.current(self.number)
        assert entry is not None
        raw = await self.cpu.read(entry.vmsa + VMSA.offset("sev_features"), _WORD)
        return int.from_bytes(raw, "little")
