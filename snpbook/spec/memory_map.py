"""The memory map of a model machine: where DRAM ends below 4 GiB, and what the BIOS and the fabric keep.

The map is this model's own choice (MODEL), in the manner of real servers; the HT hole is AMD's.
"""

LOW_DRAM_END = 0x8000_0000
"""DRAM below 4 GiB ends here; the hole up to 4 GiB is for devices."""
TSEG_SIZE = 0x100_0000
"""System management memory, at the end of DRAM below 4 GiB."""
ASEG = (0xA_0000, 0xC_0000)
"""The old system management memory below 1 MiB."""
HT_HOLE = (0xFD_0000_0000, 0xFE_0000_0000)
"""Addresses that no DRAM answers to, on a machine large enough to reach them."""
