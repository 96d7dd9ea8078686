"""SNP_PAGE_SET_STATE and SNP_PAGE_UNSMASH: the entries that they leave, their counts, and the events that tell it."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.machines import FREE, GCTX, MIB, PAGE, SYSCFG_FOR_SNP, Board, World

LIST = FREE + 4 * MIB
AREA = 20 * MIB
PRE_GUEST = NewState(assigned=True, asid=1, immutable=True)


def write_list(board: Board, *ranges: tuple[int, int], at: int = LIST) -> None:
    body = b"".join(struct.pack("<QII", base, count, 0) for base, count in ranges)
    board.machine.dram.write(at, struct.pack("<II", len(ranges), 0) + body)


def set_state(board: Board, *ranges: tuple[int, int]) -> Status:
    write_list(board, *ranges)
    return board.command(Command.SNP_PAGE_SET_STATE, length=16, list_paddr=LIST)


def counts_are_right(board: Board) -> None:
    """In every region the count of assigned pages besides its first, by counting them."""
    entries = board.machine.rmp.load(np.arange(board.machine.rmp.entries, dtype=np.uint64))
    for first in range(0, len(entries) - 511, 512):
        head = int(entries[first, 0])
        if not head & 2:
            assert head >> 3 & 0x1FF == sum(int(low) & 1 for low in entries[first + 1 : first + 512, 0]), hex(first)


def test_pages_become_the_hosts_for_good() -> None:
    board = Board().initialise()
    board.assign(AREA, FIRMWARE, count=600)
    board.assign(AREA + 4 * MIB, FIRMWARE, count=2)
    assert set_state(board, (AREA, 513), (AREA + 4 * MIB, 1), (AREA + 8 * MIB, 0)) is Status.SUCCESS
    states = board.machine.rmp.states(range(AREA >> 12, (AREA >> 12) + 600)).tolist()
    assert states == [PageState.HV_FIXED] * 513 + [PageState.FIRMWARE] * 87
    assert board.state(AREA + 4 * MIB) == PageState.HV_FIXED
    raw = board.machine.rmp.load(np.array([(AREA >> 12) + 1], np.uint64))[0].tolist()
    assert raw == [4, 0]
    counts_are_right(board)
    event = board.log.events[-1]
    assert event.changed.tolist() == [*range(AREA >> 12, (AREA >> 12) + 513), AREA + 4 * MIB >> 12]
    assert set(event.before.tolist()) == {PageState.FIRMWARE}
    assert set(event.after.tolist()) == {PageState.HV_FIXED}


def test_all_ranges_pass_before_any_page_changes() -> None:
    board = Board().initialise()
    board.assign(AREA, FIRMWARE, count=3)
    assert set_state(board, (AREA, 2), (AREA + 2 * MIB, 1)) is Status.INVALID_PAGE_STATE
    assert board.state(AREA) == PageState.FIRMWARE
    assert board.log.events[-1].changed is None


def test_the_table_itself_is_skipped_and_what_it_does_not_cover_ignored() -> None:
    board = Board(installed=512 * MIB)
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_BASE, 32 * MIB)
        core.wrmsr(Msr.RMP_END, 33 * MIB - 1)
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    board.ok(Command.SNP_INIT)
    board.assign(33 * MIB, FIRMWARE)
    assert set_state(board, (32 * MIB, 257), (400 * MIB, 9), (1 << 50, 2**32 - 1)) is Status.SUCCESS
    assert board.state(32 * MIB) == PageState.FIRMWARE
    assert board.state(33 * MIB) == PageState.HV_FIXED


def test_a_list_of_255_ranges_fills_its_page() -> None:
    board = Board().initialise()
    board.assign(AREA, FIRMWARE)
    assert set_state(board, (AREA, 1), *[(AREA, 0)] * 254) is Status.SUCCESS
    write_list(board, (AREA, 0), at=LIST + PAGE - 24)
    board.ok(Command.SNP_PAGE_SET_STATE, length=16, list_paddr=LIST + PAGE - 24)
    write_list(board, (AREA, 0), at=LIST + PAGE - 16)
    at_the_end = board.command(Command.SNP_PAGE_SET_STATE, length=16, list_paddr=LIST + PAGE - 16)
    assert at_the_end is Status.INVALID_PARAM


@pytest.mark.parametrize("at", [LIST + PAGE - 4, 1 << 63], ids=hex)
def test_a_list_at_an_odd_place_gets_a_status(at: int) -> None:
    board = Board().initialise()
    status = board.command(Command.SNP_PAGE_SET_STATE, length=16, list_paddr=at)
    assert status is (Status.INVALID_PARAM if at < 1 << 63 else Status.INVALID_ADDRESS)


# SNP_PAGE_UNSMASH.


def smashed() -> Board:
    """512 pages of a launching guest, immutable, at consecutive guest addresses."""
    board = Board().initialise()
    board.start()
    board.assign(AREA, PRE_GUEST, gpa=64 * MIB, count=512)
    return board


def test_unsmash_joins_a_region_that_can_be_launched_and_smashed_again() -> None:
    board = smashed()
    board.ok(Command.SNP_PAGE_UNSMASH, page_paddr=AREA)
    words = board.machine.rmp.load(np.arange(AREA >> 12, (AREA >> 12) + 512, dtype=np.uint64))
    gfn = 64 * MIB >> 12
    assert int(words[0, 0]) == 1 | 2 | 4 | gfn << 12 | 1 << 51 | 1 << 63, "2 MB, count 0, still immutable"
    assert set(words[1:, 0].tolist()) == {1}, "assigned to nobody"
    assert board.machine.rmp.counters(1) == 512
    event = board.log.events[-1]
    assert event.before.tolist() == [PageState.PRE_GUEST] * 512
    assert event.after.tolist() == [PageState.PRE_GUEST] + [PageState.RECLAIM] * 511
    assert board.command(Command.SNP_PAGE_UNSMASH, page_paddr=AREA) is Status.INVALID_PAGE_STATE
    board.ok(Command.SNP_LAUNCH_UPDATE, gctx_paddr=GCTX, page_paddr=AREA, page_type=1, page_size=1)
    codes = board.cpu.psmash(range(AREA >> 12, (AREA >> 12) + 1))
    assert not codes.any()
    assert set(board.machine.rmp.states(range(AREA >> 12, (AREA >> 12) + 512)).tolist()) == {PageState.GUEST_VALID}
    counts_are_right(board)


def test_unsmash_of_what_no_entry_answers_for() -> None:
    board = Board(installed=512 * MIB)
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_BASE, 32 * MIB)
        core.wrmsr(Msr.RMP_END, 36 * MIB - 1)
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    board.ok(Command.SNP_INIT)
    unsmash = {at: board.command(Command.SNP_PAGE_UNSMASH, page_paddr=at) for at in (34 * MIB, 1 << 40, 0x3FFD00000000)}
    assert [*unsmash.values()] == [Status.INVALID_PARAM, Status.INVALID_PAGE_STATE, Status.INVALID_ADDRESS]
    assert board.command(Command.SNP_PAGE_UNSMASH, page_paddr=1018 * MIB) is Status.INVALID_CONFIG, "the last"
    assert board.command(Command.SNP_PAGE_UNSMASH, page_paddr=1020 * MIB) is Status.INVALID_PAGE_STATE


@given(data=st.binary(max_size=64), count=st.integers(0, 2**32 - 1) | st.integers(0, 3), at=st.integers(0, PAGE - 1))
def test_any_list_gets_a_status(data: bytes, count: int, at: int) -> None:
    """And a refused one changes nothing."""
    board = Board().initialise()
    board.assign(AREA, FIRMWARE, count=8)
    board.machine.dram.write(LIST + at, struct.pack("<II", count, 0) + data)
    address = board.put(BUFFERS[Command.SNP_PAGE_SET_STATE], length=16, list_paddr=LIST + at)
    before = World.of(board)
    if board.send(Command.SNP_PAGE_SET_STATE, address) is not Status.SUCCESS:
        assert World.of(board) == before
    board.ok(Command.SNP_SHUTDOWN)
    board.ok(Command.SNP_INIT_EX, init_rmp=1, list_paddr_en=1, list_paddr=LIST + at)
