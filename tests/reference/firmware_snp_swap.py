"""SNP page swap and move: rows of the firmware sheet's section 1.5 as ordered checks.

Above each command stands what the sheet says of it. Sources: firmware sheet 1.4, 1.5, 9.4.
"""

from __future__ import annotations

from tests.reference.firmware_rows import (
    INACTIVE,
    NO_CONTEXT,
    NOT_INIT,
    Change,
    Row,
    Spec,
    address_rows,
    ask,
    both,
    gstate_row,
    guest,
    large,
    low_rows,
    page,
    pages_other_than,
    part,
    reserved_row,
)  # fmt: skip
from tests.reference.firmware_snp_guests import of_guest
from tests.reference.firmware_snp_pages import span
from tests.reference.firmware_world import AGENT, DST, GCTX, MDATA, SRC, Mdata, Page, Request, World

# SWAP_OUT, 30: 0:gctx 8:src 10:dst 18:mdata 20:software_data 28:bit0 PAGE_SIZE bits2:1 TYPE(0 data,1 metadata,2 VMSA)
# bit4 ROOT_MDATA_EN. [P S G]; unless ROOT: mdata unaligned 64 or overlapping->16, page not Metadata->1A, owner->1C;
# src size (and dst if not Default)->19; GSTATE not LAUNCH/RUNNING->02; inactive->08; data/VMSA: src Pre-Swap or
# Pre-Guest, dst Firmware/Default else 1A, ASID 1C; metadata: src Metadata, owner 1C; type 3->1A; IV = 2^64-2 ->1D.
# data src -> Pre-Guest, metadata src -> Firmware; dst state kept. Unconfirmed: a metadata page's dst is tested as a
# data page's.
SWAP_OUT_RESERVED = ((0x28 * 8 + 3, 0x28 * 8 + 3), (0x28 * 8 + 5, 0x30 * 8 - 1))
SWAP_BUFFER = {
    "gctx_paddr": (0, 64), "src_paddr": (8 * 8, 64), "dst_paddr": (0x10 * 8, 64), "mdata_paddr": (0x18 * 8, 64),
    "page_size": (0x28 * 8, 1), "page_type": (0x28 * 8 + 1, 2), "root_mdata_en": (0x28 * 8 + 4, 1),
}  # fmt: skip
DATA, META, VMSA_PAGE = 0, 1, 2
ADMITTED = gstate_row("LAUNCH", "RUNNING")


def _swap(src: Page, dst: Page, **fields: object) -> tuple[World, Request]:
    w, r = of_guest(
        "RUNNING", 1, src_paddr=SRC, dst_paddr=DST, mdata_paddr=MDATA, page_size=0, page_type=DATA, root_mdata_en=0,
        **fields,
    )  # fmt: skip
    w.pages |= {SRC: src, DST: dst, MDATA: Page("METADATA", owner=GCTX)}
    return w, r


def _is_meta(r: Request) -> bool:
    return bool(r.page_type == META)


def _as_meta(*changes: Change) -> Change:
    """Swapping out a metadata page."""
    return both(ask(page_type=META), page("src_paddr", state="METADATA", owner=GCTX), *changes)


def _mdata_rows() -> list[Row]:
    def pages(w: World, r: Request) -> tuple[range, ...]:
        return tuple(range(at, at + span(r)) for at in (r.src_paddr, r.dst_paddr))

    def misplaced(w: World, r: Request) -> bool:
        if r.root_mdata_en:
            return False
        return r.mdata_paddr % 64 != 0 or any(r.mdata_paddr in covered for covered in pages(w, r))

    return [
        Row("mdata unaligned or overlapping", 0x16, misplaced,
            [ask(mdata_paddr=MDATA + 32), ask(mdata_paddr=MDATA + 1), ask(mdata_paddr=SRC), ask(mdata_paddr=DST + 64)]),
        Row("mdata page not Metadata", 0x1A,
            lambda w, r: not r.root_mdata_en and w.at(r.mdata_paddr).state != "METADATA",
            pages_other_than("mdata_paddr", "METADATA")),
        Row("mdata of another guest", 0x1C, lambda w, r: not r.root_mdata_en and w.at(r.mdata_paddr).owner != GCTX,
            [page("mdata_paddr", owner=AGENT)]),
    ]  # fmt: skip


def _sizes_differ(w: World, r: Request) -> bool:
    src, dst = w.at(r.src_paddr), w.at(r.dst_paddr)
    return src.large != r.page_size or (dst.state != "DEFAULT" and dst.large != r.page_size)


SIZES = Row("src or dst size", 0x19, _sizes_differ, [large("src_paddr"), large("dst_paddr"), ask(page_size=1)])
MDATA_ADDRESS = list(address_rows("mdata_paddr", 64, when=lambda w, r: not r.root_mdata_en))
SWAP_PREFIX = [*low_rows("gctx_paddr", "src_paddr", "dst_paddr"), NOT_INIT]
SWAP_LOOKUPS = [
    *address_rows("src_paddr", span), *address_rows("dst_paddr", span), *MDATA_ADDRESS, *address_rows("gctx_paddr"),
    NO_CONTEXT,
]  # fmt: skip


def _swapped_out(w: World, r: Request) -> None:
    w.guest(r.gctx_paddr).iv_count += 1
    src = w.at(r.src_paddr)
    if _is_meta(r):
        w.pages[r.src_paddr] = Page("FIRMWARE", large=src.large)
    else:
        src.state = "PRE_GUEST"


PAGE_SWAP_OUT = Spec(
    0xC0, lambda: _swap(Page("PRE_SWAP", asid=1, gfn=0x200), Page("FIRMWARE"), software_data=0),
    [
        reserved_row(SWAP_OUT_RESERVED), *SWAP_PREFIX, *SWAP_LOOKUPS, *_mdata_rows(), SIZES, ADMITTED, INACTIVE,
        Row("src or dst state", 0x1A,
            lambda w, r: r.page_type in (DATA, VMSA_PAGE) and (
                w.at(r.src_paddr).state not in ("PRE_SWAP", "PRE_GUEST")
                or w.at(r.dst_paddr).state not in ("FIRMWARE", "DEFAULT")),
            [*pages_other_than("src_paddr", "PRE_SWAP", "PRE_GUEST"), *pages_other_than("dst_paddr", "FIRMWARE"),
             both(ask(page_type=VMSA_PAGE), page("src_paddr", state="GUEST_VALID"))]),
        Row("src: another ASID", 0x1C,
            lambda w, r: r.page_type in (DATA, VMSA_PAGE) and w.at(r.src_paddr).asid != w.guest(r.gctx_paddr).asid,
            [page("src_paddr", asid=2), both(ask(page_type=VMSA_PAGE), page("src_paddr", asid=2))]),
        Row("metadata: states", 0x1A,
            lambda w, r: _is_meta(r) and (
                w.at(r.src_paddr).state != "METADATA" or w.at(r.dst_paddr).state not in ("FIRMWARE", "DEFAULT")),
            [ask(page_type=META), _as_meta(page("dst_paddr", state="HYPERVISOR"))]),
        Row("metadata: owner", 0x1C, lambda w, r: _is_meta(r) and w.at(r.src_paddr).owner != GCTX,
            [_as_meta(page("src_paddr", owner=AGENT))]),
        Row("type 3", 0x1A, lambda w, r: r.page_type == 3, [ask(page_type=3)]),
        Row("IVs used up", 0x1D, lambda w, r: w.guest(r.gctx_paddr).iv_count == 2**64 - 2, [guest(iv_count=2**64 - 2)]),
    ],
    _swapped_out, 0x30, SWAP_OUT_RESERVED,
    buffer={**SWAP_BUFFER, "software_data": (0x20 * 8, 64)},
)  # fmt: skip

# SWAP_IN, 30: same; 20:rsvd; 28: + bit3 SWAP_IN_PLACE. same front; MDATA type inconsistent or != PAGE_TYPE or
# VALID=0->1B; any of 3 sizes differ->19; data: dst Pre-Guest (in place: src=dst else 09) 1A, ASID 1C; metadata:
# in-place->16, dst Firmware 1A; VMSA: in-place->16, 4K only 19, Pre-Guest 1A; tag mismatch->0B. PAGE_VALIDATED=1 ->
# Pre-Swap else stays Pre-Guest; metadata dst -> Metadata. src state is tested only in place. On 0B dst, RMP and VALID
# unchanged. Read as (unconfirmed): the front is all of SWAP_OUT's up to 08 but for the sizes; VMSA's ASID as data's.
SWAP_IN_RESERVED = ((0x20 * 8, 0x28 * 8 - 1), (0x28 * 8 + 5, 0x30 * 8 - 1))


def _entry(w: World, r: Request) -> Mdata:
    found = w.guest(r.gctx_paddr).root if r.root_mdata_en else r.mdata
    assert isinstance(found, Mdata)
    return found


def _swap_in() -> tuple[World, Request]:
    w, r = _swap(Page("HYPERVISOR"), Page("PRE_GUEST", asid=1, gfn=0x200), in_place=0)
    r.memory["mdata"] = Mdata(validated=True)
    return w, r


def _bad_entry(w: World, r: Request) -> bool:
    m = _entry(w, r)
    kind = META if m.metadata else VMSA_PAGE if m.vmsa else DATA
    return not m.valid or (m.metadata and m.vmsa) or kind != r.page_type


def _three_sizes(w: World, r: Request) -> bool:
    src = w.at(r.src_paddr)
    sizes = {bool(r.page_size), _entry(w, r).large, w.at(r.dst_paddr).large}
    return len(sizes | ({src.large} if src.state not in ("HYPERVISOR", "DEFAULT") else set())) > 1


def _meta_in(*changes: Change) -> Change:
    return both(ask(page_type=META), part("mdata", metadata=True, validated=False), page("dst_paddr", state="FIRMWARE"),
                *changes)  # fmt: skip


def _vmsa_in(*changes: Change) -> Change:
    return both(ask(page_type=VMSA_PAGE), part("mdata", vmsa=True), *changes)


def _in_place(*changes: Change) -> Change:
    return both(ask(in_place=1, src_paddr=DST), *changes)


def _swapped_in(w: World, r: Request) -> None:
    dst = w.at(r.dst_paddr)
    if _is_meta(r):
        dst.state, dst.owner = "METADATA", GCTX
    else:
        dst.state, dst.vmsa = "PRE_SWAP" if _entry(w, r).validated else "PRE_GUEST", _entry(w, r).vmsa


PAGE_SWAP_IN = Spec(
    0xC1, _swap_in,
    [
        reserved_row(SWAP_IN_RESERVED), *SWAP_PREFIX, *SWAP_LOOKUPS, *_mdata_rows(), ADMITTED, INACTIVE,
        Row("mdata entry", 0x1B, _bad_entry,
            [part("mdata", valid=False), part("mdata", vmsa=True), part("mdata", metadata=True), ask(page_type=META),
             ask(page_type=VMSA_PAGE), ask(page_type=3)]),
        Row("sizes", 0x19, _three_sizes, [part("mdata", large=True), ask(page_size=1), large("dst_paddr")]),
        Row("in place: src is not dst", 0x09,
            lambda w, r: r.page_type == DATA and r.in_place and r.src_paddr != r.dst_paddr,
            [ask(in_place=1)]),
        Row("dst not Pre-Guest", 0x1A, lambda w, r: r.page_type == DATA and w.at(r.dst_paddr).state != "PRE_GUEST",
            pages_other_than("dst_paddr", "PRE_GUEST")),
        Row("metadata or VMSA in place", 0x16, lambda w, r: r.page_type != DATA and r.in_place,
            [_meta_in(ask(in_place=1)), _vmsa_in(ask(in_place=1)), _vmsa_in(_in_place())]),
        Row("metadata: dst not Firmware", 0x1A, lambda w, r: _is_meta(r) and w.at(r.dst_paddr).state != "FIRMWARE",
            [_meta_in(change) for change in pages_other_than("dst_paddr", "FIRMWARE")]),
        Row("VMSA of 2 MB", 0x19, lambda w, r: r.page_type == VMSA_PAGE and r.page_size,
            [_vmsa_in(large("dst_paddr"), ask(page_size=1), part("mdata", large=True))]),
        Row("VMSA: dst not Pre-Guest", 0x1A,
            lambda w, r: r.page_type == VMSA_PAGE and w.at(r.dst_paddr).state != "PRE_GUEST",
            [_vmsa_in(change) for change in pages_other_than("dst_paddr", "PRE_GUEST")]),
        Row("dst: another ASID", 0x1C,
            lambda w, r: not _is_meta(r) and w.at(r.dst_paddr).asid != w.guest(r.gctx_paddr).asid,
            [page("dst_paddr", asid=2)]),
        Row("tag", 0x0B, lambda w, r: not _entry(w, r).tag, [part("mdata", tag=False)]),
    ],
    _swapped_in, 0x30, SWAP_IN_RESERVED,
    buffer={**SWAP_BUFFER, "in_place": (0x28 * 8 + 3, 1)},
)  # fmt: skip

# PAGE_MOVE, 20: 0:gctx 8:bit0 PAGE_SIZE 10:src 18:dst. [P S G]; sizes->19; GSTATE->02; 08; (src Pre-Swap/Pre-Guest,
# dst Pre-Guest) else (src Metadata, dst Firmware) else 1A; owner->1C. dst: Guest-Valid if src was Pre-Swap else
# Guest-Invalid, inherits GPA/VMSA/VMPL; src -> Guest-Invalid, not wiped. Metadata: dst Metadata, src Firmware. 1.2:
# range crossing a 64 MB boundary -> 16.
MOVE_RESERVED = ((8 * 8 + 1, 0x10 * 8 - 1),)


def _move() -> tuple[World, Request]:
    w, r = of_guest("RUNNING", 1, page_size=0, src_paddr=SRC, dst_paddr=DST)
    w.pages |= {SRC: Page("PRE_SWAP", asid=1, gfn=0x200), DST: Page("PRE_GUEST", asid=1, gfn=0x300)}
    return w, r


def _moves_data(w: World, r: Request) -> bool:
    return w.at(r.src_paddr).state in ("PRE_SWAP", "PRE_GUEST") and w.at(r.dst_paddr).state == "PRE_GUEST"


def _moves_metadata(w: World, r: Request) -> bool:
    return w.at(r.src_paddr).state == "METADATA" and w.at(r.dst_paddr).state == "FIRMWARE"


def _foreign(w: World, r: Request) -> bool:
    src, dst, asid = w.at(r.src_paddr), w.at(r.dst_paddr), w.guest(r.gctx_paddr).asid
    return src.owner != GCTX if _moves_metadata(w, r) else src.asid != asid or dst.asid != asid


def _moved(w: World, r: Request) -> None:
    src, dst = w.at(r.src_paddr), w.at(r.dst_paddr)
    if _moves_metadata(w, r):
        w.pages[r.dst_paddr], w.pages[r.src_paddr] = src, Page("FIRMWARE", large=dst.large)
        return
    dst.state = "GUEST_VALID" if src.state == "PRE_SWAP" else "GUEST_INVALID"
    dst.gfn, dst.vmsa, dst.vmpl, src.state = src.gfn, src.vmsa, src.vmpl, "GUEST_INVALID"


PAGE_MOVE = Spec(
    0xC2, _move,
    [
        reserved_row(MOVE_RESERVED), *SWAP_PREFIX,
        *address_rows("src_paddr", span), *address_rows("dst_paddr", span), *address_rows("gctx_paddr"), NO_CONTEXT,
        SIZES, ADMITTED, INACTIVE,
        Row("states", 0x1A, lambda w, r: not _moves_data(w, r) and not _moves_metadata(w, r),
            [*pages_other_than("src_paddr", "PRE_SWAP", "PRE_GUEST"), *pages_other_than("dst_paddr", "PRE_GUEST")]),
        Row("owner", 0x1C, _foreign, [page("src_paddr", asid=2), page("dst_paddr", asid=2), both(
            page("src_paddr", state="METADATA", owner=AGENT), page("dst_paddr", state="FIRMWARE"))]),
    ],
    _moved, 0x20, MOVE_RESERVED,
    buffer={"gctx_paddr": (0, 64), "page_size": (8 * 8, 1), "src_paddr": (0x10 * 8, 64), "dst_paddr": (0x18 * 8, 64)},
)  # fmt: skip

SPECS = {
    "SNP_PAGE_SWAP_OUT": PAGE_SWAP_OUT, "SNP_PAGE_SWAP_IN": PAGE_SWAP_IN, "SNP_PAGE_MOVE": PAGE_MOVE,
}  # fmt: skip
