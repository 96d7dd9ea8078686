"""The ID block of an SNP guest: what its owner signs beforehand, so that the firmware launches nothing else.

The ID key signs the expected launch digest, the policy and the owner's numbers; an author key may vouch for the ID
key. Reports carry the digests of both keys. Source: SNP ABI, SNP_LAUNCH_FINISH (ID block, ID authentication
information) and the formats of ECDSA keys and signatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha384

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from snpbook.spec.launch import (
    ALGO_ECDSA_P384_SHA384,
    CURVE_P384,
    DIGEST_SIZE,
    ID_AUTH,
    ID_BLOCK,
    ID_BLOCK_VERSION,
    OWNER_ID_SIZE,
    PUBLIC_KEY,
    SIGNATURE,
)
from snpbook.spec.policy import DEFAULT_POLICY

PrivateKey = ec.EllipticCurvePrivateKey


class UnusableKey(ValueError):
    """No private key on P-384, or none that can be read."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An ID block and its ID authentication information, as SNP_LAUNCH_FINISH takes them.

    The digests are those that reports will carry; without an author theirs is zero.
    """

    block: bytes
    auth: bytes
    id_key_digest: bytes
    author_key_digest: bytes


def create(
    launch_digest: bytes,
    id_key: PrivateKey,
    author_key: PrivateKey | None = None,
    *,
    family_id: bytes = bytes(OWNER_ID_SIZE),
    image_id: bytes = bytes(OWNER_ID_SIZE),
    guest_svn: int = 0,
    policy: int = DEFAULT_POLICY,
) -> Identity:
    """Sign an ID block for guests with this measurement and, exactly, this policy; `family_id` etc. are the owner's.

    Signatures are deterministic (RFC 6979): the same arguments give the same bytes. `ValueError` names what does not
    fit, `UnusableKey` another curve than P-384.
    """
    block = ID_BLOCK.pack(
        launch_digest=launch_digest,
        family_id=family_id,
        image_id=image_id,
        version=ID_BLOCK_VERSION,
        guest_svn=guest_svn,
        policy=policy,
    )
    id_public = public_key(id_key)
    auth = ID_AUTH.record(id_key_algo=ALGO_ECDSA_P384_SHA384, id_block_signature=_sign(id_key, block), id_key=id_public)
    author_digest = bytes(DIGEST_SIZE)
    if author_key:
        author_public = public_key(author_key)
        author_digest = sha384(author_public).digest()
        auth = auth.replace(
            author_key_algo=ALGO_ECDSA_P384_SHA384,
            id_key_signature=_sign(author_key, id_public),
            author_key=author_public,
        )
    return Identity(block, bytes(auth), sha384(id_public).digest(), author_digest)


def load_key(pem: bytes) -> PrivateKey:
    """The private key in an unencrypted PEM file; `UnusableKey` says why there is none."""
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise UnusableKey("the key is encrypted: give it without a password") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UnusableKey("no private key in PEM form") from error
    if not isinstance(key, PrivateKey):
        raise UnusableKey("no key on an elliptic curve: ID blocks know only P-384")
    public_key(key)  # refuses other curves
    return key


def public_key(key: PrivateKey) -> bytes:
    """The public half in the firmware's form, whose SHA-384 is the key digest in reports."""
    if not isinstance(key.curve, ec.SECP384R1):
        raise UnusableKey(f"the key is on {key.curve.name}, ID blocks know only P-384")
    numbers = key.public_key().public_numbers()
    size = PUBLIC_KEY.fields["qx"].size
    return PUBLIC_KEY.pack(
        curve=CURVE_P384, qx=numbers.x.to_bytes(size, "little"), qy=numbers.y.to_bytes(size, "little")
    )


def _sign(key: PrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
    size = SIGNATURE.fields["r"].size
    return SIGNATURE.pack(r=r.to_bytes(size, "little"), s=s.to_bytes(size, "little"))
