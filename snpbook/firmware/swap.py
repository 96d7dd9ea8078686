"""Page swap: SNP_PAGE_MD_INIT, SNP_PAGE_SWAP_OUT, SNP_PAGE_SWAP_IN: guest pages sealed for the host's own storage.

What a sealed page was is kept in an entry of a Metadata page, or of the guest context for the last one; an entry
serves once, so that no older content comes back. Source: SNP ABI (page swap); order of checks of firmware 1.55.25.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.pages import (
    Entry,
    check_address,
    entry_of,
    make_metadata,
    release_metadata,
    require_state,
    set_guest_page,
    without_c_bit,
)
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.dram import Bytes
from snpbook.spec import rmp as spec
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.messages import TAG_SIZE
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PageSize, PageState
from snpbook.spec.policy import guest_policy
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.spec.swap import LAST_IV, MDATA_ENTRY, METADATA_GFN, SwapType, swap_iv

_PLAIN = (PageState.FIRMWARE, PageState.DEFAULT)
_HELD = (PageState.PRE_SWAP, PageState.PRE_GUEST)


def snp_page_md_init(psp: SecureProcessor, buffer: Record) -> None:
    """Make a firmware page one of a guest's Metadata pages, empty.

    Any address in a 2 MB page means all of it (inferred).
    """
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr, page_paddr=buffer.page_paddr)
    psp.require_initialised()
    spa = check_address(psp, buffer.page_paddr, PAGE_SIZE, "page_paddr")
    context = psp.context(buffer.gctx_paddr)
    require_state(psp, spa, "page_paddr", PageState.FIRMWARE)
    psp.next_state(context, Command.SNP_PAGE_MD_INIT)

    # ACTION
    page = entry_of(psp, spa)
    pages = pages_of(page.head, page.size)
    psp.machine.memory.write_pages(KeyId.UNENCRYPTED, pages, np.zeros((len(pages), PAGE_SIZE), np.uint8))
    make_metadata(psp, page, without_c_bit(psp, buffer.gctx_paddr))


def snp_page_swap_out(psp: SecureProcessor, buffer: Record) -> None:
    """Seal a guest's page or Metadata page into a page of the host's; the guest's address of it becomes free."""
    # CHECKS
    gctx, src, dst, mdata, context = _front(psp, buffer)
    check_sizes(buffer.page_size, src, dst)
    check_active(psp, context, Command.SNP_PAGE_SWAP_OUT)
    match buffer.page_type:
        case SwapType.DATA | SwapType.VMSA:
            _require_states(src, _HELD, dst, _PLAIN)
            _require_asid(src, context.asid)
        case SwapType.METADATA:
            _require_states(src, (PageState.METADATA,), dst, _PLAIN)
            require(src.belongs_to(gctx), Status.INVALID_PAGE_OWNER, "the Metadata page is the guest's")
        case unknown:
            raise FirmwareRefusal(Status.INVALID_PAGE_STATE, "type of the page", "0..2", unknown)
    count = context.oek_iv_count
    require(count < LAST_IV, Status.AEAD_OFLOW, "numbers of the offline key are left", f"below {LAST_IV}", count)

    # ACTION
    memory, metadata = psp.machine.memory, buffer.page_type is SwapType.METADATA
    key_id = KeyId.UNENCRYPTED if metadata else context.asid
    plain = memory.read_pages(key_id, pages_of(src.spa, buffer.page_size))
    sealed = AESGCM(context.oek).encrypt(swap_iv(count), plain.tobytes(), None)
    memory.write_pages(KeyId.UNENCRYPTED, pages_of(dst.spa, buffer.page_size), _rows(sealed[:-TAG_SIZE]))
    entry = MDATA_ENTRY.record(
        software_data=buffer.software_data,
        iv=count,
        auth_tag=sealed[-TAG_SIZE:],
        valid=1,
        page_validated=int(src.state is PageState.PRE_SWAP),
        vmsa=int(buffer.page_type is SwapType.VMSA),
        metadata=int(metadata),
        page_size=buffer.page_size,
        gfn=METADATA_GFN if metadata else src.gfn,
        vmpl_permissions=0 if metadata else src.high,
    )

    # STATE
    context = context.replace(oek_iv_count=count + 1)
    _save_entry(psp, gctx, context, mdata, entry)
    if metadata:
        release_metadata(psp, src)
    else:
        set_guest_page(psp, src, replace(src, low=src.low & ~spec.VALIDATED), immutable=True)


def snp_page_swap_in(psp: SecureProcessor, buffer: Record) -> None:
    """Open a sealed page into a page that the guest has been given, or a sealed Metadata page into a firmware page."""
    # CHECKS
    gctx, src, dst, mdata, context = _front(psp, buffer)
    check_active(psp, context, Command.SNP_PAGE_SWAP_IN)
    entry = _load_entry(psp, context, mdata)
    kind = SwapType.METADATA if entry.metadata else SwapType.VMSA if entry.vmsa else SwapType.DATA
    consistent = entry.valid and not (entry.metadata and entry.vmsa) and kind == buffer.page_type
    require(bool(consistent), Status.INVALID_MDATA_ENTRY, "a valid entry of such a page", buffer.page_type, entry)
    sizes = {buffer.page_size, entry.page_size, dst.size}
    require(len(sizes) == 1, Status.INVALID_PAGE_SIZE, "sizes of command, entry and dst_paddr", "one size", sizes)
    require_aligned(buffer.page_size, src, dst)
    in_place = bool(buffer.swap_in_place)
    match buffer.page_type:
        case SwapType.DATA:
            same = src.spa == dst.spa
            require(same or not in_place, Status.INVALID_ADDRESS, "in place: one page", dst.spa, src.spa)
            _require_state(dst, PageState.PRE_GUEST)
            _require_asid(dst, context.asid)
        case SwapType.METADATA:
            require(not in_place, Status.INVALID_PARAM, "a Metadata page comes from another page", 0, 1)
            _require_state(dst, PageState.FIRMWARE)
        case SwapType.VMSA:
            require(not in_place, Status.INVALID_PARAM, "a VMSA comes from another page", 0, 1)
            small = buffer.page_size is PageSize.SIZE_4K
            require(small, Status.INVALID_PAGE_SIZE, "a VMSA is a page of 4 KB", "4K", "2M")
            _require_state(dst, PageState.PRE_GUEST)
            _require_asid(dst, context.asid)
    memory = psp.machine.memory
    sealed = memory.read_pages(KeyId.UNENCRYPTED, pages_of(src.spa, buffer.page_size)).tobytes()
    plain = _open(context.oek, entry, sealed)

    # ACTION
    key_id = KeyId.UNENCRYPTED if kind is SwapType.METADATA else context.asid
    memory.write_pages(key_id, pages_of(dst.spa, buffer.page_size), _rows(plain))

    # STATE
    _save_entry(psp, gctx, context, mdata, entry.replace(valid=0))
    if kind is SwapType.METADATA:
        make_metadata(psp, dst, gctx)
    else:
        low = entry.gfn << spec.GFN_SHIFT & spec.GFN | spec.VMSA * entry.vmsa | spec.VALIDATED * entry.page_validated
        set_guest_page(psp, dst, replace(dst, low=low, high=entry.vmpl_permissions), immutable=True)


def _front(psp: SecureProcessor, buffer: Record) -> tuple[int, Entry, Entry, int | None, Record]:
    """What both swap commands check first: the context's address, both pages, the entry's address, the context.

    The entry's address is None for the root entry, which is in the context itself.
    """
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr, src_paddr=buffer.src_paddr, dst_paddr=buffer.dst_paddr)
    psp.require_initialised()
    size = span(buffer.page_size)
    src = check_address(psp, buffer.src_paddr, size, "src_paddr")
    dst = check_address(psp, buffer.dst_paddr, size, "dst_paddr")
    mdata = None
    if not buffer.root_mdata_en:
        mdata = check_address(psp, buffer.mdata_paddr, MDATA_ENTRY.size, "mdata_paddr")
    context, gctx = psp.context(buffer.gctx_paddr), without_c_bit(psp, buffer.gctx_paddr)
    if mdata is not None:
        apart = mdata % MDATA_ENTRY.size == 0 and not any(page <= mdata < page + size for page in (src, dst))
        require(apart, Status.INVALID_PARAM, "mdata_paddr is aligned to 64 bytes and in neither page", 0, mdata)
        require_state(psp, mdata, "mdata_paddr", PageState.METADATA)
        owned = entry_of(psp, mdata).belongs_to(gctx)
        require(owned, Status.INVALID_PAGE_OWNER, "the Metadata page is the guest's", hex(gctx), hex(mdata))
    return gctx, entry_of(psp, src), entry_of(psp, dst), mdata, context


def span(size: PageSize) -> int:
    """Bytes of a page."""
    return LARGE_PAGE_SIZE if size is PageSize.SIZE_2M else PAGE_SIZE


def pages_of(spa: int, size: PageSize) -> range:
    """The 4 KB pages of a page."""
    return range(spa >> PAGE_SHIFT, spa + span(size) >> PAGE_SHIFT)


def check_sizes(size: PageSize, src: Entry, dst: Entry) -> None:
    """INVALID_PAGE_SIZE unless both entries have the size asked for; beyond the RMP there is none."""
    require(src.size is size, Status.INVALID_PAGE_SIZE, "RMP page size of src_paddr", size, src.size)
    fits = dst.size is size or dst.state is PageState.DEFAULT
    require(fits, Status.INVALID_PAGE_SIZE, "RMP page size of dst_paddr", size, dst.size)
    require_aligned(size, src, dst)


def require_aligned(size: PageSize, *pages: Entry) -> None:
    """A 2 MB page is one from its first byte on (inferred: as at SNP_LAUNCH_UPDATE)."""
    for page in pages:
        offset = page.spa % span(size)
        require(offset == 0, Status.INVALID_ADDRESS, "a 2 MB page is aligned", 0, offset)


def check_active(psp: SecureProcessor, context: Record, command: Command) -> None:
    """The guest's state, its ASID, and from ABI 1.58 on its policy, whose place in the order is not published."""
    psp.next_state(context, command)
    require(context.asid != 0, Status.INACTIVE, "the guest has an ASID", "an ASID", 0)
    policy = guest_policy(context.policy)
    require(not policy.page_swap_disable, Status.POLICY_FAILURE, "the guest's pages may be swapped and moved", 0, 1)


def _require_state(page: Entry, *allowed: PageState) -> None:
    wanted = " or ".join(state.name for state in allowed)
    require(page.state in allowed, Status.INVALID_PAGE_STATE, "page state", wanted, page.state.name)


def _require_states(src: Entry, held: tuple[PageState, ...], dst: Entry, free: tuple[PageState, ...]) -> None:
    _require_state(src, *held)
    _require_state(dst, *free)


def _require_asid(page: Entry, asid: int) -> None:
    require(page.asid == asid, Status.INVALID_PAGE_OWNER, "page owner", asid, page.asid)


def _rows(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)


def _open(key: bytes, entry: Record, sealed: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(swap_iv(entry.iv), sealed + entry.auth_tag, None)
    except InvalidTag:
        raise FirmwareRefusal(Status.BAD_MEASUREMENT, "tag of the page", "valid", "invalid") from None


def _load_entry(psp: SecureProcessor, context: Record, mdata: int | None) -> Record:
    if mdata is None:
        root: Record = context.root_md_entry
        return root
    return MDATA_ENTRY.unpack(psp.machine.memory.read(KeyId.UNENCRYPTED, mdata, MDATA_ENTRY.size))


def _save_entry(psp: SecureProcessor, gctx: int, context: Record, mdata: int | None, entry: Record) -> None:
    """Keep the entry, and the context with it."""
    if mdata is None:
        context = context.replace(root_md_entry=entry)
    else:
        psp.machine.memory.write(KeyId.UNENCRYPTED, mdata, bytes(entry))
    psp.save_context(gctx, context)
