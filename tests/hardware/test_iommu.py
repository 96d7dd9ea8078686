"""Devices: what the IOMMU lets them write, and what they read. Its checks row by row: test_access_table."""

import pytest

from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.iommu import DmaBlocked
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import Device
from snpbook.spec.products import product
from snpbook.system import System
from snpbook.trace import Trace
from tests.hardware.guests import ASID, PAGE, Bench

GUEST = NewState(assigned=True, asid=6)


def with_device(*, on: bool = True) -> tuple[Bench, Device]:
    """The guest owns pages 0x40 and 0x41."""
    bench = Bench()
    bench.machine.dram.write(0x40 * PAGE, b"\x77" * 2 * PAGE)
    assert not bench.cpu.rmpupdate(range(0x40, 0x42), range(2), GUEST).any()
    bench.machine.iommu.snp_enabled = on
    return bench, Device(bench.machine)


@pytest.mark.parametrize(("spa", "size"), [(0x40 * PAGE + 5, 1), (0x42 * PAGE - 1, 2), (0x3E * PAGE, 2 * PAGE + 1)])
def test_dma_to_a_guests_page_is_blocked(spa: int, size: int) -> None:
    bench, device = with_device()
    before = bench.cpu.read(0, 0x50 * PAGE)
    with pytest.raises(DmaBlocked) as caught:
        device.dma_write(spa, bytes(size))
    assert caught.value.spa in (0x40 * PAGE, 0x41 * PAGE)
    assert (caught.value.expected, caught.value.found, caught.value.cite) == (
        "HYPERVISOR",
        "GUEST_INVALID",
        "APM2 15.36.10",
    )
    assert str(caught.value).startswith("DMA to 0x4")
    assert bench.cpu.read(0, 0x50 * PAGE) == before


def test_what_a_device_may_do() -> None:
    bench, device = with_device()
    device.dma_write(0x3F * PAGE, bytes(range(256)) * 16)
    device.dma_write(0x40 * PAGE, b"")
    for mapping, error in (("x", TypeError), (5, ValueError)):
        for data in (b"", b"x"):
            with pytest.raises(error, match="mapping = "):
                device.dma_write(0x40 * PAGE, data, mapping=mapping)
    assert bench.cpu.read(0x3F * PAGE, 4) == bytes(range(4))
    assert device.dma_read(0x40 * PAGE - 1, 2) == b"\xff\x77"
    assert "SNP on" in repr(bench.machine.iommu)


def test_before_snp_is_on_in_the_iommu_nothing_is_checked() -> None:
    bench, device = with_device(on=False)
    device.dma_write(0x40 * PAGE, b"mine")
    assert bench.machine.dram.read(0x40 * PAGE, 4) == b"mine"


def test_snp_init_turns_it_on() -> None:
    system = System(product="milan", seed="iommu")
    assert not system.machine.iommu.snp_enabled
    system.host.boot()
    assert system.machine.iommu.snp_enabled


def test_a_large_mapping_needs_all_its_pages() -> None:
    bench, device = with_device()
    bench.cpu.rmpupdate(range(0x277, 0x278), range(1), GUEST)
    for mapping in (0x200000, 1 << 30):
        with pytest.raises(DmaBlocked) as caught:
            device.dma_write(0x280 * PAGE, b"x", mapping=mapping)
        assert (caught.value.spa, caught.value.found) == (0x280 * PAGE, "GUEST_INVALID")
        device.dma_write(0x400 * PAGE, b"x", mapping=mapping)
    device.dma_write(0x280 * PAGE, b"x")


def test_reads_give_ciphertext() -> None:
    bench, device = with_device()
    bench.give(0, 0x900)
    bench.machine.encryption.write(ASID, 0x900 * PAGE, b"secret of a guest")
    assert device.dma_read(0x900 * PAGE, 17) == bench.machine.dram.read(0x900 * PAGE, 17) != b"secret of a guest"


def test_the_c_bit_in_an_address_is_the_hosts_key() -> None:
    bench, device = with_device()
    spa, c_bit = 0x50 * PAGE, 1 << 51
    device.dma_write(spa | c_bit, b"sixteen bytes ..")
    assert device.dma_read(spa | c_bit, 16) == bench.cpu.read(spa, 16, c_bit=True) == b"sixteen bytes .."
    assert device.dma_read(spa, 16) != b"sixteen bytes .."
    with pytest.raises(ValueError, match="spa"):
        device.dma_read(-1, 4)


def test_with_a_cache_in_front_of_memory() -> None:
    """A device finds the lines of its own key, and its writes drop them."""
    machine = Machine(product("milan"), 64 << 20, boot_entropy=bytes(32), trace=Trace(), cores=1, cache=True)
    device = Device(machine)
    machine.memory.write(0, 0x50000, b"cached")
    assert machine.dram.read(0x50000, 6) == bytes(6)
    assert device.dma_read(0x50000, 6) == b"cached"
    device.dma_write(0x50000, b"device")
    assert machine.memory.read(0, 0x50000, 6) == machine.dram.read(0x50000, 6) == b"device"


def test_ciphertext_hiding_covers_devices() -> None:
    bench, device = with_device()
    bench.give(0, 0x900)
    bench.machine.hidden_asids = ASID
    assert device.dma_read(0x900 * PAGE - 1, 4) == bench.cpu.read(0x900 * PAGE - 1, 4) == b"\x00\xff\xff\xff"
