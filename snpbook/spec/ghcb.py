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
    CPUID_REQUEST = 0x004
    CPUID = 0x005
    AP_RESET_HOLD_REQUEST = 0x006
    AP_RESET_HOLD = 0x007
    PREFERRED_GPA_REQUEST = 0x010
    PREFERRED_GPA = 0x011
    REGISTER_GPA_REQUEST = 0x012
    REGISTER_GPA = 0x013
    PAGE_STATE_REQUEST = 0x014
    PAGE_STATE = 0x015
    RUN_VMPL_REQUEST = 0x016
    RUN_VMPL = 0x017
    FEATURES_REQUEST = 0x080
    FEATURES = 0x081
    TERMINATE = 0x100


MSR_CODE_MASK = 0xFFF
MSR_DATA_SHIFT = 12
GFN_NONE = (1 << 52) - 1
FEATURE_SNP = 1 << 0
FEATURE_AP_CREATION = 1 << 1
FEATURE_RESTRICTED_INJECTION = 1 << 2
FEATURE_MULTI_VMPL = 1 << 5

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


MSR_CPUID = Layout(
    "GhcbMsrCpuid",
    8,
    Cite("GHCB", "CPUID request by MSR"),
    [
        bits("code", 0, 8, 0, 12),
        bits("register", 0, 8, 30, 2, note="EAX, EBX, ECX, EDX"),
        bits("value", 0, 8, 32, 32, note="the leaf; in the answer what the register holds"),
    ],
)
MSR_RUN_VMPL = Layout(
    "GhcbMsrRunVmpl", 8, Cite("GHCB", "run VMPL by MSR"), [bits("code", 0, 8, 0, 12), bits("vmpl", 0, 8, 32, 8)]
)


class Nae(IntEnum):
    """SW_EXITCODE of the events that a guest reports through its GHCB: intercepts first, then those that are none.

    From HV_DOORBELL to SPECIFIC_EOI they are none that Linux 6.12 knows; the meaning of HV_TIMER is from memory.
    """

    READ_DR7 = 0x27
    WRITE_DR7 = 0x37
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    INVD = 0x76
    IOIO = 0x7B
    MSR = 0x7C
    VMMCALL = 0x81
    RDTSCP = 0x87
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MMIO_READ = 0x80000001
    MMIO_WRITE = 0x80000002
    NMI_COMPLETE = 0x80000003
    AP_RESET_HOLD = 0x80000004
    AP_JUMP_TABLE = 0x80000005
    PAGE_STATE_CHANGE = 0x80000010
    GUEST_REQUEST = 0x80000011
    EXTENDED_GUEST_REQUEST = 0x80000012
    AP_CREATION = 0x80000013
    HV_DOORBELL = 0x80000014
    HV_IPI = 0x80000015
    HV_TIMER = 0x80000016
    APIC_ID_LIST = 0x80000017
    RUN_VMPL = 0x80000018
    SECURE_AVIC = 0x8000001A
    CONFIGURE_INJECTION = 0x8000001B
    DISABLE_ALTERNATE_INJECTION = 0x8000001C
    SPECIFIC_EOI = 0x8000001D
    FEATURES = 0x8000FFFD
    TERMINATE = 0x8000FFFE
    UNSUPPORTED = 0x8000FFFF


NAE_INPUTS: dict[int, tuple[str, ...]] = {
    Nae.WRITE_DR7: ("rax",),
    Nae.RDPMC: ("rcx",),
    Nae.CPUID: ("rax", "rcx"),
    Nae.MSR: ("rcx",),
    Nae.VMMCALL: ("rax", "cpl"),
    Nae.MONITOR: ("rax", "rcx", "rdx"),
    Nae.MWAIT: ("rax", "rcx"),
    Nae.MMIO_READ: ("sw_scratch",),
    Nae.MMIO_WRITE: ("sw_scratch",),
}
"""The fields that an event must have filled in beside SW_EXITCODE, SW_EXITINFO1 and 2, where that does not depend on
what the event asks for (Linux sev_es_validate_vmgexit)."""
INSTRUCTION_EVENTS = frozenset(event for event in Nae if event < Nae.NMI_COMPLETE)
"""Events that are an instruction of the guest: the hypervisor may answer them with the exception that it raises."""
SNP_EVENTS = frozenset([Nae.PAGE_STATE_CHANGE, Nae.GUEST_REQUEST, Nae.EXTENDED_GUEST_REQUEST, Nae.AP_CREATION])
"""What is for SNP guests alone."""
SVSM_EVENTS = frozenset([
    Nae.HV_DOORBELL, Nae.HV_IPI, Nae.HV_TIMER, Nae.APIC_ID_LIST, Nae.RUN_VMPL, Nae.SECURE_AVIC, Nae.CONFIGURE_INJECTION,
    Nae.DISABLE_ALTERNATE_INJECTION, Nae.SPECIFIC_EOI,
])  # fmt: skip
"""What Linux 6.12 does not know."""


class ApCreation(IntEnum):
    """The request of AP_CREATION, in the low bits of SW_EXITINFO1."""

    ON_INIT = 0
    CREATE = 1
    DESTROY = 2


AP_CREATION = Layout(
    "ApCreationInfo",
    8,
    Cite("GHCB", "SNP AP creation, SW_EXITINFO1"),
    [
        bits("request", 0, 8, 0, 16),
        bits("vmpl", 0, 8, 16, 4),
        bits("apic_id", 0, 8, 32, 32),
    ],
)


class Doorbell(IntEnum):
    """What HV_DOORBELL asks for, in SW_EXITINFO1."""

    GET_PREFERRED = 0
    SET = 1
    QUERY = 2
    CLEAR = 3


class VmmError(IntEnum):
    """The upper half of SW_EXITINFO2 after a guest request: what the hypervisor itself refused.

    GENERIC is from memory.
    """

    INVALID_LEN = 1
    BUSY = 2
    GENERIC = 3


EMPTY_CERTIFICATES = bytes(24)
"""The certificate table without an entry: the all-zero entry that ends it."""
SCRATCH_LIMIT = 16 * PAGE_SIZE
"""GHCB_SCRATCH_AREA_LIMIT of Linux: how long a scratch area outside of the GHCB may be."""
MMIO_LIMIT = 8
"""Bytes that an MMIO event of version 2 may move."""
INJECT = 1
"""SW_EXITINFO1 where the guest shall take the exception in SW_EXITINFO2."""


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
