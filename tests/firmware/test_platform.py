"""SNP_INIT_EX: the machine it demands, check by check, the table that it builds, and its newer switches."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.states import PlatformState
from snpbook.spec.status import Status
from tests.firmware.rows import PLACES, Attempt, Row, assert_refused, double, single
from tests.machines import BUFFER, FREE, GCTX, MIB, PAGE, SYSCFG_FOR_SNP, Board, World

MFDM, ENCRYPTION, SNP, VMPL = (1 << bit for bit in (19, 23, 24, 25))
LIST = FREE + 5 * PAGE


def init_ex(
    stray: tuple[int, ...] = (), on: bool = False, syscfg: dict[int, int] | None = None, hwcr: tuple[int, int] = (1, 1),
    rmp: tuple[int, int] = (0, 0), differs: int = 0, hsave: int = 0, init_rmp: int = 1, listed: int | None = None,
) -> Attempt:  # fmt: skip
    """SNP_INIT_EX on a machine whose registers are as the kernel leaves them, but for what is asked for."""
    board = Board()
    for core in board.machine.cores:
        core.set_by_bios({Msr.HWCR: hwcr[core.number]})
        core.wrmsr(Msr.RMP_BASE, core.rdmsr(Msr.RMP_BASE) + rmp[0] + differs * core.number)
        core.wrmsr(Msr.RMP_END, core.rdmsr(Msr.RMP_END) + rmp[1])
        core.wrmsr(Msr.VM_HSAVE_PA, hsave * core.number)
        core.wrmsr(Msr.SYSCFG, (syscfg or {}).get(core.number, SYSCFG_FOR_SNP))
    if on:
        board.psp.state = PlatformState.INIT
    fields = {"init_rmp": init_rmp}
    if listed is not None:
        fields |= {"list_paddr_en": 1, "list_paddr": listed}
    return Attempt(board, Command.SNP_INIT_EX, fields, stray)


def both(value: int) -> dict[int, int]:
    return {0: value, 1: value}


ROWS = [
    Row("reserved flag", Status.INVALID_PARAM, {"stray": (2,)}),
    Row("reserved tail", Status.INVALID_PARAM, {"stray": (0x10 * 8,)}),
    Row("already INIT", Status.INVALID_PLATFORM_STATE, {"on": True}),
    Row("no RMP to keep", Status.RMP_INIT_REQUIRED, {"init_rmp": 0}),
    Row("SYSCFG without encryption", Status.INVALID_CONFIG, {"syscfg": both(SYSCFG_FOR_SNP & ~ENCRYPTION)}),
    Row("SYSCFG without SNP", Status.INVALID_CONFIG, {"syscfg": both(SYSCFG_FOR_SNP & ~SNP)}),
    Row("SYSCFG without VMPL", Status.INVALID_CONFIG, {"syscfg": both(SYSCFG_FOR_SNP & ~VMPL)}),
    Row("one core without SNP", Status.INVALID_CONFIG, {"syscfg": {1: SYSCFG_FOR_SNP & ~SNP}}),
    Row("SYSCFG differs", Status.INVALID_CONFIG, {"syscfg": {1: SYSCFG_FOR_SNP | 1 << 20}}),
    Row("SYSCFG without MFDM", Status.INVALID_CONFIG, {"syscfg": both(SYSCFG_FOR_SNP & ~MFDM)}),
    Row("HWCR differs", Status.INVALID_CONFIG, {"hwcr": (1, 3)}),
    Row("SMM not locked", Status.INVALID_CONFIG, {"hwcr": (0, 0)}),
    Row("RMP above the address limit", Status.INVALID_ADDRESS, {"rmp": (0x3FFCFD100000, 0x3FFCFD100000)}),
    Row("RMP bounds differ", Status.INVALID_CONFIG, {"differs": MIB}),
    Row("RMP base unaligned", Status.INVALID_CONFIG, {"rmp": (0x8000, 0)}),
    Row("RMP end unaligned", Status.INVALID_CONFIG, {"rmp": (0, -0x8000)}),
    Row("RMP empty", Status.INVALID_CONFIG, {"rmp": (MIB, 0)}),
    Row("RMP with the C-bit", Status.UNSUPPORTED, {"rmp": (1 << 51, 1 << 51)}),
    Row("RMP in no DRAM", Status.INVALID_CONFIG, {"rmp": (1 << 30, 1 << 30)}),
    Row("RMP leaves DRAM", Status.INVALID_CONFIG, {"rmp": (16 * MIB, 17 * MIB)}),
    Row("VM_HSAVE_PA on a core", Status.INVALID_CONFIG, {"hsave": 0x5000}),
    Row("list in the RMP", Status.INVALID_ADDRESS, {"listed": PLACES["rmp"]}),
    Row("list in no DRAM", Status.INVALID_CONFIG, {"listed": PLACES["hole"]}),
]


@single(ROWS)
def test_init_refuses(row: Row) -> None:
    assert_refused(init_ex(**row.options), row.status)


@double(ROWS)
def test_init_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(init_ex(**first.options, **second.options), first.status)


def test_a_list_needs_init_rmp() -> None:
    """The RMP has been built before, so that INIT_RMP = 0 alone would do."""
    built = init_ex(init_rmp=0, listed=LIST, hsave=0x5000)
    built.board.psp.rmp_tcb = built.board.psp.current_tcb
    assert_refused(built, Status.INVALID_PARAM)


def test_init_without_init_rmp_keeps_all_page_states() -> None:
    """VM_HSAVE_PA matters only where the table is built."""
    built = init_ex(init_rmp=0, hsave=0x5000)
    built.board.psp.rmp_tcb = built.board.psp.current_tcb
    built.board.machine.dram.write(PLACES["rmp"], b"\x5a" * MIB)
    assert built.issue() is Status.SUCCESS
    assert built.board.machine.dram.read(PLACES["rmp"], MIB) == b"\x5a" * MIB


def test_init_leaves_every_asid_dirty_and_wbinvd_to_do() -> None:
    built = init_ex()
    built.board.cpu.wbinvd()
    built.board.psp.guest_count = 3
    assert built.issue() is Status.SUCCESS
    assert built.board.psp.state is PlatformState.INIT
    assert built.board.psp.guest_count == 0
    assert set(built.board.psp.asids.states.reshape(-1).tolist()) == {1}
    assert built.board.command(Command.SNP_DF_FLUSH) is Status.WBINVD_REQUIRED
    assert_refused(built, Status.INVALID_PLATFORM_STATE)


# The table.


def expected_states(board: Board, fixed: Callable[[int], bool]) -> list[PageState]:
    """Page by page, from the memory map: the sheet's order of filling, told as a decision."""
    memory, entries = board.machine.map, board.machine.rmp.entries

    def state(page: int) -> PageState:
        spa = page << 12
        if memory.rmp.base <= spa <= memory.rmp.end:
            return PageState.FIRMWARE
        dram = any(start <= spa < stop for start, stop in memory.dram)
        smm = memory.tseg[0] <= spa < memory.tseg[1] or 0xA0000 <= spa < 0xC0000
        hole = 0xFD00000000 <= spa < 0xFE00000000
        return PageState.HV_FIXED if not dram or smm or hole or fixed(page) else PageState.HYPERVISOR

    return [state(page) for page in range(entries)]


def build(ranges: bytes | None = None, count: int | None = None, installed: int = 64 * MIB) -> Board:
    board = Board(installed=installed)
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    board.machine.dram.write(board.machine.map.rmp.base, b"\xee" * (2 * MIB if installed > 64 * MIB else MIB))
    fields = {"init_rmp": 1}
    if ranges is not None:
        header = struct.pack("<II", len(ranges) // 16 if count is None else count, 0)
        board.machine.dram.write(LIST, header + ranges)
        fields |= {"list_paddr_en": 1, "list_paddr": LIST}
    board.ok(Command.SNP_INIT_EX, **fields)
    return board


def entry(base: int, pages: int, reserved: int = 0) -> bytes:
    return struct.pack("<QII", base, pages, reserved)


def check_table(board: Board, fixed: Callable[[int], bool] = lambda page: False) -> None:
    entries = board.machine.rmp.entries
    assert board.machine.rmp.states(range(entries)).tolist() == expected_states(board, fixed)
    words = board.machine.rmp.load(np.arange(entries, dtype=np.uint64))
    assert not words[:, 1].any(), "no permissions"
    base = board.machine.map.rmp.base
    assert board.machine.dram.read(base, 0x4000) == bytes(0x4000), "no counters"
    assigned = words[:, 0] & np.uint64(1)
    for first in range(0, entries - 511, 512):
        count = int(words[first, 0]) >> 3 & 0x1FF
        assert count == assigned[first + 1 : first + 512].sum(), f"subpage count of {first:#x}"


def test_table_of_a_small_machine() -> None:
    check_table(build())


@pytest.mark.parametrize("installed", [4 << 30, 2 << 30], ids=["4 GiB", "2 GiB"])
def test_table_of_a_machine_with_a_hole(installed: int) -> None:
    check_table(build(installed=installed))


def test_listed_ranges_are_fixed_but_for_the_rmp() -> None:
    rmp = PLACES["rmp"] >> 12
    board = build(entry(20 * MIB, 3) + entry(30 * MIB, 0) + entry(PLACES["rmp"] - PAGE, 2) + entry(1 << 45, 9))
    listed = {*range(20 * MIB >> 12, (20 * MIB >> 12) + 3), rmp - 1}
    check_table(board, lambda page: page in listed)


@pytest.mark.parametrize("bad", [entry(31 * MIB + 8, 1), entry(31 * MIB, 1, reserved=1)], ids=["unaligned", "reserved"])
def test_a_list_counts_up_to_its_first_bad_entry(bad: bytes) -> None:
    """So does firmware 1.55.25: it does not look at what reading the list returned."""
    board = build(entry(20 * MIB, 3) + bad + entry(25 * MIB, 1))
    check_table(board, lambda page: 0 <= page - (20 * MIB >> 12) < 3)


@pytest.mark.parametrize(("count", "used"), [(255, True), (256, False), (1 << 31, False)])
def test_a_list_of_more_than_a_page_counts_for_nothing(count: int, used: bool) -> None:
    board = build(entry(20 * MIB, 3) + entry(20 * MIB, 0) * 254, count=count)
    check_table(board, lambda page: used and 0 <= page - (20 * MIB >> 12) < 3)


def test_the_raw_entries_are_the_documented_ones() -> None:
    board = build()
    assert board.machine.rmp.load(np.array([PLACES["rmp"] >> 12 | 1], np.uint64))[0, 0] == 0x8000000000000005
    assert board.machine.rmp.load(np.array([0xA1], np.uint64))[0, 0] == 0x4
    address = PLACES["rmp"] + 0x4000 + 16 * 0xA1
    assert board.cpu.read(address, 16) == b"\4" + bytes(15), "an entry lies where the sheet says"


def test_init_again_after_shutdown_builds_anew() -> None:
    board = build()
    board.assign(FREE, FIRMWARE)
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    board.ok(Command.SNP_SHUTDOWN)
    assert board.state(FREE) == PageState.FIRMWARE, "a shutdown keeps page states"
    board.ok(Command.SNP_INIT)
    check_table(board)


def test_nothing_else_is_written() -> None:
    built = init_ex()
    before = World.of(built.board)
    assert built.issue() is Status.SUCCESS
    after = World.of(built.board)
    rmp, buffer = PLACES["rmp"] // (2 * MIB), BUFFER // (2 * MIB)
    changed = {
        n for n in after.memory if n not in before.memory or not np.array_equal(after.memory[n], before.memory[n])
    }
    assert changed == {rmp, buffer}


def test_a_table_that_does_not_cover_itself_cannot_be_built() -> None:
    board = Board(installed=512 * MIB)
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_END, core.rdmsr(Msr.RMP_BASE) + MIB - 1)
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    assert_refused(Attempt(board, Command.SNP_INIT), Status.RMP_INITIALIZATION_FAILED)


# The switches of newer firmware.


def switched(release: str = "1.58", **fields: int) -> Attempt:
    """SNP_INIT_EX on a machine whose firmware is of a release."""
    board = Board(release=release)
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    return Attempt(board, Command.SNP_INIT_EX, {"init_rmp": 1, **fields})


@pytest.mark.parametrize("field", ["rapl_dis", "ciphertext_hiding_en", "tio_en", "max_snp_asid"])
@pytest.mark.parametrize("release", ["1.55", "1.58"])
def test_older_firmware_takes_the_switches_for_reserved_bits(release: str, field: str) -> None:
    attempt = switched(release, **{field: 1})
    status = attempt.issue()
    reserved = "reserved" in attempt.board.log.events[-1].reason
    assert reserved == (release == "1.55")
    assert status == (Status.INVALID_PARAM if release == "1.55" else {"rapl_dis": 0, "tio_en": 0x15}.get(field, 0x16))


def test_trusted_io_is_refused_by_name() -> None:
    attempt = switched(tio_en=1)
    assert_refused(attempt, Status.UNSUPPORTED)
    assert "trusted I/O" in attempt.board.log.events[-1].reason


@pytest.mark.parametrize("limit", [0, 100])
def test_hidden_asids_are_those_of_snp_guests(limit: int) -> None:
    assert_refused(switched(ciphertext_hiding_en=1, max_snp_asid=limit), Status.INVALID_PARAM)


def test_ciphertext_hiding_parts_the_asids_and_a_shutdown_joins_them() -> None:
    attempt = switched(ciphertext_hiding_en=1, max_snp_asid=7, rapl_dis=1)
    board = attempt.board
    assert attempt.issue() is Status.SUCCESS
    assert board.machine.hidden_asids == 7
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    board.start(asid=0)
    assert board.command(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=8) is Status.INVALID_ASID
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=7)
    board.assign(FREE, FIRMWARE)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE)
    assert board.cpu.read(FREE + 8, 1)[0] == 0x78, "feature info, RAPL off, hiding possible, hiding on"
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    board.ok(Command.SNP_SHUTDOWN)
    assert board.machine.hidden_asids == 0
    assert board.psp.platform_info & 0x18 == 0


# What a host may ask.

FEATURES = {"1.51": 0x02, "1.55": 0x03, "1.58": 0x203F}
"""ECX of index 0 by the sheet: VLEK, X86_SNP_SHUTDOWN, RAPL, hiding, XTS, CXL; VERIFY_MITIGATION."""


@pytest.mark.parametrize("release", FEATURES)
def test_feature_info(release: str) -> None:
    board = Board(release=release)
    board.ok(Command.SNP_FEATURE_INFO, length=16, feature_info_paddr=FREE)
    assert struct.unpack("<4I", board.cpu.read(FREE, 16)) == (1, 1, FEATURES[release], 0)
    board.ok(Command.SNP_FEATURE_INFO, length=16, ecx_in=1, feature_info_paddr=FREE + 16)
    assert struct.unpack("<4I", board.cpu.read(FREE + 16, 16)) == (0x1FF, 0, 0, 0)


def test_verify_mitigation() -> None:
    board = Board(release="1.58")
    fields = {"length": 0x40, "dst_paddr_en": 1, "dst_paddr": FREE}
    board.ok(Command.SNP_VERIFY_MITIGATION, subcommand=0, vector=1, **fields)
    assert board.cpu.read(FREE, 20) == struct.pack("<QQI", 0, 1, 0), "asked only"
    board.ok(Command.SNP_VERIFY_MITIGATION, subcommand=1, vector=3, **fields)
    assert board.cpu.read(FREE, 20) == struct.pack("<QQI", 1, 1, 1), "one is verified, one is unknown"
    board.ok(Command.SNP_VERIFY_MITIGATION, subcommand=1, vector=1, **fields)
    assert board.cpu.read(FREE, 20) == struct.pack("<QQI", 1, 1, 0)
    assert board.psp.mitigations == 1


@pytest.mark.parametrize("fields", [{"length": 0x3F}, {"subcommand": 2}, {"src_paddr_en": 1}], ids=str)
def test_verify_mitigation_refuses(fields: dict[str, int]) -> None:
    board = Board(release="1.58")
    assert_refused(Attempt(board, Command.SNP_VERIFY_MITIGATION, {"length": 0x40, **fields}), Status.INVALID_PARAM)
