"""The SNP commands on pages: rows of the firmware sheet's section 1.5 as ordered checks; [P S G] is `prefix`.

Above each command stands what the sheet says of it. Sources: firmware sheet 1.4, 1.5, 3.3, 9.4.
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
    length_row,
    low_rows,
    page,
    pages_other_than,
    prefix,
    reserved_row,
)  # fmt: skip
from tests.reference.firmware_snp_guests import of_guest
from tests.reference.firmware_world import (
    ABOVE,
    DEBUG,
    DST,
    GCTX,
    IMMUTABLE,
    IN_ASEG,
    IN_NOTHING,
    IN_RMP,
    IN_TSEG,
    LIST,
    MIB,
    OF_GUESTS,
    PAGE,
    POLICY,
    SRC,
    Page,
    Request,
    World,
    bad_address,
)  # fmt: skip

# PAGE_RECLAIM, 8: 0: bit0 size (1=2M), 11:1 MBZ, 63:12 page. bits 11:1->16; S; bad range->09/03; RMP.size !=
# bit0->19; 2M unaligned->09; Immutable already 0->00; state not Metadata/Firmware/Pre-Guest/Pre-Swap->1A (Context,
# HV-Fixed, IOMMU pages). Metadata,Firmware -> Reclaim; Pre-Guest -> Guest-Invalid; Pre-Swap -> Guest-Valid
RECLAIM_RESERVED = ((1, 11),)
RECLAIMED = {
    "METADATA": "RECLAIM", "FIRMWARE": "RECLAIM", "PRE_GUEST": "GUEST_INVALID", "PRE_SWAP": "GUEST_VALID"
}  # fmt: skip


def span(r: Request) -> int:
    return 2 * MIB if r.page_size else PAGE


def _reclaim() -> tuple[World, Request]:
    return World(pages={SRC: Page("PRE_GUEST", asid=3, gfn=0x200)}), Request({"page_size": 0, "page_paddr": SRC})


def _reclaimed(w: World, r: Request) -> None:
    entry = w.at(r.page_paddr)
    entry.state = RECLAIMED.get(entry.state, entry.state)


def _size_rows() -> list[Row]:
    """The entry's size and the size asked for, then the alignment of 2 MB."""
    return [
        Row("RMP size", 0x19, lambda w, r: w.at(r.page_paddr).large != r.page_size,
            [large("page_paddr"), ask(page_size=1),
             both(ask(page_size=1, page_paddr=SRC + PAGE), page("page_paddr", state="PRE_GUEST"))]),
        Row("2M unaligned", 0x09, lambda w, r: r.page_size and r.page_paddr % (2 * MIB) != 0,
            [both(large("page_paddr"), ask(page_size=1, page_paddr=SRC + at * PAGE)) for at in (1, 511)]),
    ]  # fmt: skip


PAGE_RECLAIM = Spec(
    0xC7, _reclaim,
    [
        reserved_row(RECLAIM_RESERVED),
        NOT_INIT,
        *address_rows("page_paddr", span),
        *_size_rows(),
        Row("Immutable already 0", 0x00, lambda w, r: w.at(r.page_paddr).state not in IMMUTABLE,
            [page("page_paddr", state=s) for s in ("HYPERVISOR", "RECLAIM", "GUEST_INVALID", "GUEST_VALID")]),
        Row("page not to be reclaimed", 0x1A, lambda w, r: w.at(r.page_paddr).state not in RECLAIMED,
            [page("page_paddr", state="CONTEXT"), page("page_paddr", state="HV_FIXED")]),
    ],
    _reclaimed, 8, RECLAIM_RESERVED,
    buffer={"page_size": (0, 1), "page_paddr": (0, 64)},
)  # fmt: skip

# DBG_DECRYPT, 18: 0:gctx 8:src 10:dst. [P S G]; src not Pre-Guest/Pre-Swap/Guest-Invalid/Guest-Valid or dst not
# Firmware->1A; RMP.ASID->1C; policy.DEBUG=0->07; inactive->08. 4 KB always; any GSTATE
DBG_BUFFER = {"gctx_paddr": (0, 64), "src_paddr": (8 * 8, 64), "dst_paddr": (0x10 * 8, 64)}
NO_DEBUG = Row(
    "policy without DEBUG", 0x07, lambda w, r: not w.guest(r.gctx_paddr).policy & DEBUG, [guest(policy=POLICY)]
)


def _dbg(src: str, dst: str) -> tuple[World, Request]:
    w, r = of_guest("RUNNING", 1, src_paddr=SRC, dst_paddr=DST)
    w.guests[GCTX].policy = POLICY | DEBUG
    for address, state in ((SRC, src), (DST, dst)):
        w.pages[address] = Page(state, asid=int(state in OF_GUESTS), gfn=0x200 * (state in OF_GUESTS))
    return w, r


def _owner_row(field: str) -> Row:
    return Row(
        f"{field}: another ASID", 0x1C, lambda w, r: w.at(getattr(r, field)).asid != w.guest(r.gctx_paddr).asid,
        [page(field, asid=2)],
    )  # fmt: skip


DBG_DECRYPT = Spec(
    0xB0, lambda: _dbg("GUEST_VALID", "FIRMWARE"),
    [
        *prefix((), ("src_paddr", "dst_paddr"), ("src_paddr", "dst_paddr")),
        Row("src of no guest, or dst not Firmware", 0x1A,
            lambda w, r: w.at(r.src_paddr).state not in OF_GUESTS or w.at(r.dst_paddr).state != "FIRMWARE",
            [*pages_other_than("src_paddr", *OF_GUESTS), *pages_other_than("dst_paddr", "FIRMWARE")]),
        _owner_row("src_paddr"), NO_DEBUG, INACTIVE,
    ],
    size=0x18, buffer=DBG_BUFFER,
)  # fmt: skip

# DBG_ENCRYPT: S then P; G; dst not Pre-Guest/Pre-Swap->1A; 1C; 07; 08. src state unchecked (may be Default)
DBG_ENCRYPT = Spec(
    0xB1, lambda: _dbg("HYPERVISOR", "PRE_GUEST"),
    [
        NOT_INIT, *low_rows("gctx_paddr", "src_paddr", "dst_paddr"),
        *address_rows("src_paddr", lookup=False), *address_rows("dst_paddr"), *address_rows("gctx_paddr"), NO_CONTEXT,
        Row("dst not Pre-Guest or Pre-Swap", 0x1A,
            lambda w, r: w.at(r.dst_paddr).state not in ("PRE_GUEST", "PRE_SWAP"),
            pages_other_than("dst_paddr", "PRE_GUEST", "PRE_SWAP")),
        _owner_row("dst_paddr"), NO_DEBUG, INACTIVE,
    ],
    size=0x18, buffer=DBG_BUFFER,
)  # fmt: skip

# PAGE_MD_INIT, 10: 0:gctx 8:page. [P S G]; page not Firmware->1A; GSTATE not LAUNCH/RUNNING->02 (ASID not needed).
# page (4K or 2M) zeroed; -> Metadata (RMP.GPA = gctx paddr)


def _md_init() -> tuple[World, Request]:
    w, r = of_guest("LAUNCH", 0, page_paddr=SRC)
    w.pages[SRC] = Page("FIRMWARE")
    return w, r


def _made_metadata(w: World, r: Request) -> None:
    entry = w.at(r.page_paddr)
    entry.state, entry.owner = "METADATA", GCTX


PAGE_MD_INIT = Spec(
    0xC3, _md_init,
    [
        *prefix((), ("page_paddr",), ("page_paddr",)),
        Row("page not Firmware", 0x1A, lambda w, r: w.at(r.page_paddr).state != "FIRMWARE",
            pages_other_than("page_paddr", "FIRMWARE")),
        gstate_row("LAUNCH", "RUNNING"),
    ],
    _made_metadata, 0x10, buffer={"gctx_paddr": (0, 64), "page_paddr": (8 * 8, 64)},
)  # fmt: skip

# PAGE_SET_STATE, 10: 0:len=10h 4:rsvd 8:list_paddr. len->04; P; S; list address->09, N>255 / list leaves its page /
# rsvd->16; base not 2M-aligned->16; any page not Firmware 4K->1A. -> HV-Fixed, only after all ranges pass. Read as:
# every failing list address is 09, also one in no DRAM (unconfirmed); the list is one page of the layout of 9.1.
SET_STATE_RESERVED = ((32, 63),)


def _set_state() -> tuple[World, Request]:
    w = World(pages={SRC: Page("FIRMWARE"), SRC + PAGE: Page("FIRMWARE")})
    return w, Request({"length": 0x10, "list_paddr": LIST}, {"count": 1, "base": SRC, "pages": 2, "list_reserved": 0})


def _not_all_firmware(w: World, r: Request) -> bool:
    entries = [w.at(r.base + number * PAGE) for number in range(r.pages)]
    return any(entry.state != "FIRMWARE" or entry.large for entry in entries)


def _fixed(w: World, r: Request) -> None:
    for number in range(r.pages):
        w.pages[r.base + number * PAGE] = Page("HV_FIXED")


PAGE_SET_STATE = Spec(
    0xC6, _set_state,
    [
        length_row(0x10, 0x04), reserved_row(SET_STATE_RESERVED), NOT_INIT,
        Row("list address", 0x09, lambda w, r: bad_address(w, r.list_paddr, lookup=False) != 0,
            [ask(list_paddr=at) for at in (IN_RMP, ABOVE, IN_TSEG, IN_ASEG)]),
        Row("list: count, page or reserved", 0x16,
            lambda w, r: r.count > 255 or r.list_reserved or r.list_paddr % PAGE + 8 + 16 * r.count > PAGE,
            [ask(count=256), ask(count=1 << 31), ask(list_reserved=1), ask(list_paddr=LIST + PAGE - 16)]),
        Row("base not 2M-aligned", 0x16, lambda w, r: r.base % (2 * MIB) != 0, [ask(base=SRC + PAGE, pages=1)]),
        Row("a page not Firmware of 4K", 0x1A, _not_all_firmware,
            [*pages_other_than(SRC, "FIRMWARE"), page(SRC + PAGE, state="HYPERVISOR"), large(SRC)]),
    ],
    _fixed, 0x10, SET_STATE_RESERVED, buffer={"length": (0, 32), "list_paddr": (8 * 8, 64)},
)  # fmt: skip

# PAGE_UNSMASH, 8: 0: paddr, 2M-aligned. P, not 2M->16; S; Default->1A, inside RMP->16, overlapping it->09; 512
# entries: 4K, Immutable=1, VMSA=0, ASID!=0, same state/ASID/VMPL masks, first GPA 2M-aligned and consecutive, else
# 1A. entry 0 becomes 2M, stays Immutable; entries 1..511: Assigned=1 ASID=0 Immutable=0


def _unsmash() -> tuple[World, Request]:
    pages = {SRC + number * PAGE: Page("PRE_GUEST", asid=1, gfn=0x200 + number) for number in range(512)}
    return World(pages=pages), Request({"page_paddr": SRC})


def _not_uniform(w: World, r: Request) -> bool:
    entries = [w.at(r.page_paddr + number * PAGE) for number in range(512)]
    first = entries[0]
    alike = all(
        (e.state, e.asid, e.vmpl, e.gfn) == (first.state, first.asid, first.vmpl, first.gfn + number)
        and not e.large and not e.vmsa
        for number, e in enumerate(entries)
    )  # fmt: skip
    return not alike or first.state not in ("PRE_GUEST", "PRE_SWAP") or first.gfn % 512 != 0


def _unsmashed(w: World, r: Request) -> None:
    w.at(r.page_paddr).large = True
    for number in range(1, 512):
        w.pages[r.page_paddr + number * PAGE] = Page("RECLAIM")


def _shifted(w: World, r: Request) -> None:
    for number in range(512):
        w.pages[SRC + number * PAGE].gfn += 1


PAGE_UNSMASH = Spec(
    0xC8, _unsmash,
    [
        Row("not 2M-aligned", 0x16, lambda w, r: r.page_paddr % (2 * MIB) != 0,
            [ask(page_paddr=SRC + 1), ask(page_paddr=SRC + PAGE), ask(page_paddr=SRC + MIB)]),
        NOT_INIT,
        Row("overlaps the RMP", 0x09, lambda w, r: bad_address(w, r.page_paddr, 2 * MIB, lookup=False) == 0x09,
            [ask(page_paddr=46 * MIB), ask(page_paddr=IN_TSEG), ask(page_paddr=0)], group="address"),
        Row("in no DRAM", 0x03, lambda w, r: bad_address(w, r.page_paddr, 2 * MIB, lookup=False) == 0x03,
            [ask(page_paddr=IN_NOTHING)], group="address"),
        Row("not 512 alike", 0x1A, _not_uniform,
            [*pages_other_than(SRC, "PRE_GUEST"), *pages_other_than(SRC + 511 * PAGE, "PRE_GUEST"),
             page(SRC + PAGE, asid=2), page(SRC + 2 * PAGE, vmsa=True), page(SRC + 3 * PAGE, gfn=7),
             page(SRC + 4 * PAGE, vmpl=(1, 0, 0)), Change("GPA unaligned", _shifted)]),
    ],
    _unsmashed, 8, buffer={"page_paddr": (0, 64)},
)  # fmt: skip

SPECS = {
    "SNP_PAGE_RECLAIM": PAGE_RECLAIM, "SNP_DBG_DECRYPT": DBG_DECRYPT, "SNP_DBG_ENCRYPT": DBG_ENCRYPT,
    "SNP_PAGE_MD_INIT": PAGE_MD_INIT, "SNP_PAGE_SET_STATE": PAGE_SET_STATE, "SNP_PAGE_UNSMASH": PAGE_UNSMASH,
}  # fmt: skip
