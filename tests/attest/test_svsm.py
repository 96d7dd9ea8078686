"""A vTPM's key that a report vouches for: what is bound, and everything that is not. Formats are typed again."""

from __future__ import annotations

import struct
from collections.abc import Callable
from hashlib import sha256, sha512
from uuid import UUID

import pytest

from snpbook.attest.checks import NotGenuine
from snpbook.attest.svsm import bound_endorsement_key
from snpbook.attest.verify import VerifiedReport, verify
from tests.attest.own_chain import OwnChain
from tests.attest.vectors import NOW

NONCE = bytes(range(64))
HEAD = bytes.fromhex(
    "0001000b000300b20020837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
    "00060080004300100800000000000100"
)
MODULUS = (1 << 2047) | (1 << 1000) | 1
PUBLIC = HEAD + MODULUS.to_bytes(256, "big")
VTPM, OTHER = UUID("c476f1eb-0123-45a5-9641-b4e7dde5bfe3"), UUID("a4453a59-9e1b-4787-a033-1986d6adbe55")


CHAIN = OwnChain()


def genuine(**fields: object) -> VerifiedReport:
    return verify(CHAIN.report(**fields), CHAIN.certificates, CHAIN.roots, NOW)


def services(*said: tuple[UUID, bytes], size: int | None = None, count: int | None = None, shift: int = 0) -> bytes:
    """The manifest of all services; `size`, `count` and `shift` replace or move what is true."""
    start = 24 + 24 * len(said)
    entries, data = b"", b""
    for guid, text in said:
        entries += guid.bytes_le + struct.pack("<II", start + len(data) + shift, len(text))
        data += text
    total, number = start + len(data) if size is None else size, len(said) if count is None else count
    return UUID("63849ebb-3d92-4670-a1ff-58f9c94b87bb").bytes_le + struct.pack("<II", total, number) + entries + data


def bound(manifest: bytes, nonce: bytes = NONCE, vmpl: int = 0, data: bytes | None = None) -> bytes:
    report = genuine(vmpl=vmpl, report_data=sha512(nonce + manifest).digest() if data is None else data)
    return bound_endorsement_key(report, manifest, nonce).public


def failed(call: Callable[[], object]) -> str:
    with pytest.raises(NotGenuine) as caught:
        call()
    assert caught.value.checks[-1].name == caught.value.check
    return caught.value.check


MANIFESTS = {
    "one": PUBLIC, "all": services((VTPM, PUBLIC)), "first of two": services((VTPM, PUBLIC), (OTHER, b"more")),
    "second of two": services((OTHER, b"more"), (VTPM, PUBLIC)),
    "beside an empty one": services((OTHER, b""), (VTPM, PUBLIC)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MANIFESTS))
def test_a_bound_key(name: str) -> None:
    manifest = MANIFESTS[name]
    assert bound(manifest) == PUBLIC
    report = genuine(report_data=sha512(NONCE + manifest).digest())
    key = bound_endorsement_key(report, manifest, NONCE)
    numbers = key.key.public_numbers()
    assert (numbers.n, numbers.e) == (MODULUS, 65537)
    assert key.name == b"\x00\x0b" + sha256(PUBLIC).digest()
    assert [check.name for check in key.checks][:3] == ["svsm.vmpl", "svsm.nonce", "svsm.report_data"]
    assert repr(key).startswith("<BoundKey RSA-2048 000b")


@pytest.mark.parametrize("vmpl", [1, 2, 3])
def test_a_report_of_the_guest_itself_binds_nothing(vmpl: int) -> None:
    """The guest can ask for any REPORT_DATA at its own level, with a manifest that it has made."""
    assert failed(lambda: bound(PUBLIC, vmpl=vmpl)) == "svsm.vmpl"


@pytest.mark.parametrize("size", [0, 32, 63, 65, 128])
def test_other_nonces(size: int) -> None:
    """A nonce of another length could have been cut elsewhere: nonce and manifest are hashed without a border."""
    assert failed(lambda: bound(PUBLIC, nonce=bytes(size))) == "svsm.nonce"


@pytest.mark.parametrize(
    "data",
    [
        bytes(64), sha512(PUBLIC).digest(), sha512(PUBLIC + NONCE).digest(), sha512(NONCE).digest(),
        sha512(NONCE + PUBLIC + b"\0").digest(), sha512(bytes(64) + PUBLIC).digest(), NONCE,
    ],
)  # fmt: skip
def test_what_is_bound_is_another_thing(data: bytes) -> None:
    assert failed(lambda: bound(PUBLIC, data=data)) == "svsm.report_data"


@pytest.mark.parametrize(
    ("manifest", "check"),
    [
        (services((VTPM, PUBLIC), size=361), "svsm.services"), (services((VTPM, PUBLIC), count=20), "svsm.services"),
        (services((VTPM, PUBLIC))[:20], "svsm.services"), (services((VTPM, PUBLIC)) + b"\0", "svsm.services"),
        (services((VTPM, PUBLIC), shift=1), "svsm.entries"), (services((VTPM, PUBLIC), shift=-24), "svsm.entries"),
        (services((VTPM, PUBLIC), (VTPM, PUBLIC)), "svsm.entries"), (services((OTHER, PUBLIC)), "svsm.vtpm"),
        (services(), "svsm.vtpm"), (services((VTPM, PUBLIC), count=0), "svsm.vtpm"),
        (services((VTPM, b"")), "svsm.manifest"), (services((VTPM, PUBLIC[:-1])), "svsm.manifest"),
        (b"", "svsm.manifest"), (PUBLIC + b"\0", "svsm.manifest"), (b"\1" + PUBLIC[1:], "svsm.manifest"),
        (HEAD[:4] + b"\0\3\0\xb3" + PUBLIC[8:], "svsm.manifest"), (HEAD[:10] + b"\0" + PUBLIC[11:], "svsm.manifest"),
        (HEAD + bytes(256), "svsm.manifest"), (HEAD + b"\x7f" + PUBLIC[59:], "svsm.manifest"),
        (PUBLIC[:-1] + b"\0", "svsm.manifest"),
    ],
)  # fmt: skip
def test_manifests_that_are_no_key(manifest: bytes, check: str) -> None:
    assert failed(lambda: bound(manifest)) == check
