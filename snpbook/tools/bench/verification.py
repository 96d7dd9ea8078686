"""Rows A: what a verification costs beside its bare signatures, on a report of a simulated guest and its chain.

A1 is one report more under a chain that was verified before, A2 the first: three certificates read, held against their
profiles and verified. The references are calls of the same library over the same bytes.
"""

from __future__ import annotations

from functools import partial

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from snpbook.attest import certs, chain, parse, vek
from snpbook.attest.certs import Certificate
from snpbook.attest.parse import Report
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import check_binding, verify
from snpbook.spec.certificates import PSS_SALT_SIZE
from snpbook.system import NOW, System
from snpbook.tools.bench.measure import Comparison, Row, at_most

REMEMBERED = (
    certs._pss_holds, certs._words, parse._check_format, chain._judge, chain._check_links, vek.read_vek, check_binding,
)  # fmt: skip
"""What a chain's second report no longer costs."""


def forget() -> None:
    """The next verification is the first."""
    for remembered in REMEMBERED:
        remembered.cache_clear()


def _evidence() -> tuple[bytes, list[bytes]]:
    """A report and the DER of its VCEK, ASK and ARK."""
    system = System("milan", "bench")
    system.host.boot()
    guest = system.create_vm()
    guest.launch()
    return guest.request_report(b"bench"), list(system.certificates())


def _bare_report(report: bytes, vcek: Certificate) -> partial[None]:
    fields, key = Report.parse(report).fields, vcek.public_key.key
    assert isinstance(key, ec.EllipticCurvePublicKey)
    parts = (int.from_bytes(part, "little") for part in (fields.signature_r, fields.signature_s))
    return partial(key.verify, encode_dss_signature(*parts), Report.parse(report).signed, ec.ECDSA(SHA384()))


def one_more_report() -> Comparison:
    """A verification : its ECDSA signature."""
    report, ders = _evidence()
    certificates, roots = [Certificate.read(der) for der in ders], named_roots("toy")
    return Comparison(_bare_report(report, certificates[0]), lambda: verify(report, certificates, roots, NOW))


def first_report() -> Comparison:
    """A verification from bytes, with nothing remembered : its four signatures."""
    report, ders = _evidence()
    vcek, ask, ark = [Certificate.read(der) for der in ders]
    scheme, roots = padding.PSS(padding.MGF1(SHA384()), PSS_SALT_SIZE), named_roots("toy")
    signatures = [_bare_report(report, vcek)]
    for certificate, issuer in ((vcek, ask), (ask, ark), (ark, ark)):
        key = issuer.public_key.key
        assert isinstance(key, rsa.RSAPublicKey)
        signatures.append(partial(key.verify, certificate.signature, certificate.tbs, scheme, SHA384()))

    def bare() -> None:
        for signature in signatures:
            signature()

    def ours() -> None:
        forget()
        verify(report, [Certificate.read(der) for der in ders], roots, NOW)

    return Comparison(bare, ours)


ROWS = [
    Row("A1", "a report more : its ECDSA verify", at_most(1.1), one_more_report, only_reported=True),
    Row("A2", "a first report and its chain : 1 ECDSA, 3 RSA", at_most(1.25), first_report, only_reported=True),
]
