"""What memory is for: the types of the BIOS's map (e820), and the descriptors of Linux's resources (/proc/iomem).

Sources: ACPI specification (address range types), Linux arch/x86/include/asm/e820/types.h, include/linux/ioport.h.
"""

from enum import IntEnum


class E820Type(IntEnum):
    """Types of address ranges."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4
    PMEM = 7


class IoDescriptor(IntEnum):
    """IORES_DESC_*: what a resource is for."""

    NONE = 0
    CRASH_KERNEL = 1
    ACPI_TABLES = 2
    ACPI_NV_STORAGE = 3
    PERSISTENT_MEMORY = 4
    RESERVED = 7
    SOFT_RESERVED = 8
