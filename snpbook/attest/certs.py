"""Certificates as evidence: what AMD's X.509 profile needs of one, and the one signature scheme that AMD uses.

Keys are looked at as bytes first: only RSA-4096 with e = 65537 and P-384 are ever handed to arithmetic. The outermost
form is judged with `MalformedEvidence`, whatever is wrong inside with `NotGenuine`. Sources: KDS (certificate formats),
X509 (RFC 5280, RFC 4055).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from hashlib import sha256, sha384

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_der_public_key
from cryptography.x509.oid import NameOID

from snpbook.attest import der as asn1
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.spec.certificates import (
    DISTINGUISHED_NAME,
    P384_KEY_ALGORITHM,
    P384_POINT_SIZE,
    PRODUCT_LINES,
    PSS_ALGORITHM,
    PSS_ALGORITHM_EXPLICIT,
    PSS_SALT_SIZE,
    RSA_BITS,
    RSA_EXPONENT,
    RSA_KEY_ALGORITHM,
    VCEK,
    VLEK,
)

X509 = "X509 RFC 5280"
_SHORT = 8
"""Bytes of an exponent that is looked at as a number."""
_PSS = padding.PSS(padding.MGF1(SHA384()), PSS_SALT_SIZE)
UNREADABLE = (
    ValueError, TypeError, OverflowError, Warning, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""What the X.509 parser raises over what it does not understand."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A subject's key: what kind it is, in words, its SubjectPublicKeyInfo, and the key where AMD would use it."""

    kind: str
    spki: bytes = field(repr=False)
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, repr=False)
class Certificate:
    """One certificate, with everything decoded that a chain of AMD's needs; names as RFC 4514 writes them."""

    der: bytes
    common_name: str = field(compare=False)
    subject: str = field(compare=False)
    issuer: str = field(compare=False)
    serial: int = field(compare=False)
    not_before: datetime = field(compare=False)
    not_after: datetime = field(compare=False)
    version: x509.Version = field(compare=False)
    public_key: PublicKey = field(compare=False)
    extensions: x509.Extensions = field(compare=False)
    tbs: bytes = field(compare=False)
    signature: bytes = field(compare=False)
    uses_pss: bool = field(compare=False)

    @classmethod
    def read(cls, der: bytes) -> Certificate:
        """Decode one certificate; `MalformedEvidence` where the DER ends elsewhere, `NotGenuine` for what is inside."""
        outer = outermost(der)
        try:
            tbs, algorithm, _ = asn1.children(der, outer)
            fields = asn1.children(der, tbs)
            number, inner, by, _, of, spki = fields[1:7] if fields[0].tag == asn1.CONTEXT_0 else fields[0:6]
            serial = asn1.integer(der, number)
            if serial is None:
                raise ValueError("the serial number is negative or not minimal")
            parsed = x509.load_der_x509_certificate(_with_positive_serial(der, number))
            subject, common_name = _words(_Name(der[of.start : of.end], lambda: parsed.subject))
            issuer, _ = _words(_Name(der[by.start : by.end], lambda: parsed.issuer))
            return cls(
                der=der,
                common_name=common_name,
                subject=subject,
                issuer=issuer,
                serial=serial,
                not_before=parsed.not_valid_before_utc,
                not_after=parsed.not_valid_after_utc,
                version=parsed.version,
                public_key=_public_key(der, spki),
                extensions=parsed.extensions,
                tbs=der[tbs.start : tbs.end],
                signature=parsed.signature,
                uses_pss=is_pss(der, algorithm, inner),
            )
        except UNREADABLE as error:
            rule = f"a certificate cannot be decoded: {error}"
            raise NotGenuine("certificates.decode", rule, cite=X509) from error

    def __repr__(self) -> str:
        return f"Certificate({self.common_name}, sha256 {self.fingerprint[:16]})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the DER, in hex: what a root is pinned by."""
        return sha256(self.der).hexdigest()

    @property
    def has_ca_key(self) -> bool:
        """RSA with 4096 bits and exponent 65537, as every CA of AMD: other keys are never computed with."""
        return isinstance(self.public_key.key, rsa.RSAPublicKey)

    @property
    def span(self) -> str:
        """Its dates in words."""
        return f"{self.not_before.date()} to {self.not_after.date()}"

    def is_valid_at(self, now: datetime) -> bool:
        """Its dates span that moment, both ends included."""
        return self.not_before <= now <= self.not_after

    def signed_by(self, issuer: Certificate) -> bool:
        """The issuer's key made this certificate's signature, in AMD's scheme."""
        return self.uses_pss and made_by(issuer, self.signature, self.tbs)


@dataclass(frozen=True, slots=True)
class _Name:
    """A distinguished name, and what decodes it."""

    der: bytes
    decode: Callable[[], x509.Name] = field(compare=False)


@lru_cache(maxsize=256)
def _words(name: _Name) -> tuple[str, str]:
    """A name as RFC 4514 writes it, and its common name; remembered, because all certificates have the same few."""
    if name.der in _amd_names():
        return _amd_names()[name.der]
    decoded = name.decode()
    common = decoded.get_attributes_for_oid(NameOID.COMMON_NAME)
    return decoded.rfc4514_string(), " ".join(str(attribute.value) for attribute in common)


def made_by(issuer: Certificate, signature: bytes, message: bytes) -> bool:
    """The key of a CA made that PSS signature; False as well where AMD would use no such key."""
    return issuer.has_ca_key and _pss_holds(issuer.public_key, signature, sha384(message).digest())


@lru_cache(maxsize=4096)
def _pss_holds(signer: PublicKey, signature: bytes, digest: bytes) -> bool:
    """Remembered, because thousands of reports hang from the same few certificates."""
    assert isinstance(signer.key, rsa.RSAPublicKey)
    try:
        signer.key.verify(signature, digest, _PSS, Prehashed(SHA384()))
    except InvalidSignature:
        return False
    return True


def outermost(data: bytes, at: int = 0, *, whole: bool = True) -> asn1.Element:
    """The SEQUENCE at `at`; `MalformedEvidence` where there is none, or (with `whole`) more than it."""
    if data[at : at + 1] != bytes([asn1.SEQUENCE]):
        raise MalformedEvidence("neither PEM nor DER: certificates begin with a SEQUENCE or with BEGIN CERTIFICATE")
    try:
        outer = asn1.element(data, at)
    except asn1.DerError as error:
        raise MalformedEvidence(f"the DER is cut short or its outermost length is off: {error}") from error
    if whole and outer.end != len(data):
        raise MalformedEvidence(f"the DER announces {outer.end} bytes, and there are {len(data)}")
    return outer


def is_pss(der: bytes, algorithm: asn1.Element, inner: asn1.Element) -> bool:
    """The algorithm is AMD's PSS in one of its two encodings, inside the signed part as behind it."""
    named = der[algorithm.start : algorithm.end]
    return named in (PSS_ALGORITHM, PSS_ALGORITHM_EXPLICIT) and der[inner.start : inner.end] == named


@cache
def amd_name(common_name: str) -> str:
    """The distinguished name that AMD gives to a key of that common name."""
    return _amd_name(common_name).rfc4514_string()


def _amd_name(common_name: str) -> x509.Name:
    fields = [x509.NameAttribute(x509.ObjectIdentifier(oid), value) for oid, value in DISTINGUISHED_NAME]
    return x509.Name([*fields, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


@cache
def _amd_names() -> dict[bytes, tuple[str, str]]:
    """The names of AMD's keys by their DER, which is the same in every certificate."""
    authorities = [facts for line in PRODUCT_LINES.values() for facts in (line.ark, line.ask, line.asvk)]
    common_names = [VCEK.common_name, VLEK.common_name, *(facts.common_name for facts in authorities)]
    return {_amd_name(name).public_bytes(): (amd_name(name), name) for name in common_names}


def _with_positive_serial(der: bytes, number: asn1.Element) -> bytes:
    """The bytes that the parser reads: it warns of the serial number 0, which AMD gives to every VEK."""
    return der if any(der[number.content : number.end]) else der[: number.end - 1] + b"\1" + der[number.end :]


def _public_key(der: bytes, spki: asn1.Element) -> PublicKey:
    algorithm, point = asn1.children(der, spki)
    named, encoded = der[algorithm.start : algorithm.end], der[spki.start : spki.end]
    kind, usable = "a key of another kind", False
    if named == RSA_KEY_ALGORITHM:
        kind, usable = _rsa_kind(der, point)
    elif named == P384_KEY_ALGORITHM:
        usable = point.end - point.content == 1 + P384_POINT_SIZE
        kind = "EC secp384r1" if usable else "EC secp384r1, not as an uncompressed point"
    key = load_der_public_key(encoded) if usable else None
    assert key is None or isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
    return PublicKey(kind, encoded, key)


def _rsa_kind(der: bytes, bit_string: asn1.Element) -> tuple[str, bool]:
    """What an RSA key is, by the lengths of its two integers, and whether it is AMD's kind."""
    modulus, exponent = asn1.children(der, asn1.element(der, bit_string.content + 1, bit_string.end))
    body, size = der[modulus.content : modulus.content + 2], modulus.end - modulus.content
    bits = 8 * (size - 1) + (body[0].bit_length() if body else 0)
    e = asn1.integer(der, exponent) if exponent.end - exponent.content <= _SHORT else None
    whole = size == RSA_BITS // 8 + 1 and body[0] == 0 and body[1].bit_length() == 8
    return f"RSA-{bits}, e = {'no small number' if e is None else e}", whole and e == RSA_EXPONENT
