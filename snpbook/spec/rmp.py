"""The reverse map table: raw 16-byte entry, its states, the operands and codes of its instructions.

The raw entry is not architectural; it is that of Milan and Genoa (PPR family 19h; quadword 1 is
confirmed for Genoa only). Sources: APM2 15.36, PPR, firmware 1.55.25, Linux arch/x86/virt/svm/sev.c.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, uint
from snpbook.spec.pages import PageSize, PageState, VmplPermission

RMP_ENTRY = Layout(
    "RmpEntry",
    16,
    Cite("PPR", "RMP entry format"),
    [
        bits("assigned", 0, 8, 0, note="owned by a guest or by the firmware, not by the hypervisor"),
        bits("page_size", 0, 8, 1, enum=PageSize, note="0 4 KB, 1 2 MB"),
        bits("immutable", 0, 8, 2, note="only the firmware may change the entry"),
        bits("subpage_count", 0, 8, 3, 9, note="in a 2 MB-aligned entry: how many of the other 511 are assigned"),
        bits("gfn", 0, 8, 12, 39, note="guest page number; bits 38:36 tag pages of the firmware"),
        bits("asid", 0, 8, 51, 10, note="0 with assigned: the firmware's own page"),
        bits("vmsa", 0, 8, 61, note="may be run as a VMSA"),
        bits("validated", 0, 8, 62, note="the guest accepted the page by PVALIDATE"),
        bits("lock", 0, 8, 63, note="the firmware writes it equal to immutable"),
        bits("vmpl0", 8, 8, 0, 8, note="permissions of VMPL0"),
        bits("vmpl1", 8, 8, 8, 8, note="permissions of VMPL1"),
        bits("vmpl2", 8, 8, 16, 8, note="permissions of VMPL2"),
        bits("vmpl3", 8, 8, 24, 8, note="permissions of VMPL3"),
    ],
)

RMPUPDATE_STATE = Layout(
    "RmpupdateState",
    16,
    Cite("APM2", "RMPUPDATE"),
    [
        uint("gpa", 0, 8),
        bits("assigned", 8, 1, 0),
        bits("page_size", 9, 1, 0, enum=PageSize),
        bits("region_status", 9, 1, 1, note="RMPREAD only"),
        bits("immutable", 10, 1, 0),
        uint("asid", 12, 4),
    ],
)


def _mask(name: str) -> int:
    field = RMP_ENTRY.fields[name]
    return field.limit << field.lo


ASSIGNED = _mask("assigned")
LARGE = _mask("page_size")
IMMUTABLE = _mask("immutable")
SUBPAGES = _mask("subpage_count")
SUBPAGE_SHIFT = RMP_ENTRY.fields["subpage_count"].lo
GFN = _mask("gfn")
GFN_SHIFT = RMP_ENTRY.fields["gfn"].lo
ASID = _mask("asid")
ASID_SHIFT = RMP_ENTRY.fields["asid"].lo
ASID_LIMIT = 1 << RMP_ENTRY.fields["asid"].width
VMSA = _mask("vmsa")
VALIDATED = _mask("validated")
PERMISSION_BITS = RMP_ENTRY.fields["vmpl0"].width
"""Of each VMPL, from the lowest bits of the second quadword on."""
GFN_LIMIT = 1 << RMP_ENTRY.fields["gfn"].width
LOCK = _mask("lock")

GFN_TAG_SHIFT = 36
"""The firmware's tag for its own pages sits in bits 38:36 of the 39-bit guest page number."""
GFN_TAG_METADATA = 1
GFN_TAG_IOMMU = 2

VMPL0_FULL = int(VmplPermission.ALL)
"""VMPL0 after an RMPUPDATE that changes ownership: everything; the shadow-stack bit is unconfirmed."""

FIRMWARE_ADDRESS_LIMIT = 0x3FFD00000000
"""The firmware refuses buffers above 0x3FFCFFFFFFFF."""

ENTRY_SIZE = 16
BOOKKEEPING_SIZE = 0x4000
"""The first 16 KB of the table: 2048 counters of assigned pages, one u64 per ASID."""
ASID_COUNTERS = 2048


class GfnKind(IntEnum):
    """What the guest page number of a page of the firmware says: nothing, or what the firmware tagged it as."""

    ZERO = 0
    IOMMU = 1
    METADATA = 2
    OTHER = 3


PAGE_STATES: dict[PageState, dict[str, int]] = {
    PageState.HYPERVISOR: {"assigned": 0, "validated": 0, "owned": 0, "immutable": 0},
    PageState.HV_FIXED: {"assigned": 0, "validated": 0, "owned": 0, "immutable": 1},
    PageState.FIRMWARE: {
        "assigned": 1, "validated": 0, "owned": 0, "immutable": 1, "gfn": GfnKind.ZERO, "vmsa": 0,
    },
    PageState.FIRMWARE_IOMMU: {
        "assigned": 1, "validated": 0, "owned": 0, "immutable": 1, "gfn": GfnKind.IOMMU, "vmsa": 0,
    },
    PageState.RECLAIM: {"assigned": 1, "validated": 0, "owned": 0, "immutable": 0, "lock": 0},
    PageState.CONTEXT: {
        "assigned": 1, "validated": 0, "owned": 0, "immutable": 1, "gfn": GfnKind.ZERO, "vmsa": 1,
    },
    PageState.METADATA: {"assigned": 1, "validated": 0, "owned": 0, "immutable": 1, "gfn": GfnKind.METADATA},
    PageState.PRE_GUEST: {"assigned": 1, "validated": 0, "owned": 1, "immutable": 1},
    PageState.PRE_SWAP: {"assigned": 1, "validated": 1, "owned": 1, "immutable": 1},
    PageState.GUEST_INVALID: {"assigned": 1, "validated": 0, "owned": 1, "immutable": 0},
    PageState.GUEST_VALID: {"assigned": 1, "validated": 1, "owned": 1, "immutable": 0},
}  # fmt: skip
"""The state table: what an entry must hold to be in a state (`owned`: ASID not 0); what is left out may be anything.

An entry that fits no row is INVALID, a page without an entry DEFAULT. Source: SNP ABI, page states, as firmware
1.55.25 decodes them.
"""


RMP_SEGMENT = Layout(
    "RmpSegment",
    8,
    Cite("LINUX", "arch/x86/virt/svm/sev.c, segmented RMP (mainline after 6.12)"),
    [
        bits("covered_gib", 0, 8, 0, 20, note="GiB of the segment's memory that have entries; 0 for none"),
        bits("base", 0, 8, 20, 32, note="where its entries lie, in MiB"),
    ],
)
SEGMENT_TABLE_SIZE = 0x1000
RMP_SEGMENTS = 512
"""Up to so many segments, listed behind the bookkeeping area."""
SEGMENT_BASE_SHIFT, GIB_SHIFT = 20, 30


class RmpCode(IntEnum):
    """Return codes in EAX of RMPUPDATE, PSMASH, PVALIDATE, RMPADJUST, RMPQUERY and RMPREAD."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4
    FAIL_SIZEMISMATCH = 6
    FAIL_BADADDR = 7
    """PSMASH of a page that is no 2 MB page; one source only."""
