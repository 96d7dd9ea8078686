"""Options of the set-up menu, as the registers, CPUID, the memory map and the IOMMU show them afterwards."""

from __future__ import annotations

import pytest

from snpbook.hardware.bios import BiosSetup
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.spec.products import product
from snpbook.trace import Trace

MIB, GIB = 1 << 20, 1 << 30
SYSCFG, HWCR, RMP_BASE, RMP_END = 0xC0010010, 0xC0010015, 0xC0010132, 0xC0010133


def built(name: str = "milan", installed: int = GIB, **options: object) -> HostCpu:
    setup = BiosSetup(**options)  # type: ignore[arg-type]
    return HostCpu(Machine(product(name), installed, boot_entropy=bytes(32), trace=Trace(), cores=3, bios=setup))


def registers(cpu: HostCpu, number: int) -> set[int]:
    return {cpu.rdmsr(number, core) for core in cpu.cores}  # type: ignore[arg-type]


def test_the_default_is_ready_for_snp() -> None:
    cpu = built()
    assert registers(cpu, SYSCFG) == {0xF40000}
    assert registers(cpu, HWCR) == {1}
    assert cpu.product.cpuid(0x8000001F).edx == 100
    assert cpu.iommu_features == 1 << 63
    assert registers(cpu, RMP_END) == {cpu.memory_map.rmp.end}


def test_switches() -> None:
    assert registers(built(smee=False), SYSCFG) == {0x740000}
    assert registers(built(smm_lock=False), HWCR) == {0}
    assert built(iommu=False).iommu_features is None
    assert built(nbio_snp=False).iommu_features == 0
    assert built(iommu=False, nbio_snp=False).iommu_features is None


@pytest.mark.parametrize(("limit", "es", "sev"), [(1, 0, 509), (100, 99, 410), (510, 509, 0)])
def test_the_limit_is_what_cpuid_tells(limit: int, es: int, sev: int) -> None:
    cpu = built(min_sev_asid=limit)
    assert cpu.product.cpuid(0x8000001F).edx == limit
    assert (len(cpu.product.es_asids), len(cpu.product.sev_asids)) == (es, sev)
    assert product("milan").min_sev_asid == 100, "of this machine alone"


def test_no_table() -> None:
    cpu = built(snp_coverage=0)
    assert registers(cpu, RMP_BASE) == registers(cpu, RMP_END) == {0}
    assert cpu.memory_map.rmp.entries == 0


@pytest.mark.parametrize(("covered", "size"), [(None, 5), (GIB, 5), (256 * MIB, 2), (1 << 50, 5), (4096, 1)])
def test_the_table_is_as_large_as_what_it_covers(covered: int | None, size: int) -> None:
    """16 bytes for 4 KB and 16 KB before them, in whole MB; 1 GB needs 4 MB and 16 KB."""
    rmp = built(snp_coverage=covered).memory_map.rmp
    assert rmp.end + 1 - rmp.base == size * MIB
    assert rmp.entries == (size * MIB - 0x4000) // 16


def test_the_table_lies_where_it_is_told_to() -> None:
    assert built(rmp_base=0x2000_2000).memory_map.rmp.base == 0x2000_2000
    for base in (GIB - 2 * MIB, GIB, 1 << 40):  # in TSEG, at the end of memory, far beyond
        with pytest.raises(ValueError, match=f"rmp_base = {base:#x}"):
            built(rmp_base=base)


@pytest.mark.parametrize(
    ("option", "value"), [("snp_coverage", 4095), ("snp_coverage", -4096), ("rmp_base", 0x1000), ("rmp_base", -0x2000)]
)
def test_values_that_no_menu_takes(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=option):
        BiosSetup(**{option: value})  # type: ignore[arg-type]


def test_limits_that_the_processor_has_not() -> None:
    for limit in (0, 511):
        with pytest.raises(ValueError, match="min_sev_asid"):
            built(min_sev_asid=limit)


def test_published_tables_cover_what_they_are_said_to() -> None:
    """Two hosts of public logs: 0x35600000-0x75bfffff and 0x88900000-0xa8efffff."""
    from snpbook.hardware.rmp_range import RmpRange

    assert RmpRange(0x35600000, 0x75BFFFFF).entries == 0x405FC00
    assert RmpRange(0x88900000, 0xA8EFFFFF).entries == 0x205FC00


def test_zeros_are_stored_under_the_check() -> None:
    cpu = built()
    cpu.write(32 * MIB, b"\xff" * 8192)
    cpu.zero(32 * MIB, 4096)
    assert cpu.read(32 * MIB, 8192) == bytes(4096) + b"\xff" * 4096
