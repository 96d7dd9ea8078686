"""The memory that SNP_INIT_EX is to make HV-Fixed, so that neither guests nor the firmware ever get it.

The driver means reserved, persistent and ACPI memory, but compares types of the BIOS's map with descriptors of
resources: it gets ACPI tables, ACPI NVS and, by luck, reserved memory. Source: Linux 6.12 drivers/crypto/ccp/sev-dev.c
(snp_filter_reserved_mem_regions).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snpbook.hardware.ports import HostCpu
from snpbook.host.e820 import Span, rmp_edges
from snpbook.spec.iomem import E820Type, IoDescriptor
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

_COMPARED = frozenset(map(int, (E820Type.RESERVED, E820Type.PMEM, E820Type.ACPI)))


@dataclass(frozen=True, slots=True)
class Resource:
    """A line of /proc/iomem: first byte, end, and what it is for."""

    start: int
    end: int
    descriptor: IoDescriptor


def reserved_memory(cpu: HostCpu, *, edges: bool) -> list[Resource]:
    """What is reserved: TSEG, the memory of the RMP and, with `edges`, the rest of the 2 MB around its ends."""
    memory, spans = cpu.memory_map, list[Span]()
    reserved = [memory.tseg, (memory.rmp.base, memory.rmp.end + 1), *(rmp_edges(cpu) if edges else ())]
    for start, end in sorted(span for span in reserved if span[0] < span[1]):
        if spans and start <= spans[-1][1]:
            start, end = spans[-1][0], max(spans.pop()[1], end)
        spans.append((start, end))
    return [Resource(start, end, IoDescriptor.RESERVED) for start, end in spans]


def listed_ranges(resources: Iterable[Resource]) -> list[range]:
    """Page numbers of the resources that the driver lists, rounded outwards."""
    return [
        range(each.start >> PAGE_SHIFT, -(-each.end // PAGE_SIZE))
        for each in resources
        if int(each.descriptor) in _COMPARED
    ]
