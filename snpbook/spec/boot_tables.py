"""What firmware leaves in memory for a kernel: the table of unaccepted memory, and where SNP's own pages are.

Sources: Linux drivers/firmware/efi/libstub/unaccepted_memory.c, arch/x86/include/asm/sev.h (struct cc_blob_sev_info);
the form of setup_data is from memory.
"""

from __future__ import annotations

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, raw, uint
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

CC_BLOB = Layout(
    "CcBlobSevInfo",
    0x28,
    Cite("LINUX", "arch/x86/include/asm/sev.h, struct cc_blob_sev_info"),
    [
        uint("magic", 0x00, 4),
        uint("version", 0x04, 2),
        uint("secrets_phys", 0x08, 8),
        uint("secrets_len", 0x10, 4),
        uint("cpuid_phys", 0x18, 8),
        uint("cpuid_len", 0x20, 4),
    ],
)
CC_BLOB_MAGIC = 0x45444D41

EFI_TABLE = Layout(
    "EfiConfigurationTable", 24, Cite("LINUX", "include/linux/efi.h"), [raw("guid", 0, 16), uint("table", 16, 8)]
)
"""One entry of EFI's configuration tables; GUIDs are mixed-endian."""

SETUP_DATA = Layout(
    "SetupData",
    20,
    Cite("LINUX", "arch/x86/include/uapi/asm/setup_data.h; struct cc_setup_data"),
    [uint("next", 0, 8), uint("type", 8, 4), uint("len", 12, 4), uint("cc_blob_address", 16, 4)],
)
"""An entry of the boot protocol's list, with the address that one of type `SETUP_CC_BLOB` holds."""
SETUP_CC_BLOB = 7
