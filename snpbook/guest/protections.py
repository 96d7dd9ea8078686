"""Which protections a guest has, by its own registers, and whether it can live with all of them.

SEV_STATUS is the processor's word and nobody else's. A feature behind which a guest must do something that this one
does not know ends it. Sources: Linux arch/x86/mm/mem_encrypt.c (print_mem_encrypt_feature_info),
arch/x86/boot/compressed/sev.c (snp_get_unsupported_features).
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.guest.cpuid import is_sev
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec import sev_features as spec
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF, RANGES
from snpbook.spec.msr import Msr
from snpbook.spec.sev_features import SevFeatures

C_BIT_LEAST = 32
"""Below it the bit would be one of an address that a 32-bit table can hold."""


@dataclass(frozen=True, slots=True)
class Protections:
    """SEV_STATUS of a guest, and the bit that marks memory as private in its tables (None without encryption)."""

    status: int = 0
    c_bit: int | None = None

    @property
    def sev(self) -> bool:
        return bool(self.status & spec.SEV_STATUS_SEV)

    @property
    def sev_es(self) -> bool:
        return bool(self.status & spec.SEV_STATUS_ES)

    @property
    def snp(self) -> bool:
        return bool(self.features & SevFeatures.SNP_ACTIVE)

    @property
    def features(self) -> SevFeatures:
        return SevFeatures(self.status >> spec.SEV_STATUS_SHIFT)

    @property
    def unknown(self) -> int:
        """The bits of SEV_STATUS that this guest would have to know and does not."""
        return self.status & spec.LINUX_MUST_KNOW & ~spec.LINUX_KNOWS

    @property
    def rows(self) -> tuple[tuple[str, bool], ...]:
        """Every protection by name, and whether this guest has it: what its kernel can print about itself."""
        kinds = (("SEV", self.sev), ("SEV_ES", self.sev_es))
        return (*kinds, *((feature.name or "", bool(self.features & feature)) for feature in SevFeatures))

    def __str__(self) -> str:
        names = [name for name, on in (("SEV", self.sev), ("SEV-ES", self.sev_es), ("SEV-SNP", self.snp)) if on]
        return f"Memory Encryption Features active: AMD {' '.join(names)}" if names else "no memory encryption"


async def find(cpu: GuestCpu) -> Protections:
    """Ask CPUID whether the processor has SEV and where the C-bit is, and the processor whether it is on.

    A C-bit that cannot be one ends the guest.
    """
    highest = await cpu.cpuid(RANGES[-1])
    if not is_sev(highest.eax, (leaf := await cpu.cpuid(ENCRYPTED_MEMORY_LEAF)).eax):
        return Protections()
    status: int = await cpu.rdmsr(Msr.SEV_STATUS)
    if not status & spec.SEV_STATUS_SEV:
        return Protections()
    c_bit = leaf.decode(ENCRYPTED_MEMORY).c_bit
    if c_bit < C_BIT_LEAST:
        raise ProgramFailure(f"CPUID names bit {c_bit} as the C-bit: it is at least {C_BIT_LEAST}")
    return Protections(status, c_bit)
