"""Page swap: what is kept of a page while it is outside the guest's memory.

A metadata page of SNP holds 64 entries; the root entry lies in the guest context instead. Content is sealed
with AES-256-GCM under the guest's offline key (OEK). Sources: SNP ABI (page swap), firmware 1.55.25.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE, PageSize


class SwapType(IntEnum):
    """PAGE_TYPE of the swap commands; 3 is no type. That the legacy commands number theirs alike is inferred."""

    DATA = 0
    METADATA = 1
    VMSA = 2


MDATA_ENTRY = Layout(
    "MdataEntry",
    0x40,
    Cite("SNP", "metadata entry"),
    [
        uint("software_data", 0x00, 8, note="the host's own"),
        uint("iv", 0x08, 8),
        raw("auth_tag", 0x10, 16),
        bits("valid", 0x20, 8, 0, note="cleared by SNP_PAGE_SWAP_IN: an entry serves once"),
        bits("page_validated", 0x20, 8, 1),
        bits("vmsa", 0x20, 8, 2),
        bits("metadata", 0x20, 8, 3),
        bits("page_size", 0x20, 8, 4, enum=PageSize),
        bits("gfn", 0x20, 8, 12, 52, note="of a metadata page all ones"),
        uint("vmpl_permissions", 0x28, 8, note="the second quadword of the RMP entry"),
    ],
)
ENTRIES_PER_PAGE = PAGE_SIZE // MDATA_ENTRY.size
METADATA_GFN = MDATA_ENTRY.fields["gfn"].limit

LAST_IV = 2**64 - 2
"""The offline key's count at which SNP_PAGE_SWAP_OUT refuses with AEAD_OFLOW."""

LEGACY_MDATA = Layout(
    "LegacyMdata",
    0x40,
    Cite("SEV", "SWAP_OUT metadata"),
    [
        uint("software_data", 0x00, 8),
        uint("iv", 0x08, 8),
        raw("auth_tag", 0x10, 16),
        bits("page_size", 0x3C, 4, 0, enum=PageSize),
        bits("page_type", 0x3C, 4, 1, 2, enum=SwapType),
    ],
)
"""The 64 bytes, tag taken as zero, are the additional authenticated data; SNP's cipher has none."""


def swap_iv(count: int) -> bytes:
    """The 12-byte GCM nonce of the offline key's `count`th page."""
    return count.to_bytes(8, "little") + bytes(4)
