"""The PC around a guest: how many vCPUs, where RAM lies, and the clock's registers that tell how much there is.

Sources: Linux arch/x86/include/asm/kvm_host.h; QEMU hw/i386/pc.c, hw/i386/pc_q35.c, hw/rtc/mc146818rtc.c.
"""

from __future__ import annotations

from enum import IntEnum

MAX_VCPUS = 1024
"""KVM_MAX_VCPUS of an x86 host by default."""


class Cmos(IntEnum):
    """The PC's real-time clock ports and the registers that tell the size of memory."""

    INDEX_PORT = 0x70
    DATA_PORT = 0x71
    ABOVE_1M_LOW = 0x30
    ABOVE_1M_HIGH = 0x31
    ABOVE_16M_LOW = 0x34
    ABOVE_16M_HIGH = 0x35
    ABOVE_4G_LOW = 0x5B
    ABOVE_4G_MID = 0x5C
    ABOVE_4G_HIGH = 0x5D


CMOS_MASK = 0x7F
ONE_MIB, SIXTEEN_MIB = 0x100000, 0x1000000
CMOS_UNIT_1M, CMOS_UNIT_16M = 0x400, 0x10000
CMOS_LIMIT_1M = 63 * ONE_MIB
"""Registers 0x30 and 0x31 count KiB above 1 MiB, up to 63 MiB; 0x34 and 0x5B count 64 KiB units."""
LOW_RAM_END = 0x8000_0000
"""QEMU's q35 puts at most 2 GiB below 4 GiB, the rest above."""
