"""The life of a page against the model: every row is carried out by the instruction or the command that it names."""

from collections.abc import Callable

import pytest

from snpbook.hardware.attempts import Order, attempt
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.hardware.workbench import PLAY, Workbench
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.transitions import PAGE_TRANSITIONS, Mover, Transition
from tests.machines import FREE, GCTX, Board

P = PLAY.start
OURS, OTHER, FROZEN = NewState(True, 1), NewState(True, 1), NewState(True, 1, immutable=True)
NEW = {
    PageState.GUEST_INVALID: OURS, PageState.PRE_GUEST: FROZEN, PageState.PRE_SWAP: FROZEN,
    PageState.FIRMWARE: FIRMWARE, PageState.HYPERVISOR: HYPERVISOR,
}  # fmt: skip
SOFTWARE = [one for one in PAGE_TRANSITIONS if one.mover is not Mover.FIRMWARE and one.source is not PageState.RECLAIM]


def brought_to(state: PageState) -> Workbench:
    """A workbench whose first page is in a state that software can bring it to."""
    bench = Workbench()
    if state is not PageState.HYPERVISOR:
        attempt(bench, Order("RMPUPDATE", range(P, P + 1), 0x10, OURS))
    if state is PageState.GUEST_VALID:
        attempt(bench, Order("PVALIDATE", range(P, P + 1), 0x10, asid=1))
    assert bench.machine.rmp.state(P) is state
    return bench


@pytest.mark.parametrize("one", SOFTWARE, ids=lambda one: f"{one.source.name}-{one.target.name}-{one.by}")
def test_instructions(one: Transition) -> None:
    bench = brought_to(one.source)
    gfn = 0x11 if (one.source, one.target) == (PageState.GUEST_VALID, PageState.GUEST_INVALID) else 0x10
    if one.by == "PVALIDATE":
        validate = one.target is PageState.GUEST_VALID
        made = attempt(bench, Order("PVALIDATE", range(P, P + 1), 0x10, asid=1, validate=validate))
    else:
        given = NEW[one.target]
        made = attempt(bench, Order("RMPUPDATE", range(P, P + 1), gfn if given.asid else 0, given))
    assert made.answers[0].ok
    assert bench.machine.rmp.state(P) is one.target


def test_no_instruction_of_the_host_leads_to_guest_valid() -> None:
    assert {one.by for one in PAGE_TRANSITIONS if one.target is PageState.GUEST_VALID} == {
        "PVALIDATE", "SNP_LAUNCH_UPDATE", "SNP_PAGE_MOVE", "SNP_PAGE_RECLAIM",
    }  # fmt: skip


def launch_update(board: Board) -> int:
    board.start()
    board.add(FREE, 0x1000)
    return FREE


def create(board: Board) -> int:
    board.create()
    return GCTX


def decommission(board: Board) -> int:
    board.create()
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    return GCTX


def reclaim(new: NewState) -> Callable[[Board], int]:
    def act(board: Board) -> int:
        board.assign(FREE, new, 0x1000 if new.asid else 0)
        board.ok(Command.SNP_PAGE_RECLAIM, page=FREE >> 12)
        return FREE

    return act


@pytest.mark.parametrize(
    ("act", "source", "target"),
    [
        (launch_update, PageState.PRE_GUEST, PageState.GUEST_VALID),
        (create, PageState.FIRMWARE, PageState.CONTEXT),
        (decommission, PageState.CONTEXT, PageState.FIRMWARE),
        (reclaim(FIRMWARE), PageState.FIRMWARE, PageState.RECLAIM),
        (reclaim(FROZEN), PageState.PRE_GUEST, PageState.GUEST_INVALID),
    ],
)
def test_commands(act: Callable[[Board], int], source: PageState, target: PageState) -> None:
    board = Board().initialise()
    assert board.state(act(board)) == target
    assert any((one.source, one.target, one.mover) == (source, target, Mover.FIRMWARE) for one in PAGE_TRANSITIONS)


def test_reclaimed_pages_go_back_and_frozen_valid_ones_stay_valid() -> None:
    board = Board().initialise()
    page = launch_update(board)
    board.assign(page, FROZEN, 0x1000)
    assert board.state(page) == PageState.PRE_SWAP
    board.ok(Command.SNP_PAGE_RECLAIM, page=page >> 12)
    assert board.state(page) == PageState.GUEST_VALID
    board.assign(FREE + 0x200000, FIRMWARE)
    board.ok(Command.SNP_PAGE_RECLAIM, page=FREE + 0x200000 >> 12)
    board.assign(FREE + 0x200000, HYPERVISOR)
    assert board.state(FREE + 0x200000) == PageState.HYPERVISOR
