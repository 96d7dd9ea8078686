"""SNP_PAGE_MOVE: a guest's page gets another place in memory, its content under another tweak.

The guest's address, its validation and its permissions go with it. Source: SNP ABI; the order of checks is that of
firmware 1.55.25.
"""

from __future__ import annotations

from dataclasses import replace

from snpbook.firmware.pages import (
    check_address,
    entry_of,
    make_metadata,
    release_metadata,
    set_guest_page,
    without_c_bit,
)
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.swap import check_active, check_sizes, pages_of, span
from snpbook.spec import rmp as spec
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import RUN_BOUNDARY
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PageSize, PageState
from snpbook.spec.status import Status, require


def snp_page_move(psp: SecureProcessor, buffer: Record) -> None:
    """Move a page that the host holds (Pre-Swap or Pre-Guest) or a Metadata page; the source is not wiped."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr, src_paddr=buffer.src_paddr, dst_paddr=buffer.dst_paddr)
    psp.require_initialised()
    size = buffer.page_size
    src_paddr = _address(psp, buffer.src_paddr, size, "src_paddr")
    dst_paddr = _address(psp, buffer.dst_paddr, size, "dst_paddr")
    context, gctx = psp.context(buffer.gctx_paddr), without_c_bit(psp, buffer.gctx_paddr)
    src, dst = entry_of(psp, src_paddr), entry_of(psp, dst_paddr)
    check_sizes(size, src, dst)
    check_active(psp, context, Command.SNP_PAGE_MOVE)
    data = src.state in (PageState.PRE_SWAP, PageState.PRE_GUEST) and dst.state is PageState.PRE_GUEST
    metadata = src.state is PageState.METADATA and dst.state is PageState.FIRMWARE
    found = f"{src.state.name} to {dst.state.name}"
    require(data or metadata, Status.INVALID_PAGE_STATE, "states of both pages", "PRE_SWAP to PRE_GUEST", found)
    owned = src.belongs_to(gctx) if metadata else src.asid == dst.asid == context.asid
    require(owned, Status.INVALID_PAGE_OWNER, "owner of both pages", context.asid, (src.asid, dst.asid))

    # ACTION
    key_id = KeyId.UNENCRYPTED if metadata else context.asid
    content = psp.machine.memory.read_pages(key_id, pages_of(src.spa, size)).copy()
    psp.machine.memory.write_pages(key_id, pages_of(dst.spa, size), content)

    # STATE
    if metadata:
        make_metadata(psp, dst, gctx)
        release_metadata(psp, src)
    else:
        set_guest_page(psp, dst, src, immutable=False)
        set_guest_page(psp, src, replace(src, low=src.low & ~spec.VALIDATED), immutable=False)


def _address(psp: SecureProcessor, address: int, size: PageSize, name: str) -> int:
    spa = check_address(psp, address, span(size), name)
    inside = spa % RUN_BOUNDARY + span(size) <= RUN_BOUNDARY
    require(inside, Status.INVALID_PARAM, f"{name} stays between multiples of 64 MB", RUN_BOUNDARY, spa)
    return spa
