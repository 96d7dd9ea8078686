"""The owner of a legacy guest: the firmware takes his session and his secret, and an independent owner agrees."""

from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.launch_secret import LaunchOwner
from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from tests.firmware import legacy_owner
from tests.firmware.legacy_board import CERT, A, B, C, D, LegacyBoard
from tests.firmware.legacy_owner import Owner
from tests.machines import counting_rng

NODBG = 1
IMAGE = bytes(range(256)) * 16
TIK = bytes.fromhex("66320db73158a35a255d051758e95ed4")
ANSWER = bytes.fromhex(
    "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea4fbe0bedbad6c86ae8f68971d103e554"
)
"""A published example: API 0.18, build 15, policy 0, nothing loaded."""


def launched(board: LegacyBoard, owner: LaunchOwner) -> tuple[int, bytes, bytes]:
    """Handle, digest, and the answer of LAUNCH_MEASURE."""
    session = owner.session(board.certificates()[0], counting_rng(b"session"))
    handle = board.launch(owner.policy, session=(owner.certificate, session))
    board.write(C, IMAGE)
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=C, len=len(IMAGE))
    board.ok(Command.LAUNCH_MEASURE, handle=handle, paddr=D, len=0x30)
    return handle, sha256(IMAGE).digest(), board.machine.dram.read(D, 0x30)


def inject(board: LegacyBoard, handle: int, header: bytes, body: bytes) -> Status:
    buffers = {"hdr_paddr": board.write(D, header), "hdr_len": len(header), "trans_paddr": board.write(B, body)}
    return board.command(
        Command.LAUNCH_SECRET, handle=handle, guest_paddr=A, guest_len=len(body), trans_len=len(body), **buffers
    )


@pytest.mark.parametrize("name", ["rome", "milan", "genoa"])
def test_the_firmware_takes_session_and_secret(name: str) -> None:
    board = LegacyBoard(name).start()
    owner = LaunchOwner.draw(NODBG, counting_rng(b"owner"))
    handle, digest, answer = launched(board, owner)
    major, minor, build = board.api
    owner.check_measurement(answer, digest, (major, minor), build)
    header, body = owner.secret_packet(b"a secret of 22 letters", answer, counting_rng(b"packet"))
    assert inject(board, handle, header, body[:-1] + bytes([body[-1] ^ 1])) is Status.BAD_MEASUREMENT
    assert inject(board, handle, header, body) is Status.SUCCESS
    assert board.plain(A, 32) == b"a secret of 22 letters".ljust(32, b"\0")


def test_a_packet_is_for_one_launch() -> None:
    board, owner = LegacyBoard().start(), LaunchOwner.draw(0, counting_rng(b"owner"))
    handle, _, answer = launched(board, owner)
    other = answer[:31] + bytes([answer[31] ^ 1]) + answer[32:]
    assert inject(board, handle, *owner.secret_packet(b"s", other, counting_rng(b"p"))) is Status.BAD_MEASUREMENT
    assert inject(board, handle, *owner.secret_packet(b"s", answer, counting_rng(b"p"))) is Status.SUCCESS


@given(st.binary(min_size=1, max_size=100), st.integers(0, 0xFFFFFFFF), st.binary(min_size=8, max_size=8))
def test_an_independent_owner_makes_the_same(secret: bytes, policy: int, seed: bytes) -> None:
    owner = LaunchOwner.draw(policy, counting_rng(seed))
    platform = legacy_owner.key(7)
    pdh = legacy_owner.cert(legacy_owner.body(legacy_owner.PDH, platform.public_key()))
    session = owner.session(pdh, counting_rng(seed))
    other = Owner(owner.key, owner.tek, owner.tik, session[:16], session[0x30:0x40])
    assert other.session(pdh, policy) == session
    header, body = owner.secret_packet(secret, ANSWER, counting_rng(seed))
    padded = secret.ljust(-(-len(secret) // 16) * 16, b"\0")
    assert other.packet(padded, 1, ANSWER[:32], iv=header[4:20]) == (header, body)
    assert legacy_owner.public_of(owner.certificate).public_numbers() == owner.key.public_key().public_numbers()
    assert len(owner.certificate) == CERT


def test_the_published_measurement_holds_and_no_other() -> None:
    empty = sha256().digest()
    owner = LaunchOwner(0, legacy_owner.key(1), bytes(16), TIK)
    owner.check_measurement(ANSWER, empty, (0, 18), 15)
    for changed, digest, api, build in (
        (ANSWER, empty, (0, 18), 16),
        (ANSWER, empty, (0, 19), 15),
        (ANSWER, sha256(b"x").digest(), (0, 18), 15),
        (ANSWER[:-1] + b"\0", empty, (0, 18), 15),
    ):
        with pytest.raises(NotGenuine, match="measured something else"):
            owner.check_measurement(changed, digest, api, build)
    for other in (LaunchOwner(1, owner.key, bytes(16), TIK), LaunchOwner(0, owner.key, bytes(16), bytes(16))):
        with pytest.raises(NotGenuine):
            other.check_measurement(ANSWER, empty, (0, 18), 15)


def test_old_firmware_measures_less() -> None:
    owner = LaunchOwner(5, legacy_owner.key(1), bytes(16), TIK)
    digest, nonce = sha256(b"image").digest(), b"n" * 16
    measure = legacy_owner.hmac.digest(TIK, (5).to_bytes(4, "little") + digest + nonce, "sha256")
    owner.check_measurement(measure + nonce, digest, (0, 16), 1)
    with pytest.raises(NotGenuine):
        owner.check_measurement(measure + nonce, digest, (0, 17), 1)


@pytest.mark.parametrize("size", [0, 0x5001])
def test_a_secret_has_bounds(size: int) -> None:
    owner = LaunchOwner.draw(0, counting_rng(b"owner"))
    with pytest.raises(ValueError, match=f"a secret of {size} bytes"):
        owner.secret_packet(bytes(size), ANSWER, counting_rng(b"p"))


def test_other_lengths_are_malformed() -> None:
    owner = LaunchOwner.draw(0, counting_rng(b"owner"))
    for answer in (b"", ANSWER[:-1], ANSWER + b"\0"):
        with pytest.raises(MalformedEvidence, match="LAUNCH_MEASURE"):
            owner.secret_packet(b"s", answer, counting_rng(b"p"))
        with pytest.raises(MalformedEvidence, match="LAUNCH_MEASURE"):
            owner.check_measurement(answer, bytes(32), (1, 55), 25)


def pdh_with(curve: int, x: int, y: int) -> bytes:
    good = legacy_owner.cert(legacy_owner.body(legacy_owner.PDH, legacy_owner.key(7).public_key()))
    point = curve.to_bytes(4, "little") + x.to_bytes(72, "little") + y.to_bytes(72, "little")
    return good[:0x10] + point + good[0x10 + len(point) :]


@pytest.mark.parametrize(
    "pdh", [b"", bytes(CERT), bytes(CERT + 1), b"\xff" * CERT, pdh_with(1, 1, 1), pdh_with(2, 1, 1)]
)
def test_a_certificate_without_a_point_is_malformed(pdh: bytes) -> None:
    owner = LaunchOwner.draw(0, counting_rng(b"owner"))
    with pytest.raises(MalformedEvidence, match="PDH certificate"):
        owner.session(pdh, counting_rng(b"s"))


def test_the_keys_stay_out_of_sight() -> None:
    owner = LaunchOwner(0, ec.derive_private_key(5, ec.SECP384R1()), b"t" * 16, b"i" * 16)
    assert repr(owner) == "LaunchOwner(policy=0)"
