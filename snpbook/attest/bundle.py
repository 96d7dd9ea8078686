"""Certificates and revocation lists from files: DER, one or several one behind the other, or PEM.

A file is taken apart before anything in it is decoded, so that a broken outer form (`MalformedEvidence`) is told from
broken content (`NotGenuine`). Sources: RFC 7468 (PEM), X509 (RFC 5280).
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from snpbook.attest import der as asn1
from snpbook.attest.certs import Certificate, outermost
from snpbook.attest.checks import MalformedEvidence
from snpbook.attest.crl import RevocationList

_BEGIN, _DASHES = b"-----BEGIN ", b"-----"
_LABELS = (b"CERTIFICATE", b"X509 CRL")
_LONG_SEQUENCE = bytes([asn1.SEQUENCE, asn1.LONG_FORM + 2])


@dataclass(frozen=True, slots=True)
class Bundle:
    """Certificates and revocation lists of any origin, in the order in which they came."""

    certificates: tuple[Certificate, ...] = ()
    crls: tuple[RevocationList, ...] = ()

    @classmethod
    def read(cls, data: bytes) -> Bundle:
        """What a file holds; errors as of `ders` and `decode`."""
        return cls.decode(ders(data))

    @classmethod
    def decode(cls, blobs: Iterable[bytes]) -> Bundle:
        """Decode each; errors as of `Certificate.read` and `RevocationList.read`."""
        certificates, crls = [], []
        for blob in blobs:
            if is_revocation_list(blob):
                crls.append(RevocationList.read(blob))
            else:
                certificates.append(Certificate.read(blob))
        return cls(tuple(certificates), tuple(crls))


def load_certificates(data: bytes) -> list[Certificate]:
    """The certificates of a file, which may hold revocation lists as well; errors as of `Bundle.read`."""
    return list(Bundle.read(data).certificates)


def ders(data: bytes) -> list[bytes]:
    """The DER of each certificate and list of a file; `MalformedEvidence` for broken armour, or a length that is off.

    Text around PEM armour and armour of other things, such as keys, is passed over; DER beside it counts.
    """
    if _BEGIN not in data:
        return list(_joined(data))
    blobs = list(_armoured(data))
    if not blobs:
        raise MalformedEvidence("this PEM holds neither a certificate nor a revocation list")
    for blob in blobs:
        outermost(blob)
    return blobs


def _joined(data: bytes) -> Iterator[bytes]:
    """One DER, or several one behind the other."""
    at = 0
    while at < len(data) or not at:
        end = outermost(data, at, whole=False).end
        yield data[at:end]
        at = end


def _armoured(data: bytes) -> Iterator[bytes]:
    before, *parts = data.split(_BEGIN)
    yield from _beside(before)
    for part in parts:
        label, begun, rest = part.partition(_DASHES)
        if label not in _LABELS:
            continue
        text, ended, behind = rest.partition(b"-----END " + label + _DASHES)
        if not (begun and ended):
            raise MalformedEvidence(f"the armour of a PEM {label.decode()} is broken")
        try:
            yield b64decode(text.translate(None, b" \t\r\n"), validate=True)
        except ValueError as error:
            raise MalformedEvidence(f"the base64 text of a PEM {label.decode()} is broken: {error}") from error
        yield from _beside(behind.lstrip(b"\r\n"))


def _beside(data: bytes) -> Iterator[bytes]:
    """DER between armour, where files of both kinds were joined: no text begins with a length of two octets."""
    return _joined(data) if data.startswith(_LONG_SEQUENCE) else iter(())


def is_revocation_list(der: bytes) -> bool:
    """Whether a date stands where a certificate has its validity, a SEQUENCE of two."""
    try:
        fields = asn1.children(der, asn1.element(der, asn1.element(der).content))
    except asn1.DerError:
        return False
    versioned = bool(fields) and fields[0].tag == asn1.INTEGER
    times = (asn1.UTC_TIME, asn1.GENERALIZED_TIME)
    return any(field.tag in times for field in fields[2 + versioned : 3 + versioned])
