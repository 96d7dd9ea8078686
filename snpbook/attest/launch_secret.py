"""The owner of a SEV or SEV-ES guest: a channel to the platform, the launch's measurement, and the secret for it.

Before SNP the owner speaks first: his keys travel in the session of LAUNCH_START, LAUNCH_MEASURE answers under them,
and LAUNCH_SECRET takes a packet that fits this one measurement. Whose PDH he agreed with is for its certificate chain
to say. Sources: SEV API (session data, LAUNCH_MEASURE, LAUNCH_SECRET), firmware 1.55.25.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.spec.key_derivation import EXTRA_BITS, KEK_LABEL, KIK_LABEL, MASTER_SECRET_LABEL, SESSION_KEY_SIZE
from snpbook.spec.launch import CURVE_P384, PUBLIC_KEY
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import (
    MEASURE_INPUT,
    MEASUREMENT,
    PACKET_ALIGNMENT,
    PACKET_HEADER,
    PACKET_LIMIT,
    PACKET_MAC_INPUT,
    SESSION,
    MacContext,
)
from snpbook.spec.policy import LEGACY_POLICY
from snpbook.spec.sev_certificates import SEV_CERTIFICATE, CertUsage, unsigned_certificate

SEV = "SEV LAUNCH_MEASURE"
MEASURED_API = (0, 17)
"""Older firmware leaves context, version and build out of what MEASURE covers."""


@dataclass(frozen=True, slots=True)
class LaunchOwner:
    """One launch: the owner's Diffie-Hellman key, his transport keys (16 bytes each), and the guest's policy."""

    policy: int
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    tek: bytes = field(repr=False)
    tik: bytes = field(repr=False)

    @classmethod
    def draw(cls, policy: int, rng: Callable[[int], bytes]) -> LaunchOwner:
        """An owner with new keys; `rng` gives so many random bytes."""
        curve = ec.SECP384R1()
        stream = rng((curve.key_size + EXTRA_BITS) // 8)
        scalar = int.from_bytes(stream, "big") % (curve.group_order - 1) + 1
        return cls(policy, ec.derive_private_key(scalar, curve), rng(SESSION_KEY_SIZE), rng(SESSION_KEY_SIZE))

    @property
    def certificate(self) -> bytes:
        """The owner's Diffie-Hellman certificate for LAUNCH_START, which nobody need have signed."""
        point = self.key.public_key().public_numbers()
        return bytes(unsigned_certificate(CertUsage.PDH, point.x, point.y, (0, 0)))

    def session(self, pdh: bytes, rng: Callable[[int], bytes]) -> bytes:
        """The session data for LAUNCH_START: TEK and TIK for the platform of that PDH certificate, and no other.

        `MalformedEvidence` where the certificate holds no point of P-384.
        """
        nonce, iv = rng(SESSION.fields["nonce"].size), rng(SESSION.fields["wrap_iv"].size)
        master = _kdf(self.key.exchange(ec.ECDH(), _public_key(pdh)), MASTER_SECRET_LABEL, nonce)
        wrapped = _ctr(_kdf(master, KEK_LABEL), iv, self.tek + self.tik)
        return SESSION.pack(
            nonce=nonce,
            wrap_tk=wrapped,
            wrap_iv=iv,
            wrap_mac=_mac(_kdf(master, KIK_LABEL), wrapped),
            policy_mac=_mac(self.tik, self.policy.to_bytes(LEGACY_POLICY.size, "little")),
        )

    def check_measurement(self, measurement: bytes, digest: bytes, api: tuple[int, int], build: int) -> None:
        """Whether LAUNCH_MEASURE (its 48 bytes) speaks of that launch digest; `NotGenuine` where it does not.

        `digest` is SHA-256 of all that was loaded, `api` and `build` are the platform's firmware.
        """
        answer = _measurement(measurement)
        covered = MEASURE_INPUT.pack(
            context=MacContext.MEASURE,
            api_major=api[0],
            api_minor=api[1],
            build=build,
            policy=self.policy,
            launch_digest=digest,
            mnonce=answer.mnonce,
        )
        if api < MEASURED_API:
            covered = covered[MEASURE_INPUT.offset("policy") :]
        expected = _mac(self.tik, covered)
        if not hmac.compare_digest(expected, answer.measure):
            rule = "the platform measured something else, under other keys or with other firmware"
            raise NotGenuine("launch.measure", rule, expected, answer.measure, SEV)

    def secret_packet(self, secret: bytes, measurement: bytes, rng: Callable[[int], bytes]) -> tuple[bytes, bytes]:
        """Header and body for LAUNCH_SECRET, good for the launch of that (checked) measurement alone.

        `secret` is padded with zeros to whole blocks of 16 bytes, as long as which the guest's area must be.
        """
        plain = secret.ljust(-(-len(secret) // PACKET_ALIGNMENT) * PACKET_ALIGNMENT, b"\0")
        if not 0 < len(plain) <= PACKET_LIMIT:
            raise ValueError(f"a secret of {len(secret)} bytes: LAUNCH_SECRET takes 1 to {PACKET_LIMIT}")
        iv = rng(PACKET_HEADER.fields["iv"].size)
        body = _ctr(self.tek, iv, plain)
        covered = PACKET_MAC_INPUT.pack(
            context=MacContext.SECRET, flags=0, iv=iv, guest_len=len(plain), trans_len=len(body)
        )
        mac = _mac(self.tik, covered + body + _measurement(measurement).measure)
        return PACKET_HEADER.pack(iv=iv, mac=mac), body


def _measurement(data: bytes) -> Record:
    if len(data) != MEASUREMENT.size:
        raise MalformedEvidence(f"{len(data)} bytes are no answer of LAUNCH_MEASURE: it has {MEASUREMENT.size}")
    return MEASUREMENT.unpack(data)


def _public_key(certificate: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a legacy certificate."""
    if len(certificate) != SEV_CERTIFICATE.size:
        raise MalformedEvidence(f"{len(certificate)} bytes are no PDH certificate: it has {SEV_CERTIFICATE.size}")
    key = PUBLIC_KEY.unpack(SEV_CERTIFICATE.unpack(certificate).pubkey)
    try:
        if key.curve != CURVE_P384:
            raise ValueError(f"curve {key.curve}, not {CURVE_P384}")
        x, y = (int.from_bytes(coordinate, "little") for coordinate in (key.qx, key.qy))
        return ec.EllipticCurvePublicNumbers(x, y, ec.SECP384R1()).public_key()
    except ValueError as error:
        raise MalformedEvidence(f"the PDH certificate holds no point of P-384: {error}") from error


def _kdf(key: bytes, label: str, context: bytes = b"") -> bytes:
    """16 bytes of SP 800-108 in counter mode: counter and length little-endian, as the firmware has them."""
    length = (8 * SESSION_KEY_SIZE).to_bytes(4, "little")
    return _mac(key, (1).to_bytes(4, "little") + label.encode() + b"\0" + context + length)[:SESSION_KEY_SIZE]


def _mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def _ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    cipher = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    return cipher.update(data) + cipher.finalize()
