"""The chain from a report's signing key to a pinned root: choosing the certificates, and judging them.

VCEKs hang from the ASK, VLEKs from the ASVK, both from the ARK of the product line. Sources: KDS (certificate
chain), X509 (RFC 5280, RFC 8017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.attest.certs import X509, Certificate, amd_name
from snpbook.attest.checks import Check, Checklist, NotGenuine
from snpbook.attest.crl import RevocationList, check_revocation
from snpbook.attest.ec_keys import ECDSA_SHA384, signed_by
from snpbook.attest.kds import chain_url, vcek_url
from snpbook.attest.parse import Report
from snpbook.attest.roots import Roots
from snpbook.attest.vek import KDS, read_vek
from snpbook.spec.certificates import PRODUCT_LINES, VCEK, VLEK, CaFacts, ProductLine, product_line
from snpbook.spec.report import SigningKey, product_of_cpuid

VEK_NAMES = {SigningKey.VCEK: VCEK.common_name, SigningKey.VLEK: VLEK.common_name}
WITHOUT_CPUID = ("milan", "genoa")
"""The product lines whose reports of version 2 do not name them."""


class MissingCertificate(NotGenuine):
    """A chain cannot be completed; `url` is where AMD publishes what is missing, empty where that cannot be told."""

    def __init__(self, check: str, rule: str, url: str, made: list[Check]) -> None:
        super().__init__(check, rule, cite=KDS, made=tuple(made))
        self.url = url


@dataclass(frozen=True, slots=True)
class Chain:
    """The certificates above one report, and the product line that they are for."""

    product: str
    vek: Certificate
    intermediate: Certificate
    root: Certificate


def find_chain(
    report: Report,
    certificates: Sequence[Certificate],
    roots: Roots,
    product: str | None,
    now: datetime,
    checks: Checklist,
    crls: Sequence[RevocationList] = (),
) -> Chain:
    """Choose a report's chain among certificates of any origin, and judge it at the time `now` (with a time zone)."""
    pool, kind = (*certificates, *roots.certificates), report.fields.signing_key
    vek = _choose_vek(report, pool, VEK_NAMES[kind], now)
    if vek is None:
        named = report.product or product
        lines = [product_line(named)] if named else [PRODUCT_LINES[name] for name in WITHOUT_CPUID]
        url = " or ".join(filter(None, [_vek_url(report, line) for line in lines]))
        rule = f"no {kind.name} certificate of this report is at hand"
        raise MissingCertificate("certificates.vek", rule, url, checks.made)
    return checks.follow(lambda: _judge(kind, vek, report.cpuid, pool, roots, product, now, tuple(crls)))


@lru_cache(maxsize=1024)
def _judge(
    kind: SigningKey,
    vek: Certificate,
    cpuid: tuple[int, int] | None,
    pool: tuple[Certificate, ...],
    roots: Roots,
    product: str | None,
    now: datetime,
    crls: tuple[RevocationList, ...],
) -> tuple[Chain, tuple[Check, ...]]:
    """Find what stands above a VEK, and judge it from the pinned root downwards.

    The product line is named by the report itself from version 3 on, by the VEK's issuer, and perhaps by the caller;
    they must agree. Remembered, because many reports hang from one chain and are judged at one time.
    """
    checks, own = Checklist(), product_of_cpuid(*cpuid) if cpuid else None
    claims = sorted({name for name in (own, product, _issuing_lines(kind).get(vek.issuer)) if name})
    rule, found = "report, certificates and the product asked for name one product line", " or ".join(claims) or "none"
    checks.require("report.product", len(claims) == 1, rule, "one product line", found, KDS)

    line = product_line(claims[0])
    root = _choose(line.ark.common_name, pool, now, lambda candidate: candidate.fingerprint in roots.fingerprints)
    if root is None:
        raise _missing("root", line.ark, line, kind, checks)
    above = _issuer(line, kind)
    intermediate = _choose(above.common_name, pool, now, lambda candidate: candidate.signed_by(root))
    if intermediate is None:
        raise _missing("intermediate", above, line, kind, checks)

    pinned = root.fingerprint in roots.fingerprints
    rule = f"{root.common_name} is not one of the pinned roots of {roots.name}"
    checks.require("chain.root", pinned, rule, f"a root of {roots.name}", f"sha256 {root.fingerprint}", KDS)
    chain = Chain(claims[0], vek, intermediate, root)
    checks.follow(lambda: (None, _check_links(chain, kind)))
    moment = f"{now.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    for name, certificate in (("root", root), ("intermediate", intermediate), ("vek", vek)):
        rule, span = f"{certificate.common_name} is not valid at this time", certificate.span
        checks.require(f"chain.{name}.dates", certificate.is_valid_at(now), rule, span, moment, X509)
    check_revocation(intermediate, root, crls, now, checks)
    return chain, tuple(checks.made)


@lru_cache(maxsize=4096)
def _check_links(chain: Chain, kind: SigningKey) -> tuple[Check, ...]:
    """Make the checks that depend on nothing but the chain: remembered, because many reports hang from it."""
    checks, line = Checklist(), product_line(chain.product)
    vek, intermediate, root = chain.vek, chain.intermediate, chain.root
    for name, certificate, below in (("root", root, 1), ("intermediate", intermediate, 0)):
        fault = authority_fault(certificate, below)
        rule = f"{certificate.common_name} is no certificate authority of AMD's kind"
        expected = "v3, RSA-4096, e = 65537, CA, keyCertSign"
        checks.require(f"chain.{name}.authority", not fault, rule, expected, fault or expected, KDS)
    for name, certificate, issuer in (
        ("root", root, root),
        ("intermediate", intermediate, root),
        ("vek", vek, intermediate),
    ):
        rule = f"{certificate.common_name} is not signed by {issuer.common_name}"
        met = certificate.signed_by(issuer)
        found = "signed" if met else "no valid one"
        checks.require(f"chain.{name}.signature", met, rule, "RSASSA-PSS, SHA-384", found, X509)

    ark, above = line.ark.common_name, _issuer(line, kind).common_name
    names = ((root, ark, ark), (intermediate, above, ark), (vek, VEK_NAMES[kind], above))
    odd = [
        f"{certificate.subject} issued by {certificate.issuer}"
        for certificate, subject, issuer in names
        if (certificate.subject, certificate.issuer) != (amd_name(subject), amd_name(issuer))
    ]
    rule, expected = "a name in the chain is not AMD's", f"AMD's for {line.name}"
    checks.require("chain.names", not odd, rule, expected, "; ".join(odd) or expected, KDS)
    rule, expected = f"{intermediate.common_name} names another key of its issuer", "the root's key identifier"
    met = _key_identifiers_agree(intermediate, root)
    checks.require("chain.key_identifier", met, rule, expected, expected if met else "another", X509)
    return tuple(checks.made)


def authority_fault(certificate: Certificate, below: int) -> str:
    """What keeps a certificate from being one of AMD's authorities with `below` more under it; else empty."""
    if certificate.version is not x509.Version.v3:
        return f"version {certificate.version.name}"
    if not certificate.has_ca_key:
        return certificate.public_key.kind
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound as error:
        return f"no extension {error.oid.dotted_string}"
    path = constraints.value.path_length
    faults = {
        "no CA": not constraints.value.ca,
        f"a path of at most {path}": path is not None and path < below,
        "no keyCertSign": not usage.value.key_cert_sign,
        "constraints or key usage that are not critical": not (constraints.critical and usage.critical),
    }
    known = (constraints.oid, usage.oid)
    unknown = [e.oid.dotted_string for e in certificate.extensions if e.critical and e.oid not in known]
    return next((fault for fault, found in faults.items() if found), f"critical {unknown[0]}" if unknown else "")


def _key_identifiers_agree(certificate: Certificate, issuer: Certificate) -> bool:
    """Where both say which key it is, they say the same."""
    try:
        named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return True
    return named is None or named == own


def _choose(
    common_name: str, pool: Sequence[Certificate], now: datetime, preferred: Callable[[Certificate], bool]
) -> Certificate | None:
    """The certificate of that name; where there are several, a preferred one."""
    named = [candidate for candidate in pool if candidate.common_name == common_name]
    fitting = [candidate for candidate in named if preferred(candidate)] if len(named) > 1 else []
    return _latest(fitting or named, now)


def _choose_vek(report: Report, pool: Sequence[Certificate], common_name: str, now: datetime) -> Certificate | None:
    """The only VEK, or of several the one that names the report's TCB and chip, or that has signed, or else none.

    As of a masked chip or of providers several may be named: then too the one that has signed. Of copies with one key,
    those that an authority at hand vouches for come first.
    """
    named = [candidate for candidate in pool if candidate.common_name == common_name]
    if len(named) < 2:
        return _latest(named, now)
    fitting = [candidate for candidate in named if _names(report, candidate)]
    if not fitting or len({candidate.public_key for candidate in fitting}) > 1:
        fitting = [candidate for candidate in fitting or named if _signed(report, candidate)] or fitting
    if len(fitting) > 1:
        fitting = [candidate for candidate in fitting if _is_vouched_for(candidate, pool)] or fitting
    return _latest(fitting, now)


def _is_vouched_for(candidate: Certificate, pool: Sequence[Certificate]) -> bool:
    return any(candidate.signed_by(issuer) for issuer in pool if issuer.subject == candidate.issuer)


def _latest(candidates: Sequence[Certificate], now: datetime) -> Certificate | None:
    """The latest issue of those that are valid at the time, or of all."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    return max(candidates, key=lambda each: (each.is_valid_at(now), each.not_after))


def _signed(report: Report, candidate: Certificate) -> bool:
    key, fields = candidate.public_key.key, report.fields
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    return signed_by(key, fields.signature_r, fields.signature_s, report.signed, ECDSA_SHA384)


def _names(report: Report, candidate: Certificate) -> bool:
    """A VEK names this report's TCB, and its chip where the report has one."""
    try:
        content, _ = read_vek(candidate, report.fields.signing_key)
    except NotGenuine:
        return False
    tcb, chip = report.fields.reported_tcb, report.fields.chip_id
    return bool(content.tcb == tcb and (not any(chip) or chip.startswith(content.hwid or b"")))


@cache
def _issuing_lines(kind: SigningKey) -> dict[str, str]:
    """The product line of each name that issues VEKs of a kind."""
    return {amd_name(_issuer(line, kind).common_name): name for name, line in PRODUCT_LINES.items()}


def _issuer(line: ProductLine, kind: SigningKey) -> CaFacts:
    return line.asvk if kind is SigningKey.VLEK else line.ask


def _vek_url(report: Report, line: ProductLine) -> str:
    if report.fields.signing_key is not SigningKey.VCEK or not any(report.fields.chip_id):
        return ""  # a VLEK comes from the cloud provider, and a masked chip cannot be asked for
    return vcek_url(line, report.fields.chip_id, report.tcb("reported_tcb", line.name.lower()))


def _missing(name: str, facts: CaFacts, line: ProductLine, kind: SigningKey, checks: Checklist) -> MissingCertificate:
    rule = f"the certificate {facts.common_name} is not at hand"
    return MissingCertificate(f"certificates.{name}", rule, chain_url(line, kind), checks.made)
