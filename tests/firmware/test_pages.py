"""SNP_PAGE_RECLAIM and the addresses of buffers: which pages the firmware touches and which it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.firmware.table import COMMANDS
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.pages import PageState
from snpbook.spec.rmp import GFN_SHIFT, GFN_TAG_METADATA, GFN_TAG_SHIFT, IMMUTABLE, VALIDATED
from snpbook.spec.states import PlatformState
from snpbook.spec.status import Status
from tests.firmware.rows import PLACES, Attempt, Row, assert_refused, double, single
from tests.firmware.test_launch import assert_same, one_by_one
from tests.machines import BUFFER, FREE, GCTX, MIB, PAGE, Board, World

PRE_GUEST = NewState(assigned=True, asid=1, immutable=True)
LARGE = NewState(assigned=True, asid=1, immutable=True, large=True)


def set_bits(board: Board, spa: int, low: int) -> None:
    """Set bits of a page's entry in DRAM, as only the firmware could."""
    page = np.array([spa >> 12], np.uint64)
    entry = board.machine.rmp.load(page).copy()
    entry[0, 0] |= np.uint64(low)
    board.machine.rmp.store(page, entry)


def reclaim(
    off: bool = False, page: int = FREE, new: NewState = FIRMWARE, size: int = 0, inside: int = 0, kind: str = "",
    stray: tuple[int, ...] = (),
) -> Attempt:  # fmt: skip
    board = Board().initialise()
    board.assign(FREE, new)
    if kind == "context":
        board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=FREE)
    if kind == "fixed":
        set_bits(board, FREE, IMMUTABLE)
    if off:
        board.psp.state = PlatformState.UNINIT
    return Attempt(board, Command.SNP_PAGE_RECLAIM, {"page": page + inside >> 12, "page_size": size}, stray)


RECLAIM = [
    Row("bit 1", Status.INVALID_PARAM, {"stray": (1,)}),
    Row("bit 11", Status.INVALID_PARAM, {"stray": (11,)}),
    Row("platform UNINIT", Status.INVALID_PLATFORM_STATE, {"off": True}),
    Row("page in the RMP", Status.INVALID_PARAM, {"page": PLACES["rmp"]}),
    Row("page in TSEG", Status.INVALID_ADDRESS, {"page": PLACES["tseg"]}),
    Row("page in ASEG", Status.INVALID_ADDRESS, {"page": PLACES["aseg"]}),
    Row("page above the limit", Status.INVALID_ADDRESS, {"page": PLACES["limit"]}),
    Row("page in no DRAM", Status.INVALID_CONFIG, {"page": PLACES["hole"]}),
    Row("2 MB of a 4 KB page", Status.INVALID_PAGE_SIZE, {"size": 1}),
    Row("4 KB of a 2 MB page", Status.INVALID_PAGE_SIZE, {"new": LARGE}),
    Row("2 MB not aligned", Status.INVALID_ADDRESS, {"new": LARGE, "size": 1, "inside": PAGE}),
    Row("page Context", Status.INVALID_PAGE_STATE, {"kind": "context", "new": FIRMWARE}),
    Row("page HV-Fixed", Status.INVALID_PAGE_STATE, {"kind": "fixed", "new": HYPERVISOR}),
]


@single(RECLAIM)
def test_reclaim_refuses(row: Row) -> None:
    assert_refused(reclaim(**row.options), row.status)


@double(RECLAIM)
def test_reclaim_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(reclaim(**first.options, **second.options), first.status)


def test_reclaim_of_2_mb_across_the_rmp() -> None:
    assert_refused(reclaim(page=PLACES["rmp"] - MIB, size=1), Status.INVALID_PARAM)


@pytest.mark.parametrize("new", [HYPERVISOR, NewState(assigned=True), NewState(assigned=True, asid=1)])
def test_a_page_that_is_not_held_is_a_success_without_effect(new: NewState) -> None:
    assert_refused(reclaim(new=new), Status.SUCCESS)


METADATA = 7 << GFN_SHIFT | GFN_TAG_METADATA << GFN_TAG_SHIFT + GFN_SHIFT


@pytest.mark.parametrize(
    ("new", "extra", "before", "after"),
    [
        (FIRMWARE, 0, PageState.FIRMWARE, PageState.RECLAIM),
        (FIRMWARE, METADATA, PageState.METADATA, PageState.RECLAIM),
        (PRE_GUEST, 0, PageState.PRE_GUEST, PageState.GUEST_INVALID),
        (PRE_GUEST, VALIDATED, PageState.PRE_SWAP, PageState.GUEST_VALID),
        (LARGE, 0, PageState.PRE_GUEST, PageState.GUEST_INVALID),
    ],
)
def test_reclaim_moves_the_page(new: NewState, extra: int, before: PageState, after: PageState) -> None:
    built = reclaim(new=new, size=int(new.large))
    set_bits(built.board, FREE, extra)
    assert built.board.state(FREE) == before
    assert built.issue() is Status.SUCCESS
    assert built.board.state(FREE) == after
    assert built.issue() is Status.SUCCESS, "a second time"
    assert not built.board.cpu.rmpupdate(range(FREE >> 12, (FREE >> 12) + 1), range(1), HYPERVISOR).any() or new.large


@given(states=st.lists(st.sampled_from(["pre-guest", "firmware", "hypervisor", "invalid"]), min_size=1, max_size=6))
def test_a_run_is_the_commands_one_by_one(states: list[str]) -> None:
    assert assert_same(states, Command.SNP_PAGE_RECLAIM) == (len(states), Status.SUCCESS)


def test_a_run_stops_at_a_context() -> None:
    boards = [Board().initialise() for _ in range(2)]
    for board in boards:
        board.assign(FREE, FIRMWARE, 0, 3)
        board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=FREE + PAGE)
    pages = range(FREE >> 12, (FREE >> 12) + 3)
    result = boards[0].run(Command.SNP_PAGE_RECLAIM, pages)
    assert result == one_by_one(boards[1], Command.SNP_PAGE_RECLAIM, pages) == (1, Status.INVALID_PAGE_STATE)
    assert [boards[0].state(FREE + i * PAGE) for i in range(3)] == [
        PageState.RECLAIM, PageState.CONTEXT, PageState.FIRMWARE,
    ]  # fmt: skip


@pytest.mark.parametrize(("start", "done", "status"), [
    (PLACES["rmp"] - 2 * PAGE, 2, Status.INVALID_PARAM),
    (48 * MIB, 0, Status.INVALID_ADDRESS),
    (PLACES["aseg"] - PAGE, 1, Status.INVALID_ADDRESS),
    (64 * MIB - PAGE, 0, Status.INVALID_ADDRESS),
    (64 * MIB, 0, Status.INVALID_CONFIG),
])  # fmt: skip
def test_a_run_stops_at_a_bad_address(start: int, done: int, status: Status) -> None:
    board = Board().initialise()
    assert board.run(Command.SNP_PAGE_RECLAIM, range(start >> 12, (start >> 12) + 4)) == (done, status)


def test_a_run_across_a_hole_in_dram() -> None:
    """Both ends lie in DRAM; what is between does not."""
    board = Board(installed=4 << 30).initialise()
    end = (2 << 30) - 16 * MIB >> 12
    assert board.run(Command.SNP_PAGE_RECLAIM, range(end - 2, (4 << 18) + 1)) == (2, Status.INVALID_ADDRESS)


# Addresses of the command buffer: data accesses, so the RMP is an address that is merely wrong.

BAD_BUFFERS = {
    PLACES["rmp"]: Status.INVALID_ADDRESS,
    PLACES["rmp"] - 4: Status.INVALID_ADDRESS,
    PLACES["tseg"]: Status.INVALID_ADDRESS,
    PLACES["aseg"]: Status.INVALID_ADDRESS,
    PLACES["limit"] - 4: Status.INVALID_ADDRESS,
    (1 << 64) - 8: Status.INVALID_ADDRESS,
    1 << 50: Status.INVALID_ADDRESS,
    PLACES["hole"]: Status.INVALID_CONFIG,
}


WITH_BUFFERS = [c for c in COMMANDS if c.name.startswith("SNP_") and (layout := BUFFERS[c]) and layout.size > 4]


@pytest.mark.parametrize("command", WITH_BUFFERS, ids=lambda c: c.name)
@pytest.mark.parametrize("address", list(BAD_BUFFERS), ids=hex)
def test_command_buffer_at_a_bad_address(command: Command, address: int) -> None:
    board = Board(release="1.58").initialise()
    before = World.of(board)
    assert board.send(command, address) is BAD_BUFFERS[address]
    assert World.of(board) == before


def test_command_buffer_may_cross_pages_and_carry_the_c_bit() -> None:
    board = Board().initialise()
    board.create()
    board.machine.dram.write(BUFFER + PAGE - 4, GCTX.to_bytes(8, "little"))
    assert board.send(Command.SNP_DECOMMISSION, (BUFFER + PAGE - 4) | 1 << 51) is Status.SUCCESS


# The status page of SNP_PLATFORM_STATUS: an output.


def status(off: bool = False, at: int = FREE, new: NewState = FIRMWARE, inside: int = 0) -> Attempt:
    board = Board().initialise()
    board.assign(FREE, new)
    if off:
        board.psp.state = PlatformState.UNINIT
    return Attempt(board, Command.SNP_PLATFORM_STATUS, {"status_paddr": at + inside})


STATUS = [
    Row("crosses its page", Status.INVALID_PARAM, {"inside": PAGE - 31}),
    Row("in the RMP", Status.INVALID_PARAM, {"at": PLACES["rmp"]}),
    Row("in TSEG", Status.INVALID_ADDRESS, {"at": PLACES["tseg"]}),
    Row("in no DRAM", Status.INVALID_CONFIG, {"at": PLACES["hole"]}),
    Row("page Hypervisor", Status.INVALID_PAGE_STATE, {"new": HYPERVISOR}),
    Row("page Guest-Invalid", Status.INVALID_PAGE_STATE, {"new": NewState(assigned=True, asid=1)}),
]


@single(STATUS)
def test_platform_status_refuses(row: Row) -> None:
    assert_refused(status(**row.options), row.status)


@double(STATUS)
def test_platform_status_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(status(**first.options, **second.options), first.status)


def test_platform_status_needs_no_page_state_before_snp() -> None:
    built = status(off=True, new=HYPERVISOR, inside=PAGE - 32)
    assert built.issue() is Status.SUCCESS


def test_platform_status_tells_what_is() -> None:
    fields: dict[str, Any] = {}
    board = Board("genoa").initialise()
    board.start()
    board.assign(FREE, FIRMWARE)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE, **fields)
    raw = board.cpu.read(FREE, 32)
    assert raw[:3] == bytes([1, 55, 1]), "API 1.55, INIT"
    assert raw[3] & 3 == 3, "RMP initialised, alias check complete"
    assert raw[4:8] == (40).to_bytes(4, "little")
    assert raw[8:12] == bytes([8, 0, 0, 0]), "SNP_FEATURE_INFO exists"
    assert raw[12:16] == (1).to_bytes(4, "little"), "one guest is launching"
    tcb = int(board.psp.release.tcb).to_bytes(8, "little")
    assert raw[16:32] == tcb + tcb
    assert board.state(FREE) == PageState.FIRMWARE


def test_command_buffer_across_the_end_of_a_dram_region() -> None:
    """On a machine that reaches the hole at 0xFD00000000; its memory costs nothing until it is touched."""
    board = Board(installed=1 << 40)
    edge = 0xFD_0000_0000
    assert board.machine.map.dram[1][1] == edge
    assert board.send(Command.SNP_PLATFORM_STATUS, edge - 4) is Status.INVALID_CONFIG
    assert board.send(Command.SNP_PLATFORM_STATUS, edge) is Status.INVALID_CONFIG
