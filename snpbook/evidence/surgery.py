"""Edits inside DER that keep every length right, and signatures over what was edited.

A defect must be the only one: a certificate that lies about its chip is otherwise in perfect order. Sources: ITU-T
X.690, RFC 5280 (Certificate, CertificateList).
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import rsa

from snpbook.attest.der import BIT_STRING, LONG_FORM, OCTET_STRING, OID, SEQUENCE, Element, children, element
from snpbook.vendor import pss

_CONSTRUCTED, _GROUP = 1 << 5, 7


def spliced(der: bytes, old: bytes, new: bytes) -> bytes:
    """One element with the first run of bytes `old` inside it replaced; `ValueError` where there is none."""
    return _rebuilt(der, element(der), der.index(old), len(old), new)


def resigned(der: bytes, key: rsa.RSAPrivateKey, old: bytes, new: bytes) -> bytes:
    """A certificate or revocation list whose signed part was spliced, signed again by `key`."""
    signed, algorithm, _ = children(der, element(der))
    body = spliced(der[signed.start : signed.end], old, new)
    named = der[algorithm.start : algorithm.end]
    return tagged(SEQUENCE, body + named + tagged(BIT_STRING, b"\0" + pss.sign(key, body)))


def extension(der: bytes, oid: str) -> bytes:
    """The whole extension of a certificate that has that identifier, as it stands there."""
    name, signed = encoded_oid(oid), children(der, element(der))[0]
    for found in children(der, children(der, children(der, signed)[-1])[0]):
        if der.startswith(name, found.content):
            return der[found.start : found.end]
    raise ValueError(f"the certificate has no extension {oid}")


def made_extension(oid: str, value: bytes) -> bytes:
    """An extension that is not critical."""
    return tagged(SEQUENCE, encoded_oid(oid) + tagged(OCTET_STRING, value))


def encoded_oid(oid: str) -> bytes:
    """The DER of an object identifier: seven bits of each arc an octet, all but an arc's last with the top bit."""
    first, second, *arcs = map(int, oid.split("."))
    body = bytearray([40 * first + second])
    for arc in arcs:
        octets = [arc % LONG_FORM]
        while arc := arc >> _GROUP:
            octets.append(arc % LONG_FORM | LONG_FORM)
        body += bytes(reversed(octets))
    return tagged(OID, bytes(body))


def flipped(data: bytes, at: int) -> bytes:
    """The bytes with the lowest bit of one of them turned; `at` may count from the end."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def tagged(tag: int, content: bytes) -> bytes:
    """An element of that content."""
    size = len(content)
    octets = size.to_bytes(-(-size.bit_length() // 8), "big")
    return bytes([tag, *([size] if size < LONG_FORM else [LONG_FORM | len(octets), *octets])]) + content


def _rebuilt(der: bytes, outer: Element, at: int, size: int, new: bytes) -> bytes:
    """The element with a run inside it replaced, in the child that holds all of it or in its own content."""
    before, after = der[outer.content : at], der[at + size : outer.end]
    if outer.tag & _CONSTRUCTED:
        for child in children(der, outer):
            if child.content <= at and at + size <= child.end:
                before = der[outer.content : child.start]
                new, after = _rebuilt(der, child, at, size, new), der[child.end : outer.end]
    return tagged(outer.tag, before + new + after)
