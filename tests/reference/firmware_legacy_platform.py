"""The legacy commands on platform and keys: rows of the firmware sheet's section 1.3 as ordered checks.

Above each command stands what the sheet says of it; U, I, W are the platform states. The valid cases have SNP
initialised, so that the rules on pages show (1.2, rules 3 and 4). Commands on guests are in `firmware_legacy_guests`.
Sources: firmware sheet 1.2, 1.3, 3.1, 9.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.reference.firmware_rows import Holds, Row, Spec, ask, core, fault, length_row, page, pages_other_than, world
from tests.reference.firmware_snp_guests import release_asid
from tests.reference.firmware_snp_platform import flush, two_complexes
from tests.reference.firmware_world import (
    ABOVE,
    ASID_LIMIT,
    BUFFER,
    DST,
    IN_NOTHING,
    IN_RMP,
    IN_TSEG,
    MIB,
    MIN_SEV_ASID,
    OUT,
    PAGE,
    SRC,
    Page,
    Request,
    World,
    bad_address,
)  # fmt: skip

CERT, CHAIN = 2084, 3 * 2084
OUTPUT = ("FIRMWARE", "DEFAULT")


def platform_row(*states: str) -> Row:
    """The platform is in none of the states."""
    others = [s for s in ("UNINIT", "INIT", "WORKING") if s not in states]
    return Row(
        f"platform not {' or '.join(states)}", 0x01, lambda w, r: w.legacy not in states,
        [world(legacy=state) for state in others],
    )  # fmt: skip


# 1.2, rule 3. While SNP is INIT, a command that writes its command buffer needs every page it spans in Firmware or
# Default state, else 5A (quirk: 1A + 64); afterwards the page goes to Reclaim, also after a failed command (not after
# a refusal by this test). That the test comes before all of the command's own checks is inferred.
BUFFER_PAGE = Row(
    "buffer page not Firmware", 0x5A, lambda w, r: w.snp == "INIT" and w.at(BUFFER).state not in OUTPUT,
    pages_other_than(BUFFER, "FIRMWARE"),
)  # fmt: skip


def writes_its_buffer(rows: list[Row]) -> list[Row]:
    """Rule 3 in front of a command's checks."""
    return [BUFFER_PAGE, *(replace(row, left=buffer_reclaimed) for row in rows)]


# Quirk: after a plain SNP_SHUTDOWN the test is skipped but the clearing still happens, whatever the page state.
CLEARED = {
    "HV_FIXED": "HYPERVISOR", "FIRMWARE": "RECLAIM", "CONTEXT": "RECLAIM", "METADATA": "RECLAIM",
    "PRE_GUEST": "GUEST_INVALID", "PRE_SWAP": "GUEST_VALID",
}  # fmt: skip


def buffer_reclaimed(w: World, r: Request) -> None:
    if w.snp == "INIT" or w.rmp_initialised:
        before = w.at(BUFFER)
        w.pages[BUFFER] = replace(before, state=CLEARED.get(before.state, before.state), owner=0)


def address_status(w: World, address: int, size: int, written: bool = True) -> int:
    """Rule 5 for data that legacy commands touch: of what they write page states are looked up while SNP is INIT."""
    return bad_address(w, address, size, lookup=written and w.snp == "INIT")


def data_rows(
    name: str, size: int | Callable[[Request], int], *, written: bool, when: Holds = lambda w, r: True
) -> Iterator[Row]:
    """The address of data, and rule 4 where it is written: Firmware or Default, else 1A. They keep their state."""

    def length(r: Request) -> int:
        return max(1, size if isinstance(size, int) else size(r))

    in_rmp = [(0x16, "in the RMP", [IN_RMP])] if written else []
    forbidden = [ABOVE, IN_TSEG, *[IN_RMP] * (not written)]
    for status, what, places in (*in_rmp, (0x09, "forbidden", forbidden), (0x03, "in no DRAM", [IN_NOTHING])):

        def bad(w: World, r: Request, status: int = status) -> bool:
            return when(w, r) and address_status(w, getattr(r, name), length(r), written) == status

        yield Row(f"{name} {what}", status, bad, [ask(**{name: place}) for place in places], group=name)
    if written:
        yield output_row(name, when)


def output_row(name: str, when: Holds = lambda w, r: True) -> Row:
    """Rule 4 for one page."""
    return Row(
        f"{name}: page not Firmware", 0x1A,
        lambda w, r: when(w, r) and w.snp == "INIT" and w.at(getattr(r, name)).state not in OUTPUT,
        pages_other_than(name, "FIRMWARE"),
    )  # fmt: skip


def legacy_world(legacy: str = "INIT", *outputs: int) -> World:
    """SNP initialised, the legacy platform in a state, and pages for output."""
    return World(legacy=legacy, pages={at: Page("FIRMWARE") for at in (BUFFER, *outputs)})


# INIT 01: 0:u16 flags(bit0 ES) 2:rsvd6 8:tmr_paddr 10:u32 tmr_len. U -> I. In order 01, 15, 13 (no SME/UMC
# encryption), 03 bad buffer, 01 if SNPEn set but RMP not initialised, 1A, 09/04 TMR align/size. All ASIDs dirty
# unless SNP is INIT. 9.2: TMR 1 MB size/alignment; 2 MB once the RMP is initialised; alignment else 09, then exact
# size else 04, then 09/03 if not plain DRAM. Read as (unconfirmed): 1A of the TMR's pages only where there is DRAM;
# reserved bytes are unchecked.


def _tmr_size(w: World) -> int:
    return 2 * MIB if w.rmp_initialised else MIB


def _es(r: Request) -> bool:
    return bool(r.flags & 1)


def _tmr_rows() -> list[Row]:
    def span(r: Request) -> range:
        return range(r.tmr_paddr, r.tmr_paddr + max(r.tmr_len, 1), PAGE)

    return [
        Row("TMR pages", 0x1A,
            lambda w, r: _es(r) and w.snp == "INIT" and address_status(w, r.tmr_paddr, max(r.tmr_len, 1)) == 0
            and any(w.at(at).state not in OUTPUT for at in span(r)),
            [page("tmr_paddr", state="PRE_GUEST"), page("tmr_paddr", state="HYPERVISOR")]),
        Row("TMR alignment", 0x09, lambda w, r: _es(r) and r.tmr_paddr % _tmr_size(w) != 0,
            [ask(tmr_paddr=SRC + 0x1000, tmr_len=MIB), ask(tmr_paddr=SRC + MIB, tmr_len=MIB)]),
        Row("TMR size", 0x04, lambda w, r: _es(r) and r.tmr_len != _tmr_size(w), [ask(tmr_len=MIB), ask(tmr_len=0)]),
        Row("TMR forbidden", 0x09, lambda w, r: _es(r) and address_status(w, r.tmr_paddr, 2 * MIB) in (0x09, 0x16),
            [ask(tmr_paddr=IN_TSEG), ask(tmr_paddr=46 * MIB)], group="TMR"),
        Row("TMR in no DRAM", 0x03, lambda w, r: _es(r) and address_status(w, r.tmr_paddr, 2 * MIB) == 0x03,
            [ask(tmr_paddr=IN_NOTHING)], group="TMR"),
    ]  # fmt: skip


def _init() -> tuple[World, Request]:
    w = World(pages={SRC: Page("FIRMWARE", large=True)})
    return w, Request({"flags": 1, "tmr_paddr": SRC, "tmr_len": 2 * MIB})


def _initialised(w: World, r: Request) -> None:
    w.legacy, w.legacy_es = "INIT", _es(r)
    if w.snp != "INIT":
        w.asids = [dict.fromkeys(range(1, ASID_LIMIT + 1), "DIRTY") for _ in w.asids]
        for one in w.cores:  # unconfirmed
            one.wbinvd = False


INIT_ROWS = [
    platform_row("UNINIT"),
    Row("unsupported", 0x15, lambda w, r: "old boot loader" in w.faults, [fault("old boot loader")]),
    Row("no encryption", 0x13, lambda w, r: "no UMC encryption" in w.faults or not w.cores[0].syscfg & 1 << 23,
        [fault("no UMC encryption")]),
    Row("SNPEn without an RMP", 0x01, lambda w, r: bool(w.cores[0].syscfg & 1 << 24) and not w.rmp_initialised,
        [world(snp="UNINIT", rmp_initialised=False, iommu_enforced=False)]),
]  # fmt: skip
INIT = Spec(
    0x01, _init, [*INIT_ROWS, *_tmr_rows()], _initialised, 0x18,
    buffer={"flags": (0, 16), "tmr_paddr": (8 * 8, 64), "tmr_len": (0x10 * 8, 32)},
)  # fmt: skip

# INIT_EX 0D: 0:u32 len=24h 4:u16 flags 8:tmr 10:len 18:nv_paddr 20:nv_len=8000h. U. as INIT + NV in memory (0 paddr =
# SPI); 04 len, 09 NV not 4K-aligned, 09/03 range, 04 NV len, 1A, 18 bad NV (area erased first), 09 TMR overlap.
# Quirk: with nv_paddr 0 the page test is made at address 0 (left out). Where these stand among INIT's own is
# unconfirmed: len first, NV after.


def _init_ex() -> tuple[World, Request]:
    w, r = _init()
    w.pages[DST] = Page("FIRMWARE", large=True)
    r.fields |= {"length": 0x24, "nv_paddr": DST, "nv_len": 0x8000}
    r.memory["nv"] = "good"
    return w, r


def _nv_meets_tmr(w: World, r: Request) -> bool:
    return _es(r) and r.tmr_paddr < r.nv_paddr + r.nv_len and r.nv_paddr < r.tmr_paddr + r.tmr_len


INIT_EX = Spec(
    0x0D, _init_ex,
    [
        length_row(0x24, 0x04), *INIT_ROWS,
        Row("NV not page-aligned", 0x09, lambda w, r: r.nv_paddr % PAGE != 0,
            [ask(nv_paddr=DST + 8), ask(nv_paddr=IN_RMP + 8)]),
        *data_rows("nv_paddr", 0x8000, written=False),
        Row("NV length", 0x04, lambda w, r: r.nv_len != 0x8000, [ask(nv_len=0x7000), ask(nv_len=0)]),
        Row("NV pages", 0x1A, lambda w, r: w.snp == "INIT" and w.at(r.nv_paddr).state not in OUTPUT,
            [page("nv_paddr", state=state) for state in ("HYPERVISOR", "PRE_GUEST")]),
        Row("bad NV", 0x18, lambda w, r: r.nv == "bad", [ask(nv="bad")], leaves="the area, erased"),
        Row("NV meets the TMR", 0x09, _nv_meets_tmr, [ask(nv_paddr=SRC)]),
        *_tmr_rows(),
    ],
    _initialised, 0x24,
    buffer={
        "length": (0, 32), "flags": (4 * 8, 16), "tmr_paddr": (8 * 8, 64), "tmr_len": (0x10 * 8, 32),
        "nv_paddr": (0x18 * 8, 64), "nv_len": (0x20 * 8, 32),
    },
)  # fmt: skip


# SHUTDOWN 02: any -> U, drops legacy guests only (their ASIDs: in use -> dirty, allocated -> clean); 14
def _shut_down(w: World, r: Request) -> None:
    for one in w.handles.values():
        release_asid(w, one.asid)
    w.handles, w.legacy = {}, "UNINIT"


SHUTDOWN = Spec(
    0x02, lambda: (legacy_world(), Request()),
    [Row("hardware", 0x14, lambda w, r: "unsafe" in w.faults, [fault("unsafe")])], _shut_down,
)  # fmt: skip

# PLATFORM_RESET 03: U. wipes persistent OCA/PEK/PDH in SPI
PLATFORM_RESET = Spec(0x03, lambda: (legacy_world("UNINIT"), Request()), [platform_row("UNINIT")])

# PLATFORM_STATUS 04: out, 12 B. any
PLATFORM_STATUS = Spec(0x04, lambda: (legacy_world(), Request()), writes_its_buffer([]), buffer_reclaimed, 12)

# PEK_GEN 05: I. PDH_GEN 09: I,W
PEK_GEN = Spec(0x05, lambda: (legacy_world(), Request()), [platform_row("INIT")])
PDH_GEN = Spec(0x09, lambda: (legacy_world(), Request()), [platform_row("INIT", "WORKING")])


# PEK_CSR 06: 0:paddr 8:u32 len. I,W. 2084 B; 04
def short_row(name: str, size: int) -> Row:
    return Row(
        f"{name} too short", 0x04, lambda w, r: getattr(r, name) < size, [ask(**{name: 0}), ask(**{name: size - 1})],
        leaves="the length that is needed",
    )  # fmt: skip


PEK_CSR = Spec(
    0x06, lambda: (legacy_world("INIT", OUT), Request({"paddr": OUT, "length": CERT})),
    writes_its_buffer(
        [platform_row("INIT", "WORKING"), short_row("length", CERT), *data_rows("paddr", CERT, written=True)]
    ),
    buffer_reclaimed, 12, buffer={"paddr": (0, 64), "length": (8 * 8, 32)},
)  # fmt: skip


# PEK_CERT_IMPORT 07: 0:pek 8:len 10:oca 18:len. I. 05 if externally owned, 04 (each exactly 2084), OCA self-signature
# then PEK by OCA 0A/06, PEK body must equal the current one 06; rolled back if saving fails
def _import() -> tuple[World, Request]:
    fields = {"pek_paddr": SRC, "pek_len": CERT, "oca_paddr": DST, "oca_len": CERT}
    return legacy_world(), Request(fields, {"oca": "good", "pek": "good"})


def cert_row(name: str, defect: str, status: int) -> Row:
    changes = [ask(**{name: defect})]
    return Row(f"{name}: {defect}", status, lambda w, r: getattr(r, name) == defect, changes, group=name)


PEK_CERT_IMPORT = Spec(
    0x07, _import,
    [
        platform_row("INIT"),
        Row("externally owned", 0x05, lambda w, r: w.owned, [world(owned=True)]),
        Row("lengths", 0x04, lambda w, r: r.pek_len != CERT or r.oca_len != CERT,
            [ask(**{name: n}) for name in ("pek_len", "oca_len") for n in (0, CERT - 1, CERT + 1)]),
        *data_rows("pek_paddr", CERT, written=False), *data_rows("oca_paddr", CERT, written=False),
        cert_row("oca", "signature", 0x0A), cert_row("oca", "not an OCA", 0x06), cert_row("pek", "signature", 0x0A),
        cert_row("pek", "not a PEK", 0x06), cert_row("pek", "another body", 0x06),
    ],
    lambda w, r: setattr(w, "owned", True), 0x1C,
    buffer={"pek_paddr": (0, 64), "pek_len": (64, 32), "oca_paddr": (0x10 * 8, 64), "oca_len": (0x18 * 8, 32)},
)  # fmt: skip

# PDH_CERT_EXPORT 08: 0:pdh 8:len c:rsvd 10:chain 18:len. I,W. chain = PEK,OCA,CEK (3x2084); 04
PDH_CERT_EXPORT = Spec(
    0x08,
    lambda: (
        legacy_world("INIT", OUT, DST, DST + PAGE),
        Request({"pdh_paddr": OUT, "pdh_len": CERT, "chain_paddr": DST, "chain_len": CHAIN}),
    ),
    writes_its_buffer([
        platform_row("INIT", "WORKING"), short_row("pdh_len", CERT), short_row("chain_len", CHAIN),
        *data_rows("pdh_paddr", CERT, written=True), *data_rows("chain_paddr", CHAIN, written=True),
    ]),
    buffer_reclaimed, 0x1C,
    buffer={"pdh_paddr": (0, 64), "pdh_len": (64, 32), "chain_paddr": (0x10 * 8, 64), "chain_len": (0x18 * 8, 32)},
)  # fmt: skip


# DF_FLUSH 0A: any. sec 3.4; 0E
DF_FLUSH = Spec(
    0x0A, lambda: (two_complexes({1: "DIRTY", MIN_SEV_ASID: "DIRTY"}, {2: "DIRTY"}), Request()),
    [Row("WBINVD missing", 0x0E, lambda w, r: not all(c.wbinvd for c in w.cores),
         [core(wbinvd=False), core(1, wbinvd=False), core(15, wbinvd=False)], left=flush)],
    flush,
)  # fmt: skip

# DOWNLOAD_FIRMWARE 0B: 0:paddr 8:len. both U. 32-B aligned else 09; image codes as DOWNLOAD_FIRMWARE_EX
DOWNLOAD_FIRMWARE = Spec(
    0x0B, lambda: (World("UNINIT"), Request({"fw_paddr": SRC, "fw_len": 0x1000}, {"image": "good"})),
    [
        Row("SNP or legacy not UNINIT", 0x01, lambda w, r: w.snp != "UNINIT" or w.legacy != "UNINIT",
            [world(snp="INIT"), world(legacy="INIT"), world(legacy="WORKING")]),
        Row("fw_paddr not 32-byte aligned", 0x09, lambda w, r: r.fw_paddr % 32 != 0, [ask(fw_paddr=SRC + 16)]),
    ],
    lambda w, r: setattr(w, "committed", (*w.committed[:2], 25, w.committed[3])),
    12, buffer={"fw_paddr": (0, 64), "fw_len": (64, 32)},
)  # fmt: skip

# GET_ID 0C: 0:paddr 8:len. any. 64 B; second socket only if len = 128 exactly; len := bytes written; 04
GET_ID = Spec(
    0x0C, lambda: (legacy_world("UNINIT", OUT), Request({"paddr": OUT, "length": 64})),
    writes_its_buffer([short_row("length", 64), *data_rows("paddr", 64, written=True)]),
    buffer_reclaimed, 12, buffer={"paddr": (0, 64), "length": (64, 32)},
)  # fmt: skip

# NOP 0E. RING_BUFFER 0F is refused by name: it has no rows here.
NOP = Spec(0x0E, lambda: (World(), Request()), [])

SPECS = {
    "INIT": INIT, "SHUTDOWN": SHUTDOWN, "PLATFORM_RESET": PLATFORM_RESET, "PLATFORM_STATUS": PLATFORM_STATUS,
    "PEK_GEN": PEK_GEN, "PEK_CSR": PEK_CSR, "PEK_CERT_IMPORT": PEK_CERT_IMPORT, "PDH_CERT_EXPORT": PDH_CERT_EXPORT,
    "PDH_GEN": PDH_GEN, "DF_FLUSH": DF_FLUSH, "DOWNLOAD_FIRMWARE": DOWNLOAD_FIRMWARE, "GET_ID": GET_ID,
    "INIT_EX": INIT_EX, "NOP": NOP,
}  # fmt: skip
