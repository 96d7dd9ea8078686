"""What an IOMMU tells software of itself.

Only what decides on SNP is declared. Source: AMD I/O Virtualization Technology (publication 48882), extended feature
register; Linux drivers/iommu/amd.
"""

EFR_SNP_SUPPORT = 1 << 63
"""Extended feature register, SNPSup: the IOMMU can enforce the RMP, and the BIOS has let it."""
