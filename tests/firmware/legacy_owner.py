"""The other end of legacy commands, in arithmetic of its own: a guest's owner, a platform's owner, another platform.

It shares nothing with the firmware but what the SEV API says: layouts are typed again, cryptography is the library's.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CERT, SIGNED = 2084, 0x414
INVALID, OCA, PEK, PDH, CEK = range(0x1000, 0x1005)
ASK = 0x13
ECDSA_SHA256, ECDH_SHA256 = 2, 3


def key(number: int) -> ec.EllipticCurvePrivateKey:
    """A P-384 key that everybody knows."""
    return ec.derive_private_key(int.from_bytes(sha256(b"legacy test key %d" % number).digest(), "big"), ec.SECP384R1())


# Certificates.


def body(usage: int, public: ec.EllipticCurvePublicKey, api: tuple[int, int] = (1, 55), algo: int = 0) -> bytes:
    """A certificate's first 0x414 bytes."""
    point = public.public_numbers()
    algo = algo or (ECDH_SHA256 if usage == PDH else ECDSA_SHA256)
    front = struct.pack("<IBBHII", 1, *api, 0, usage, algo)
    return (front + struct.pack("<I72s72s", 2, *(v.to_bytes(72, "little") for v in (point.x, point.y)))).ljust(
        SIGNED, b"\0"
    )


def signature(signer: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA with SHA-256: R and S, little-endian, in 512 bytes."""
    r, s = decode_dss_signature(signer.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return (r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(512, b"\0")


def slot(usage: int, algo: int, value: bytes) -> bytes:
    return struct.pack("<II512s", usage, algo, value)


UNUSED = slot(INVALID, 0, b"")


def cert(data: bytes, *signers: tuple[int, ec.EllipticCurvePrivateKey]) -> bytes:
    """A certificate with up to two signatures."""
    slots = [slot(usage, ECDSA_SHA256, signature(signer, data)) for usage, signer in signers]
    return data + b"".join([*slots, UNUSED, UNUSED][:2])


def public_of(certificate: bytes) -> ec.EllipticCurvePublicKey:
    curve, x, y = struct.unpack_from("<I72s72s", certificate, 0x10)
    assert curve == 2
    return ec.EllipticCurvePublicNumbers(
        int.from_bytes(x, "little"), int.from_bytes(y, "little"), ec.SECP384R1()
    ).public_key()


def verify(certificate: bytes, usage: int, signer: ec.EllipticCurvePublicKey) -> None:
    """The signature of that usage holds (`InvalidSignature`)."""
    for at in (0x414, 0x61C):
        found, algo, value = struct.unpack_from("<II512s", certificate, at)
        if found == usage:
            assert algo == ECDSA_SHA256
            check(signer, value, certificate[:SIGNED])
            return
    raise AssertionError(f"no signature of {usage:#x}")


def check(signer: ec.EllipticCurvePublicKey, value: bytes, message: bytes) -> None:
    r, s = (int.from_bytes(part, "little") for part in (value[:72], value[72:144]))
    signer.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))


# The channel.


def kdf(secret: bytes, label: bytes, context: bytes = b"") -> bytes:
    fixed = struct.pack("<I", 1) + label + b"\0" + context + struct.pack("<I", 128)
    return hmac.digest(secret, fixed, "sha256")[:16]


def ctr(secret: bytes, iv: bytes, data: bytes) -> bytes:
    worker = Cipher(algorithms.AES(secret), modes.CTR(iv)).encryptor()
    return worker.update(data) + worker.finalize()


@dataclass(frozen=True)
class Owner:
    """Who launches a guest on a platform that he knows by its PDH certificate."""

    private: ec.EllipticCurvePrivateKey = field(default_factory=lambda: key(1))
    tek: bytes = bytes(range(16))
    tik: bytes = bytes(range(16, 32))
    nonce: bytes = b"n" * 16
    wrap_iv: bytes = b"i" * 16

    def certificate(self, usage: int = PDH, algo: int = 0) -> bytes:
        """His Diffie-Hellman key, which nobody need have signed."""
        return cert(body(usage, self.private.public_key(), algo=algo))

    def session(self, pdh: bytes, policy: int, *, wrap_mac: bool = True, policy_mac: bool = True) -> bytes:
        """His keys for the platform, with good MACs or bad ones."""
        secret = self.private.exchange(ec.ECDH(), public_of(pdh))
        master = kdf(secret, b"sev-master-secret", self.nonce)
        kek, kik = kdf(master, b"sev-kek"), kdf(master, b"sev-kik")
        wrapped = ctr(kek, self.wrap_iv, self.tek + self.tik)
        macs = [hmac.digest(kik, wrapped, "sha256"), hmac.digest(self.tik, struct.pack("<I", policy), "sha256")]
        macs = [mac if good else bytes(32) for mac, good in zip(macs, (wrap_mac, policy_mac), strict=True)]
        return self.nonce + wrapped + self.wrap_iv + b"".join(macs)

    def measure(self, api: tuple[int, int, int], policy: int, digest: bytes, nonce: bytes) -> bytes:
        """What LAUNCH_MEASURE must say."""
        return hmac.digest(self.tik, struct.pack("<BBBBI", 4, *api, policy) + digest + nonce, "sha256")

    def packet(
        self, plain: bytes, context: int, measure: bytes = b"", *, flags: int = 0, iv: bytes = b"v" * 16
    ) -> tuple[bytes, bytes]:
        """A packet's header and body."""
        sealed = ctr(self.tek, iv, plain)
        covered = struct.pack("<BI16sII", context, flags, iv, len(plain), len(sealed)) + sealed + measure
        return struct.pack("<I16s32s", flags, iv, hmac.digest(self.tik, covered, "sha256")), sealed
