"""Is it genuine? From bytes to a `VerifiedReport`, or to the first check that fails.

The order of the checks: format, chain and revocation, profile of the VEK, signature over the raw bytes, binding of the
VEK to the report. Whether the report is wanted is another question, see `attest.appraise`. Sources: SNP ABI, KDS, X509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.attest.certs import Certificate
from snpbook.attest.chain import Chain, find_chain
from snpbook.attest.checks import Check, Checklist
from snpbook.attest.crl import RevocationList
from snpbook.attest.ec_keys import ECDSA_SHA384, signature_size, signed_by
from snpbook.attest.parse import SNP, Report, check_format
from snpbook.attest.roots import Roots
from snpbook.attest.vek import KDS, VekContent, read_vek
from snpbook.spec.certificates import HWID_SIZE, product_line
from snpbook.spec.policy import Tcb


@dataclass(frozen=True, slots=True, repr=False)
class VerifiedReport:
    """A genuine report: signed by a chip, or for a provider, that a pinned root vouches for.

    Only `verify` makes one; `roots` is the name of the root set that it was verified under, `vek` what the signing
    key's certificate says.
    """

    report: Report
    chain: Chain
    vek: VekContent
    roots: str
    checks: tuple[Check, ...]

    def __repr__(self) -> str:
        return f"<VerifiedReport of {self.product}, roots {self.roots}, {self.report.fields.measurement.hex()[:16]}..>"

    @property
    def product(self) -> str:
        """The product line of the machine, as in `data/roots`."""
        return self.chain.product

    @property
    def chip_id(self) -> bytes | None:
        """The 64 bytes of the chip's id, of a masked one as its VCEK tells; None where nothing does."""
        chip: bytes = self.report.fields.chip_id
        if any(chip):
            return chip
        return self.vek.hwid.ljust(HWID_SIZE, b"\0") if self.vek.hwid is not None else None

    def tcb(self, field: str) -> Tcb:
        """One of `current_tcb`, `committed_tcb`, `reported_tcb`, `launch_tcb`."""
        return self.report.tcb(field, self.product)


def verify(
    report: bytes,
    certificates: Sequence[Certificate],
    roots: Roots,
    now: datetime,
    product: str | None = None,
    *,
    crls: Sequence[RevocationList] = (),
    allow_newer: bool = False,
) -> VerifiedReport:
    """Make every check of a report's origin, in order.

    `certificates` and `crls` are of any origin and order; `now` has a time zone; `product` need be named only to
    insist on it; `allow_newer` takes versions beyond 5, decoded like version 5. Raises `NotGenuine` at the first failed
    check, `MalformedEvidence` for a report that is not 1184 bytes.
    """
    parsed, checks = Report.parse(report), Checklist()
    check_format(parsed, checks, allow_newer)
    chain = find_chain(parsed, certificates, roots, product, now, checks, crls)
    content = checks.follow(lambda: read_vek(chain.vek, parsed.fields.signing_key))
    check_signature(parsed, chain.vek, checks)
    asked = parsed.fields.reported_tcb, parsed.fields.chip_id
    checks.follow(lambda: (None, check_binding(*asked, content, chain.product)))
    return VerifiedReport(parsed, chain, content, roots.name, tuple(checks.made))


def check_signature(report: Report, vek: Certificate, checks: Checklist) -> None:
    """Check the ECDSA signature over the raw first 672 bytes; the VEK was held against its profile."""
    key = vek.public_key.key
    assert isinstance(key, ec.EllipticCurvePublicKey)
    r, s = report.fields.signature_r, report.fields.signature_s
    size = signature_size(r, s)
    rule = "a component of the signature is longer than the curve's order"
    checks.require("report.signature.form", size <= key.key_size, rule, f"{key.key_size} bits", f"{size} bits", SNP)
    valid = signed_by(key, r, s, report.signed, ECDSA_SHA384)
    rule = "the report's signature is not by the VEK"
    checks.require("report.signature", valid, rule, "ECDSA P-384, SHA-384", "valid" if valid else "invalid", SNP)


@lru_cache(maxsize=4096)
def check_binding(reported: int, chip: bytes, content: VekContent, product: str) -> tuple[Check, ...]:
    """Check that the VEK is for this product, this TCB (as reports have it) and this chip; one VEK signs many."""
    checks, line = Checklist(), product_line(product)
    met = (content.line, content.struct_version) == (line.name, line.struct_version)
    rule = "the VEK is for another product line"
    checks.require("binding.product", met, rule, line.name, content.product_name, KDS)

    rule, turin = "the VEK is for another TCB than the report's", line.struct_version == 1
    expected, found = Tcb.from_int(reported, turin), Tcb.from_int(content.tcb, turin)
    checks.require("binding.tcb", content.tcb == reported, rule, expected, found, KDS)

    if content.hwid is None:
        checks.skip("binding.chip_id", f"a VLEK is no chip's: it is for {content.csp_id}", KDS)
    elif not any(chip):
        checks.skip("binding.chip_id", "the host masks CHIP_ID", SNP)
    else:
        met = content.hwid.ljust(HWID_SIZE, b"\0") == chip
        checks.require("binding.chip_id", met, "the VEK is for another chip", chip, content.hwid, KDS)
    return tuple(checks.made)
