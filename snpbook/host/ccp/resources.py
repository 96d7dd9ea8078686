"""The memory that SNP_INIT_EX is to make HV-Fixed, so that neither guests nor the firmware ever get it.

The driver means reserved, persistent and ACPI memory, but compares types of the BIOS's map with descriptors of
resources: it gets ACPI tables, ACPI NVS and, by luck, reserved memory. Source: Linux 6.12 drivers/crypto/ccp/sev-dev.c
(snp_filter_reserved_mem_regions).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from snpbook.hardware.ports import HostCpu
from snpbook.spec.iomem import E820Type, IoDescriptor
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

_COMPARED = frozenset(map(int, (E820Type.RESERVED, E820Type.PMEM, E820Type.ACPI)))


@dataclass(frozen=True, slots=True)
class Resource:
    """A line of /proc/iomem: first byte, end, and what it is for."""

    start: int
    end: int
    descriptor: IoDescriptor


def reserved_memory(cpu: HostCpu) -> list[Resource]:
    """What the BIOS has reserved: TSEG and the memory of the RMP."""
    memory = cpu.memory_map
    spans = [memory.tseg, (memory.rmp.base, memory.rmp.end + 1)]
    return [Resource(start, end, IoDescriptor.RESERVED) for start, end in sorted(spans) if start < end]


def listed_ranges(resources: Iterable[Resource]) -> list[range]:
    """Page numbers of the resources that the driver lists, rounded outwards."""
    return [
        range(each.start >> PAGE_SHIFT, -(-each.end // PAGE_SIZE))
        for each in resources
        if int(each.descriptor) in _COMPARED
    ]
