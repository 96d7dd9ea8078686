"""How much memory a guest has, and which parts of it are still to be accepted.

The clock's registers tell the size: the host's word, which can at worst give less or what cannot be validated. Source:
edk2 OvmfPkg/Library/PlatformInitLib (GetSystemMemorySizeBelow4gb).
"""

from __future__ import annotations

from snpbook.guest.layout import SHARED_PAGES, Layout
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import kvm
from snpbook.spec.image import FOUR_GIB, Image
from snpbook.spec.kvm import Cmos
from snpbook.spec.pages import PAGE_SHIFT


async def memory_ranges(cpu: GuestCpu) -> list[range]:
    """RAM as the clock's registers tell it, in pages."""

    async def word(*registers: Cmos) -> int:
        value = 0
        for position, register in enumerate(registers):
            await cpu.port_out(Cmos.INDEX_PORT, register)
            value |= await cpu.port_in(Cmos.DATA_PORT) << 8 * position
        return value

    above_16m = await word(Cmos.ABOVE_16M_LOW, Cmos.ABOVE_16M_HIGH) * kvm.CMOS_UNIT_16M
    above_1m = await word(Cmos.ABOVE_1M_LOW, Cmos.ABOVE_1M_HIGH) * kvm.CMOS_UNIT_1M
    above_4g = await word(Cmos.ABOVE_4G_LOW, Cmos.ABOVE_4G_MID, Cmos.ABOVE_4G_HIGH) * kvm.CMOS_UNIT_16M
    low = kvm.SIXTEEN_MIB + above_16m if above_16m else kvm.ONE_MIB + above_1m
    ranges = [range(low >> PAGE_SHIFT)]
    if above_4g:
        ranges.append(range(FOUR_GIB >> PAGE_SHIFT, FOUR_GIB + above_4g >> PAGE_SHIFT))
    return ranges


def unaccepted(image: Image, place: Layout, memory: list[range]) -> list[range]:
    """The parts of memory that the launch did not validate and that are to be private."""
    taken = [(s.gpa >> PAGE_SHIFT, s.gpa + s.size >> PAGE_SHIFT) for s in image.sections]
    taken.append((place.shared >> PAGE_SHIFT, (place.shared >> PAGE_SHIFT) + SHARED_PAGES))
    result = []
    for pages in memory:
        start = pages.start
        for first, stop in sorted(taken):
            if start < first < pages.stop:
                result.append(range(start, first))
            if first < pages.stop and stop > start:
                start = stop
        if start < pages.stop:
            result.append(range(start, pages.stop))
    return result
