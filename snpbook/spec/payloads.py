"""What guest messages say: the payload of each request and response. Every response begins with its status.

Source: SNP ABI, guest messages; sizes and paddings as in firmware 1.55.25.
"""

from collections.abc import Mapping
from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.context import GUEST_CONTEXT_EXPORT
from snpbook.spec.key_derivation import GUEST_KEY_SIZE, RootKey
from snpbook.spec.layout import Field, Layout, bits, raw, sub, uint
from snpbook.spec.messages import MessageType
from snpbook.spec.report import REPORT_SIZE


class KeySelect(IntEnum):
    """KEY_SEL: which key signs a report or roots a derived key."""

    VLEK_OR_VCEK = 0
    VCEK = 1
    VLEK = 2


def _message(name: str, size: int, message: str, *fields: Field) -> Layout:
    return Layout(name, size, Cite("SNP", message), fields)


CPUID_REQUEST = _message("CpuidRequest", 0x10, "MSG_CPUID_REQ", uint("count", 0x00, 4))
CPUID_RESPONSE = _message("CpuidResponse", 0x10, "MSG_CPUID_RSP", uint("status", 0x00, 4), uint("count", 0x04, 4))
"""Both are followed by the entries (`CPUID_ENTRY`); a response has its request's size and the corrected entries."""

KEY_REQUEST = _message(
    "KeyRequest",
    0x20,
    "MSG_KEY_REQ",
    bits("root_key_select", 0x00, 4, 0, enum=RootKey),
    bits("key_sel", 0x00, 4, 1, 2, enum=KeySelect),
    uint("guest_field_select", 0x08, 8),
    uint("vmpl", 0x10, 4),
    uint("guest_svn", 0x14, 4),
    uint("tcb_version", 0x18, 8),
)
KEY_REQUEST_V2 = _message(
    "KeyRequestV2",
    0x30,
    "MSG_KEY_REQ, version 2",
    *KEY_REQUEST.fields.values(),
    uint("launch_mit_vector", 0x20, 8),
)
"""MSG_VERSION 2, ABI 1.58. Its size is inferred: the least that takes the vector and that a message can have."""
KEY_RESPONSE = _message(
    "KeyResponse", 0x40, "MSG_KEY_RSP", uint("status", 0x00, 4), raw("derived_key", 0x20, GUEST_KEY_SIZE)
)

REPORT_REQUEST = _message(
    "ReportRequest",
    0x60,
    "MSG_REPORT_REQ",
    raw("report_data", 0x00, 64),
    uint("vmpl", 0x40, 4),
    bits("key_sel", 0x44, 4, 0, 2, enum=KeySelect),
)
REPORT_RESPONSE = _message(
    "ReportResponse",
    0x20 + REPORT_SIZE,
    "MSG_REPORT_RSP",
    uint("status", 0x00, 4),
    uint("report_size", 0x04, 4),
    raw("report", 0x20, REPORT_SIZE),
)

EXPORT_REQUEST = _message(
    "ExportRequest", 0x10, "MSG_EXPORT_REQ", uint("gctx_paddr", 0x00, 8), bits("imi_en", 0x08, 4, 0)
)
EXPORT_RESPONSE = _message(
    "ExportResponse",
    0xFA0,
    "MSG_EXPORT_RSP",
    uint("status", 0x00, 4),
    uint("gctx_size", 0x04, 4),
    uint("gctx_version", 0x08, 4),
    sub("gctx", 0x20, GUEST_CONTEXT_EXPORT),
)
"""Padded so that, behind its header, it fills a page."""


def _incoming(name: str, message: str, *target: Field) -> Layout:
    size, version = uint("gctx_size", 0x08, 4), uint("gctx_version", 0x0C, 4)
    return _message(name, 0x320, message, *target, size, version, sub("gctx", 0x20, GUEST_CONTEXT_EXPORT))


IMPORT_REQUEST = _incoming("ImportRequest", "MSG_IMPORT_REQ", uint("gctx_paddr", 0x00, 8))
ABSORB_REQUEST = _incoming("AbsorbRequest", "MSG_ABSORB_REQ", uint("gctx_paddr", 0x00, 8))
ABSORB_NOMA_REQUEST = _incoming("AbsorbNomaRequest", "MSG_ABSORB_NOMA_REQ")
VMRK_REQUEST = _message("VmrkRequest", 0x40, "MSG_VMRK_REQ", uint("gctx_paddr", 0x00, 8), raw("vmrk", 0x20, 32))
STATUS_RESPONSE = _message("StatusResponse", 0x10, "MSG_IMPORT_RSP", uint("status", 0x00, 4))
"""The answer to IMPORT, ABSORB, ABSORB_NOMA and VMRK."""

TSC_INFO_REQUEST = _message("TscInfoRequest", 0x80, "MSG_TSC_INFO_REQ", raw("zero", 0x00, 0x80))
TSC_INFO_RESPONSE = _message(
    "TscInfoResponse",
    0x80,
    "MSG_TSC_INFO_RSP",
    uint("status", 0x00, 4),
    uint("tsc_scale", 0x08, 8, note="8.32 fixed point: desired frequency by mean frequency, rounded up"),
    uint("tsc_offset", 0x10, 8),
    uint("tsc_factor", 0x18, 4),
)
TSC_SCALE_FRACTION_BITS = 32
TSC_NOMINAL_KHZ = 100_000
"""The reference clock; its mean lies TSC_FACTOR below, by spread spectrum: 99800 kHz on Genoa (inferred)."""

MESSAGES: Mapping[MessageType, tuple[Layout, Layout]] = {
    MessageType.CPUID_REQ: (CPUID_REQUEST, CPUID_RESPONSE),
    MessageType.KEY_REQ: (KEY_REQUEST, KEY_RESPONSE),
    MessageType.REPORT_REQ: (REPORT_REQUEST, REPORT_RESPONSE),
    MessageType.EXPORT_REQ: (EXPORT_REQUEST, EXPORT_RESPONSE),
    MessageType.IMPORT_REQ: (IMPORT_REQUEST, STATUS_RESPONSE),
    MessageType.ABSORB_REQ: (ABSORB_REQUEST, STATUS_RESPONSE),
    MessageType.VMRK_REQ: (VMRK_REQUEST, STATUS_RESPONSE),
    MessageType.ABSORB_NOMA_REQ: (ABSORB_NOMA_REQUEST, STATUS_RESPONSE),
    MessageType.TSC_INFO_REQ: (TSC_INFO_REQUEST, TSC_INFO_RESPONSE),
}
"""Payloads of request and response, by the request's type."""
