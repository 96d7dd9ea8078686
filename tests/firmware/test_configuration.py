"""SNP_CONFIG, SNP_COMMIT and SNP_VLEK_LOAD: which TCB is reported, whose key signs, and the quirk of SNP_INIT."""

from __future__ import annotations

import hmac
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.keys import Chip
from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command
from snpbook.spec.policy import Tcb
from snpbook.spec.status import Status
from snpbook.vendor.vlek import provider_sticks, wrapped_vlek
from tests.firmware.rows import Attempt, assert_refused
from tests.machines import FREE, PAGE, Board

MILAN = Tcb(bootloader=4, tee=0, snp=24, microcode=0xDB)
LOWER = replace(MILAN, microcode=0xD0)
AHEAD = replace(MILAN, snp=25)
"""An update that is not committed."""


def ahead() -> Board:
    """A board that runs a newer firmware than it is committed to, SNP not yet initialised."""
    board = Board()
    board.psp.current_tcb = AHEAD
    return board


def x(key: ec.EllipticCurvePrivateKey) -> int:
    return key.public_key().public_numbers().x


def signs_at(board: Board) -> Tcb:
    """The TCB whose key the board signs with: of all that come into question."""
    (found,) = [tcb for tcb in (MILAN, LOWER, AHEAD) if x(board.psp.chip.vcek(tcb)) == x(board.psp.vcek)]
    return found


def config(tcb: Tcb | int, **masks: int) -> tuple[Command, dict[str, int]]:
    return Command.SNP_CONFIG, {"reported_tcb": int(tcb), **masks}


def status_bits(board: Board) -> tuple[int, int, int]:
    """The flags of SNP_PLATFORM_STATUS, the current and the reported TCB."""
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE)
    raw = board.cpu.read(FREE, 32)
    return (*(int.from_bytes(raw[at : at + n], "little") for at, n in ((8, 4), (16, 8), (24, 8))),)  # type: ignore[return-value]


def test_config_lowers_what_is_reported_and_signs() -> None:
    board = Board()
    command, fields = config(LOWER, mask_chip_key=1)
    board.ok(command, **fields)
    assert status_bits(board) == (8 | 2, int(MILAN), int(LOWER))
    assert signs_at(board) == LOWER
    board.ok(command, reported_tcb=0, mask_chip_id=1)
    assert status_bits(board) == (8 | 1, int(MILAN), int(MILAN)), "0 is the committed TCB; the masks are the new ones"
    assert signs_at(board) == MILAN


@pytest.mark.parametrize(
    ("tcb", "passes"),
    [
        (replace(MILAN, bootloader=3, microcode=0xFF), True),
        (replace(MILAN, snp=23, microcode=0xFF), True),
        (replace(MILAN, bootloader=3, tee=9), True),
        (replace(MILAN, tee=1, snp=0, microcode=0), False),
        (replace(MILAN, microcode=0xDC), False),
    ],
    ids=str,
)
def test_the_first_component_that_differs_decides(tcb: Tcb, passes: bool) -> None:
    """Firmware 1.55.25 compares one big-endian number; whoever may lower a component reaches those behind it."""
    board = Board()
    command, fields = config(tcb)
    if passes:
        board.ok(command, **fields)
        assert x(board.psp.vcek) == x(board.psp.chip.vcek(tcb))
    else:
        assert_refused(Attempt(board, command, fields), Status.INVALID_PARAM)


def test_reserved_bytes_of_a_lower_tcb_are_unchecked() -> None:
    board = Board()
    board.ok(Command.SNP_CONFIG, reported_tcb=int(LOWER) | 1 << 16)
    assert_refused(Attempt(board, *config(int(MILAN) | 1 << 16)), Status.INVALID_PARAM)


def test_init_signs_with_the_current_key_until_config() -> None:
    """The report names the committed TCB then, and verifies only under the key of the current one."""
    board = ahead().initialise()
    assert (board.psp.reported_tcb, signs_at(board)) == (MILAN, AHEAD)
    board.ok(Command.SNP_CONFIG, reported_tcb=0)
    assert (board.psp.reported_tcb, signs_at(board)) == (MILAN, MILAN)


def test_a_configured_tcb_outlives_shutdown_but_not_the_quirk() -> None:
    board = Board().initialise()
    command, fields = config(LOWER, mask_chip_id=1)
    board.ok(command, **fields)
    board.ok(Command.SNP_SHUTDOWN)
    board.initialise()
    assert (board.psp.reported_tcb, signs_at(board), board.psp.mask_chip_id) == (LOWER, MILAN, True)


def test_commit_drops_what_was_configured_and_keeps_the_masks() -> None:
    board = ahead()
    command, fields = config(LOWER, mask_chip_key=1)
    board.ok(command, **fields)
    board.ok(Command.SNP_COMMIT, length=4)
    psp = board.psp
    assert (psp.committed_tcb, psp.reported_tcb, signs_at(board), psp.mask_chip_key) == (AHEAD, AHEAD, AHEAD, True)
    command, fields = config(MILAN)
    board.ok(command, **fields)
    assert signs_at(board) == MILAN, "going back in what is reported stays possible"


# VLEK.

IV = bytes(range(12))


def load(board: Board, blob: bytes, at: int = FREE + 3) -> Status:
    board.machine.dram.write(at, blob)
    return board.command(Command.SNP_VLEK_LOAD, length=16, vlek_wrapped_paddr=at)


def test_the_blob_is_the_documented_one() -> None:
    """AES-256-GCM under KDF(stick, "vlek-wrapping-key"); the bytes from 190h to 19Fh are authenticated."""
    chip = Chip.from_seed("tests", "milan")
    blob = wrapped_vlek("cloud", chip, MILAN, IV)
    assert (len(blob), blob[:12], blob[0x190:0x198]) == (432, IV, bytes([4, 0, 0, 0, 0, 0, 24, 0xDB]))
    message = b"\1\0\0\0vlek-wrapping-key\0" + (256).to_bytes(4, "little")
    key = hmac.digest(chip.hashstick(MILAN), message, "sha256")
    plain = AESGCM(key).decrypt(IV, blob[0x10:0x190] + blob[0x1A0:], blob[0x190:0x1A0])
    assert plain == b"".join(provider_sticks("cloud", MILAN))
    assert len(set(provider_sticks("cloud", MILAN)) | set(provider_sticks("other", MILAN))) == 16


def test_vlek_load_and_its_end() -> None:
    board = Board().initialise()
    board.assign(FREE, FIRMWARE)
    assert load(board, wrapped_vlek("cloud", board.psp.chip, MILAN, IV), FREE + PAGE) is Status.SUCCESS
    assert board.psp.vlek == provider_sticks("cloud", MILAN)[7]
    assert status_bits(board)[0] == 8 | 4
    assert load(board, wrapped_vlek("other", board.psp.chip, MILAN, IV), FREE + PAGE) is Status.SUCCESS
    assert board.psp.vlek == provider_sticks("other", MILAN)[7], "it replaces the older one"
    board.ok(Command.SNP_CONFIG, reported_tcb=int(LOWER))
    assert board.psp.vlek is not None, "a loaded one stays"
    board.ok(Command.SNP_SHUTDOWN)
    assert board.psp.vlek is None


def test_a_blob_serves_one_chip_at_one_tcb() -> None:
    board = Board()
    assert load(board, wrapped_vlek("cloud", Chip.from_seed("other", "milan"), MILAN, IV)) is Status.BAD_MEASUREMENT
    assert load(board, wrapped_vlek("cloud", board.psp.chip, LOWER, IV)) is Status.BAD_SVN
    board.ok(Command.SNP_CONFIG, reported_tcb=int(LOWER))
    assert load(board, wrapped_vlek("cloud", board.psp.chip, LOWER, IV)) is Status.SUCCESS


@pytest.mark.parametrize("at", [0x00, 0x10, 0x18F, 0x198, 0x1AF])
def test_every_part_of_a_blob_is_authenticated(at: int) -> None:
    board = Board()
    blob = bytearray(wrapped_vlek("cloud", board.psp.chip, MILAN, IV))
    blob[at] ^= 1
    assert load(board, bytes(blob)) is Status.BAD_MEASUREMENT
    assert board.psp.vlek is None


@pytest.mark.parametrize("at", range(0x0C, 0x10))
def test_what_is_not_authenticated_is_ignored(at: int) -> None:
    board = Board()
    blob = bytearray(wrapped_vlek("cloud", board.psp.chip, MILAN, IV))
    blob[at] ^= 1
    assert load(board, bytes(blob)) is Status.SUCCESS
