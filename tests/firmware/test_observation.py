"""What events of commands tell of platforms, guests and ASIDs; the product holds every command against the oracle."""

from __future__ import annotations

from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command
from snpbook.trace import FirmwareCommand
from tests.firmware.legacy_board import LegacyBoard
from tests.firmware.test_migration import departed
from tests.machines import FREE, GCTX, PAGE, Board


def last(board: Board) -> list[str]:
    event = board.log.events[-1]
    assert isinstance(event, FirmwareCommand)
    return [*map(str, event.states)]


def test_a_guests_life() -> None:
    board, seen = Board(cores=16), []
    board.machine.trace.subscribe(lambda event: seen.append([*map(str, getattr(event, "states", ()))]))
    board.initialise()
    assert [told for told in seen if told] == [
        ["SNP platform: UNINIT -> INIT", "1018 ASIDs: CLEAN -> DIRTY"], ["1018 ASIDs: DIRTY -> CLEAN"],
    ]  # fmt: skip
    seen.clear()
    board.start()
    board.finish()
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert [told for told in seen if told] == [
        ["guest 0x1100000: none -> INIT"],
        ["guest 0x1100000: INIT -> LAUNCH"],
        ["2 ASIDs: CLEAN -> ALLOCATED"],
        ["guest 0x1100000: LAUNCH -> RUNNING", "2 ASIDs: ALLOCATED -> IN_USE"],
        ["guest 0x1100000: RUNNING -> none", "2 ASIDs: IN_USE -> DIRTY"],
    ]


def test_asids_are_told_by_complex() -> None:
    board = Board(cores=16).initialise()
    board.start(asid=7)
    (change,) = board.log.events[-1].states
    assert change.where.tolist() == [[0, 7], [1, 7]]


def test_a_legacy_guests_life() -> None:
    board = LegacyBoard().start()
    handle = board.call(Command.LAUNCH_START).handle
    assert last(board) == ["legacy platform: INIT -> WORKING", f"legacy guest {handle}: UNINIT -> LUPDATE"]
    board.ok(Command.SHUTDOWN)
    assert last(board) == ["legacy platform: WORKING -> UNINIT", f"legacy guest {handle}: LUPDATE -> UNINIT"]


def test_a_message_that_ends_a_guest_tells_so() -> None:
    home, _, _ = departed()
    told = [change for event in home.board.log.of(FirmwareCommand, "SNP_GUEST_REQUEST") for change in event.states]
    assert any(change.what == "guest" and str(change).endswith("RUNNING -> none") for change in told)


def test_what_changes_nothing_tells_nothing() -> None:
    board = Board().initialise()
    board.command(Command.SNP_INIT)
    assert last(board) == []
    board.assign(FREE, FIRMWARE)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE)
    assert last(board) == []
    board.assign(FREE + PAGE, FIRMWARE, count=2)
    board.run(Command.SNP_PAGE_RECLAIM, range((FREE >> 12) + 1, (FREE >> 12) + 3))
    assert last(board) == []
    assert board.psp._before is None
