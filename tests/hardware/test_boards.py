"""The options of a board: where the host puts the table, segments, a cache, TSME, sockets."""

from typing import Any

import numpy as np
import pytest

from snpbook.hardware.dram import Dram
from snpbook.hardware.exits import HostPageFault
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.rmp_range import RmpSegments
from snpbook.spec.msr import Msr
from snpbook.spec.products import product
from snpbook.system import System
from snpbook.trace import Trace

MIB, PAGE = 1 << 20, 4096
ALL_ON = 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25


def machine(name: str = "milan", **options: Any) -> Machine:
    return Machine(product(name), 64 * MIB, boot_entropy=bytes(32), trace=Trace(), **{"cores": 2, **options})


def switch_on(board: Machine) -> HostCpu:
    for core in board.cores:
        core.wrmsr(Msr.SYSCFG, ALL_ON)
    return HostCpu(board)


# Where the table lies.


def test_the_table_is_where_the_registers_say_when_snp_is_switched_on() -> None:
    board = machine()
    for core in board.cores:
        core.wrmsr(Msr.RMP_BASE, 0x100000)
        core.wrmsr(Msr.RMP_END, 0x100000 + 0x4000 + 16 * 0x4000 - 1)
    cpu = switch_on(board)
    assert board.rmp.entries == 0x4000
    assert not cpu.rmpupdate(range(0x3000, 0x3001), range(7, 8), NewState(assigned=True, asid=1)).any()
    low = int.from_bytes(board.dram.read(0x100000 + 0x4000 + 16 * 0x3000, 8), "little")
    assert low == 1 | 7 << 12 | 1 << 51
    with pytest.raises(HostPageFault):
        cpu.write(0x3000 * PAGE, b"x")


@pytest.mark.parametrize(
    ("base", "end"), [(0x200000, 0x100000 - 1), (64 * MIB, 65 * MIB - 1), (0x100000, 0x100000 + 0x1000 - 1)]
)
def test_registers_that_name_no_table_leave_every_page_uncovered(base: int, end: int) -> None:
    board = machine()
    for core in board.cores:
        core.wrmsr(Msr.RMP_BASE, base)
        core.wrmsr(Msr.RMP_END, end)
    cpu = switch_on(board)
    assert board.rmp.entries == 0
    assert cpu.rmpupdate(range(1), range(1), NewState(assigned=True, asid=1)).tolist() == [1]
    cpu.write(0, b"no entry, no check")


def test_once_on_the_table_stays_where_it_is() -> None:
    board = machine()
    switch_on(board)
    before = board.rmp
    for core in board.cores:
        core.wrmsr(Msr.RMP_BASE, 0x100000)
        core.wrmsr(Msr.SYSCFG, ALL_ON)
    assert board.rmp is before


def test_a_segmented_table() -> None:
    """Turin: segments of 64 GiB, of which 1 GiB of the first has entries, at 32 MiB."""
    board = machine("turin")
    base, entries = 0x100000, 0x2000000
    board.dram.write(base + 0x4000, (1 | entries).to_bytes(8, "little"))
    for core in board.cores:
        core.wrmsr(Msr.RMP_BASE, base)
        core.wrmsr(Msr.RMP_END, 0)
        core.wrmsr(Msr.RMP_CFG, 1 | 36 << 8)
    cpu = switch_on(board)
    pages = np.array([5, 0x3FFFF, 0x40000, 0x1000000], np.uint64)
    assert board.rmp.covers(pages).tolist() == [True, True, False, False]
    assert cpu.rmpupdate(range(5, 7), range(9, 11), NewState(assigned=True, asid=3)).tolist() == [0, 0]
    words = [int.from_bytes(board.dram.read(entries + 16 * page, 8), "little") for page in (4, 5, 6)]
    assert words == [0, 1 | 9 << 12 | 3 << 51, 1 | 10 << 12 | 3 << 51]
    assert board.rmp.counters(3) == 2
    assert int.from_bytes(board.dram.read(base + 8 * 3, 8), "little") == 2
    with pytest.raises(HostPageFault):
        cpu.write(5 * PAGE, b"x")


@pytest.mark.parametrize(
    ("base", "log2_size", "first"),
    [
        (1 << 50, 36, 1 | 0x2000000),  # beyond memory
        (0x102000, 36, 1 | 0x2000000),  # no multiple of 1 MB
        (0x100000, 20, 1 | 0x2000000),  # segments smaller than the product has
        (0x100000, 43, 1 | 0x2000000),  # larger ones
        (0x100000, 36, 1 | 0x3F00000),  # entries that end beyond memory
        (0x100000, 36, 0),  # no segment covers anything
    ],
)
def test_a_segmented_table_that_cannot_be(base: int, log2_size: int, first: int) -> None:
    """No Python error comes out of WRMSR: every page is uncovered."""
    board = machine("turin")
    if base < board.dram.size:
        board.dram.write(base + 0x4000, first.to_bytes(8, "little"))
    for core in board.cores:
        core.wrmsr(Msr.RMP_BASE, base)
        core.wrmsr(Msr.RMP_CFG, 1 | log2_size << 8)
    cpu = switch_on(board)
    assert (board.rmp.entries, board.rmp_located) == (0, True)
    assert cpu.rmpupdate(range(5, 6), range(1), NewState(assigned=True, asid=1)).tolist() == [1]


def test_a_segment_covers_no_more_than_its_size_and_only_cached_ones_count() -> None:
    memory = Dram(64 * MIB)
    listed = [(200 | 0x100000 * (i + 1)).to_bytes(8, "little") for i in range(20)]
    memory.write(0x4000, b"".join(listed))
    found = RmpSegments.read(memory, 0, 36, 16)
    assert found.sizes == (1 << 36,) * 16
    assert found.bases == tuple(0x100000 * (i + 1) for i in range(16))
    assert RmpSegments.read(memory, 0, 38, 512).sizes == (200 << 30,) * 20


def test_the_registers_hold_an_8_kb_place() -> None:
    core = machine().cores[0]
    core.wrmsr(Msr.RMP_BASE, 0x101FFF)
    core.wrmsr(Msr.RMP_END, 0x1103FFE)
    assert (core.rdmsr(Msr.RMP_BASE), core.rdmsr(Msr.RMP_END)) == (0x100000, 0x1103FFF)


def test_another_table_voids_what_was_translated() -> None:
    board = machine()
    before = board.rmp.changes
    for core in board.cores:
        core.wrmsr(Msr.RMP_BASE, 0x100000)
        core.wrmsr(Msr.RMP_END, 0x100000 + 0x4000 + 16 * 0x4000 - 1)
    switch_on(board)
    assert board.rmp.changes > before


def test_memory_that_the_product_cannot_address() -> None:
    with pytest.raises(ValueError, match="43 bits of physical address"):
        Machine(product("milan"), 9 << 40, boot_entropy=bytes(32), trace=Trace())


def test_a_large_mapping_that_begins_with_a_page_in_use() -> None:
    """The erratum: a host's 2 MB mapping faults, and 4 KB ones do not."""
    board = machine()
    cpu = switch_on(board)
    board.in_use.add(0x200)
    cpu.write(0x201 * PAGE, b"x")
    cpu.write(0x401 * PAGE, b"x", mapping=2 * MIB)
    with pytest.raises(HostPageFault, match="in use"):
        cpu.write(0x201 * PAGE, b"x", mapping=2 * MIB)


# What is in DRAM.


def test_tsme_encrypts_what_nobody_asked_to_encrypt() -> None:
    text = b"a secret of the host"
    for tsme in (False, True):
        board = machine(tsme=tsme)
        cpu = HostCpu(board)
        cpu.write(0x5000, text)
        assert cpu.read(0x5000, len(text)) == text
        assert (cpu.read(0x5000, len(text), c_bit=True) == text) is tsme  # the same key, C-bit or not
        assert (board.dram.read(0x5000, len(text)) == text) is not tsme


@pytest.mark.parametrize("options", [{"tsme": True}, {"cache": True}, {"sockets": 2, "cores": 8}], ids=str)
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_a_guest_launches_boots_and_reports_on_any_board(name: str, options: dict[str, Any]) -> None:
    system = System(name, "boards", installed=256 * MIB, **options)
    system.host.boot()
    guest = system.create_vm(memory="16 MiB")
    guest.launch()
    verdict = system.owner(guest).verify(guest.request_report(b"nonce"), b"nonce")
    assert str(verdict) == "accepted"


def test_a_dropped_dirty_line_gives_a_guest_its_past_back() -> None:
    """What the RMP cannot see: lines that never reached memory. INVD loses them, and without a cache nothing."""
    for cached in (True, False):
        board = machine(cache=cached)
        board.encryption.install(5, bytes(16))
        board.memory.write(5, 0x6000, b"paid: no ")
        cpu = HostCpu(board)
        cpu.wbinvd()
        board.memory.write(5, 0x6000, b"paid: yes")
        assert cpu.invd() == int(cached)
        assert board.memory.read(5, 0x6000, 9) == (b"paid: no " if cached else b"paid: yes")


def test_stale_lines_on_a_part_without_coherence() -> None:
    """Rome: host and guest see an address through lines of their own, until a flush; Milan keeps them coherent."""
    for name, stale in (("rome", True), ("milan", False)):
        board = machine(name, cache=True)
        board.encryption.install(5, bytes(16))
        cpu = HostCpu(board)
        before = cpu.read(0x7000, 16)
        board.memory.write(5, 0x7000, b"guest's new text")
        assert (cpu.read(0x7000, 16) == before) is stale
        cpu.wrmsr(Msr.VMPAGE_FLUSH, 0x7000 | 5, 0)
        cpu.clflush(0x7000, 16)
        assert cpu.read(0x7000, 16) != before


# Sockets.


def test_cores_are_spread_over_the_sockets() -> None:
    board = machine(cores=8, sockets=2)
    assert [core.socket for core in board.cores] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("cores", "sockets"), [(3, 2), (0, 1), (4, 0)])
def test_sockets_that_cannot_be(cores: int, sockets: int) -> None:
    with pytest.raises(ValueError, match="as many cores on each socket"):
        machine(cores=cores, sockets=sockets)
