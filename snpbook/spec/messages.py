"""Guest messages: the encrypted channel between a guest and the firmware (SNP_GUEST_REQUEST).

What the messages say is in `payloads`. Source: SNP ABI, guest messages; checked against Linux sev-guest and the
SVSM's request layer.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, raw, uint


class MessageType(IntEnum):
    """MSG_TYPE: requests are odd, each response is its request plus one."""

    CPUID_REQ = 1
    CPUID_RSP = 2
    KEY_REQ = 3
    KEY_RSP = 4
    REPORT_REQ = 5
    REPORT_RSP = 6
    EXPORT_REQ = 7
    EXPORT_RSP = 8
    IMPORT_REQ = 9
    IMPORT_RSP = 10
    ABSORB_REQ = 11
    ABSORB_RSP = 12
    VMRK_REQ = 13
    VMRK_RSP = 14
    ABSORB_NOMA_REQ = 15
    ABSORB_NOMA_RSP = 16
    TSC_INFO_REQ = 17
    TSC_INFO_RSP = 18


MESSAGE_HEADER = Layout(
    "GuestMessageHeader",
    0x60,
    Cite("SNP", "guest message header"),
    [
        raw("authtag", 0x00, 32, note="the GCM tag in the first 16 bytes"),
        uint("msg_seqno", 0x20, 8),
        uint("algo", 0x30, 1),
        uint("hdr_version", 0x31, 1),
        uint("hdr_size", 0x32, 2),
        uint("msg_type", 0x34, 1, enum=MessageType),
        uint("msg_version", 0x35, 1),
        uint("msg_size", 0x36, 2),
        uint("msg_vmpck", 0x3C, 1),
    ],
)
AAD_FROM = MESSAGE_HEADER.offset("algo")
"""The header from here on is authenticated but not encrypted."""
ALGO_AES_256_GCM = 1
HEADER_VERSION = 1
TAG_SIZE = 16
LAST_SEQNO = 2**64 - 2


def iv(seqno: int) -> bytes:
    """The 12-byte GCM nonce of a message."""
    return seqno.to_bytes(8, "little") + bytes(4)
