"""ID blocks as evidence: is a guest's identity signed by the keys that it names, and does a report carry it?

The firmware makes part of these checks at launch; this file makes them all, and refuses what the firmware ignores:
another version, reserved bytes that are not zero. Source: SNP ABI (ID block, ID authentication information).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha384

from snpbook.attest.checks import Check, Checklist, MalformedEvidence, Result
from snpbook.attest.ec_keys import ECDSA_SHA384, read_point, signature_size, signed_by
from snpbook.attest.parse import Report
from snpbook.spec.launch import (
    ALGO_ECDSA_P384_SHA384,
    DIGEST_SIZE,
    ID_AUTH,
    ID_BLOCK,
    ID_BLOCK_VERSION,
    SIGNATURE,
)
from snpbook.spec.layout import Record

SNP = "SNP ID block"
P384_BITS = 384


@dataclass(frozen=True, slots=True, repr=False)
class IdBlock:
    """An ID block and its authentication, decoded and not believed: `verify_id_block` says whether to."""

    raw: bytes
    block: Record
    auth: Record

    @classmethod
    def read(cls, block: bytes, auth: bytes) -> IdBlock:
        """Decode both; `MalformedEvidence` where one has another size."""
        for name, data, layout in (("ID block", block, ID_BLOCK), ("ID authentication", auth, ID_AUTH)):
            if len(data) != layout.size:
                raise MalformedEvidence(f"{name} of {len(data)} bytes: it has {layout.size}")
        return cls(block + auth, ID_BLOCK.unpack(block), ID_AUTH.unpack(auth))

    def __repr__(self) -> str:
        author = ", with an author" if self.has_author else ""
        return f"IdBlock({self.block.launch_digest.hex()[:16]}.., key {self.id_key_digest.hex()[:16]}..{author})"

    @property
    def has_author(self) -> bool:
        """An author's key stands behind the ID key."""
        return any(self.auth.author_key)

    @property
    def id_key_digest(self) -> bytes:
        """What reports carry as ID_KEY_DIGEST."""
        return sha384(self.auth.id_key).digest()

    @property
    def author_key_digest(self) -> bytes:
        """What reports carry as AUTHOR_KEY_DIGEST: zeros without an author."""
        return sha384(self.auth.author_key).digest() if self.has_author else bytes(DIGEST_SIZE)


def verify_id_block(identity: IdBlock) -> tuple[Check, ...]:
    """Make every check of an ID block by itself; `NotGenuine` at the first that fails."""
    checks = Checklist()
    block, auth = identity.block, identity.auth
    rule, version = "the ID block's version is unknown", block.version
    checks.require("id.version", version == ID_BLOCK_VERSION, rule, ID_BLOCK_VERSION, version, SNP)
    stray = ID_AUTH.reserved_set(identity.raw[ID_BLOCK.size :])
    found = f"byte {stray[0]:#05x}" if stray else "zero"
    checks.require("id.reserved", not stray, "reserved bytes of the ID authentication are set", "zero", found, SNP)
    _check_signature("id.key", auth.id_key_algo, auth.id_key, auth.id_block_signature, bytes(block), checks)
    if identity.has_author:
        _check_signature("id.author", auth.author_key_algo, auth.author_key, auth.id_key_signature, auth.id_key, checks)
    else:
        checks.skip("id.author", "no author's key", SNP)
    return tuple(checks.made)


def report_carries(report: Report, identity: IdBlock) -> tuple[Check, ...]:
    """Hold a report against the ID block that its guest was to be launched with; every field is judged."""
    block = identity.block
    expected = {
        "measurement": block.launch_digest,
        "policy": block.policy,
        "family_id": block.family_id,
        "image_id": block.image_id,
        "guest_svn": block.guest_svn,
        "id_key_digest": identity.id_key_digest,
        "author_key_en": int(identity.has_author),
        "author_key_digest": identity.author_key_digest,
    }
    return tuple(
        Check(f"id.{name}", Result.PASSED if found == wanted else Result.FAILED, wanted, found, SNP)
        for name, wanted in expected.items()
        for found in [getattr(report.fields, name)]
    )


def _check_signature(name: str, algo: int, key: bytes, signature: bytes, message: bytes, checks: Checklist) -> None:
    rule, wanted = "the algorithm is unknown", ALGO_ECDSA_P384_SHA384
    checks.require(f"{name}.algorithm", algo == wanted, rule, wanted, algo, SNP)
    try:
        point, fault = read_point(key), ""
    except ValueError as error:
        point, fault = None, str(error)
    checks.require(f"{name}.point", point is not None, "this is no key", "a point on P-384", fault or "one", SNP)
    assert point is not None
    parts = SIGNATURE.unpack(signature)
    whole = signature_size(parts.r, parts.s) <= P384_BITS and not SIGNATURE.reserved_set(signature)
    rule = "a component is longer than the curve's order, or what stands behind is not zero"
    checks.require(f"{name}.form", whole, rule, f"{P384_BITS} bits", "so" if whole else "more", SNP)
    met = signed_by(point, parts.r, parts.s, message, ECDSA_SHA384)
    rule = "the signature is not by this key"
    checks.require(f"{name}.signature", met, rule, "ECDSA P-384, SHA-384", "valid" if met else "invalid", SNP)
