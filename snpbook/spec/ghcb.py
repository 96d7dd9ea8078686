"""The GHCB: the shared page and the MSR protocol by which a guest asks its hypervisor for things.

Sources: GHCB specification (through the headers that implement it: Linux asm/sev-common.h, svm.h).
"""

from __future__ import annotations

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE

_SAVED = {
    0x140: "xss", 0x160: "dr7", 0x1F8: "rax", 0x308: "rcx", 0x310: "rdx", 0x318: "rbx", 0x328: "rbp",
    0x330: "rsi", 0x338: "rdi", 0x340: "r8", 0x348: "r9", 0x350: "r10", 0x358: "r11", 0x360: "r12",
    0x368: "r13", 0x370: "r14", 0x378: "r15", 0x390: "sw_exit_code", 0x398: "sw_exit_info_1",
    0x3A0: "sw_exit_info_2", 0x3A8: "sw_scratch", 0x3E8: "xcr0",
}  # fmt: skip
SHARED_BUFFER_SIZE = 2032

GHCB = Layout(
    "Ghcb",
    PAGE_SIZE,
    Cite("GHCB", "GHCB layout"),
    [uint("cpl", 0x0CB, 1)]
    + [uint(name, offset, 8) for offset, name in _SAVED.items()]
    + [
        raw("valid_bitmap", 0x3F0, 16, note="bit offset/8 for each quadword below 0x3F0"),
        uint("x87_state_gpa", 0x400, 8),
        raw("shared_buffer", 0x800, SHARED_BUFFER_SIZE),
        uint("protocol_version", 0xFFA, 2),
        uint("usage", 0xFFC, 4),
    ],
)
SHARED_BUFFER_OFFSET = GHCB.offset("shared_buffer")
PROTOCOL_VERSION = 2
PROTOCOL_MINIMUM = 1


def valid_bitmap(*names: str) -> bytes:
    """The bitmap that marks these fields as filled in."""
    mask = 0
    for name in names:
        mask |= 1 << GHCB.offset(name) // 8
    return mask.to_bytes(16, "little")


def is_valid(bitmap: bytes, name: str) -> bool:
    """Whether the bitmap marks a field as filled in."""
    return bool(int.from_bytes(bitmap, "little") >> GHCB.offset(name) // 8 & 1)


class MsrCode(IntEnum):
    """Requests and answers in bits 11:0 of the GHCB MSR; 0 means the value is a GHCB address."""

    SEV_INFO = 0x001
    SEV_INFO_REQUEST = 0x002
    PREFERRED_GPA_REQUEST = 0x010
    PREFERRED_GPA = 0x011
    REGISTER_GPA_REQUEST = 0x012
    REGISTER_GPA = 0x013
    PAGE_STATE_REQUEST = 0x014
    PAGE_STATE = 0x015
    FEATURES_REQUEST = 0x080
    FEATURES = 0x081
    TERMINATE = 0x100


MSR_CODE_MASK = 0xFFF
MSR_DATA_SHIFT = 12
GFN_NONE = (1 << 52) - 1
FEATURE_SNP = 1 << 0
FEATURE_AP_CREATION = 1 << 1

SEV_INFO = Layout(
    "GhcbMsrSevInfo",
    8,
    Cite("GHCB", "SEV information"),
    [
        bits("code", 0, 8, 0, 12),
        bits("c_bit", 0, 8, 24, 8),
        bits("min_version", 0, 8, 32, 16),
        bits("max_version", 0, 8, 48, 16),
    ],
)

TERMINATE = Layout(
    "GhcbMsrTerminate",
    8,
    Cite("GHCB", "termination request"),
    [bits("code", 0, 8, 0, 12), bits("reason_set", 0, 8, 12, 4), bits("reason", 0, 8, 16, 8)],
)


class Nae(IntEnum):
    """SW_EXITCODE of the events that a guest reports through its GHCB."""

    IOIO = 0x7B
    PAGE_STATE_CHANGE = 0x80000010
    GUEST_REQUEST = 0x80000011
    FEATURES = 0x8000FFFD


class GhcbError(IntEnum):
    """SW_EXITINFO2 after SW_EXITINFO1 = 2: what was wrong with the GHCB."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


MALFORMED = 2
"""SW_EXITINFO1 for a GHCB that the hypervisor cannot accept."""

IOIO = Layout(
    "IoioExitInfo",
    8,
    Cite("APM2", "IOIO intercept, EXITINFO1"),
    [
        bits("is_in", 0, 8, 0),
        bits("is_string", 0, 8, 2),
        bits("rep", 0, 8, 3),
        bits("size_8", 0, 8, 4),
        bits("size_16", 0, 8, 5),
        bits("size_32", 0, 8, 6),
        bits("address_16", 0, 8, 7),
        bits("address_32", 0, 8, 8),
        bits("address_64", 0, 8, 9),
        bits("segment", 0, 8, 10, 3),
        bits("port", 0, 8, 16, 16),
    ],
)

PSC_HEADER = Layout(
    "PageStateChangeHeader",
    8,
    Cite("GHCB", "SNP page state change"),
    [uint("cur_entry", 0, 2), uint("end_entry", 2, 2, note="index of the last entry, inclusive")],
)
PSC_ENTRY = Layout(
    "PageStateChangeEntry",
    8,
    Cite("GHCB", "SNP page state change"),
    [
        bits("cur_page", 0, 8, 0, 12),
        bits("gfn", 0, 8, 12, 40),
        bits("operation", 0, 8, 52, 4),
        bits("page_size", 0, 8, 56),
    ],
)
PSC_ENTRIES = (SHARED_BUFFER_SIZE - PSC_HEADER.size) // PSC_ENTRY.size
"""253 entries fit the shared buffer."""


class PageOperation(IntEnum):
    """What a page state change asks for."""

    PRIVATE = 1
    SHARED = 2


PSC_INVALID_HEADER = 1 << 32 | 1
PSC_INVALID_ENTRY = 1 << 32 | 2
PSC_FAILURE = 0x100 << 32
PAGE_STATE_FAILED = 1 << 63
"""Added to MSR code PAGE_STATE where the hypervisor did not change the page (KVM's value)."""
