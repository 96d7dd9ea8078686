"""Reports as they come: bytes or hexadecimal text, alone or with the certificate table of an extended request.

A `Report` is decoded and not believed: `check_format` makes every check that needs no key. The raw bytes are kept,
because they are what is signed. Sources: SNP ABI (ATTESTATION_REPORT), GHCB (extended guest request).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from snpbook.attest.checks import Checklist, MalformedEvidence
from snpbook.spec import guid
from snpbook.spec.layout import Record
from snpbook.spec.policy import POLICY, Tcb
from snpbook.spec.report import (
    ATTESTATION_REPORT,
    CERT_TABLE_ENTRY,
    ECDSA_P384_SHA384,
    REPORT_SIZE,
    SIGNED_SIZE,
    VERSIONS,
    SigningKey,
    product_of_cpuid,
    reserved_ranges,
)

SNP = "SNP ATTESTATION_REPORT"
HEX_TEXT = b"0123456789abcdefABCDEF \t\r\n"
CERTIFICATES = (guid.CERT_VCEK, guid.CERT_VLEK, guid.CERT_ASK, guid.CERT_ARK)
"""The entries of a certificate table that are certificates."""


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """An attestation report, decoded; `fields` is its `spec.report.ATTESTATION_REPORT` record."""

    raw: bytes
    fields: Record

    @classmethod
    def parse(cls, raw: bytes) -> Report:
        """Decode a report; `MalformedEvidence` where it is not 1184 bytes."""
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
    def has_cpuid(self) -> bool:
        """From version 3 on a report carries family, model and stepping of its processor."""
        return bool(self.fields.version >= 3)

    @property
    def product(self) -> str | None:
        """The product line that the CPUID fields name; None where there are none, or of no known line."""
        if not self.has_cpuid:
            return None
        return product_of_cpuid(self.fields.cpuid_family, self.fields.cpuid_model)

    def tcb(self, field: str, product: str | None) -> Tcb:
        """One of `current_tcb`, `committed_tcb`, `reported_tcb`, `launch_tcb`, in the byte order of the product."""
        return Tcb.from_int(getattr(self.fields, field), turin=product == "turin")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a file of evidence holds: the report's bytes and the certificates (DER) of its own table."""

    report: bytes
    certificates: tuple[bytes, ...] = ()

    @classmethod
    def read(cls, data: bytes) -> Evidence:
        """Take a file apart: a report, or one followed by its certificate table, in bytes or in hexadecimal digits."""
        if len(data) != REPORT_SIZE and not data.strip(HEX_TEXT):
            try:
                data = bytes.fromhex(data.decode("ascii"))
            except ValueError as error:
                raise MalformedEvidence(f"the hexadecimal text is broken: {error}") from error
        if len(data) < REPORT_SIZE:
            raise MalformedEvidence(f"{len(data)} bytes are no attestation report: it has {REPORT_SIZE}")
        table = data[REPORT_SIZE:]
        return cls(data[:REPORT_SIZE], tuple(_table_certificates(table)) if table else ())


def _table_certificates(table: bytes) -> Iterator[bytes]:
    """The certificates of a table: entries up to one of zeros, then what they point to."""
    entries: dict[UUID, tuple[int, int]] = {}
    for at in range(0, len(table) - CERT_TABLE_ENTRY.size + 1, CERT_TABLE_ENTRY.size):
        entry = CERT_TABLE_ENTRY.unpack(table, at)
        identifier = UUID(bytes=entry.guid)
        if not (identifier.int or entry.offset or entry.length):
            break
        if identifier in entries:
            raise MalformedEvidence(f"the certificate table has two entries {identifier}")
        entries[identifier] = entry.offset, entry.offset + entry.length
    else:
        raise MalformedEvidence(f"{len(table)} bytes follow the report's {REPORT_SIZE}, and are no certificate table")
    for identifier, (start, end) in entries.items():
        if start < at + CERT_TABLE_ENTRY.size or end > len(table):
            raise MalformedEvidence(f"entry {identifier} points out of the certificate table")
        if identifier in CERTIFICATES:
            yield table[start:end]


def check_format(report: Report, checks: Checklist) -> None:
    """Make the checks that need nothing but the report: version, policy, algorithm, reserved bits, signing key."""
    fields, policy = report.fields, report.policy
    version = fields.version
    checks.require("report.version", version in VERSIONS, "the report's version is unknown", "2 to 5", version, SNP)
    checks.require("report.policy.one", policy.one == 1, "bit 17 of the policy is not set", 1, policy.one, SNP)
    stray = POLICY.reserved_set(fields.policy.to_bytes(POLICY.size, "little"))
    rule = "the policy has reserved bits"
    checks.require("report.policy.reserved", not stray, rule, "bits 63:26 zero", f"{fields.policy:#x}", SNP)
    rule, expected, found = "the signature's algorithm is unknown", ECDSA_P384_SHA384, fields.signature_algo
    checks.require("report.signature_algo", found == expected, rule, expected, found, SNP)
    stray = ATTESTATION_REPORT.reserved_set(report.raw)
    for first, end in reserved_ranges(version):
        if any(report.raw[first:end]):
            stray += [i for i in range(first, end) if report.raw[i]]
    found = f"byte {min(stray):#05x} is {report.raw[min(stray)]:#04x}" if stray else "zero"
    checks.require("report.reserved", not stray, f"version {version} reserves these bits", "zero", found, SNP)
    known, key = " ".join(f"{key.value} ({key.name})" for key in SigningKey), fields.signing_key
    rule = "SIGNING_KEY has an unknown value"
    checks.require("report.signing_key", isinstance(key, SigningKey), rule, known, int(key), SNP)
