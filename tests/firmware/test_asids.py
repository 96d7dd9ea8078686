"""ASIDs: clean, allocated, in use, dirty, per core complex; WBINVD and DF_FLUSH between two guests."""

from __future__ import annotations

import pytest

from snpbook.spec.asids import ASID_TRANSITIONS, AsidEvent, AsidState, GuestKind
from snpbook.spec.commands import Command
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.states import GuestState
from snpbook.spec.status import FirmwareRefusal, Status
from tests.machines import GCTX, PAGE, Board

SECOND, LIST = GCTX + PAGE, GCTX + 2 * PAGE


def states(board: Board, asid: int = 1) -> list[str]:
    return [AsidState(state).name for state in board.psp.asids.states[:, asid].tolist()]


def recreate(board: Board, asid: int = 1) -> Status:
    """A second guest that wants the ASID of the first."""
    board.create(SECOND)
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=SECOND, policy=DEFAULT_POLICY)
    return board.command(Command.SNP_ACTIVATE, gctx_paddr=SECOND, asid=asid)


def test_from_init_to_the_next_guest() -> None:
    board = Board(cores=16).initialise()
    assert states(board) == ["CLEAN", "CLEAN"]
    board.start()
    assert states(board) == ["ALLOCATED", "ALLOCATED"]
    board.finish()
    assert states(board) == ["IN_USE", "IN_USE"]
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert states(board) == ["DIRTY", "DIRTY"]
    assert board.machine.encryption.has_key(1), "the key stays in its slot"
    assert recreate(board) is Status.DF_FLUSH_REQUIRED
    assert board.command(Command.SNP_DF_FLUSH) is Status.WBINVD_REQUIRED
    assert states(board) == ["DIRTY", "DIRTY"]
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    assert states(board) == ["CLEAN", "CLEAN"]
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=SECOND, asid=1)


def test_a_guest_runs_on_the_complexes_that_activate_ex_lists() -> None:
    """Further ones come with further calls, before and after the launch is finished."""
    board = Board(cores=24).initialise()
    board.start(asid=0)

    def activate(core: int) -> None:
        board.machine.dram.write(LIST, core.to_bytes(4, "little"))
        board.ok(Command.SNP_ACTIVATE_EX, length=0x20, gctx_paddr=GCTX, asid=1, numids=1, ids_paddr=LIST)

    activate(9)
    assert board.machine.runnable == {}, "allocated"
    board.finish()
    assert board.machine.runnable == {1: {1}}
    activate(23)
    assert board.machine.runnable == {1: {1, 2}}
    assert [core.ccx for core in board.machine.cores] == [0] * 8 + [1] * 8 + [2] * 8
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert board.machine.runnable == {}


def test_a_launch_given_up_leaves_its_asid_clean() -> None:
    board = Board().initialise()
    board.start()
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert states(board) == ["CLEAN"]
    assert recreate(board) is Status.SUCCESS


def test_df_flush_cleans_each_complex_whose_cores_are_done() -> None:
    board = Board(cores=16).initialise()
    board.start()
    board.finish()
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    for core in board.machine.cores[:8]:
        core.wbinvd_done = True
    assert board.command(Command.SNP_DF_FLUSH) is Status.WBINVD_REQUIRED
    assert states(board) == ["CLEAN", "DIRTY"], "also where the command is refused"
    assert recreate(board) is Status.DF_FLUSH_REQUIRED
    board.machine.cores[8].wbinvd_done = True
    assert board.command(Command.SNP_DF_FLUSH) is Status.WBINVD_REQUIRED, "one core is not the complex"


def test_one_wbinvd_serves_until_an_asid_is_released() -> None:
    board = Board().initialise()
    board.ok(Command.SNP_DF_FLUSH)
    board.ok(Command.SNP_DF_FLUSH)
    board.start()
    board.finish()
    board.ok(Command.SNP_DF_FLUSH)
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert board.command(Command.SNP_DF_FLUSH) is Status.WBINVD_REQUIRED


def test_df_flush_leaves_living_guests_alone() -> None:
    board = Board().initialise()
    board.start()
    board.finish()
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    assert states(board) == ["IN_USE"]
    assert board.machine.runnable == {1: {0}}


@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_each_guest_has_its_own_key(name: str) -> None:
    """The same plaintext under two guests, and under two lives of one ASID, gives three ciphertexts."""
    board = Board(name).initialise()
    board.start()
    seen = []
    zero = bytes(PAGE)
    board.add(18 << 20, 0x1000)
    seen.append(board.cpu.read(18 << 20, PAGE))
    board.create(SECOND)
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=SECOND, policy=DEFAULT_POLICY)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=SECOND, asid=2)
    board.add(19 << 20, 0x1000, asid=2, gctx_paddr=SECOND)
    seen.append(board.cpu.read(19 << 20, PAGE))
    assert len({*seen, zero}) == 3
    assert board.psp.context(SECOND).state is GuestState.LAUNCH


# The table and the ranges, without a machine's commands.

FIRE = {
    AsidEvent.INITIALISE: lambda asids: asids.all_dirty(),
    AsidEvent.FLUSH: lambda asids: asids.df_flush(),
    AsidEvent.ACTIVATE_LAUNCHING: lambda asids: asids.activate(5, running=False),
    AsidEvent.ACTIVATE_RUNNING: lambda asids: asids.activate(5, running=True),
    AsidEvent.FINISH: lambda asids: asids.finish(5),
    AsidEvent.RELEASE: lambda asids: asids.release(5),
}


@pytest.mark.parametrize("event", AsidEvent)
@pytest.mark.parametrize("state", AsidState)
def test_every_event_in_every_state(event: AsidEvent, state: AsidState) -> None:
    board = Board(cores=16)
    board.cpu.wbinvd()
    asids = board.psp.asids
    asids.states[0, 5] = state
    FIRE[event](asids)
    assert asids.states[0, 5] == ASID_TRANSITIONS.get((state, event), state)
    left = state is AsidState.IN_USE and event is AsidEvent.RELEASE
    done = [core.wbinvd_done for core in board.machine.cores]
    assert done == ([False] * 8 + [True] * 8 if left else [event is not AsidEvent.INITIALISE] * 16)


def test_activation_on_some_complexes() -> None:
    board = Board(cores=16).initialise()
    asids = board.psp.asids
    asids.activate(5, running=False, complexes=[1])
    assert states(board, 5) == ["CLEAN", "ALLOCATED"]
    asids.activate(5, running=True, complexes=[0])
    asids.finish(5)
    assert states(board, 5) == ["IN_USE", "IN_USE"]
    assert not asids.all_clean


@pytest.mark.parametrize(
    ("hidden", "snp", "es"), [(0, (1, 99), (1, 99)), (7, (1, 7), (8, 99)), (98, (1, 98), (99, 99))]
)
def test_whose_asids(hidden: int, snp: tuple[int, int], es: tuple[int, int]) -> None:
    """Milan: 509 ASIDs, those below 100 for SEV-ES and SNP; ciphertext hiding parts these two."""
    asids = Board().psp.asids
    asids.hidden = hidden
    for kind, (first, last) in {GuestKind.SNP: snp, GuestKind.SEV_ES: es, GuestKind.SEV: (100, 509)}.items():
        for asid in (0, first - 1, first, last, last + 1, 510):
            if first <= asid <= last:
                asids.check_activate(asid, 0, kind=kind)
            else:
                with pytest.raises(FirmwareRefusal) as refused:
                    asids.check_activate(asid, 0, kind=kind)
                assert refused.value.status is Status.INVALID_ASID


def test_hiding_may_leave_nothing_to_sev_es() -> None:
    asids = Board().psp.asids
    asids.hidden = 99
    assert len(asids.owned_by(GuestKind.SEV_ES)) == 0
