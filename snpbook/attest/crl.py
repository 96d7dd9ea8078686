"""Revocation lists: which intermediates the root has taken back.

An ARK signs one list for its ASK and one for its ASVK; attestation keys are superseded by a newer TCB and never
revoked. Sources: KDS (certificate revocation list), X509 (RFC 5280 section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509

from snpbook.attest import der as asn1
from snpbook.attest.certs import UNREADABLE, X509, Certificate, is_pss, made_by, outermost
from snpbook.attest.checks import Checklist, NotGenuine

CHECK = "chain.revocation"


@dataclass(frozen=True, slots=True, repr=False)
class RevocationList:
    """One list, decoded and not believed; `critical` are the extensions that a reader must understand."""

    der: bytes = field(repr=False)
    issuer: str
    this_update: datetime
    next_update: datetime | None
    serials: frozenset[int]
    critical: tuple[str, ...]
    tbs: bytes
    signature: bytes
    uses_pss: bool

    @classmethod
    def read(cls, der: bytes) -> RevocationList:
        """Decode one list; `MalformedEvidence` where the DER ends elsewhere, `NotGenuine` for what is inside."""
        outer = outermost(der)
        try:
            tbs, algorithm, _ = asn1.children(der, outer)
            fields = asn1.children(der, tbs)
            parsed = x509.load_der_x509_crl(der)
            return cls(
                der=der,
                issuer=parsed.issuer.rfc4514_string(),
                this_update=parsed.last_update_utc,
                next_update=parsed.next_update_utc,
                serials=frozenset(revoked.serial_number for revoked in parsed),
                critical=tuple(e.oid.dotted_string for e in parsed.extensions if e.critical),
                tbs=der[tbs.start : tbs.end],
                signature=parsed.signature,
                uses_pss=is_pss(der, algorithm, fields[fields[0].tag == asn1.INTEGER]),
            )
        except (*UNREADABLE, IndexError) as error:
            raise NotGenuine("crl.decode", f"a revocation list cannot be decoded: {error}", cite=X509) from error

    def __repr__(self) -> str:
        return f"RevocationList({self.issuer}, {self.this_update:%Y-%m-%d}, {len(self.serials)} revoked)"

    def signed_by(self, issuer: Certificate) -> bool:
        """The issuer's key made this list's signature, in AMD's scheme."""
        return self.uses_pss and made_by(issuer, self.signature, self.tbs)


def may_sign_lists(root: Certificate) -> bool:
    """The key usage of a root says so."""
    try:
        return root.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign
    except x509.ExtensionNotFound:
        return False


def check_revocation(
    intermediate: Certificate, root: Certificate, crls: Sequence[RevocationList], now: datetime, checks: Checklist
) -> None:
    """Ask the root's lists about an intermediate; without one, revocation is skipped and not passed.

    Being listed counts for ever; not being listed counts as long as the latest list is current. Beside a list that the
    root signed, those of a namesake do not matter.
    """
    named = [crl for crl in crls if crl.issuer == root.subject]
    if not named:
        checks.skip(CHECK, f"no revocation list of {root.common_name} was given", X509)
        return
    signed = [crl for crl in named if may_sign_lists(root) and crl.signed_by(root)]
    rule = f"the revocation list is not signed by {root.common_name}"
    found = "signed" if signed else repr(named[0])
    checks.require(f"{CHECK}.signature", bool(signed), rule, "RSASSA-PSS, SHA-384", found, X509)
    strange = " ".join(sorted({oid for crl in signed for oid in crl.critical})) or "none"
    rule = "a revocation list has a critical extension that nobody here knows"
    checks.require(f"{CHECK}.critical", strange == "none", rule, "none", strange, X509)
    listed = any(intermediate.serial in crl.serials for crl in signed)
    rule, expected = f"{intermediate.common_name} is revoked", f"serial {intermediate.serial:#x} not listed"
    checks.require(f"{CHECK}.serial", not listed, rule, expected, "listed" if listed else "not listed", X509)

    latest = max(signed, key=lambda crl: crl.this_update)
    met = latest.next_update is not None and latest.this_update <= now <= latest.next_update
    until = f"{latest.next_update:%Y-%m-%d %H:%M:%S}" if latest.next_update else "no date"
    rule, expected = "the revocation list is not current", f"{latest.this_update:%Y-%m-%d %H:%M:%S} to {until}"
    checks.require(f"{CHECK}.dates", met, rule, expected, f"{now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC", X509)
