"""SNP_DOWNLOAD_FIRMWARE_EX: what an update moves, what it leaves, and the way back that a commit closes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.firmware.keys import firmware_signing_key
from snpbook.spec.commands import Command
from snpbook.spec.policy import Tcb
from snpbook.spec.releases import release
from snpbook.spec.states import GuestState
from snpbook.spec.status import Status
from snpbook.vendor.images import firmware_image
from tests.firmware.test_keys import rfc6979
from tests.machines import FREE, GCTX, PAGE, Board

OLD, NEW = Tcb(4, 0, 24, 0xDB), Tcb(4, 0, 25, 0xDB)


def image(svn: int = 25, build: int = 65, revision: str = "1.58", size: int = 4096) -> bytes:
    return firmware_image("milan", release(revision), build=build, svn=svn, size=size)


def download(board: Board, data: bytes, **fields: int) -> Status:
    board.machine.dram.write(FREE, data)
    return board.command(Command.SNP_DOWNLOAD_FIRMWARE_EX, fw_paddr=FREE, fw_len=len(data), **fields)


def test_an_update_runs_and_is_not_yet_committed() -> None:
    board = Board()
    assert board.command(Command.SNP_VERIFY_MITIGATION, length=0x40) is Status.INVALID_COMMAND
    assert download(board, image()) is Status.SUCCESS
    psp = board.psp
    assert (psp.current_tcb, psp.committed_tcb, psp.reported_tcb) == (NEW, OLD, OLD)
    assert (str(psp.release), str(psp.committed)) == ("1.55.65", "1.55.29")
    board.ok(Command.SNP_VERIFY_MITIGATION, length=0x40)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE)
    raw = board.cpu.read(FREE, 32)
    assert (raw[4], raw[16:24], raw[24:]) == (65, int(NEW).to_bytes(8, "little"), int(OLD).to_bytes(8, "little"))


@pytest.mark.parametrize("by", ["bit", "command"])
def test_a_commit_closes_the_way_back(by: str) -> None:
    board = Board()
    assert download(board, image(), commit=int(by == "bit")) is Status.SUCCESS
    if by == "command":
        assert download(board, image(svn=24, build=29, revision="1.55")) is Status.SUCCESS, "still open"
        assert download(board, image()) is Status.SUCCESS
        board.ok(Command.SNP_COMMIT, length=4)
    assert (board.psp.committed_tcb, str(board.psp.committed)) == (NEW, "1.55.65")
    assert download(board, image(svn=24)) is Status.INVALID_CONFIG
    assert (board.psp.current_tcb, str(board.psp.release)) == (NEW, "1.55.65")


@pytest.mark.parametrize(("revision", "build"), [("1.58", 64), ("1.55", 65), ("1.51", 99)])
def test_a_committed_version_is_the_oldest_whatever_its_svn(revision: str, build: int) -> None:
    board = Board()
    assert download(board, image(), commit=1) is Status.SUCCESS
    assert download(board, image(revision=revision, build=build)) is Status.INVALID_CONFIG
    assert str(board.psp.release) == "1.55.65"
    assert download(board, image(build=65)) is Status.SUCCESS


def test_guests_survive() -> None:
    board = Board().initialise()
    board.start()
    board.add(FREE + PAGE, 0x1000)
    assert download(board, image()) is Status.SUCCESS
    board.finish()
    assert board.psp.context(GCTX).state is GuestState.RUNNING
    assert board.psp.context(GCTX).launch_tcb == int(OLD)


def test_a_table_of_another_tcb_is_not_kept() -> None:
    board = Board().initialise()
    board.ok(Command.SNP_SHUTDOWN)
    assert download(board, image()) is Status.SUCCESS
    assert board.command(Command.SNP_INIT_EX, init_rmp=0) is Status.RMP_INIT_REQUIRED
    board.ok(Command.SNP_INIT_EX, init_rmp=1)


def test_shutting_the_iommu_down_commits_what_runs() -> None:
    """Quirk: what the firmware keeps for good begins anew."""
    board = Board().initialise()
    assert download(board, image()) is Status.SUCCESS
    board.ok(Command.SNP_SHUTDOWN_EX, length=8, iommu_snp_shutdown=1)
    assert board.psp.committed_tcb == NEW


def test_an_image_is_as_long_as_it_says() -> None:
    board = Board()
    assert download(board, image()[:-16]) is Status.INVALID_LENGTH
    assert download(board, image() + bytes(16)) is Status.INVALID_LENGTH
    assert download(board, image(size=0xD0)) is Status.SUCCESS, "header and signature"


@given(bit=st.integers(0, 8 * 0xD0 - 1))
def test_no_bit_of_an_image_may_change(bit: int) -> None:
    data = bytearray(image(size=0xD0))
    data[bit // 8] ^= 1 << bit % 8
    assert download(Board(), bytes(data)) in (Status.BAD_SIGNATURE, Status.INVALID_LENGTH)


def test_the_signature_is_that_of_the_toy_key() -> None:
    """Arithmetic of our own over the image but its last 144 bytes."""
    data = image()
    d = firmware_signing_key().private_numbers().private_value
    r, s = rfc6979(d, data[:-144])
    assert data[-144:] == r.to_bytes(72, "little") + s.to_bytes(72, "little")
