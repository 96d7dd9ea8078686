"""The chip's secret and every key that the secure processor derives from it.

Only the AMD-SP ever holds the secret (and AMD, which burnt it in: `vendor` may import this module). Rules: SNP ABI,
key derivation and VCEK; SP 800-108 (counter mode), FIPS 186-5 A.2.1 (extra bits), RFC 6979 (deterministic ECDSA).
MODEL: how the fused secret becomes the first hashstick's seed and the chip-unique key is not published.
"""

from __future__ import annotations

import hmac
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256, sha384

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.spec.certificates import HWID_SIZE, PRODUCT_LINES
from snpbook.spec.key_derivation import (
    CEK_LABEL,
    EXTRA_BITS,
    HASHSTICK_SIZE,
    HASHSTICKS,
    VCEK_LABEL,
    VLEK_WRAPPING_LABEL,
)
from snpbook.spec.policy import Tcb
from snpbook.spec.products import product as find_product
from snpbook.spec.report import SIGNATURE_COMPONENT, SIGNED_SIZE
from snpbook.spec.resources import resource

MEMORY_KEY_LABEL = "sev-vm-encryption-key-0"

_SPL_TOP = 255
_SECRET_SIZE = 32


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


@lru_cache(maxsize=256)
def hashsticks(seed: bytes, tcb: Tcb) -> tuple[bytes, ...]:
    """The 48-byte sticks of all TCB components, in the byte order of TCB_VERSION, reserved ones included.

    The last roots attestation and derived guest keys. That Turin chains its own order is unconfirmed.
    """
    return _chain(seed, _versions(tcb))


def lower_stick(sticks: Sequence[bytes], held: Tcb, wanted: Tcb) -> bytes:
    """The last stick at an older TCB, from the sticks at the one that is held; `ValueError` for a newer one.

    Hashing leads one version down, never up. Who may lower a component reaches every version of those behind it.
    """
    mine, theirs = _versions(held), _versions(wanted)
    if mine == theirs:
        return sticks[-1]
    lowered = next(index for index in range(len(mine)) if mine[index] != theirs[index])
    if mine[lowered] < theirs[lowered]:
        raise ValueError(f"wanted = {wanted}: no way leads there from {held}")
    last = sticks[lowered]  # one version below, it is what a last hash makes the stick of
    for _ in range(mine[lowered] - theirs[lowered] - 1):
        last = sha384(last).digest()
    below = _chain(_next_seed(last), theirs[lowered + 1 :])
    return below[-1] if below else sha384(last).digest()


def _chain(seed: bytes, versions: bytes) -> tuple[bytes, ...]:
    """The sticks of components at their versions, each component seeded by the one before it."""
    sticks = []
    for version in versions:
        for _ in range(_SPL_TOP - version):
            seed = sha384(seed).digest()
        sticks.append(sha384(seed).digest())
        seed = _next_seed(seed)
    return tuple(sticks)


def _versions(tcb: Tcb) -> bytes:
    return int(tcb).to_bytes(HASHSTICKS, "little")


def _next_seed(last: bytes) -> bytes:
    return sha384(bytes(8) + last).digest()


def wrap_vlek(chip_stick: bytes, sticks: bytes, iv: bytes, aad: bytes) -> tuple[bytes, bytes]:
    """A provider's eight hashsticks sealed for one chip at one TCB, and the tag: how AMD's key service sends them."""
    sealed = AESGCM(_vlek_wrapping_key(chip_stick)).encrypt(iv, sticks, aad)
    return sealed[: len(sticks)], sealed[len(sticks) :]


def unwrap_vlek(chip_stick: bytes, wrapped: bytes, tag: bytes, iv: bytes, aad: bytes) -> bytes:
    """The provider's hashsticks; raises `cryptography.exceptions.InvalidTag` if they are not sealed for this chip."""
    return AESGCM(_vlek_wrapping_key(chip_stick)).decrypt(iv, wrapped + tag, aad)


def _vlek_wrapping_key(chip_stick: bytes) -> bytes:
    return kdf(chip_stick, VLEK_WRAPPING_LABEL, b"", 32)


def attestation_key(stick: bytes, label: str) -> ec.EllipticCurvePrivateKey:
    """The P-384 key that signs reports: from a chip's stick with `VCEK_LABEL`, a provider's with `VLEK_LABEL`."""
    return _private_key(ec.SECP384R1(), stick, label)


def firmware_signing_key() -> ec.EllipticCurvePrivateKey:
    """The toy key that stands for AMD's: it signs firmware images, and everybody has it (MODEL)."""
    return _private_key(ec.SECP384R1(), b"snpbook", "snpbook-firmware-signing-key")


def sign_report(key: ec.EllipticCurvePrivateKey, signed: bytes) -> tuple[bytes, bytes]:
    """R and S over the signed part of a report (its first 0x2A0 bytes)."""
    if len(signed) != SIGNED_SIZE:
        raise ValueError(f"signed: the signed part of a report has {SIGNED_SIZE:#x} bytes, not {len(signed):#x}")
    return sign(key, signed)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> tuple[bytes, bytes]:
    """R and S of ECDSA with SHA-384, 72 bytes each, little-endian.

    The nonce is that of RFC 6979, so that equal messages have equal signatures. Needs a `cryptography` built on
    OpenSSL 3.2 or newer, as its wheels are; an older one raises `cryptography.exceptions.UnsupportedAlgorithm`.
    """
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
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
        if len(self.secret) != _SECRET_SIZE:
            raise ValueError(f"secret has {len(self.secret)} bytes: a chip's secret has {_SECRET_SIZE}")

    def on_socket(self, number: int) -> Chip:
        """The chip of a socket of the board that has this one on socket 0.

        Which chips come together is the model's choice (MODEL): the others' secrets derive from this one's.
        """
        return Chip(self.product, kdf(self.secret, "snpbook-socket", bytes([number]), 32)) if number else self

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

    def hashsticks(self, tcb: Tcb) -> tuple[bytes, ...]:
        """The sticks of this chip at `tcb`: what the boot loader gives to firmware that runs at it."""
        return hashsticks(kdf(self.secret, "snpbook-hashstick-seed", b"", HASHSTICK_SIZE), tcb)

    def hashstick(self, tcb: Tcb) -> bytes:
        """The last stick of this chip at `tcb`."""
        return self.hashsticks(tcb)[-1]

    def vcek(self, tcb: Tcb) -> ec.EllipticCurvePrivateKey:
        """The versioned chip endorsement key of this chip at `tcb`."""
        return attestation_key(self.hashstick(tcb), VCEK_LABEL)

    @property
    def cek(self) -> ec.EllipticCurvePrivateKey:
        """The chip endorsement key of SEV and SEV-ES, the same at every TCB."""
        return _private_key(ec.SECP384R1(), sha256(self.secret).digest(), CEK_LABEL)

    @property
    def sev_root(self) -> bytes:
        """SHA-256 of the ARK for SEV that is fused into the chip: a toy root."""
        pins = tomllib.loads(resource("data", "roots", "toy_sev.toml").read_text())
        return bytes.fromhex(pins[self.product])

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
