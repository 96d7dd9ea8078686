"""The chip's secret and every key that the secure processor derives from it.

Only the AMD-SP ever holds the secret (and AMD, which burnt it in: `vendor` may import this module). Rules: SNP ABI,
key derivation and VCEK; SP 800-108 (counter mode), FIPS 186-5 A.2.1 (extra bits), RFC 6979 (deterministic ECDSA).
MODEL: how the fused secret becomes the first hashstick's seed and the chip-unique key is not published.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256, sha384

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from snpbook.spec.certificates import HWID_SIZE, PRODUCT_LINES
from snpbook.spec.key_derivation import CEK_LABEL, EXTRA_BITS, HASHSTICK_SIZE, VCEK_LABEL
from snpbook.spec.policy import Tcb
from snpbook.spec.products import product as find_product
from snpbook.spec.report import SIGNATURE_COMPONENT, SIGNED_SIZE

MEMORY_KEY_LABEL = "sev-vm-encryption-key-0"

_SPL_TOP = 255


def kdf(key: bytes, label: str, context: bytes, size: int) -> bytes:
    """`size` bytes of SP 800-108 in counter mode with HMAC-SHA256, the firmware's one key derivation.

    Unlike the examples of SP 800-108, the firmware writes the counter and the length in bits little-endian.
    """
    bits = (8 * size).to_bytes(4, "little")
    fixed = label.encode() + b"\0" + context + bits
    blocks = range(1, -(-size // 32) + 1)
    return b"".join(hmac.digest(key, i.to_bytes(4, "little") + fixed, "sha256") for i in blocks)[:size]


def memory_key(seed: bytes, size: int) -> bytes:
    """The memory controller's key, `size` bytes, from a guest's 32-byte seed.

    Real firmware derives one per memory channel; here that of channel 0 serves all of them (MODEL).
    """
    return kdf(seed, MEMORY_KEY_LABEL, bytes(4), size)


def hashstick(seed: bytes, tcb: Tcb) -> bytes:
    """The 48-byte stick of the last TCB component: the root of attestation and derived guest keys.

    Hashing a stick once gives that of the next lower microcode version; no way leads up. Components are chained
    in the byte order of TCB_VERSION, reserved ones included; that Turin chains its own order is unconfirmed.
    """
    for version in int(tcb).to_bytes(8, "little"):
        for _ in range(_SPL_TOP - version):
            seed = sha384(seed).digest()
        stick = sha384(seed).digest()
        seed = sha384(bytes(8) + seed).digest()
    return stick


def attestation_key(stick: bytes, label: str) -> ec.EllipticCurvePrivateKey:
    """The P-384 key that signs reports: from a chip's stick with `VCEK_LABEL`, a provider's with `VLEK_LABEL`."""
    return _private_key(ec.SECP384R1(), stick, label)


def sign_report(key: ec.EllipticCurvePrivateKey, signed: bytes) -> tuple[bytes, bytes]:
    """R and S, 72 bytes each, little-endian, over the signed part of a report (its first 0x2A0 bytes).

    The nonce is that of RFC 6979, so that equal reports have equal signatures. Needs a `cryptography` built on
    OpenSSL 3.2 or newer, as its wheels are; an older one raises `cryptography.exceptions.UnsupportedAlgorithm`.
    """
    if len(signed) != SIGNED_SIZE:
        raise ValueError(f"signed: the signed part of a report has {SIGNED_SIZE:#x} bytes, not {len(signed):#x}")
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
    return r.to_bytes(SIGNATURE_COMPONENT, "little"), s.to_bytes(SIGNATURE_COMPONENT, "little")


@dataclass(frozen=True, slots=True)
class Chip:
    """What is fused into one part: its product line and its 32-byte secret."""

    product: str
    secret: bytes = field(repr=False)

    @classmethod
    def from_seed(cls, seed: str | bytes, product: str) -> Chip:
        """The chip of a named seed; text is taken as UTF-8. The same seed gives unrelated chips per product."""
        key = seed.encode() if isinstance(seed, str) else seed
        return cls(product, kdf(key, "snpbook-chip-secret", product.encode(), 32))

    def __post_init__(self) -> None:
        find_product(self.product)

    @property
    def chip_id(self) -> bytes:
        """CHIP_ID, 64 bytes: the chip-unique key's public point on secp256k1, x then y, big-endian.

        Turin keeps the first 8 bytes and zeroes the rest.
        """
        key = _private_key(ec.SECP256K1(), self.secret, "snpbook-chip-unique-key")
        point = key.public_key().public_numbers()
        whole = point.x.to_bytes(32, "big") + point.y.to_bytes(32, "big")
        line = PRODUCT_LINES.get(self.product)
        return whole[: line.hwid_size if line else HWID_SIZE].ljust(HWID_SIZE, b"\0")

    def hashstick(self, tcb: Tcb) -> bytes:
        """The stick of this chip at `tcb`."""
        return hashstick(kdf(self.secret, "snpbook-hashstick-seed", b"", HASHSTICK_SIZE), tcb)

    def vcek(self, tcb: Tcb) -> ec.EllipticCurvePrivateKey:
        """The versioned chip endorsement key of this chip at `tcb`."""
        return attestation_key(self.hashstick(tcb), VCEK_LABEL)

    @property
    def cek(self) -> ec.EllipticCurvePrivateKey:
        """The chip endorsement key of SEV and SEV-ES, the same at every TCB."""
        return _private_key(ec.SECP384R1(), sha256(self.secret).digest(), CEK_LABEL)

    @property
    def nv_key(self) -> bytes:
        """What seals the legacy platform's persistent data in the host's memory: 32 bytes (MODEL)."""
        return kdf(self.secret, "snpbook-nv-area", b"", 32)


def random_key(rng: Callable[[int], bytes]) -> ec.EllipticCurvePrivateKey:
    """A new P-384 key."""
    return _reduced(ec.SECP384R1(), rng(_stream_size(ec.SECP384R1())))


def _private_key(curve: ec.EllipticCurve, secret: bytes, label: str) -> ec.EllipticCurvePrivateKey:
    return _reduced(curve, kdf(secret, label, b"", _stream_size(curve)))


def _stream_size(curve: ec.EllipticCurve) -> int:
    return (curve.key_size + EXTRA_BITS) // 8


def _reduced(curve: ec.EllipticCurve, stream: bytes) -> ec.EllipticCurvePrivateKey:
    """A private key by "extra bits": 64 more than the order has, so that the remainder is as good as unbiased."""
    return ec.derive_private_key(int.from_bytes(stream, "little") % (curve.group_order - 1) + 1, curve)
