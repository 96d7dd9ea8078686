"""ID blocks: the published one, each kind of damage, and reports that carry one or not."""

from base64 import b64decode

import pytest

from snpbook.attest.checks import MalformedEvidence, NotGenuine, Result
from snpbook.attest.id_auth import IdBlock, report_carries, verify_id_block
from snpbook.attest.id_block import create
from snpbook.attest.parse import Report
from tests.attest.own_chain import VEK_KEY, OwnChain
from tests.attest.vectors import VECTORS, needs_vectors

BLOCK = b64decode("oU1jg0HlZ0Yo/h4C++3r5eWrT68d1y2JZgaOYVu5nv0T0hSzXCMXFbOOJj3GBZdF") + bytes(32)
BLOCK += (1).to_bytes(4, "little") + bytes(4) + (0x30000).to_bytes(8, "little")
OWN = create(b"m" * 48, VEK_KEY, VEK_KEY, family_id=b"f" * 16, guest_svn=5)


def refused(block: bytes, auth: bytes) -> str:
    with pytest.raises(NotGenuine) as refusal:
        verify_id_block(IdBlock.read(block, auth))
    return refusal.value.check


@needs_vectors
def test_the_published_block() -> None:
    auth = (VECTORS / "launch" / "auth_block.bin").read_bytes()
    identity = IdBlock.read(BLOCK, auth)
    checks = verify_id_block(identity)
    assert {check.result for check in checks} == {Result.PASSED}
    assert repr(identity).startswith("IdBlock(a14d638341e56746.., key ")
    assert refused(BLOCK[:-1] + b"\1", auth) == "id.key.signature"


def test_our_own_block() -> None:
    identity = IdBlock.read(OWN.block, OWN.auth)
    assert len(verify_id_block(identity)) == 10
    assert (identity.id_key_digest, identity.author_key_digest) == (OWN.id_key_digest, OWN.author_key_digest)
    alone = create(b"m" * 48, VEK_KEY)
    checks = verify_id_block(IdBlock.read(alone.block, alone.auth))
    assert (checks[-1].name, checks[-1].result) == ("id.author", Result.SKIPPED)


@pytest.mark.parametrize(
    ("offset", "value", "check"),
    [
        (0x50, 2, "id.version"),
        (0x60 + 0x008, 1, "id.reserved"),
        (0x60 + 0x644, 1, "id.reserved"),
        (0x60 + 0x000, 2, "id.key.algorithm"),
        (0x60 + 0x004, 0, "id.author.algorithm"),
        (0x60 + 0x240, 1, "id.key.point"),
        (0x60 + 0x244, 0xFF, "id.key.point"),
        (0x60 + 0x643, 1, "id.key.point"),
        (0x60 + 0x040 + 71, 1, "id.key.form"),
        (0x60 + 0x23F, 1, "id.key.form"),
        (0x60 + 0x040, 0xFF, "id.key.signature"),
        (0x30, 0, "id.key.signature"),
        (0x60 + 0x880, 1, "id.author.point"),
        (0x60 + 0x680, 0xFF, "id.author.signature"),
    ],
)
def test_a_damaged_block(offset: int, value: int, check: str) -> None:
    whole = bytearray(OWN.block + OWN.auth)
    whole[offset] = value
    assert refused(bytes(whole[:0x60]), bytes(whole[0x60:])) == check


def test_lengths() -> None:
    for block, auth in ((OWN.block[:-1], OWN.auth), (OWN.block, OWN.auth + b"\0")):
        with pytest.raises(MalformedEvidence):
            IdBlock.read(block, auth)


def test_a_report_that_carries_it() -> None:
    fields = {
        "measurement": b"m" * 48, "family_id": b"f" * 16, "guest_svn": 5, "id_key_digest": OWN.id_key_digest,
        "author_key_en": 1, "author_key_digest": OWN.author_key_digest,
    }  # fmt: skip
    identity = IdBlock.read(OWN.block, OWN.auth)
    assert {check.result for check in report_carries(Report.parse(OwnChain().report(**fields)), identity)} == {"passed"}
    for name in fields:
        other = Report.parse(OwnChain().report(**{**fields, name: 0 if isinstance(fields[name], int) else None}))
        assert [c.name for c in report_carries(other, identity) if c.result == "failed"] == [f"id.{name}"]
