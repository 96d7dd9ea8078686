"""Rows A: verification of reports against the bare signatures that no verifier can do without.

The evidence is made here, of a toy Milan: one report for A1 and A2, 10,000 of 100 chips for A3.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from snpbook.attest import certs, chain, fleet, vek
from snpbook.attest.appraise import DEFAULT_POLICY
from snpbook.attest.certs import Certificate
from snpbook.attest.fleet import FleetItem, verify_fleet
from snpbook.attest.parse import Report
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import verify
from snpbook.evidence.maker import Maker, Recipe
from snpbook.tools.bench.measure import Comparison, Row, at_least, at_most

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CHIPS, REPORTS = 100, 10_000
REMEMBERED = (certs._pss_holds, chain._check_links, vek.read_vek, fleet._read)


def one_report(chain_too: bool) -> Comparison:
    """One verification: with everything above the report read before, or nothing."""
    maker, roots = Maker(Recipe(NOW, "milan")), named_roots("toy")
    kit = maker.kit()
    ders = list(kit.certificates.values())
    ready = [Certificate.read(der) for der in ders]
    parsed = Report.parse(kit.report)
    signature = encode_dss_signature(*(int.from_bytes(part, "little") for part in (
        parsed.fields.signature_r, parsed.fields.signature_s)))  # fmt: skip
    public = maker.key.public_key()

    def ecdsa() -> None:
        public.verify(signature, parsed.signed, ec.ECDSA(SHA384()))

    def bare() -> None:
        ecdsa()
        for certificate, issuer in zip((*ready[:2], ready[2]), (ready[1], ready[2], ready[2]), strict=True):
            key = issuer.public_key.key
            key.verify(certificate.signature, certificate.tbs, certs._PSS, SHA384())  # type: ignore[union-attr, call-arg, arg-type]

    def nothing_cached() -> object:
        for remembered in REMEMBERED:
            remembered.cache_clear()
        return verify(kit.report, [Certificate.read(der) for der in ders], roots, NOW)

    if chain_too:
        return Comparison(bare, nothing_cached)
    return Comparison(ecdsa, lambda: verify(kit.report, ready, roots, NOW))


def many_reports() -> Comparison:
    """A fleet by two threads, against one."""
    makers = [Maker(Recipe(NOW, "milan", seed=f"chip {number}")) for number in range(CHIPS)]
    files = [tuple(maker.kit().certificates.values()) for maker in makers]
    items = [
        FleetItem(str(number), makers[number % CHIPS].report(guest_svn=number), files[number % CHIPS])
        for number in range(REPORTS)
    ]
    roots = named_roots("toy")

    def by(workers: int) -> None:
        with ThreadPoolExecutor(workers) as executor:
            for verdict in verify_fleet(items, roots, NOW, DEFAULT_POLICY, executor):
                assert verdict.verdict == fleet.ACCEPTED

    return Comparison(partial(by, 1), partial(by, 2), REPORTS, REPORTS, rounds=3)


ROWS = [
    Row("A1", "verify a report : bare ECDSA", at_most(1.1), partial(one_report, False)),
    Row("A2", "verify chain and report : 1 ECDSA, 3 RSA", at_most(1.25), partial(one_report, True)),
    Row("A3", "10,000 reports by 2 threads : by 1", at_least(1.4), many_reports, only_reported=True, units="reports"),
]
