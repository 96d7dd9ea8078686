"""Secret release: a key for a guest that proves what it is, sealed so that this guest alone can open it.

The guest binds a key of its own into its report, REPORT_DATA = SHA-512(nonce || SPKI DER), so that whoever carries the
messages, the host above all, carries what it cannot open. A nonce is good for one attempt and for a short time. The
protocol is the model's own (MODEL); the sealing is HPKE. Sources: SNP ABI (MSG_REPORT_REQ), RFC 9180.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from hashlib import sha512

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from snpbook.attest.appraise import Policy, appraise
from snpbook.attest.certs import Certificate
from snpbook.attest.checks import MalformedEvidence
from snpbook.attest.crl import RevocationList
from snpbook.attest.roots import Roots
from snpbook.attest.verify import VerifiedReport, verify
from snpbook.spec.refusal import Refusal

NONCE_SIZE = 32
LIFETIME = timedelta(minutes=5)
PROTOCOL = "snpbook secret release"
_SUITE = Suite(KEM.P384, KDF.HKDF_SHA384, AEAD.AES_256_GCM)
_INFO = b"snpbook secret release 1"


class ReleaseRefused(Refusal):
    """The report is genuine or was not looked at, and the broker keeps its secret; `check` names what was not met."""

    def __init__(self, check: str, rule: str, expected: object = "", found: object = "") -> None:
        super().__init__(rule, expected, found, PROTOCOL)
        self.check = check


class Event(StrEnum):
    """What the audit log tells of."""

    CHALLENGED = "challenged"
    RELEASED = "released"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the audit log; `reason` says why a secret was kept, or to which measurement and chip it went."""

    time: datetime
    event: Event
    nonce: str
    reason: str = ""


class Broker:
    """Keeps a secret for guests that `policy` wants and `roots` vouch for, and writes down what happened in `audit`.

    `rng` gives so many random bytes; the ephemeral keys of the sealing are the library's own. Times have a time zone.
    """

    def __init__(
        self,
        secret: bytes,
        policy: Policy,
        roots: Roots,
        rng: Callable[[int], bytes],
        lifetime: timedelta = LIFETIME,
    ) -> None:
        self._secret, self.policy, self.roots, self.rng, self.lifetime = secret, policy, roots, rng, lifetime
        self.audit: list[AuditEntry] = []
        self._pending: dict[bytes, datetime] = {}

    def __repr__(self) -> str:
        return f"Broker(policy {self.policy.name}, roots {self.roots.name}, {len(self.audit)} audit entries)"

    def challenge(self, now: datetime) -> bytes:
        """A new nonce; those that are too old are forgotten."""
        self._pending = {nonce: issued for nonce, issued in self._pending.items() if self._fresh(issued, now)}
        nonce = self.rng(NONCE_SIZE)
        self._pending[nonce] = now
        self._note(now, Event.CHALLENGED, nonce)
        return nonce

    def release(
        self,
        nonce: bytes,
        public_key: bytes,
        report: bytes,
        certificates: Sequence[Certificate],
        now: datetime,
        crls: Sequence[RevocationList] = (),
    ) -> bytes:
        """The secret, sealed for `public_key` (SPKI DER, P-384); the nonce is used up whatever comes out.

        Raises `ReleaseRefused`, and for a report that is not genuine what `verify` raises.
        """
        try:
            self._use(nonce, now)
            key = _public_key(public_key)
            verified = verify(report, certificates, self.roots, now, crls=crls)
            self._judge(verified, nonce, public_key)
        except (Refusal, MalformedEvidence) as refusal:
            self._note(now, Event.REFUSED, nonce, str(refusal))
            raise
        sealed = _SUITE.encrypt(self._secret, key, info=_info(nonce, public_key))
        chip = verified.chip_id.hex() if verified.chip_id else "masked"
        measurement = verified.report.fields.measurement.hex()
        self._note(now, Event.RELEASED, nonce, f"measurement {measurement} chip {chip}")
        return sealed

    def _use(self, nonce: bytes, now: datetime) -> None:
        issued = self._pending.pop(nonce, None)
        if issued is None:
            raise ReleaseRefused("nonce.known", "the nonce was never given out, or was used already", found=nonce)
        if not self._fresh(issued, now):
            rule = "the nonce is too old"
            raise ReleaseRefused("nonce.fresh", rule, f"at most {self.lifetime}", str(now - issued))

    def _judge(self, verified: VerifiedReport, nonce: bytes, public_key: bytes) -> None:
        expected, found = report_data(nonce, public_key), verified.report.fields.report_data
        if found != expected:
            rule = "the report binds another nonce or another key"
            raise ReleaseRefused("binding.report_data", rule, expected, found)
        failed = appraise(verified, self.policy).failed
        if failed:
            rule = f"policy {self.policy.name} does not want this guest: {', '.join(check.name for check in failed)}"
            raise ReleaseRefused(failed[0].name, rule, failed[0].expected, failed[0].found)

    def _fresh(self, issued: datetime, now: datetime) -> bool:
        return timedelta() <= now - issued <= self.lifetime

    def _note(self, now: datetime, event: Event, nonce: bytes, reason: str = "") -> None:
        self.audit.append(AuditEntry(now, event, nonce[:NONCE_SIZE].hex(), reason))


def report_data(nonce: bytes, public_key: bytes) -> bytes:
    """The 64 bytes that bind a guest's key (SPKI DER) and the broker's nonce to a report."""
    return sha512(nonce + public_key).digest()


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A guest's public key as it goes into `report_data` and to the broker: SPKI DER."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def unseal(sealed: bytes, key: ec.EllipticCurvePrivateKey, nonce: bytes) -> bytes:
    """The guest's side: the secret; `ReleaseRefused` where it was sealed for another key or nonce, or changed."""
    try:
        return _SUITE.decrypt(sealed, key, info=_info(nonce, spki(key)))
    except InvalidTag:
        raise ReleaseRefused("sealed", "the sealed secret is not for this key and nonce, or was changed") from None


def _public_key(der: bytes) -> ec.EllipticCurvePublicKey:
    """The guest's key; only the one encoding that `spki` gives, so that nothing is bound beside the key."""
    try:
        key = load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ReleaseRefused("key.spki", f"the guest's key cannot be decoded: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ReleaseRefused("key.curve", "the guest's key is not on P-384", "secp384r1", type(key).__name__)
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != der:
        raise ReleaseRefused("key.spki", "the guest's key has a second encoding", "uncompressed point", der)
    return key


def _info(nonce: bytes, public_key: bytes) -> bytes:
    return _INFO + report_data(nonce, public_key)
