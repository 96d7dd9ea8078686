"""ID blocks: real blocks byte for byte, the other tool's blocks, and the firmware model's judgement of ours."""

import base64
from hashlib import sha384
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from sevsnpmeasure import id_block as oracle

from snpbook.attest.id_block import UnusableKey, create, load_key, public_key
from snpbook.firmware.identity import check_author, check_id_block
from snpbook.spec.launch import ID_AUTH
from snpbook.spec.refusal import Refusal
from tests.attest.vectors import VECTORS, needs_vectors

DIGEST = base64.b64decode("oU1jg0HlZ0Yo/h4C++3r5eWrT68d1y2JZgaOYVu5nv0T0hSzXCMXFbOOJj3GBZdF")
LAUNCH = VECTORS / "launch"
ID_KEY, AUTHOR_KEY = (ec.derive_private_key(n, ec.SECP384R1()) for n in (1001, 1002))


def pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def verify(key: ec.EllipticCurvePrivateKey, signature: bytes, message: bytes) -> None:
    """Plain ECDSA over the 512-byte form."""
    r, s = (int.from_bytes(signature[at : at + 72], "little") for at in (0, 72))
    assert signature[144:] == bytes(368)
    key.public_key().verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))


@needs_vectors
def test_the_published_block_and_authentication() -> None:
    id_key, author_key = (load_key((LAUNCH / f"{name}_key.pem").read_bytes()) for name in ("id", "author"))
    block_signature, key_signature = ((LAUNCH / f"{name}_sig.bin").read_bytes() for name in ("id", "auth"))
    made = create(DIGEST, id_key, author_key)
    assert made.block == DIGEST + bytes(32) + (1).to_bytes(4, "little") + bytes(4) + (0x30000).to_bytes(8, "little")
    verify(id_key, block_signature, made.block)
    verify(author_key, key_signature, public_key(id_key))
    published = ID_AUTH.unpack(made.auth).replace(id_block_signature=block_signature, id_key_signature=key_signature)
    assert bytes(published) == (LAUNCH / "auth_block.bin").read_bytes()


def test_the_other_tools_block(tmp_path: Path) -> None:
    """Signatures are random there; everything else is equal, and each side's signatures verify."""
    paths = [tmp_path / "id.pem", tmp_path / "author.pem"]
    for path, key in zip(paths, (ID_KEY, AUTHOR_KEY), strict=True):
        path.write_bytes(pem(key))
    first, id_line, author_line = oracle.snp_calc_id_block(DIGEST, *map(str, paths)).splitlines()
    block, auth = (base64.b64decode(part.partition("=")[2]) for part in first.split(","))
    made = create(DIGEST, ID_KEY, AUTHOR_KEY)
    assert made.block == block
    assert base64.b64encode(made.id_key_digest).decode() == id_line.removeprefix("id_key_hash: ")
    assert base64.b64encode(made.author_key_digest).decode() == author_line.removeprefix("author_key: ")
    for each in (made.auth, auth):
        verify(ID_KEY, each[0x40:0x240], block)
        verify(AUTHOR_KEY, each[0x680:0x880], each[0x240:0x644])
    signatures = {"id_block_signature": bytes(512), "id_key_signature": bytes(512)}
    ours, theirs = (bytes(ID_AUTH.unpack(each).replace(**signatures)) for each in (made.auth, auth))
    assert ours == theirs


@given(
    digest=st.binary(min_size=48, max_size=48),
    family=st.binary(min_size=16, max_size=16),
    image=st.binary(min_size=16, max_size=16),
    svn=st.integers(0, (1 << 32) - 1),
    policy=st.integers(0, (1 << 64) - 1),
    author=st.booleans(),
)
def test_the_firmware_accepts_it_for_this_guest_alone(
    digest: bytes, family: bytes, image: bytes, svn: int, policy: int, author: bool
) -> None:
    numbers = {"family_id": family, "image_id": image}
    made = create(digest, ID_KEY, AUTHOR_KEY if author else None, guest_svn=svn, policy=policy, **numbers)
    auth = ID_AUTH.unpack(made.auth)
    assert made.block == digest + family + image + b"\1\0\0\0" + svn.to_bytes(4, "little") + policy.to_bytes(
        8, "little"
    )
    check_id_block(made.block, auth, author, digest, policy)
    assert made.id_key_digest == sha384(made.auth[0x240:0x644]).digest()
    if author:
        check_author(auth)
        assert made.author_key_digest == sha384(made.auth[0x880:0xC84]).digest()
    else:
        assert made.author_key_digest == bytes(48)
        assert made.auth[0x680:] == bytes(4096 - 0x680)
    with pytest.raises(Refusal, match="digest"):
        check_id_block(made.block, auth, author, sha384(digest).digest(), policy)
    with pytest.raises(Refusal, match="policy"):
        check_id_block(made.block, auth, author, digest, policy ^ 1)
    with pytest.raises(Refusal, match="signature by the ID key"):
        check_id_block(
            made.block[:0x54] + bytes([made.block[0x54] ^ 1]) + made.block[0x55:], auth, author, digest, policy
        )


def test_signatures_are_deterministic_and_of_the_right_key() -> None:
    made = create(DIGEST, ID_KEY, AUTHOR_KEY)
    assert made == create(DIGEST, ID_KEY, AUTHOR_KEY)
    with pytest.raises(InvalidSignature):
        verify(AUTHOR_KEY, made.auth[0x40:0x240], made.block)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no private key"),
        (pem(ec.derive_private_key(1, ec.SECP256R1())), "secp256r1"),
        (pem(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))), "no key on an elliptic curve"),
        (pem(ID_KEY, b"secret"), "encrypted"),
    ],
)
def test_keys_that_cannot_sign(data: bytes, problem: str) -> None:
    with pytest.raises(UnusableKey, match=problem):
        load_key(data)


def test_values_that_do_not_fit_are_named() -> None:
    for arguments in ({"family_id": b"x"}, {"image_id": bytes(17)}, {"guest_svn": 1 << 32}, {"policy": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            create(DIGEST, ID_KEY, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="launch_digest"):
        create(DIGEST[1:], ID_KEY)
