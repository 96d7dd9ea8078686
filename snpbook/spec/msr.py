"""Model-specific registers of memory encryption and SNP. Sources: APM2 15.34 to 15.36, Linux msr-index.h."""

from enum import IntEnum


class Msr(IntEnum):
    """Register numbers."""

    SYSCFG = 0xC0010010
    HWCR = 0xC0010015
    VM_HSAVE_PA = 0xC0010117
    GHCB = 0xC0010130
    SEV_STATUS = 0xC0010131
    RMP_BASE = 0xC0010132
    RMP_END = 0xC0010133


SYSCFG_MFDM = 1 << 19
SYSCFG_MEM_ENCRYPT = 1 << 23
SYSCFG_SNP_EN = 1 << 24
SYSCFG_VMPL_EN = 1 << 25
HWCR_SMM_LOCK = 1 << 0
RMP_ADDRESS_MASK = ((1 << 52) - 1) & ~0x1FFF
"""RMP_BASE holds bits 51:13 of an address."""
RMP_ALIGNMENT = 0x100000
"""The firmware wants base and size of the table in multiples of 1 MB."""
