"""The SVSM protocols: how a less privileged VMPL calls the software at VMPL0, with what, and what it answers.

Sources: Secure VM Service Module for SEV-SNP Guests (58019), through the headers that implement it: COCONUT-SVSM
kernel/src/protocols, Linux asm/sev.h.
"""

from __future__ import annotations

from enum import IntEnum
from uuid import UUID

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Field, Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE, VmplPermission

GUEST_VMPL = 2
"""Where firmware and kernel run: VMPL1 is the SVSM's own to use."""
VMPL_COUNT = 4
VERSION = 1
"""Of each protocol below, and the only one."""


class Protocol(IntEnum):
    """RAX[63:32] of a call. The last two are COCONUT-SVSM's."""

    CORE = 0
    ATTEST = 1
    VTPM = 2
    APIC = 3
    UEFI_MM = 4


class Core(IntEnum):
    """Calls of the core protocol."""

    REMAP_CA = 0
    PVALIDATE = 1
    CREATE_VCPU = 2
    DELETE_VCPU = 3
    DEPOSIT_MEM = 4
    WITHDRAW_MEM = 5
    QUERY_PROTOCOL = 6
    CONFIGURE_VTOM = 7


class Attest(IntEnum):
    """Calls of the attestation protocol."""

    SERVICES = 0
    SINGLE_SERVICE = 1


class Vtpm(IntEnum):
    """Calls of the vTPM protocol."""

    QUERY = 0
    COMMAND = 1


PROTOCOL_SHIFT = 32


class SvsmCode(IntEnum):
    """RAX of an answer; from PROTOCOL_BASE on each protocol's own: for the core protocol what PVALIDATE answered."""

    SUCCESS = 0
    INCOMPLETE = 0x80000000
    UNSUPPORTED_PROTOCOL = 0x80000001
    UNSUPPORTED_CALL = 0x80000002
    INVALID_ADDRESS = 0x80000003
    INVALID_FORMAT = 0x80000004
    INVALID_PARAMETER = 0x80000005
    INVALID_REQUEST = 0x80000006
    BUSY = 0x80000007
    PROTOCOL_BASE = 0x80001000
    SIZE_MISMATCH = 0x80001006
    UNCHANGED = 0x80001010


CALLING_AREA = Layout(
    "SvsmCallingArea",
    PAGE_SIZE,
    Cite("SVSM", "calling area"),
    [
        uint("call_pending", 0, 1),
        uint("mem_available", 1, 1),
        uint("no_eoi_required", 2, 1, note="COCONUT-SVSM"),
        raw("buffer", 8, PAGE_SIZE - 8),
    ],
)

PVALIDATE_LIST = Layout(
    "SvsmPvalidateList", 8, Cite("SVSM", "SVSM_CORE_PVALIDATE"), [uint("entries", 0, 2), uint("next", 2, 2)]
)
PVALIDATE_ENTRY = Layout(
    "SvsmPvalidateEntry",
    8,
    Cite("SVSM", "SVSM_CORE_PVALIDATE"),
    [
        bits("page_size", 0, 8, 0, 2, note="0 4 KB, 1 2 MB"),
        bits("validate", 0, 8, 2),
        bits("ignore_unchanged", 0, 8, 3, note="a page that is so already is no error"),
        bits("pfn", 0, 8, 12, 52),
    ],
)
PVALIDATE_ENTRIES = 510
"""As many as a calling area holds behind its first 8 bytes and the list's."""

GUEST_RIGHTS = (
    VmplPermission.READ | VmplPermission.WRITE | VmplPermission.EXECUTE_USER | VmplPermission.EXECUTE_SUPERVISOR
)
VMSA_RIGHTS = VmplPermission.READ

_OPERATION = [
    uint("report_gpa", 0x00, 8),
    uint("report_size", 0x08, 4),
    uint("nonce_gpa", 0x10, 8),
    uint("nonce_size", 0x18, 2),
    uint("manifest_gpa", 0x20, 8),
    uint("manifest_size", 0x28, 4),
    uint("certificates_gpa", 0x30, 8),
    uint("certificates_size", 0x38, 4),
]


def _operation(name: str, size: int, *more: Field) -> Layout:
    return Layout(name, size, Cite("SVSM", "attestation protocol"), [*_OPERATION, *more])


ATTEST_SERVICES = _operation("SvsmAttestServices", 0x40)
ATTEST_SINGLE_SERVICE = _operation(
    "SvsmAttestSingleService", 0x58, raw("guid", 0x40, 16), uint("manifest_version", 0x50, 4)
)
NONCE_SIZE = 64
CERTIFICATES_LIMIT = 0x4000

VTPM_SERVICE = UUID("c476f1eb-0123-45a5-9641-b4e7dde5bfe3")
SERVICES_MANIFEST = UUID("63849ebb-3d92-4670-a1ff-58f9c94b87bb")
MANIFEST_HEADER = Layout(
    "SvsmServicesManifest",
    24,
    Cite("SVSM", "services manifest"),
    [raw("guid", 0, 16, note="mixed-endian"), uint("size", 16, 4, note="in all"), uint("count", 20, 4)],
)
MANIFEST_ENTRY = Layout(
    "SvsmServicesManifestEntry",
    24,
    Cite("SVSM", "services manifest"),
    [raw("guid", 0, 16), uint("offset", 16, 4, note="from the manifest's start"), uint("size", 20, 4)],
)

VTPM_SEND_COMMAND = 8
"""The only platform command: RCX of QUERY has its bit."""
VTPM_REQUEST = Layout(
    "SvsmVtpmRequest",
    PAGE_SIZE,
    Cite("SVSM", "SVSM_VTPM_COMMAND"),
    [uint("command", 0, 4), uint("locality", 4, 1), uint("size", 5, 4), raw("data", 9, PAGE_SIZE - 9)],
)
VTPM_RESPONSE = Layout(
    "SvsmVtpmResponse",
    PAGE_SIZE,
    Cite("SVSM", "SVSM_VTPM_COMMAND"),
    [uint("size", 0, 4), raw("data", 4, PAGE_SIZE - 4)],
)
