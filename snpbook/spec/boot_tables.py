"""What firmware leaves in memory for a kernel: the table of unaccepted memory.

Source: Linux drivers/firmware/efi/libstub/unaccepted_memory.c.
"""

from __future__ import annotations

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, uint
from snpbook.spec.pages import LARGE_PAGE_SIZE

UNACCEPTED_TABLE = Layout(
    "UnacceptedMemoryTable",
    24,
    Cite("LINUX", "include/linux/efi.h, struct efi_unaccepted_memory"),
    [
        uint("version", 0, 4),
        uint("unit_size", 4, 4),
        uint("phys_base", 8, 8),
        uint("size", 16, 8, note="bytes of the bitmap behind, in which 1 is unaccepted"),
    ],
)
UNACCEPTED_VERSION = 1
UNIT_SIZE = LARGE_PAGE_SIZE
