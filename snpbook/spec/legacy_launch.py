"""Legacy launch and migration: session, packets, measurement and attestation report, and the sizes that INIT asks for.

The guest owner and the platform share a transport encryption and an integrity key (TEK, TIK), wrapped in the session.
Sources: SEV API (LAUNCH_START, LAUNCH_MEASURE, LAUNCH_SECRET, ATTESTATION), firmware 1.55.25.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.sev_certificates import CertAlgo, CertUsage

SESSION = Layout(
    "LaunchSession",
    0x80,
    Cite("SEV", "session data"),
    [
        raw("nonce", 0x00, 16),
        raw("wrap_tk", 0x10, 32, note="TEK, then TIK, under AES-128-CTR with the KEK"),
        raw("wrap_iv", 0x30, 16),
        raw("wrap_mac", 0x40, 32, note="HMAC-SHA256 of wrap_tk with the KIK"),
        raw("policy_mac", 0x60, 32, note="HMAC-SHA256 of the policy with the TIK"),
    ],
)

PACKET_HEADER = Layout(
    "PacketHeader",
    0x34,
    Cite("SEV", "packet header"),
    [bits("compressed", 0x00, 4, 0), raw("iv", 0x04, 16), raw("mac", 0x14, 32)],
)

MEASUREMENT = Layout(
    "LaunchMeasurement",
    0x30,
    Cite("SEV", "LAUNCH_MEASURE"),
    [raw("measure", 0x00, 32), raw("mnonce", 0x20, 16)],
)


class MacContext(IntEnum):
    """The first byte of what a MAC covers. Firmware 1.55.25 uses DATA for VMSA packets too."""

    SECRET = 1
    DATA = 2
    VMSA = 3
    MEASURE = 4


MEASURE_INPUT = Layout(
    "MeasureInput",
    0x38,
    Cite("SEV", "LAUNCH_MEASURE"),
    [
        uint("context", 0x00, 1, enum=MacContext),
        uint("api_major", 0x01, 1),
        uint("api_minor", 0x02, 1),
        uint("build", 0x03, 1),
        uint("policy", 0x04, 4),
        raw("launch_digest", 0x08, 32),
        raw("mnonce", 0x28, 16),
    ],
)
"""What MEASURE is the HMAC-SHA256 of, with the TIK as key."""

PACKET_MAC_INPUT = Layout(
    "PacketMacInput",
    0x1D,
    Cite("SEV", "LAUNCH_SECRET"),
    [
        uint("context", 0x00, 1, enum=MacContext),
        uint("flags", 0x01, 4),
        raw("iv", 0x05, 16),
        uint("guest_len", 0x15, 4),
        uint("trans_len", 0x19, 4),
    ],
)
"""What a packet's MAC begins with; the ciphertext follows and, for a secret, MEASURE."""

LEGACY_REPORT = Layout(
    "LegacyAttestationReport",
    0xD0,
    Cite("SEV", "ATTESTATION"),
    [
        raw("mnonce", 0x00, 16),
        raw("launch_digest", 0x10, 32),
        uint("policy", 0x30, 4),
        uint("sig_usage", 0x34, 4, enum=CertUsage),
        uint("sig_algo", 0x38, 4, enum=CertAlgo),
        raw("signature_r", 0x40, 72),
        raw("signature_s", 0x88, 72),
    ],
)
LEGACY_REPORT_SIGNED_SIZE = LEGACY_REPORT.offset("sig_usage")
"""The PEK signs the bytes before it."""

LEGACY_DIGEST_SIZE = 32
HANDLES_MAX = 1024
"""Legacy guests have handles 1 to 1024; 0 asks LAUNCH_START for new keys."""

PACKET_LIMIT = 0x5000
"""Most bytes of one packet or secret; LAUNCH_UPDATE_DATA works through its range in such chunks."""
PACKET_ALIGNMENT = 16
CHIP_ID_SIZE = 64
"""GET_ID answers x and y, 32 bytes each, of one socket, or of two where the buffer has exactly room for two."""

TMR_SIZE, TMR_SIZE_SNP = 1 << 20, 2 << 20
"""Size and alignment of the SEV-ES trusted memory region: 1 MB, and 2 MB once the RMP is initialised."""
NV_SIZE = 0x8000
"""Persistent data of INIT_EX, in a page-aligned area of the host's memory."""
FIRMWARE_ALIGNMENT = 32
"""Of the image that DOWNLOAD_FIRMWARE[_EX] loads."""
