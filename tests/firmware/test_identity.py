"""The ID block at SNP_LAUNCH_FINISH: the published one, our own keys, and each way it can be wrong, in order."""

from __future__ import annotations

import struct
from base64 import b64decode
from hashlib import sha384
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from snpbook.firmware.identity import check_author, check_id_block
from snpbook.spec.commands import Command
from snpbook.spec.launch import ID_AUTH
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.states import GuestState
from snpbook.spec.status import FirmwareRefusal, Status
from tests.attest.vectors import VECTORS, needs_vectors
from tests.firmware.rows import Attempt, Row, assert_refused, double, single
from tests.machines import FREE, GCTX, PAGE, Board

ID_KEY, AUTHOR_KEY, STRANGER = (ec.derive_private_key(n, ec.SECP384R1()) for n in (11, 22, 33))
FAMILY, IMAGE = b"family".ljust(16, b"."), b"image".ljust(16, b".")
BLOCK_AT, AUTH_AT = FREE + 7, FREE + PAGE + 7
"""No alignment is asked of either, and the authentication page may cross pages."""


def public_key(key: ec.EllipticCurvePrivateKey, curve: int = 2) -> bytes:
    point = key.public_key().public_numbers()
    return struct.pack("<I72s72s", curve, point.x.to_bytes(72, "little"), point.y.to_bytes(72, "little")).ljust(
        0x404, b"\0"
    )


def signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(0x200, b"\0")


def id_block(digest: bytes, policy: int = DEFAULT_POLICY, svn: int = 5, version: int = 1) -> bytes:
    return struct.pack("<48s16s16sIIQ", digest, FAMILY, IMAGE, version, svn, policy)


def id_auth(
    block: bytes, *, id_algo: int = 1, author_algo: int = 1, id_curve: int = 2, author_curve: int = 2,
    signer: ec.EllipticCurvePrivateKey = ID_KEY, author: ec.EllipticCurvePrivateKey = AUTHOR_KEY, off_curve: str = "",
) -> bytes:  # fmt: skip
    id_key, author_key = public_key(ID_KEY, id_curve), public_key(AUTHOR_KEY, author_curve)
    if off_curve == "id":
        id_key = id_key[:4] + bytes([id_key[4] ^ 1]) + id_key[5:]
    body = struct.pack("<II56x", id_algo, author_algo) + signature(signer, block) + id_key
    body = body.ljust(0x680, b"\0") + signature(author, id_key)
    if off_curve == "author":
        author_key = author_key[:4] + bytes([author_key[4] ^ 1]) + author_key[5:]
    return (body + author_key).ljust(0x1000, b"\0")


def finish(
    block: dict[str, Any] | None = None,
    with_author: bool = True,
    digest: bytes | None = None,
    policy: int | None = None,
    **auth: Any,
) -> Attempt:
    """LAUNCH_FINISH with an ID block that fits, but for what is asked for."""
    board = Board().initialise()
    board.start()
    board.add(FREE + 8 * PAGE, 0x1000)
    wanted = board.psp.context(GCTX).launch_digest if digest is None else digest
    block_bytes = id_block(wanted, DEFAULT_POLICY if policy is None else policy, **(block or {}))
    board.machine.dram.write(BLOCK_AT, block_bytes)
    board.machine.dram.write(AUTH_AT, id_auth(block_bytes, **auth))
    fields = {"id_block_paddr": BLOCK_AT, "id_auth_paddr": AUTH_AT, "id_block_en": 1, "auth_key_en": int(with_author)}
    return Attempt(board, Command.SNP_LAUNCH_FINISH, {"gctx_paddr": GCTX, **fields})


ROWS = [
    Row("digest", Status.BAD_MEASUREMENT, {"digest": bytes(48)}),
    Row("policy", Status.POLICY_FAILURE, {"policy": DEFAULT_POLICY | 1 << 19}),
    Row("ID algorithm", Status.INVALID_PARAM, {"id_algo": 2}),
    Row("author algorithm", Status.INVALID_PARAM, {"author_algo": 0}),
    Row("ID key on another curve", Status.BAD_SIGNATURE, {"id_curve": 1}),
    Row("ID key off the curve", Status.BAD_SIGNATURE, {"off_curve": "id"}),
    Row("ID block signed by another", Status.BAD_SIGNATURE, {"signer": STRANGER}),
]
AUTHOR_ROWS = [
    Row("author key on another curve", Status.BAD_SIGNATURE, {"author_curve": 1}),
    Row("author key off the curve", Status.BAD_SIGNATURE, {"off_curve": "author"}),
    Row("ID key signed by another", Status.BAD_SIGNATURE, {"author": STRANGER}),
]


@single(ROWS)
def test_id_block_refused(row: Row) -> None:
    built = finish(**row.options)
    assert_refused(built, row.status)
    assert built.board.psp.context(GCTX).state is GuestState.LAUNCH, "and may be finished in another way"


@double(ROWS)
def test_id_block_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(finish(**first.options, **second.options), first.status)


@single(AUTHOR_ROWS)
def test_a_failed_author_check_leaves_the_block_stored(row: Row) -> None:
    built = finish(**row.options)
    before, block = built.board.psp.context(GCTX), built.board.machine.dram.read(BLOCK_AT, 96)
    assert built.issue() is row.status
    digest = sha384(public_key(ID_KEY)).digest()
    assert built.board.psp.context(GCTX) == before.replace(id_block=block, id_key_digest=digest)


@pytest.mark.parametrize("first", ROWS, ids=str)
@pytest.mark.parametrize("second", AUTHOR_ROWS, ids=str)
def test_the_author_comes_last(first: Row, second: Row) -> None:
    if first.options.keys().isdisjoint(second.options):
        assert_refused(finish(**first.options, **second.options), first.status)


def test_accepted_with_author() -> None:
    built = finish()
    assert built.issue() is Status.SUCCESS
    context = built.board.psp.context(GCTX)
    assert (context.id_block_en, context.author_key_en) == (1, 1)
    assert context.id_block == built.board.machine.dram.read(BLOCK_AT, 96)
    assert context.id_key_digest == sha384(public_key(ID_KEY)).digest()
    assert context.author_key_digest == sha384(public_key(AUTHOR_KEY)).digest()


@pytest.mark.parametrize(
    "author_parts", [{"author_algo": 9}, {"author_curve": 7}, {"author": STRANGER}, {"off_curve": "author"}]
)
def test_without_author_its_parts_are_not_looked_at(author_parts: dict[str, Any]) -> None:
    built = finish(with_author=False, **author_parts)
    assert built.issue() is Status.SUCCESS
    context = built.board.psp.context(GCTX)
    assert (context.author_key_en, context.author_key_digest) == (0, bytes(48))
    assert context.id_key_digest == sha384(public_key(ID_KEY)).digest()


def test_the_version_is_not_checked() -> None:
    assert finish(block={"version": 77}).issue() is Status.SUCCESS


@pytest.mark.parametrize("position", [0, 0x30, 0x40, 0x50, 0x54])
def test_each_signed_part_of_the_block_counts(position: int) -> None:
    built = finish()
    dram = built.board.machine.dram
    dram.write(BLOCK_AT + position, bytes([dram.read(BLOCK_AT + position, 1)[0] ^ 1]))
    assert_refused(built, Status.BAD_MEASUREMENT if position == 0 else Status.BAD_SIGNATURE)


@pytest.mark.parametrize("component", [0x040, 0x040 + 72])
@pytest.mark.parametrize("value", [bytes(72), b"\xff" * 72], ids=["zero", "huge"])
def test_degenerate_signatures(component: int, value: bytes) -> None:
    built = finish()
    built.board.machine.dram.write(AUTH_AT + component, value)
    assert_refused(built, Status.BAD_SIGNATURE)


def test_a_retry_with_the_right_block_succeeds() -> None:
    built = finish(signer=STRANGER)
    assert built.issue() is Status.BAD_SIGNATURE
    block = built.board.machine.dram.read(BLOCK_AT, 96)
    built.board.machine.dram.write(AUTH_AT, id_auth(block))
    assert built.issue() is Status.SUCCESS


# The published block.

PUBLISHED_BLOCK = (
    b64decode("oU1jg0HlZ0Yo/h4C++3r5eWrT68d1y2JZgaOYVu5nv0T0hSzXCMXFbOOJj3GBZdF")
    + bytes(32)
    + struct.pack("<IIQ", 1, 0, 0x30000)
)


@needs_vectors
@pytest.mark.parametrize("author", [False, True])
def test_published_authentication(author: bool) -> None:
    folder = VECTORS / "launch"
    auth = (folder / "auth_block.bin").read_bytes()

    def check(auth: bytes) -> None:
        check_id_block(PUBLISHED_BLOCK, ID_AUTH.unpack(auth), author, PUBLISHED_BLOCK[:48], 0x30000)
        if author:
            check_author(ID_AUTH.unpack(auth))

    check(auth)
    worse = bytearray(auth)
    worse[0x680 if author else 0x40] ^= 1
    with pytest.raises(FirmwareRefusal) as refused:
        check(bytes(worse))
    assert refused.value.status is Status.BAD_SIGNATURE


@needs_vectors
def test_published_keys_have_our_form() -> None:
    """Public keys made from the published private ones stand in the published block where ours would."""
    folder = VECTORS / "launch"
    auth = (folder / "auth_block.bin").read_bytes()
    for name, start in (("id_key.pem", 0x240), ("author_key.pem", 0x880)):
        key = serialization.load_pem_private_key((folder / name).read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert auth[start : start + 0x404] == public_key(key)
