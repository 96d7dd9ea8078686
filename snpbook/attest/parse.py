"""Reports, decoded and not believed: fields by version, and every check that needs no key.

The raw bytes are kept, because they are what is signed. How reports come (text, tables, headers) is
`snpbook.attest.evidence`. Source: SNP ABI (ATTESTATION_REPORT).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from snpbook.attest.checks import Check, Checklist, MalformedEvidence
from snpbook.attest.evidence import Evidence as Evidence
from snpbook.spec.certificates import PRODUCT_LINES
from snpbook.spec.layout import Layout, Record
from snpbook.spec.policy import PLATFORM_INFO, POLICY, Tcb
from snpbook.spec.report import (
    ATTESTATION_REPORT,
    ECDSA_P384_SHA384,
    FIELDS_SINCE,
    REPORT_SIZE,
    SIGNED_SIZE,
    UNPUBLISHED,
    VERSIONS,
    SigningKey,
    product_of_cpuid,
    reserved_ranges,
)

SNP = "SNP ATTESTATION_REPORT"
KNOWN_KEYS = " ".join(f"{key.value} ({key.name})" for key in SigningKey)


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """An attestation report, decoded; `fields` is its `spec.report.ATTESTATION_REPORT` record."""

    raw: bytes
    fields: Record

    @classmethod
    def parse(cls, raw: bytes) -> Report:
        """Decode a report, of a version beyond 5 like version 5; `MalformedEvidence` where it is not 1184 bytes."""
        if len(raw) != REPORT_SIZE:
            raise MalformedEvidence(f"{len(raw)} bytes are no attestation report: it has {REPORT_SIZE}")
        return cls(raw, ATTESTATION_REPORT.unpack(raw))

    def __repr__(self) -> str:
        return f"Report(version {self.fields.version}, measurement {self.fields.measurement.hex()[:16]}..)"

    @property
    def signed(self) -> bytes:
        """The bytes under the signature."""
        return self.raw[:SIGNED_SIZE]

    @property
    def policy(self) -> Record:
        """The guest policy, decoded."""
        return POLICY.unpack(self.raw, ATTESTATION_REPORT.offset("policy"))

    @property
    def platform_info(self) -> Record:
        """What the platform says of itself, decoded."""
        return PLATFORM_INFO.unpack(self.raw, ATTESTATION_REPORT.offset("platform_info"))

    @property
    def is_newer(self) -> bool:
        """Of a version that nobody here knows, and hence with fields that nobody here knows."""
        return bool(self.fields.version > VERSIONS[-1])

    @property
    def has_cpuid(self) -> bool:
        """From version 3 on a report carries family, model and stepping of its processor."""
        return bool(self.fields.version >= 3)

    @property
    def has_mitigation_vectors(self) -> bool:
        """From version 5 on a report tells which vulnerabilities were mitigated, at launch and now."""
        return bool(self.fields.version >= VERSIONS[-1])

    @property
    def cpuid(self) -> tuple[int, int] | None:
        """Family and model of the processor; None where the version has none."""
        return (self.fields.cpuid_family, self.fields.cpuid_model) if self.has_cpuid else None

    @property
    def product(self) -> str | None:
        """The product line that the CPUID fields name; None where there are none, or of no known line."""
        return product_of_cpuid(*self.cpuid) if self.cpuid else None

    @property
    def named(self) -> dict[str, Any]:
        """The fields that a report of its version has."""
        version = self.fields.version
        return {name: value for name, value in self.fields if version >= FIELDS_SINCE.get(name, 0)}

    def tcb(self, field: str, product: str | None) -> Tcb:
        """One of `current_tcb`, `committed_tcb`, `reported_tcb`, `launch_tcb`, in the byte order of the product."""
        return Tcb.from_int(getattr(self.fields, field), turin=product == "turin")

    @property
    def stray_bytes(self) -> list[int]:
        """The offsets of bytes with bits that the report's version reserves, and that are not zero."""
        stray = int.from_bytes(self.raw, "little") & _reserved_mask(min(self.fields.version, VERSIONS[-1]))
        return [at for at, byte in enumerate(stray.to_bytes(REPORT_SIZE, "little")) if byte] if stray else []

    def unknown_bits(self) -> Iterator[tuple[str, int]]:
        """Bits without a name that are set: the field's name and the bit, of the guest policy and PLATFORM_INFO."""
        for field, layout in (("policy", POLICY), ("platform_info", PLATFORM_INFO)):
            yield from ((field, bit) for bit in _unnamed(layout, getattr(self.fields, field)))


@cache
def _reserved_mask(version: int) -> int:
    """The bits of a report that its version reserves, as of one number."""
    mask = ATTESTATION_REPORT.reserved_mask
    for first, end in reserved_ranges(version):
        mask |= (1 << 8 * end) - (1 << 8 * first)
    return mask


def _unnamed(layout: Layout, value: int) -> Iterator[int]:
    stray = value & layout.reserved_mask
    return (bit for bit in range(stray.bit_length()) if stray >> bit & 1)


def check_format(report: Report, checks: Checklist, allow_newer: bool = False) -> None:
    """Make the checks that need nothing but the report: version, policy, algorithm, reserved bits, key, processor.

    With `allow_newer`, a version beyond 5 passes, and what versions up to 5 reserve in its signed part is noted and
    not judged: nobody here knows what it means. Of version 4 that holds for the bytes that version 5 has named.
    """
    fields = report.fields
    stray = tuple((at, report.raw[at]) for at in report.stray_bytes)
    asked = fields.version, fields.policy, fields.signature_algo, fields.signing_key, report.cpuid, stray, allow_newer
    checks.follow(lambda: (None, _check_format(*asked)))


@lru_cache(maxsize=256)
def _check_format(
    version: int,
    policy: int,
    algorithm: int,
    key: int,
    cpuid: tuple[int, int] | None,
    stray: tuple[tuple[int, int], ...],
    allow_newer: bool,
) -> tuple[Check, ...]:
    """Remembered, because few reports differ in these; `stray` has offset and value of each byte that is reserved."""
    checks, is_newer = Checklist(), version > VERSIONS[-1]
    rule = "the report's version is unknown"
    met = version in VERSIONS or (allow_newer and is_newer)
    checks.require("report.version", met, rule, "2 or later" if allow_newer else "2 to 5", version, SNP)
    one = POLICY.unpack(policy.to_bytes(POLICY.size, "little")).one
    checks.require("report.policy.one", one == 1, "bit 17 of the policy is not set", 1, one, SNP)

    unnamed = " ".join(f"bit {bit}" for bit in _unnamed(POLICY, policy))
    if is_newer and unnamed:
        checks.skip("report.policy.reserved", f"version {version} may have named {unnamed}", SNP)
    else:
        rule = "the policy has reserved bits"
        checks.require("report.policy.reserved", not unnamed, rule, "bits 63:26 zero", unnamed or "zero", SNP)

    rule, expected = "the signature's algorithm is unknown", ECDSA_P384_SHA384
    checks.require("report.signature_algo", algorithm == expected, rule, expected, algorithm, SNP)

    first, end = (0, SIGNED_SIZE) if is_newer else UNPUBLISHED.get(version, (0, 0)) if allow_newer else (0, 0)
    judged = [(at, byte) for at, byte in stray if not first <= at < end]
    found = "byte {:#05x} is {:#04x}".format(*judged[0]) if judged else "zero"
    checks.require("report.reserved", not judged, f"version {version} reserves these bits", "zero", found, SNP)
    if len(stray) > len(judged):
        told = " ".join(f"{at:#05x}" for at, _ in stray if first <= at < end)
        checks.skip("report.unknown", f"version {version} may have given a meaning to {told}", SNP)

    rule = "SIGNING_KEY has an unknown value"
    checks.require("report.signing_key", isinstance(key, SigningKey), rule, KNOWN_KEYS, int(key), SNP)
    rule, name = "the report is unsigned", SigningKey(key).name
    checks.require("report.signed", key is not SigningKey.NONE, rule, "VCEK or VLEK", name, SNP)
    if cpuid:
        rule, found = "the report's CPUID is of no known product line", "family {:#x} model {:#x}".format(*cpuid)
        known = product_of_cpuid(*cpuid) is not None
        checks.require("report.cpuid", known, rule, " ".join(PRODUCT_LINES), found, SNP)
    return tuple(checks.made)
