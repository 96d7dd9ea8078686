"""Certificates as evidence: reading DER and PEM, AMD's names, and the one signature scheme that AMD uses.

This file alone talks to the X.509 parser: whatever that finds wrong inside a well-formed outer structure becomes
`NotGenuine`. Sources: KDS (certificate formats), X509 (RFC 5280, RFC 4055).
"""

from __future__ import annotations

import re
import warnings
from base64 import b64decode
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import NameOID

from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.spec.certificates import (
    DISTINGUISHED_NAME,
    PSS_ALGORITHM,
    PSS_ALGORITHM_EXPLICIT,
    PSS_SALT_SIZE,
    RSA_BITS,
    RSA_EXPONENT,
)

X509 = "X509 RFC 5280"
_BEGIN = b"-----BEGIN CERTIFICATE-----"
_SEQUENCE, _LONG_FORM = b"\x30", 0x80
_PEM = re.compile(_BEGIN + rb"\s+([A-Za-z0-9+/=\s]*?)-----END CERTIFICATE-----")
_PSS = padding.PSS(padding.MGF1(SHA384()), PSS_SALT_SIZE)
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension)


@dataclass(frozen=True, slots=True, repr=False)
class Certificate:
    """One certificate, with everything decoded that a chain of AMD's needs; names as RFC 4514 writes them."""

    der: bytes
    common_name: str
    subject: str
    issuer: str
    not_before: datetime
    not_after: datetime
    version: x509.Version
    public_key: object
    extensions: x509.Extensions = field(compare=False)
    tbs: bytes
    signature: bytes
    uses_pss: bool

    @classmethod
    def read(cls, der: bytes) -> Certificate:
        """Decode one certificate; `MalformedEvidence` where the DER ends elsewhere, `NotGenuine` for what is inside."""
        header = _der_header(der)
        try:
            with warnings.catch_warnings():  # AMD gives every VEK the serial number 0
                warnings.filterwarnings("ignore", message="Parsed a serial number which wasn't positive")
                parsed = x509.load_der_x509_certificate(der)
            tbs = parsed.tbs_certificate_bytes
            return cls(
                der=der,
                common_name=" ".join(str(e.value) for e in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)),
                subject=parsed.subject.rfc4514_string(),
                issuer=parsed.issuer.rfc4514_string(),
                not_before=parsed.not_valid_before_utc,
                not_after=parsed.not_valid_after_utc,
                version=parsed.version,
                public_key=parsed.public_key(),
                extensions=parsed.extensions,
                tbs=tbs,
                signature=parsed.signature,
                uses_pss=der.startswith((PSS_ALGORITHM, PSS_ALGORITHM_EXPLICIT), header + len(tbs)),
            )
        except _UNREADABLE as error:
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
        key = self.public_key
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size != RSA_BITS:
            return False
        return key.public_numbers().e == RSA_EXPONENT

    @property
    def may_sign_certificates(self) -> bool:
        """Basic constraints and key usage make it a certificate authority."""
        try:
            constraints = self.extensions.get_extension_for_class(x509.BasicConstraints).value
            return constraints.ca and self.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        except x509.ExtensionNotFound:
            return False

    def signed_by(self, issuer: Certificate) -> bool:
        """The issuer's key made this certificate's signature, in AMD's scheme."""
        if not (self.uses_pss and issuer.has_ca_key):
            return False
        assert isinstance(issuer.public_key, rsa.RSAPublicKey)
        try:
            issuer.public_key.verify(self.signature, self.tbs, _PSS, SHA384())
        except InvalidSignature:
            return False
        return True


def load_certificates(data: bytes) -> list[Certificate]:
    """The certificates of a file: one as DER, or any number as PEM; errors as of `Certificate.read`."""
    if b"-----BEGIN" not in data:
        return [Certificate.read(data)]
    blocks = _PEM.findall(data)
    if len(blocks) != data.count(_BEGIN):
        raise MalformedEvidence("the armour of a PEM certificate is broken")
    if not blocks:
        raise MalformedEvidence("this PEM holds no certificate")
    try:
        ders = [b64decode(block.translate(None, b" \t\r\n"), validate=True) for block in blocks]
    except ValueError as error:
        raise MalformedEvidence(f"the base64 text of a PEM certificate is broken: {error}") from error
    return [Certificate.read(der) for der in ders]


@cache
def amd_name(common_name: str) -> str:
    """The distinguished name that AMD gives to a key of that common name."""
    fields = [x509.NameAttribute(x509.ObjectIdentifier(oid), value) for oid, value in DISTINGUISHED_NAME]
    return x509.Name([*fields, x509.NameAttribute(NameOID.COMMON_NAME, common_name)]).rfc4514_string()


def _der_header(der: bytes) -> int:
    """The size of the outermost header; `MalformedEvidence` where the SEQUENCE does not span exactly the bytes."""
    if der[:1] != _SEQUENCE or len(der) < 2:
        raise MalformedEvidence("neither PEM nor DER: a certificate begins with a SEQUENCE or with BEGIN CERTIFICATE")
    octets = der[1] - _LONG_FORM if der[1] > _LONG_FORM else 0
    length = int.from_bytes(der[2 : 2 + octets], "big") if octets else der[1]
    if 2 + octets + length != len(der):
        raise MalformedEvidence(f"the DER announces {2 + octets + length} bytes, and there are {len(der)}")
    return 2 + octets
