"""Keys and signatures on P-384 as AMD's firmware writes them: little-endian integers of 72 bytes, zeros behind.

Reports, ID blocks and legacy SEV certificates share these forms. Sources: SNP ABI (ECDSA public key and signature
formats), SEV API (certificate format).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from snpbook.spec.launch import CURVE_P384, PUBLIC_KEY

ECDSA_SHA384 = ec.ECDSA(SHA384())
"""How reports and ID blocks are signed."""


def read_point(data: bytes) -> ec.EllipticCurvePublicKey:
    """The key in 0x404 bytes; `ValueError` says why there is none."""
    fields = PUBLIC_KEY.unpack(data)
    if fields.curve != CURVE_P384:
        raise ValueError(f"curve {fields.curve}, not {CURVE_P384} (P-384)")
    stray = PUBLIC_KEY.reserved_set(data)
    if stray:
        raise ValueError(f"byte {stray[0]:#05x} of the key is reserved and {data[stray[0]]:#04x}")
    x, y = (int.from_bytes(part, "little") for part in (fields.qx, fields.qy))
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()


def signature_size(r: bytes, s: bytes) -> int:
    """The bits of the longer of two components; more than the curve's order has fit no signature."""
    return (int.from_bytes(r, "little") | int.from_bytes(s, "little")).bit_length()


def signed_by(key: ec.EllipticCurvePublicKey, r: bytes, s: bytes, message: bytes, algorithm: ec.ECDSA) -> bool:
    """The key made that signature."""
    signature = encode_dss_signature(int.from_bytes(r, "little"), int.from_bytes(s, "little"))
    try:
        key.verify(signature, message, algorithm)
    except InvalidSignature:
        return False
    return True
