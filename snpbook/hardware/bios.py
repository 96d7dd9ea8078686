"""The firmware set-up menu: what a person chooses before the machine starts, and nobody can change afterwards.

A machine is built with these options; `msr.bios_settings` and the memory map carry them out, on every core alike.
Names and defaults of menus differ between vendors; these are AMD's. Sources: AMDSEV snp-latest (README.md), APM2 15.36.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.hardware.dram import whole
from snpbook.spec.msr import RMP_LAST_BYTE
from snpbook.spec.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class BiosSetup:
    """One choice of the options. `ValueError` for a value that no menu takes."""

    smee: bool = True
    """SMEE: SYSCFG.MemEncryptionModEn, the master switch of all memory encryption."""
    smm_lock: bool = True
    """HWCR.SmmLock: system management mode cannot be changed any more."""
    snp_coverage: int | None = None
    """SNP memory coverage: bytes of the address space for which an RMP is reserved; None is all, 0 reserves none."""
    rmp_base: int | None = None
    """Where the RMP begins, in steps of 8 KB; None is the top of memory (MODEL)."""
    min_sev_asid: int | None = None
    """SEV-ES ASID space limit: the first ASID of plain SEV guests, 1 for no SEV-ES; None is the product's default."""
    iommu: bool = True
    """IOMMU: ACPI has an IVRS table."""
    nbio_snp: bool = True
    """NBIO SEV-SNP: the IOMMU's extended features tell SNP support."""

    def __post_init__(self) -> None:
        for name, step in (("snp_coverage", PAGE_SIZE), ("rmp_base", RMP_LAST_BYTE + 1)):
            value = getattr(self, name)
            if value is not None and (whole(name, value) < 0 or value % step):
                raise ValueError(f"{name} = {value:#x}: a multiple of {step:#x} bytes")


SNP_READY = BiosSetup()
"""Everything that SNP needs: the model's default, where real boards ship with most of it off."""
