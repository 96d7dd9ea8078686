"""SNP_SHUTDOWN[_EX]: what goes, what stays, and SNP on again behind it."""

from __future__ import annotations

import pytest

from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.platform import Fault
from snpbook.spec.states import PlatformState
from snpbook.spec.status import Status
from tests.firmware.rows import Attempt, assert_refused
from tests.machines import FREE, GCTX, SYSCFG_FOR_SNP, Board

SNP_EN = 1 << 24


def idle() -> Board:
    """A board whose only guest has come and gone, with a page that the firmware still has."""
    board = Board().initialise()
    board.assign(FREE, FIRMWARE)
    board.start()
    board.finish()
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    return board


def flushed() -> Board:
    board = idle()
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    return board


def shut_down(board: Board, **bits: int) -> None:
    board.ok(Command.SNP_SHUTDOWN_EX, length=8, **bits)


def test_what_a_guest_leaves_must_be_flushed_first() -> None:
    assert_refused(Attempt(idle(), Command.SNP_SHUTDOWN), Status.DF_FLUSH_REQUIRED)
    flushed().ok(Command.SNP_SHUTDOWN)


@pytest.mark.parametrize("running", [False, True])
def test_a_guest_keeps_snp_on(running: bool) -> None:
    board = Board().initialise()
    board.start()
    if running:
        board.finish()
    board.cpu.wbinvd()
    board.ok(Command.SNP_DF_FLUSH)
    assert_refused(Attempt(board, Command.SNP_SHUTDOWN), Status.DF_FLUSH_REQUIRED)


def test_so_does_an_initialisation_without_a_flush() -> None:
    board = Board()
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    board.ok(Command.SNP_INIT)
    assert_refused(Attempt(board, Command.SNP_SHUTDOWN), Status.DF_FLUSH_REQUIRED)


def test_a_plain_shutdown_keeps_table_keys_iommu_and_masks() -> None:
    board = flushed()
    board.ok(Command.SNP_CONFIG, reported_tcb=0, mask_chip_id=1)
    shut_down(board)
    psp, machine = board.psp, board.machine
    assert (psp.state, psp.rmp_built, psp.mask_chip_id) == (PlatformState.UNINIT, True, True)
    assert (machine.iommu.snp_enabled, machine.encryption.has_key(1), machine.snp_enabled) == (True, True, True)
    assert board.state(FREE) == PageState.FIRMWARE
    board.ok(Command.SNP_INIT_EX, init_rmp=0)
    assert board.state(FREE) == PageState.FIRMWARE, "the table was kept"


def test_the_iommu_bit_forgets_the_table() -> None:
    board = flushed()
    board.ok(Command.SNP_CONFIG, reported_tcb=0, mask_chip_id=1, mask_chip_key=1)
    shut_down(board, iommu_snp_shutdown=1)
    psp, machine = board.psp, board.machine
    assert (psp.rmp_built, psp.mask_chip_id, psp.mask_chip_key) == (False, False, False)
    assert (machine.iommu.snp_enabled, machine.encryption.has_key(1), machine.snp_enabled) == (False, False, True)
    assert board.state(FREE) == PageState.FIRMWARE, "page states stay"
    assert board.command(Command.SNP_INIT_EX, init_rmp=0) is Status.RMP_INIT_REQUIRED
    board.ok(Command.SNP_INIT)
    assert board.state(FREE) == PageState.HYPERVISOR


def test_the_x86_bit_turns_the_cores_off_as_well() -> None:
    board = flushed()
    shut_down(board, iommu_snp_shutdown=1, x86_snp_shutdown=1)
    assert [core.rdmsr(Msr.SYSCFG) for core in board.machine.cores] == [SYSCFG_FOR_SNP & ~SNP_EN] * 2
    board.cpu.write(FREE, b"the host's again")
    assert board.command(Command.SNP_INIT) is Status.INVALID_CONFIG
    board.initialise()


def test_cores_that_do_not_answer() -> None:
    board = flushed()
    board.psp.faults.add(Fault.NO_ANSWER)
    attempt = Attempt(board, Command.SNP_SHUTDOWN_EX, {"length": 8, "iommu_snp_shutdown": 1, "x86_snp_shutdown": 1})
    assert_refused(attempt, Status.SHUTDOWN_INCOMPLETE)


def test_a_second_shutdown_says_yes_whatever_its_buffer_holds() -> None:
    board = flushed()
    shut_down(board)
    attempt = Attempt(board, Command.SNP_SHUTDOWN_EX, {"length": 7, "x86_snp_shutdown": 1}, stray=(63,))
    assert_refused(attempt, Status.SUCCESS)
