"""The IOMMU in front of devices: once the firmware has turned SNP on in it, DMA does not write what guests own.

DMA goes by system addresses; address translation and the IOMMU's own logs are left out. Reads are never checked:
they give what memory holds. Sources: APM2 15.36.10; that DMA is checked as a host's access is inferred.
"""

from __future__ import annotations

from snpbook.hardware.checks import refused_write
from snpbook.hardware.rmp import Rmp
from snpbook.spec.iommu import EFR_SNP_SUPPORT
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.refusal import Refusal


class DmaBlocked(Refusal):
    """The IOMMU has stopped a device's write to a page that is not the hypervisor's; nothing is stored."""

    def __init__(self, spa: int, found: PageState) -> None:
        rule = "a DMA write needs a page of the hypervisor"
        super().__init__(rule, PageState.HYPERVISOR.name, found.name, "APM2 15.36.10")
        self.spa = spa

    def __str__(self) -> str:
        return f"DMA to {self.spa:#x}: {super().__str__()}"


class Iommu:
    """The IOMMU of a machine: `present` where the BIOS has turned it on, `snp` where it may enforce the RMP."""

    def __init__(self, *, present: bool = True, snp: bool = True) -> None:
        self.features: int | None = EFR_SNP_SUPPORT * snp if present else None
        """The extended feature register, of which SNPSup alone is modelled; None where ACPI tells of no IOMMU."""
        self.snp_enabled = False
        """Whether it enforces the RMP: SNP_INIT turns it on."""

    def __repr__(self) -> str:
        return f"Iommu(SNP {'on' if self.snp_enabled else 'off'})"

    def check_write(self, rmp: Rmp, spa: int, size: int, mapping: int = PAGE_SIZE) -> None:
        """`DmaBlocked` where a write to a range of bytes, mapped by pages of `mapping` bytes, is not let through."""
        pages = range(spa >> PAGE_SHIFT, -(-(spa + size) // PAGE_SIZE))
        if not self.snp_enabled or not len(pages):
            return
        refused = refused_write(rmp, pages, large=mapping > PAGE_SIZE)
        if refused:
            page, owned = refused
            raise DmaBlocked(page << PAGE_SHIFT, rmp.state(owned))
