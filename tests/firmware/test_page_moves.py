"""Every edge of the page table that is the firmware's: a command goes it, from worlds of the oracle.

That no command goes another way is what `check_page_moves` sees to on every board.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import WRITES_COMMAND_BUFFER
from snpbook.spec.pages import PageState
from snpbook.spec.transitions import PAGE_MOVES, PAGE_TRANSITIONS, UNTESTED_BUFFERS, Mover
from snpbook.trace import FirmwareCommand
from tests.firmware.test_migration import departed
from tests.firmware.worlds import MEMORY, realise
from tests.machines import BUFFER, Board
from tests.observers.page_moves import Edge, check_page_moves, edges
from tests.reference import firmware_legacy, firmware_snp
from tests.reference.firmware_cases import case
from tests.reference.firmware_rows import Change, Spec, ask, both, page, part, world
from tests.reference.firmware_world import BUFFER as BUFFER_PAGE
from tests.reference.firmware_world import GCTX, SRC

SPECS = {**firmware_snp.SPECS, **firmware_legacy.SPECS}
METADATA = page("src_paddr", state="METADATA", owner=GCTX)
FREE = page("dst_paddr", state="FIRMWARE")
OTHERS: dict[str, list[Change]] = {
    "SNP_PAGE_SWAP_OUT": [both(ask(page_type=1), METADATA)],
    "SNP_PAGE_SWAP_IN": [both(ask(page_type=1), part("mdata", metadata=True, validated=False), FREE)],
    "SNP_PAGE_MOVE": [page("src_paddr", state="PRE_GUEST"), both(METADATA, FREE)],
    "SNP_PAGE_RECLAIM": [page(SRC, state=state) for state in ("FIRMWARE", "METADATA", "PRE_SWAP")],
    "SNP_PAGE_UNSMASH": [
        both(*(page(SRC + number * 0x1000, state="PRE_SWAP") for number in range(512))),
    ],
}
"""Ways of a command besides that of its valid case."""
ONLY_BY_MESSAGE = {(Command.SNP_GUEST_REQUEST, PageState.CONTEXT, PageState.FIRMWARE)}
ALL = {(command, *way) for command, ways in PAGE_MOVES.items() for way in ways}


def issue(command: str, spec: Spec, *changes: Change) -> set[Edge]:
    """The edges that a case goes."""
    made = case(command, spec, "a way", *changes)
    board = realise(made.world)
    if command in MEMORY:
        MEMORY[command](board, made.world, made.request)
    if spec.size:
        board.machine.dram.write(BUFFER, spec.encode(made.request))
    assert board.send(spec.number, BUFFER if spec.size else 0) == made.status == 0, made
    return last_edges(board)


def last_edges(board: Board) -> set[Edge]:
    event = board.log.events[-1]
    assert isinstance(event, FirmwareCommand)
    return edges(event)


def after_a_shutdown(command: str) -> Iterator[tuple[Change, ...]]:
    """SNP off again, the buffer's page in each state, for a command that every legacy state admits."""
    for state in (one.source.name for one in UNTESTED_BUFFERS):
        yield world(snp="UNINIT"), page(BUFFER_PAGE, state=state, **{"owner": GCTX} if state == "METADATA" else {})


@pytest.mark.parametrize("command", sorted({edge[0].name for edge in ALL - ONLY_BY_MESSAGE}))
def test_every_edge_is_gone(command: str) -> None:
    wanted = {edge for edge in ALL if edge[0] is Command[command]}
    ways: list[tuple[Change, ...]] = [(), *((change,) for change in OTHERS.get(command, ()))]
    if Command[command] in WRITES_COMMAND_BUFFER:
        ways += after_a_shutdown(command)
    assert set[Edge]().union(*(issue(command, SPECS[command], *way) for way in ways)) == wanted


def test_an_exported_guest_leaves_a_firmware_page() -> None:
    home, _, _ = departed()
    asked = home.board.log.of(FirmwareCommand, "SNP_GUEST_REQUEST")
    assert set[Edge]().union(*map(edges, asked)) == ONLY_BY_MESSAGE


def test_the_watch_sees_a_stray() -> None:
    def event(name: str, before: PageState, after: PageState) -> FirmwareCommand:
        old, new = (np.array([state], np.uint8) for state in (before, after))
        return FirmwareCommand(name=name, status=0, changed=np.array([7]), before=old, after=new)

    for command, before, after in product(("SNP_PAGE_RECLAIM", "SNP_PAGE_MOVE"), PageState, PageState):
        if before is after or (before, after) in PAGE_MOVES[Command[command]]:
            check_page_moves(event(command, before, after))
        else:
            with pytest.raises(AssertionError, match=before.name):
                check_page_moves(event(command, before, after))


def test_edges_are_told_once() -> None:
    rows = [(one.source, one.target, one.by) for one in (*PAGE_TRANSITIONS, *UNTESTED_BUFFERS)]
    assert len(rows) == len(set(rows))
    assert {one.by for one in PAGE_TRANSITIONS if one.mover is not Mover.FIRMWARE} == {"RMPUPDATE", "PVALIDATE"}
