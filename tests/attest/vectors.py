"""Where the public vectors lie, and how a test skips without them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from snpbook.attest.bundle import load_certificates
from snpbook.attest.certs import Certificate
from snpbook.attest.parse import Evidence

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="the public vectors are not beside this repository")

NOW = datetime(2026, 6, 1, tzinfo=UTC)
"""A moment at which every certificate among the vectors is valid."""

REAL = {
    "milan": ("milan_v2.hex", "milan_v2_vcek.der"),
    "genoa": ("genoa_v3.bin", "genoa_v3_vcek.pem"),
    "milan-debug": ("milan_v2_debug.bin", "milan_v2_debug_vcek.der"),
}
"""Real reports: the file of each and of its VCEK."""


def report_file(name: str) -> Path:
    return VECTORS / "reports" / REAL[name][0]


def vcek_file(name: str) -> Path:
    return VECTORS / "reports" / REAL[name][1]


def chain_file(name: str) -> Path:
    return VECTORS / "chains" / f"{name.split('-')[0]}.pem"


def real_report(name: str) -> bytes:
    return Evidence.read(report_file(name).read_bytes()).report


def real_certificates(name: str) -> list[Certificate]:
    return [*load_certificates(vcek_file(name).read_bytes()), *load_certificates(chain_file(name).read_bytes())]
