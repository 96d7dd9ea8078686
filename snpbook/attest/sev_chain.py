"""The chain of a SEV or SEV-ES platform: PDH, PEK, OCA, CEK, ASK, ARK in AMD's own formats, up to a pinned ARK.

Before SNP a guest's owner meets no report but the platform's Diffie-Hellman key, and believes it for these signatures.
Sources: SEV API (certificate format), a real Naples chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

from snpbook.attest.checks import Check, Checklist, MalformedEvidence
from snpbook.attest.ec_keys import read_point, signed_by
from snpbook.attest.roots import Roots
from snpbook.spec.certificates import RSA_EXPONENT
from snpbook.spec.launch import SIGNATURE
from snpbook.spec.layout import Record
from snpbook.spec.sev_certificates import (
    AMD_CERTIFICATES,
    CERT_SIGNED_SIZE,
    CERT_VERSION,
    KEY_ALGOS,
    RSA_ALGOS,
    SEV_CERTIFICATE,
    SIGNERS,
    CertAlgo,
    CertUsage,
)

SEV = "SEV certificate format"
_HASHES = {
    CertAlgo.RSA_SHA256: SHA256(), CertAlgo.ECDSA_SHA256: SHA256(), CertAlgo.RSA_SHA384: SHA384(),
    CertAlgo.ECDSA_SHA384: SHA384(),
}  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class SevCertificate:
    """One certificate in AMD's own format, decoded and not believed."""

    raw: bytes
    fields: Record

    @classmethod
    def read(cls, data: bytes) -> SevCertificate:
        """Decode one; its length tells which form it has. `MalformedEvidence` for any other length."""
        sizes = {layout.size: layout for layout in (SEV_CERTIFICATE, *AMD_CERTIFICATES.values())}
        if len(data) not in sizes:
            raise MalformedEvidence(f"{len(data)} bytes are no SEV certificate: it has {' or '.join(map(str, sizes))}")
        return cls(data, sizes[len(data)].unpack(data))

    def __repr__(self) -> str:
        return f"SevCertificate({self.name}, sha256 {self.fingerprint[:16]})"

    @property
    def is_amds(self) -> bool:
        """An ARK or ASK, with an RSA key."""
        return self.fields.layout is not SEV_CERTIFICATE

    @property
    def usage(self) -> int:
        """What its key is for."""
        return int(self.fields.key_usage if self.is_amds else self.fields.pubkey_usage)

    @property
    def name(self) -> str:
        """Its usage in words."""
        return _name(self.usage)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex: what an ARK is pinned by."""
        return sha256(self.raw).hexdigest()


@dataclass(frozen=True, slots=True, repr=False)
class VerifiedPlatform:
    """A platform whose Diffie-Hellman key (`pdh`) a pinned ARK vouches for. Only `verify_platform` makes one."""

    pdh: ec.EllipticCurvePublicKey
    roots: str
    checks: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"<VerifiedPlatform, roots {self.roots}>"


def verify_platform(certificates: Iterable[SevCertificate], roots: Roots) -> VerifiedPlatform:
    """Verify a platform's six certificates, in any order; `NotGenuine` at the first check that fails."""
    checks = Checklist()
    given = {certificate.usage: certificate for certificate in certificates}
    missing = " ".join(usage.name for usage in SIGNERS if usage not in given)
    checks.require("sev.certificates", not missing, "a certificate is not at hand", "all six", missing or "all", SEV)
    ark = given[CertUsage.ARK]
    rule, pinned = f"the ARK is not one of the pinned roots of {roots.name}", ark.fingerprint in roots.fingerprints
    checks.require("sev.root", pinned, rule, f"a root of {roots.name}", f"sha256 {ark.fingerprint}", SEV)
    for usage in reversed(tuple(SIGNERS)):
        _check_form(given[usage], checks)
        for signer in SIGNERS[usage]:
            _check_signature(given[usage], given[signer], checks)
    return VerifiedPlatform(read_point(given[CertUsage.PDH].fields.pubkey), roots.name, tuple(checks.made))


def _check_form(certificate: SevCertificate, checks: Checklist) -> None:
    fields, name = certificate.fields, f"sev.{certificate.name.lower()}"
    rule = "the certificate's version is unknown"
    checks.require(f"{name}.version", fields.version == CERT_VERSION, rule, CERT_VERSION, fields.version, SEV)
    stray = [name for name in ("unused",) if any(getattr(fields, name))]
    checks.require(f"{name}.reserved", not stray, "reserved bytes are set", "zero", stray or "zero", SEV)
    if certificate.is_amds:
        bits, size = fields.modulus_bits, fields.layout.fields["modulus"].size * 8
        exponent = int.from_bytes(fields.exponent, "little")
        met = bits == fields.exponent_bits == size and exponent == RSA_EXPONENT
        expected, found = f"RSA-{size}, e = {RSA_EXPONENT}", f"RSA-{bits}, e = {exponent:#x}"
        checks.require(f"{name}.key", met, "the key is not of AMD's kind", expected, found, SEV)
        return
    algo, wanted = fields.pubkey_algo, KEY_ALGOS.get(CertUsage(certificate.usage))
    try:
        fault = "" if read_point(fields.pubkey) else "none"
    except ValueError as error:
        fault = str(error)
    expected = f"{wanted.name if wanted else 'no'} key on P-384"
    checks.require(f"{name}.key", algo == wanted and not fault, "the key is not usable", expected, fault or algo, SEV)


def _check_signature(certificate: SevCertificate, signer: SevCertificate, checks: Checklist) -> None:
    name = f"sev.{certificate.name.lower()}.signed_by_{signer.name.lower()}"
    if certificate.is_amds:
        met = certificate.fields.certifying_id == signer.fields.key_id
        rule = "it names another signer"
        checks.require(f"{name}.id", met, rule, signer.fields.key_id, certificate.fields.certifying_id, SEV)
        message = certificate.raw[: certificate.fields.layout.offset("signature")]
        met = _rsa_signed(signer, certificate.fields.signature, message)
        algo: int = RSA_ALGOS[signer.fields.modulus_bits]
    else:
        met, algo = _slot_signed(certificate, signer)
    rule = f"the {certificate.name} is not signed by the {signer.name}"
    checks.require(name, met, rule, "a valid signature", f"{_name(algo, CertAlgo)}, {'' if met else 'in'}valid", SEV)


def _slot_signed(certificate: SevCertificate, signer: SevCertificate) -> tuple[bool, int]:
    """Whether a slot holds a signature of that signer, and by which algorithm."""
    message = certificate.raw[:CERT_SIGNED_SIZE]
    for slot in ("sig1", "sig2"):
        if getattr(certificate.fields, f"{slot}_usage") != signer.usage:
            continue
        algo, signature = getattr(certificate.fields, f"{slot}_algo"), getattr(certificate.fields, slot)
        if signer.is_amds:
            size = signer.fields.modulus_bits // 8
            whole = algo == RSA_ALGOS[signer.fields.modulus_bits] and not any(signature[size:])
            return whole and _rsa_signed(signer, signature[:size], message), algo
        parts = SIGNATURE.unpack(signature)
        known = algo in (CertAlgo.ECDSA_SHA256, CertAlgo.ECDSA_SHA384) and not SIGNATURE.reserved_set(signature)
        point = read_point(signer.fields.pubkey)
        return known and signed_by(point, parts.r, parts.s, message, ec.ECDSA(_HASHES[algo])), algo
    return False, CertAlgo.INVALID


def _rsa_signed(signer: SevCertificate, signature: bytes, message: bytes) -> bool:
    """PSS with a salt as long as the digest; integers are little-endian."""
    digest = _HASHES[RSA_ALGOS[signer.fields.modulus_bits]]
    modulus = int.from_bytes(signer.fields.modulus, "little")
    try:
        key = rsa.RSAPublicNumbers(RSA_EXPONENT, modulus).public_key()
        key.verify(signature[::-1], message, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
    except (InvalidSignature, ValueError):
        return False
    return True


def _name(value: int, names: type[CertUsage] | type[CertAlgo] = CertUsage) -> str:
    return names(value).name if value in names._value2member_map_ else f"{value:#x}"
