"""The legacy platform: products without SNP, both platforms at once, ASIDs, the TMR, and what a snapshot keeps."""

from __future__ import annotations

from hashlib import sha256

import pytest

from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.firmware.legacy_board import ES_ASID, NV, PAGE, PLAIN_ASID, TMR, A, B, C, D, LegacyBoard
from tests.firmware.legacy_owner import Owner
from tests.machines import BUFFER, MIB, Board


@pytest.mark.parametrize(("name", "version"), [("naples", (0, 17, 48)), ("rome", (0, 24, 14))])
def test_products_before_snp(name: str, version: tuple[int, int, int]) -> None:
    """They boot, they know the legacy commands, and of SNP's none."""
    board = LegacyBoard(name)
    assert board.api == version
    for command in Command:
        if command.name.startswith("SNP_"):
            assert board.send(command, 0) is Status.INVALID_COMMAND, command.name
    board.start()
    handle = board.launch(4, 1)
    board.ok(Command.LAUNCH_UPDATE_VMSA, handle=handle, paddr=board.write(A, b"v" * PAGE), len=PAGE)
    board.finish_launch(handle)
    assert 1 in board.machine.runnable


def test_ids_of_both_kinds_of_guests_on_naples() -> None:
    board = LegacyBoard("naples").start()
    plain, es = (board.call(Command.LAUNCH_START, policy=policy).handle for policy in (0, 4))
    for handle, asid, status in (
        (plain, 4, Status.INVALID_ASID), (es, 5, Status.INVALID_ASID), (plain, 16, Status.INVALID_ASID),
        (plain, 0, Status.INVALID_ASID), (plain, 15, Status.SUCCESS), (es, 15, Status.ASID_OWNED),
        (plain, 14, Status.ACTIVE), (es, 4, Status.SUCCESS),
    ):  # fmt: skip
        assert board.command(Command.ACTIVATE, handle=handle, asid=asid) is status, (handle, asid)


def test_the_life_of_an_asid() -> None:
    """INIT leaves every ASID dirty; a deactivated one is dirty until WBINVD and DF_FLUSH, one that never ran is not."""
    board = LegacyBoard()
    board.ok(Command.INIT)
    handle = board.call(Command.LAUNCH_START).handle
    activate = {"command": Command.ACTIVATE, "handle": handle, "asid": PLAIN_ASID}
    assert board.command(**activate) is Status.DF_FLUSH_REQUIRED
    assert board.command(Command.DF_FLUSH) is Status.WBINVD_REQUIRED
    board.cpu.wbinvd()
    board.ok(Command.DF_FLUSH)
    assert board.command(**activate) is Status.SUCCESS
    assert PLAIN_ASID not in board.machine.runnable, "its launch is not finished"
    board.ok(Command.DEACTIVATE, handle=handle)
    assert board.command(**activate) is Status.SUCCESS
    board.finish_launch(handle)
    assert PLAIN_ASID in board.machine.runnable
    assert board.command(Command.DECOMMISSION, handle=handle) is Status.ACTIVE
    board.ok(Command.DEACTIVATE, handle=handle)
    assert PLAIN_ASID not in board.machine.runnable
    assert board.command(**activate) is Status.DF_FLUSH_REQUIRED
    board.ok(Command.DECOMMISSION, handle=handle)
    assert board.call(Command.PLATFORM_STATUS).state == 1
    assert board.call(Command.GUEST_STATUS, handle=handle).state == 0


def test_a_finished_guest_without_asid_runs_as_soon_as_it_has_one() -> None:
    board = LegacyBoard().start()
    handle = board.call(Command.LAUNCH_START).handle
    board.finish_launch(handle)
    board.ok(Command.ACTIVATE, handle=handle, asid=PLAIN_ASID)
    assert PLAIN_ASID in board.machine.runnable


def test_shutdown_ends_guests_in_any_state() -> None:
    board = LegacyBoard().start()
    board.launch(4, ES_ASID)
    board.finish_launch(board.launch(4, ES_ASID + 1))
    board.ok(Command.SHUTDOWN)
    status = board.call(Command.PLATFORM_STATUS)
    assert (status.state, status.guest_count, status.es) == (0, 0, 0)
    assert not board.machine.runnable
    board.ok(Command.SHUTDOWN)
    board.start().launch(4, ES_ASID)


def test_the_tmr_is_nobodys_buffer() -> None:
    board = LegacyBoard().start()
    assert board.command(Command.PEK_CSR, paddr=TMR + 64, len=2084) is Status.INVALID_ADDRESS
    assert board.command(Command.PEK_CSR, paddr=TMR - 2084, len=2084) is Status.SUCCESS
    board.ok(Command.SHUTDOWN)
    assert board.command(Command.GET_ID, paddr=TMR, len=64) is Status.SUCCESS


def both(board: Board) -> None:
    """SNP first, then SEV-ES; the TMR is 2 MB once there is an RMP, and its pages are given to the firmware."""
    board.initialise()
    assert board.command(Command.INIT, es=1, tmr_paddr=TMR, tmr_len=MIB) is Status.INVALID_PAGE_STATE
    board.assign(TMR, NewState(assigned=True, immutable=True, large=True))
    assert board.command(Command.INIT, es=1, tmr_paddr=TMR, tmr_len=MIB) is Status.INVALID_LENGTH
    board.ok(Command.INIT, es=1, tmr_paddr=TMR, tmr_len=2 * MIB)


def test_both_platforms_at_once() -> None:
    board = Board()
    both(board)
    board.start(asid=1)
    fields = {"handle": 0, "policy": 4}
    assert board.command(Command.LAUNCH_START, **fields) is Status.INVALID_BUFFER_STATE
    board.assign(BUFFER, FIRMWARE)
    board.ok(Command.LAUNCH_START, **fields)
    assert board.state(BUFFER) == PageState.RECLAIM, "its buffer was written"
    assert int.from_bytes(board.machine.dram.read(BUFFER, 4), "little") == 1
    assert board.command(Command.ACTIVATE, handle=1, asid=1) is Status.ASID_OWNED, "SNP's guest has it"
    board.ok(Command.ACTIVATE, handle=1, asid=2)
    update = {"handle": 1, "paddr": A, "len": PAGE}
    assert board.command(Command.LAUNCH_UPDATE_DATA, **update) is Status.INVALID_PAGE_STATE
    board.assign(A, FIRMWARE)
    board.ok(Command.LAUNCH_UPDATE_DATA, **update)
    assert board.state(A) == PageState.FIRMWARE, "data pages keep their state"
    assert board.command(Command.SNP_SHUTDOWN_EX, length=8) is Status.INVALID_PLATFORM_STATE
    board.ok(Command.SHUTDOWN)
    assert board.command(Command.SNP_SHUTDOWN_EX, length=8) is Status.DF_FLUSH_REQUIRED


def test_a_refused_command_leaves_its_buffer_to_be_reclaimed_and_tells_the_length() -> None:
    board = Board()
    both(board)
    board.assign(BUFFER, FIRMWARE)
    assert board.command(Command.PEK_CSR, paddr=A, len=5) is Status.INVALID_LENGTH
    assert board.state(BUFFER) == PageState.RECLAIM
    assert int.from_bytes(board.machine.dram.read(BUFFER + 8, 4), "little") == 2084


def test_an_identity_that_cannot_be_stored_is_not_taken() -> None:
    """The host has taken the NV area back: new keys are refused and the old ones stay."""
    board = Board().initialise()
    board.assign(NV, NewState(assigned=True, immutable=True, large=True))
    board.machine.dram.write(NV, b"\xff" * 0x8000)
    board.ok(Command.INIT_EX, length=0x24, nv_paddr=NV, nv_len=0x8000)
    before, stored = board.psp.legacy.identity, board.machine.dram.read(NV, 0x8000)
    board.ok(Command.SNP_PAGE_RECLAIM, page=NV // PAGE, page_size=1)
    for command in (Command.PEK_GEN, Command.PDH_GEN):
        assert board.command(command) is Status.INVALID_PAGE_STATE
    assert (board.psp.legacy.identity, board.machine.dram.read(NV, 0x8000)) == (before, stored)


def test_a_snapshot_keeps_a_launch_in_the_middle() -> None:
    board = LegacyBoard().start()
    handle = board.launch()
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(A, b"1" * PAGE), len=PAGE)
    middle = Snapshot(machine=board.machine, processor=board.psp)
    for _ in range(2):
        board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(B, b"2" * PAGE), len=PAGE)
        assert board.psp.legacy.guests[handle].digest.value == sha256(b"1" * PAGE + b"2" * PAGE).digest()
        assert middle != Snapshot(machine=board.machine, processor=board.psp)
        middle.restore()
        assert board.psp.legacy.guests[handle].digest.value == sha256(b"1" * PAGE).digest()


def secrets(board: LegacyBoard) -> list[bytes]:
    identity = board.psp.legacy.identity
    assert identity is not None
    keys = [identity.oca_key, identity.pek_key, identity.pdh_key, board.psp.chip.secret, board.psp.chip.nv_key]
    for guest in board.psp.legacy.guests.values():
        keys += [guest.vek_seed, guest.oek, guest.transport.encryption, guest.transport.integrity]
    return [key for key in keys if any(key)]


def test_no_secret_is_ever_in_memory() -> None:
    """No 16 bytes of a key stand in what the host can read; a planted one is found."""
    board, owner = LegacyBoard(), Owner()
    board.write(NV, b"\xff" * 0x8000)
    board.start(nv_paddr=NV, nv_len=0x8000)
    handle = board.launch(session=(owner.certificate(), owner.session(board.certificates()[0], 0)))
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(C, b"c" * PAGE), len=PAGE)
    board.ok(Command.LAUNCH_MEASURE, handle=handle, paddr=D, len=0x30)
    board.ok(Command.SWAP_OUT, handle=handle, src_paddr=C, dst_paddr=B, mdata_paddr=A)
    known = secrets(board)
    assert len(known) == 9

    def found() -> bool:
        memory = b"".join(region.tobytes() for region in board.machine.dram._regions.values())
        return any(key[at : at + 16] in memory for key in known for at in range(len(key) - 15))

    assert not found()
    board.write(34 * MIB + 5, known[3][7:23])
    assert found()
