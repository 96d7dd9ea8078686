"""A decoded report as rows for readers and as JSON for scripts: every field of its version, and what has no name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from enum import IntEnum
from typing import Any

from snpbook.attest.evidence import Evidence
from snpbook.attest.parse import Report
from snpbook.spec.layout import Record


def report_rows(evidence: Evidence, report: Report) -> Iterator[tuple[str, str]]:
    """Name and text of each field, then what the report leaves open."""
    words = {"policy": report.policy, "platform_info": report.platform_info}
    for name, value in report.named.items():
        if name.endswith("_tcb"):
            yield name, f"{value:#018x}  {report.tcb(name, report.product)}"
        elif name in words:
            unknown = [f"bit{bit}" for field, bit in report.unknown_bits() if field == name]
            yield name, " ".join([f"{value:#x} ", *filter(None, [_flags(words[name])]), *unknown]).rstrip()
        else:
            yield name, value.name if isinstance(value, IntEnum) else text(value)
    yield "product", report.product or "not named by the report"
    if report.is_newer:
        yield "decoded as", "version 5, the newest that is known"
    yield "reserved bytes set", " ".join(f"{offset:#05x}" for offset in report.stray_bytes) or "none"
    lists = f", {len(evidence.crls)} revocation list" if evidence.crls else ""
    yield "certificates", f"{len(evidence.certificates)}{lists} in the report's own table"


def report_json(evidence: Evidence, report: Report) -> dict[str, Any]:
    """One object: bytes in hexadecimal, words as numbers, and each word taken apart under its own name."""
    tcbs = {name: report.tcb(name, report.product) for name in report.named if name.endswith("_tcb")}
    return {
        "report": {name: plain(value) for name, value in report.named.items()},
        "policy": dict(report.policy),
        "platform_info": dict(report.platform_info),
        "tcb": {
            name: {part: level for part, level in asdict(tcb).items() if level is not None}
            for name, tcb in tcbs.items()
        },
        "product": report.product,
        "unknown_bytes": [f"{offset:#05x}" for offset in report.stray_bytes],
        "unknown_bits": [f"{field}[{bit}]" for field, bit in report.unknown_bits()],
        "table": {str(identifier): len(blob) for identifier, blob in evidence.table.items()},
    }


def text(value: object) -> str:
    """A value for readers: bytes in hexadecimal."""
    return value.hex() if isinstance(value, bytes) else str(value)


def plain(value: object) -> Any:
    """A value for JSON: bytes in hexadecimal, names of enumerations, numbers as they are."""
    if isinstance(value, IntEnum):
        return value.name
    return value if isinstance(value, int | None) else text(value)


def _flags(record: Record) -> str:
    return " ".join(name if value == 1 else f"{name}={value}" for name, value in record if value)
