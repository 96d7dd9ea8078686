"""Certificates of SEV: making and checking the 2084-byte ones of PDH, PEK, OCA and CEK, and AMD's own of ASK and ARK.

A certificate of the wrong kind is INVALID_CERTIFICATE, a signature that does not hold BAD_SIGNATURE. Sources: SEV API
(certificate format), firmware 1.55.25; what the real Naples chain looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from snpbook.spec.launch import CURVE_P384, PUBLIC_KEY, SIGNATURE
from snpbook.spec.layout import Record
from snpbook.spec.releases import Release
from snpbook.spec.report import SIGNATURE_COMPONENT
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
    amd_certificate,
    unsigned_certificate,
)
from snpbook.spec.status import FirmwareRefusal, Status, require

_HASHES: Mapping[int, type[hashes.SHA256] | type[hashes.SHA384]] = {
    CertAlgo.RSA_SHA256: hashes.SHA256,
    CertAlgo.RSA_SHA384: hashes.SHA384,
    CertAlgo.ECDSA_SHA256: hashes.SHA256,
    CertAlgo.ECDSA_SHA384: hashes.SHA384,
}


# Making.


def certificate(usage: CertUsage, key: ec.EllipticCurvePublicKey, release: Release) -> Record:
    """An unsigned certificate of a P-384 key."""
    point = key.public_numbers()
    return unsigned_certificate(usage, point.x, point.y, (release.major, release.minor))


def unsigned(cert: Record) -> Record:
    """A certificate without its signatures."""
    return SEV_CERTIFICATE.unpack(bytes(cert)[:CERT_SIGNED_SIZE].ljust(SEV_CERTIFICATE.size, b"\0")).replace(
        sig1_usage=CertUsage.INVALID, sig2_usage=CertUsage.INVALID
    )


def signed(cert: Record, usage: CertUsage, key: ec.EllipticCurvePrivateKey) -> Record:
    """The certificate with a further signature, by the key whose usage that is."""
    r, s = sign(key, bytes(cert)[:CERT_SIGNED_SIZE])
    return with_signature(cert, usage, SIGNATURE.pack(r=r, s=s))


def with_signature(cert: Record, usage: CertUsage, signature: bytes) -> Record:
    """The certificate with an ECDSA signature in its first free slot."""
    slot = "sig1" if cert.sig1_usage is CertUsage.INVALID else "sig2"
    return cert.replace(**{f"{slot}_usage": usage, f"{slot}_algo": CertAlgo.ECDSA_SHA256, slot: signature})


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> tuple[bytes, bytes]:
    """R and S, 72 bytes each, little-endian: ECDSA with SHA-256 and the nonce of RFC 6979."""
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(SIGNATURE_COMPONENT, "little"), s.to_bytes(SIGNATURE_COMPONENT, "little")


# Checking.


def checked(data: bytes, usage: CertUsage) -> Record:
    """The certificate in 2084 bytes, of a key of that usage."""
    cert = SEV_CERTIFICATE.unpack(data)
    found = (cert.version, cert.pubkey_usage, cert.pubkey_algo)
    wanted = (CERT_VERSION, usage, KEY_ALGOS[usage])
    require(found == wanted, Status.INVALID_CERTIFICATE, f"version, usage and algorithm of the {usage.name}",
            wanted, found, "SEV")  # fmt: skip
    public_key(cert)
    return cert


def public_key(cert: Record) -> ec.EllipticCurvePublicKey:
    """The key that a 2084-byte certificate is of."""
    packed = PUBLIC_KEY.unpack(cert.pubkey)
    x, y = int.from_bytes(packed.qx, "little"), int.from_bytes(packed.qy, "little")
    try:
        if packed.curve != CURVE_P384:
            raise ValueError(f"curve {packed.curve}")
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError as error:
        raise FirmwareRefusal(Status.INVALID_CERTIFICATE, "key", "a point on P-384", str(error), "SEV") from None


def check_signed(cert: Record, signer: Record) -> None:
    """That a certificate has a good signature by the key of another one: a 2084-byte one or AMD's ASK."""
    usage = signer.key_usage if signer.layout in AMD_CERTIFICATES.values() else signer.pubkey_usage
    name = f"{CertUsage(cert.pubkey_usage).name} by {CertUsage(usage).name}"
    admitted = usage in SIGNERS[cert.pubkey_usage]
    slots = [slot for slot in ("sig1", "sig2") if admitted and getattr(cert, f"{slot}_usage") == usage]
    require(bool(slots), Status.INVALID_CERTIFICATE, f"there is a signature of {name}", usage, cert.sig1_usage, "SEV")
    algo, signature = getattr(cert, f"{slots[0]}_algo"), getattr(cert, slots[0])
    message = bytes(cert)[:CERT_SIGNED_SIZE]
    if "modulus" in signer.layout.fields:
        _check_rsa(signer, algo, signature[: signer.modulus_bits // 8], message, name)
        return
    known = algo in (CertAlgo.ECDSA_SHA256, CertAlgo.ECDSA_SHA384)
    require(known, Status.INVALID_CERTIFICATE, f"algorithm of {name}", "ECDSA", algo, "SEV")
    parts = SIGNATURE.unpack(signature)
    r, s = int.from_bytes(parts.r, "little"), int.from_bytes(parts.s, "little")
    try:
        public_key(signer).verify(encode_dss_signature(r, s), message, ec.ECDSA(_HASHES[algo]()))
        good = True
    except (InvalidSignature, ValueError):
        good = False
    require(good, Status.BAD_SIGNATURE, f"signature of {name}", "valid", "invalid", "SEV")


def check_amd_chain(data: bytes, ark_digest: bytes) -> Record:
    """The ASK of an ASK and the ARK behind it, whose SHA-256 is the one that the chip was fused with.

    What of the ARK the fuses hold a hash of is not published (MODEL: the whole certificate).
    """
    try:
        ask = amd_certificate(data)
        ark = amd_certificate(data, ask.layout.size)
    except ValueError as error:
        raise FirmwareRefusal(Status.INVALID_CERTIFICATE, "AMD's certificates", "two", str(error), "SEV") from None
    for cert, usage in ((ask, CertUsage.ASK), (ark, CertUsage.ARK)):
        found = (cert.version, cert.key_usage)
        require(found == (CERT_VERSION, usage), Status.INVALID_CERTIFICATE, f"version and usage of the {usage.name}",
                (CERT_VERSION, usage), found, "SEV")  # fmt: skip
        require(cert.certifying_id == ark.key_id, Status.INVALID_CERTIFICATE, f"signer of the {usage.name}",
                ark.key_id, cert.certifying_id, "SEV")  # fmt: skip
    digest = sha256(bytes(ark)).digest()
    require(digest == ark_digest, Status.INVALID_CERTIFICATE, "SHA-256 of the ARK", ark_digest, digest, "SEV")
    for cert in (ark, ask):
        message = bytes(cert)[: cert.layout.offset("signature")]
        algo = RSA_ALGOS[ark.modulus_bits]
        _check_rsa(ark, algo, cert.signature[: ark.modulus_bits // 8], message, f"{cert.key_usage.name} by ARK")
    return ask


def _check_rsa(signer: Record, algo: int, signature: bytes, message: bytes, name: str) -> None:
    wanted = RSA_ALGOS[signer.modulus_bits]
    require(algo == wanted, Status.INVALID_CERTIFICATE, f"algorithm of {name}", wanted, algo, "SEV")
    digest = _HASHES[wanted]()
    exponent, modulus = (int.from_bytes(part, "little") for part in (signer.exponent, signer.modulus))
    try:
        key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        key.verify(signature[::-1], message, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
        good = True
    except (InvalidSignature, ValueError):
        good = False
    require(good, Status.BAD_SIGNATURE, f"signature of {name}", "valid", "invalid", "SEV")
