"""Which memory is the kernel's: what the BIOS reports as RAM, without what lies in one 2 MB page with the RMP's ends.

Sources: Linux arch/x86/kernel/e820.c, arch/x86/virt/svm/sev.c (snp_fixup_e820_tables).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snpbook.hardware.ports import HostCpu
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE

FIRST_FREE = 16 << 20
"""Below 16 MiB lies the kernel itself (MODEL)."""
Span = tuple[int, int]
"""First byte and end."""


def ram(cpu: HostCpu) -> list[Span]:
    """What the BIOS reports as RAM: DRAM without TSEG and without the memory that it reserved for the RMP."""
    memory = cpu.memory_map
    return _without(memory.dram, [memory.tseg, (memory.rmp.base, memory.rmp.end + 1)])


def rmp_edges(cpu: HostCpu) -> list[Span]:
    """The 2 MB around an end of the reserved RMP that is not aligned to 2 MB, where RAM lies in them."""
    rmp = cpu.memory_map.rmp
    blocks = [address // LARGE_PAGE_SIZE * LARGE_PAGE_SIZE for address in (rmp.base, rmp.end + 1)]
    unaligned = [block for block, end in zip(blocks, (rmp.base, rmp.end + 1), strict=True) if block != end]
    spans = [(block, block + LARGE_PAGE_SIZE) for block in unaligned]
    return [span for span in spans if any(start < span[1] and span[0] < end for start, end in ram(cpu))]


def free_frames(cpu: HostCpu) -> list[range]:
    """Page frames that the kernel may give out.

    The edges of the RMP are left out whatever the kernel says of them (MODEL): v7 does not reserve them.
    """
    free = _without(ram(cpu), [(0, FIRST_FREE), *rmp_edges(cpu)])
    return [range(-(-start // PAGE_SIZE), end // PAGE_SIZE) for start, end in free]


def _without(spans: Sequence[Span], taken: Iterable[Span]) -> list[Span]:
    free = []
    taken = sorted(taken)
    for start, end in spans:
        for first, stop in taken:
            if start < stop and first < end:
                if start < first:
                    free.append((start, first))
                start = max(start, stop)
        if start < end:
            free.append((start, end))
    return free
