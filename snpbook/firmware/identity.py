"""The owner's identity of a guest: ID block and ID authentication information at SNP_LAUNCH_FINISH.

Source: SNP ABI, SNP_LAUNCH_FINISH; the order of checks is that of firmware 1.55.25, which ignores
version fields and padding. A failed check leaves the guest in LAUNCH.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from snpbook.spec.launch import ALGO_ECDSA_P384_SHA384, CURVE_P384, ID_BLOCK, PUBLIC_KEY, SIGNATURE
from snpbook.spec.layout import Record
from snpbook.spec.status import Status, require


def check_id_block(block: bytes, auth: Record, author: bool, digest: bytes, policy: int) -> None:
    """The checks on an ID block in order: digest, policy, algorithms, ID key; `check_author` may follow."""
    wanted = ID_BLOCK.unpack(block)
    require(wanted.launch_digest == digest, Status.BAD_MEASUREMENT, "ID block digest", digest, wanted.launch_digest)
    require(wanted.policy == policy, Status.POLICY_FAILURE, "ID block policy", policy, wanted.policy)
    algorithm = ALGO_ECDSA_P384_SHA384
    require(auth.id_key_algo == algorithm, Status.INVALID_PARAM, "ID key algorithm", algorithm, auth.id_key_algo)
    if author:
        found = auth.author_key_algo
        require(found == algorithm, Status.INVALID_PARAM, "author key algorithm", algorithm, found)
    _check_signature(auth.id_key, auth.id_block_signature, block, "ID key")


def check_author(auth: Record) -> None:
    """The author's signature over the ID key."""
    _check_signature(auth.author_key, auth.id_key_signature, auth.id_key, "author key")


def _check_signature(key: bytes, signature: bytes, message: bytes, name: str) -> None:
    public, parts = PUBLIC_KEY.unpack(key), SIGNATURE.unpack(signature)
    require(public.curve == CURVE_P384, Status.BAD_SIGNATURE, f"curve of the {name}", CURVE_P384, public.curve)
    x, y, r, s = (int.from_bytes(part, "little") for part in (public.qx, public.qy, parts.r, parts.s))
    try:
        point = ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
        point.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA384()))
        good = True
    except (ValueError, InvalidSignature):
        good = False
    require(good, Status.BAD_SIGNATURE, f"signature by the {name}", "valid", "invalid")
