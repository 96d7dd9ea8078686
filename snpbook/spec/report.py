"""The attestation report: 1184 bytes, the signed part first, and the signature after it.

Versions 2 to 5 share one layout; what a version leaves reserved is data (`reserved_ranges`).
Source: SNP ABI, MSG_REPORT_RSP and ATTESTATION_REPORT.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint

REPORT_SIZE = 0x4A0
SIGNED_SIZE = 0x2A0
SIGNATURE_COMPONENT = 72
"""R and S are little-endian integers of 72 bytes each, the top 24 bytes zero."""
REPORT_DATA_SIZE = 64
ECDSA_P384_SHA384 = 1
VERSIONS = (2, 3, 4, 5)


class SigningKey(IntEnum):
    """Which key signed: bits 4:2 of the word at 0x48."""

    VCEK = 0
    VLEK = 1
    NONE = 7


_FIELDS = [
    uint("version", 0x000, 4),
    uint("guest_svn", 0x004, 4),
    uint("policy", 0x008, 8),
    raw("family_id", 0x010, 16),
    raw("image_id", 0x020, 16),
    uint("vmpl", 0x030, 4),
    uint("signature_algo", 0x034, 4),
    uint("current_tcb", 0x038, 8),
    uint("platform_info", 0x040, 8),
    bits("author_key_en", 0x048, 4, 0),
    bits("mask_chip_key", 0x048, 4, 1),
    bits("signing_key", 0x048, 4, 2, 3, enum=SigningKey),
    raw("report_data", 0x050, REPORT_DATA_SIZE),
    raw("measurement", 0x090, 48),
    raw("host_data", 0x0C0, 32),
    raw("id_key_digest", 0x0E0, 48),
    raw("author_key_digest", 0x110, 48),
    raw("report_id", 0x140, 32),
    raw("report_id_ma", 0x160, 32),
    uint("reported_tcb", 0x180, 8),
    uint("cpuid_family", 0x188, 1, note="version 3 and later"),
    uint("cpuid_model", 0x189, 1, note="version 3 and later"),
    uint("cpuid_stepping", 0x18A, 1, note="version 3 and later"),
    raw("chip_id", 0x1A0, 64),
    uint("committed_tcb", 0x1E0, 8),
    uint("current_build", 0x1E8, 1),
    uint("current_minor", 0x1E9, 1),
    uint("current_major", 0x1EA, 1),
    uint("committed_build", 0x1EC, 1),
    uint("committed_minor", 0x1ED, 1),
    uint("committed_major", 0x1EE, 1),
    uint("launch_tcb", 0x1F0, 8),
    uint("launch_mit_vector", 0x1F8, 8, note="version 5 and later"),
    uint("current_mit_vector", 0x200, 8, note="version 5 and later"),
    raw("signature_r", 0x2A0, SIGNATURE_COMPONENT),
    raw("signature_s", 0x2E8, SIGNATURE_COMPONENT),
]

ATTESTATION_REPORT = Layout("AttestationReport", REPORT_SIZE, Cite("SNP", "ATTESTATION_REPORT"), _FIELDS)


FIELDS_SINCE = {
    "cpuid_family": 3, "cpuid_model": 3, "cpuid_stepping": 3, "launch_mit_vector": 5, "current_mit_vector": 5,
}  # fmt: skip
"""Fields that are younger than version 2, and the version that brought each."""


UNPUBLISHED = {4: (0x1F8, 0x208)}
"""Bytes [first, end) that a version reserves as far as is published, and may yet have named.

What version 4 adds is not published; reports of that version with the mitigation vectors of version 5 are told of.
"""


def reserved_ranges(version: int) -> list[tuple[int, int]]:
    """Byte ranges [first, end) that must be zero in a report of `version`."""
    cpuid = (0x188, 0x1A0) if version < 3 else (0x18B, 0x1A0)
    vectors = (0x1F8, 0x2A0) if version < 5 else (0x208, 0x2A0)
    return [(0x04C, 0x050), cpuid, (0x1EB, 0x1EC), (0x1EF, 0x1F0), vectors, (0x330, REPORT_SIZE)]


CPUID_PRODUCTS = {
    (0x19, range(0x10)): "milan",
    (0x19, range(0x10, 0x20)): "genoa",
    (0x19, range(0xA0, 0xB0)): "genoa",
    (0x1A, range(0x12)): "turin",
}
"""Product lines by combined CPUID family and model; Bergamo and Siena (models from 0xA0) count as Genoa."""


def product_of_cpuid(family: int, model: int) -> str | None:
    """The product line that the CPUID bytes of a report (version 3 and later) name, None where it is not known."""
    return next((name for (known, models), name in CPUID_PRODUCTS.items() if family == known and model in models), None)


CERT_TABLE_ENTRY = Layout(
    "CertificateTableEntry",
    24,
    Cite("GHCB", "SNP extended guest request"),
    [raw("guid", 0, 16, note="text order, not mixed-endian"), uint("offset", 16, 4), uint("length", 20, 4)],
)
