"""The PC's clock, where firmware reads the size of memory. Other ports read all ones.

Source: QEMU hw/rtc/mc146818rtc.c, hw/i386/pc.c (pc_cmos_init).
"""

from __future__ import annotations

from snpbook.spec import kvm as spec
from snpbook.spec.kvm import Cmos

_NOTHING = 0xFF


def write(port: int, value: int, index: int) -> int:
    """A byte goes to a port: the clock's index register from then on."""
    return value & spec.CMOS_MASK if port == Cmos.INDEX_PORT else index


def read(port: int, index: int, memory: int) -> int:
    """The byte at a port of a guest with `memory` bytes, while the clock's index register is `index`."""
    return _cmos(memory).get(index, 0) if port == Cmos.DATA_PORT else _NOTHING


def _cmos(memory: int) -> dict[int, int]:
    low = min(memory, spec.LOW_RAM_END)
    above_1m = min(low - spec.ONE_MIB, spec.CMOS_LIMIT_1M) // spec.CMOS_UNIT_1M
    above_16m = max(low - spec.SIXTEEN_MIB, 0) // spec.CMOS_UNIT_16M
    above_4g = (memory - low) // spec.CMOS_UNIT_16M
    return {
        Cmos.ABOVE_1M_LOW: above_1m & 0xFF,
        Cmos.ABOVE_1M_HIGH: above_1m >> 8,
        Cmos.ABOVE_16M_LOW: above_16m & 0xFF,
        Cmos.ABOVE_16M_HIGH: above_16m >> 8,
        Cmos.ABOVE_4G_LOW: above_4g & 0xFF,
        Cmos.ABOVE_4G_MID: above_4g >> 8 & 0xFF,
        Cmos.ABOVE_4G_HIGH: above_4g >> 16,
    }
