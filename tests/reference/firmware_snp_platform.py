"""The SNP commands on the platform: rows of the firmware sheet's section 1.5 as ordered checks.

Above each command stands what the sheet says of it, so that a reader can lay the two beside each other. Sources:
firmware sheet 1.4, 1.5, 9; hardware sheet 2.2 (what SNP_INIT checks).
"""

from __future__ import annotations

from dataclasses import replace

from tests.reference.firmware_rows import (
    Change,
    Row,
    Spec,
    address_rows,
    ask,
    both,
    core,
    fault,
    length_row,
    reserved_row,
    world,
    writable_row,
)  # fmt: skip
from tests.reference.firmware_world import (
    ASID_LIMIT,
    C_BIT,
    IN_RMP,
    LIST,
    MIB,
    OUT,
    PAGE,
    SRC,
    Core,
    Page,
    Request,
    World,
)  # fmt: skip

# SNP_INIT_EX, 40h: 0:bit0 INIT_RMP bit1 LIST_PADDR_EN 4:rsvd 8:list_paddr, rest MBZ reserved->16; diag mode->13; SNP
# or legacy not UNINIT->01; old boot loader->15; unlocked part->14; INIT_RMP=0 and (RMP never initialised or TCB
# changed since)->20; LIST_PADDR_EN with INIT_RMP=0->16; UMC encryption, SYSCFG SME/SNPEn/VMPLEn not on for all cores,
# or multi-key SME on->03; MSRs differ between cores (...) or a thread in guest/SMM (bits 2,7) or SYSCFG.MFDM=0 or
# HWCR.SMMLOCK=0->03; RMP base/end range 09/03, not 1 MB multiples or differ->03; RMP address with C-bit->15; TSEG
# MSRs not as booted->03; RMP not inside one DRAM region->03; other processors do not ack->13; VM_HSAVE_PA not 0 on
# all cores (only if INIT_RMP)->03; RMP build fails->26
INIT_EX_RESERVED = ((2, 31), (32, 63), (0x10 * 8, 0x40 * 8 - 1))
SYSCFG_ON = 1 << 23 | 1 << 24 | 1 << 25
MFDM, MULTI_KEY = 1 << 19, 1 << 26
SYSCFG = MFDM | SYSCFG_ON
COMPARED = ("mtrr_fixed", "iorr", "tom", "tom2", "tseg", "syscfg", "hwcr", "debug_status")


def uninit(**values: object) -> World:
    """A machine made ready for SNP_INIT, on which it has never run."""
    w = World("UNINIT", rmp_initialised=False, iommu_enforced=False)
    for name, value in values.items():
        setattr(w, name, value)
    return w


def _init_ex() -> tuple[World, Request]:
    return uninit(), Request({"init_rmp": 1, "list_paddr_en": 0, "list_paddr": 0})


def _rmp_misplaced(w: World) -> bool:
    base, end = w.cores[0].rmp_base, w.cores[0].rmp_end
    differ = len({(c.rmp_base, c.rmp_end) for c in w.cores}) > 1
    return base % MIB != 0 or (end + 1) % MIB != 0 or end <= base or differ


def _keep(*changes: Change) -> Change:
    """INIT_RMP = 0, where there is a table to be kept."""
    return both(ask(init_rmp=0), world(rmp_initialised=True), *changes)


PLATFORM_FREE = Row(
    "SNP or legacy not UNINIT", 0x01, lambda w, r: w.snp != "UNINIT" or w.legacy != "UNINIT",
    [world(snp="INIT"), world(legacy="INIT"), world(legacy="WORKING")],
)  # fmt: skip
MACHINE_ROWS = [
    Row("UMC encryption off", 0x03, lambda w, r: "no UMC encryption" in w.faults, [fault("no UMC encryption")]),
    Row("SYSCFG: SME, SNPEn, VMPLEn", 0x03, lambda w, r: any(c.syscfg & SYSCFG_ON != SYSCFG_ON for c in w.cores),
        [core(n, syscfg=SYSCFG & ~bit) for bit in (1 << 23, 1 << 24, 1 << 25) for n in (None, 1)]),
    Row("multi-key SME on", 0x03, lambda w, r: any(c.syscfg & MULTI_KEY for c in w.cores),
        [core(syscfg=SYSCFG | MULTI_KEY), core(1, syscfg=SYSCFG | MULTI_KEY)]),
    Row("MSRs differ", 0x03, lambda w, r: any(len({getattr(c, n) for c in w.cores}) > 1 for n in COMPARED),
        [core(1, mtrr_fixed=0), core(1, iorr=1 << 12), core(1, tom=32 * MIB), core(1, tom2=1 << 33), core(1, hwcr=3),
         core(1, syscfg=SYSCFG | 1 << 20), core(1, debug_status=1 << 2)]),
    Row("a thread in a guest or in SMM", 0x03, lambda w, r: any(c.debug_status & 0x84 for c in w.cores),
        [core(debug_status=1 << 2), core(debug_status=1 << 7)]),
    Row("MFDM 0", 0x03, lambda w, r: any(not c.syscfg & MFDM for c in w.cores), [core(syscfg=SYSCFG_ON)]),
    Row("SMMLOCK 0", 0x03, lambda w, r: any(not c.hwcr & 1 for c in w.cores), [core(hwcr=0)]),
    Row("RMP not in multiples of 1 MB, or differs", 0x03, lambda w, r: _rmp_misplaced(w),
        [core(rmp_base=47 * MIB + 0x8000), core(rmp_end=48 * MIB - 0x8001), core(rmp_base=48 * MIB),
         core(1, rmp_base=46 * MIB), core(1, rmp_end=49 * MIB - 1)]),
    Row("RMP with the C-bit", 0x15, lambda w, r: any((c.rmp_base | c.rmp_end) & C_BIT for c in w.cores),
        [core(rmp_base=C_BIT | 47 * MIB, rmp_end=C_BIT | 48 * MIB - 1)]),
    Row("TSEG not as booted", 0x03, lambda w, r: any(c.tseg != w.tseg[0] for c in w.cores),
        [core(tseg=32 * MIB)]),
    # The range rows "09/03" and this one are told apart by no published order: one row, DRAM (unconfirmed).
    Row("RMP not inside one DRAM region", 0x03,
        lambda w, r: not (w.dram[0] <= w.cores[0].rmp_base and w.cores[0].rmp_end < w.dram[1]),
        [core(rmp_base=1 << 30, rmp_end=(1 << 30) + MIB - 1), core(rmp_base=63 * MIB, rmp_end=65 * MIB - 1)]),
    Row("no ack", 0x13, lambda w, r: "no ack" in w.faults, [fault("no ack")]),
]  # fmt: skip
CHIP_ROWS = [
    Row("diag mode", 0x13, lambda w, r: "diag mode" in w.faults, [fault("diag mode")]),
    PLATFORM_FREE,
    Row("old boot loader", 0x15, lambda w, r: "old boot loader" in w.faults, [fault("old boot loader")]),
    Row("unlocked part", 0x14, lambda w, r: "unlocked part" in w.faults, [fault("unlocked part")]),
]
HSAVE_ROWS = [
    Row("VM_HSAVE_PA", 0x03, lambda w, r: getattr(r, "init_rmp", 1) == 1 and any(c.hsave for c in w.cores),
        [core(hsave=0x5000), core(1, hsave=0x5000)]),
    Row("RMP build", 0x26, lambda w, r: "RMP build" in w.faults, [fault("RMP build")]),
]  # fmt: skip


def _initialised(w: World, r: Request) -> None:
    if getattr(r, "init_rmp", 1):
        w.pages, w.rmp_initialised = {}, True
    w.snp, w.iommu_enforced, w.guest_count = "INIT", True, 0
    w.asids = [dict.fromkeys(range(1, ASID_LIMIT + 1), "DIRTY") for _ in w.asids]
    for one in w.cores:
        one.wbinvd = False


INIT_EX = Spec(
    0x85, _init_ex,
    [
        reserved_row(INIT_EX_RESERVED),
        *CHIP_ROWS,
        Row("no RMP to keep", 0x20, lambda w, r: not r.init_rmp and (not w.rmp_initialised or w.rmp_tcb_changed),
            [ask(init_rmp=0), _keep(world(rmp_tcb_changed=True))]),
        Row("list with INIT_RMP = 0", 0x16, lambda w, r: r.list_paddr_en and not r.init_rmp,
            [_keep(ask(list_paddr_en=1, list_paddr=LIST))]),
        *MACHINE_ROWS,
        # Where the list's address is checked is not published (unconfirmed): with the other inputs, at the end.
        HSAVE_ROWS[0],
        *[
            replace(row, changes=[both(ask(list_paddr_en=1), change) for change in row.changes])
            for row in address_rows("list_paddr", lookup=False, when=lambda w, r: bool(r.list_paddr_en))
        ],
        HSAVE_ROWS[1],
    ],
    _initialised, 0x40, INIT_EX_RESERVED,
    buffer={"init_rmp": (0, 1), "list_paddr_en": (1, 1), "list_paddr": (8 * 8, 64)},
)  # fmt: skip

# SNP_INIT (81) = INIT_RMP=1 without list
INIT = Spec(0x81, lambda: (uninit(), Request()), [*CHIP_ROWS, *MACHINE_ROWS, *HSAVE_ROWS], _initialised)

# SHUTDOWN, _EX: legacy not UNINIT->01; already UNINIT->00; any ASID not clean on all CCX->0F; len!=8 or reserved->16;
# X86 bit without IOMMU bit->16. UNINIT, VLEK wiped; RMP, page states, gctx pages and masks stay. IOMMU bit: RMP
# marked uninitialised, IOMMU enforcement off, all ASID keys wiped; quirk: next command rebuilds the permanent area:
# masks 0. X86 bit: SNPEn cleared on cores (fail->28; unsupported->16).
SHUTDOWN_EX_RESERVED = ((4 * 8 + 2, 63),)
LEGACY_ON = Row(
    "legacy not UNINIT", 0x01, lambda w, r: w.legacy != "UNINIT", [world(legacy="INIT"), world(legacy="WORKING")]
)
ALREADY = Row("already UNINIT", 0x00, lambda w, r: w.snp == "UNINIT", [world(snp="UNINIT")])
NOT_CLEAN = Row(
    "an ASID not clean", 0x0F, lambda w, r: any(s != "CLEAN" for states in w.asids for s in states.values()),
    [Change(f"ASID {asid} {s}", lambda w, r, asid=asid, s=s: w.set_asid(asid, s))
     for asid, s in ((1, "DIRTY"), (1, "ALLOCATED"), (1, "IN_USE"), (ASID_LIMIT, "DIRTY"))],
)  # fmt: skip


def _shut_down(w: World, r: Request) -> None:
    w.snp, w.vlek = "UNINIT", False
    if getattr(r, "iommu_snp_shutdown", 0):
        w.rmp_initialised = w.iommu_enforced = w.mask_chip_id = w.mask_chip_key = False
    if getattr(r, "x86_snp_shutdown", 0):
        for one in w.cores:
            one.syscfg &= ~(1 << 24)


SHUTDOWN = Spec(0x82, lambda: (World(), Request()), [LEGACY_ON, ALREADY, NOT_CLEAN], _shut_down)
SHUTDOWN_EX = Spec(
    0x86, lambda: (World(), Request({"length": 8, "iommu_snp_shutdown": 0, "x86_snp_shutdown": 0})),
    [
        LEGACY_ON, ALREADY, NOT_CLEAN,
        length_row(8),
        reserved_row(SHUTDOWN_EX_RESERVED),
        Row("X86 bit without IOMMU bit", 0x16, lambda w, r: r.x86_snp_shutdown and not r.iommu_snp_shutdown,
            [ask(x86_snp_shutdown=1)]),
    ],
    _shut_down, 8, SHUTDOWN_EX_RESERVED,
    buffer={"length": (0, 32), "iommu_snp_shutdown": (4 * 8, 1), "x86_snp_shutdown": (4 * 8 + 1, 1)},
)  # fmt: skip


# PLATFORM_STATUS, 8: 0:status_paddr. buffer (32 B) crosses page->16; SNP INIT and page not Firmware/Default->1A. any
# state
def _platform_status() -> tuple[World, Request]:
    return World(pages={OUT: Page("FIRMWARE")}), Request({"status_paddr": OUT})


PLATFORM_STATUS = Spec(
    0x83, _platform_status,
    [
        Row("crosses its page", 0x16, lambda w, r: r.status_paddr % PAGE + 32 > PAGE,
            [ask(status_paddr=OUT + PAGE - 31), ask(status_paddr=OUT + PAGE - 1)]),
        *address_rows("status_paddr", 32),
        writable_row("status_paddr"),
    ],
    size=8,
    buffer={"status_paddr": (0, 64)},
)  # fmt: skip


# DF_FLUSH: not all cores WBINVD since last->0E. dirty ASIDs -> clean, per CCX, even when 0E is returned for others; no
# platform-state check
def flush(w: World, r: Request) -> None:
    for number, states in enumerate(w.asids):
        if not all(one.wbinvd for one in w.cores[8 * number : 8 * number + 8]):
            continue
        for asid, state in states.items():
            if state == "DIRTY":
                states[asid] = "CLEAN"


def two_complexes(*asids: dict[int, str]) -> World:
    """SNP initialised on 16 cores, which are two core complexes."""
    return World(cores=[Core() for _ in range(16)], asids=list(asids))


DF_FLUSH = Spec(
    0x84, lambda: (two_complexes({1: "DIRTY", 2: "ALLOCATED", ASID_LIMIT: "DIRTY"}, {5: "DIRTY"}), Request()),
    [Row("WBINVD missing", 0x0E, lambda w, r: not all(c.wbinvd for c in w.cores),
         [core(wbinvd=False), core(1, wbinvd=False), core(15, wbinvd=False)], left=flush)],
    flush,
)  # fmt: skip

# CONFIG, 40: 0:reported_tcb 8:bit0 MASK_CHIP_ID bit1 MASK_CHIP_KEY, rest MBZ. reserved->16; REPORTED_TCB above
# CommittedTcb->16. FW compares bl,tee,snp,ucode as one big-endian number; same number but reserved bytes differ->16.
# No S check. TCB 0 := committed; masks stored.
CONFIG_RESERVED = ((8 * 8 + 2, 0x40 * 8 - 1),)


def _config() -> tuple[World, Request]:
    return World(), Request({"reported_tcb": tcb(4, 0, 24, 0xDB), "mask_chip_id": 0, "mask_chip_key": 0})


def tcb(bootloader: int, tee: int, snp: int, microcode: int, reserved: int = 0) -> int:
    """TCB_VERSION of Milan and Genoa: byte 0 bootloader, 1 TEE, 2-5 reserved, 6 SNP, 7 microcode."""
    return bootloader | tee << 8 | reserved << 16 | snp << 48 | microcode << 56


def _parts(value: int) -> tuple[int, int, int, int]:
    return value & 0xFF, value >> 8 & 0xFF, value >> 48 & 0xFF, value >> 56


def _configured(w: World, r: Request) -> None:
    w.configured = _parts(r.reported_tcb) if r.reported_tcb else None
    w.mask_chip_id, w.mask_chip_key = bool(r.mask_chip_id), bool(r.mask_chip_key)


CONFIG = Spec(
    0xC9, _config,
    [
        reserved_row(CONFIG_RESERVED),
        Row("TCB above the committed one", 0x16, lambda w, r: _parts(r.reported_tcb) > w.committed,
            [ask(reported_tcb=tcb(5, 0, 0, 0)), ask(reported_tcb=tcb(4, 1, 0, 0)), ask(reported_tcb=tcb(4, 0, 25, 0)),
             ask(reported_tcb=tcb(4, 0, 24, 0xDC))]),
        Row("reserved bytes of an equal TCB", 0x16,
            lambda w, r: _parts(r.reported_tcb) == w.committed and r.reported_tcb >> 16 & 0xFFFFFFFF != 0,
            [ask(reported_tcb=tcb(4, 0, 24, 0xDB, 1)), ask(reported_tcb=tcb(4, 0, 24, 0xDB, 1 << 31))]),
    ],
    _configured, 0x40, CONFIG_RESERVED,
    buffer={"reported_tcb": (0, 64), "mask_chip_id": (8 * 8, 1), "mask_chip_key": (8 * 8 + 1, 1)},
)  # fmt: skip

# COMMIT, 4: 0:len=4. len->16. no S check; Committed := current; CONFIG'd TCB dropped.
COMMIT = Spec(
    0xCB, lambda: (World(), Request({"length": 4})),
    [length_row(4)],
    lambda w, r: setattr(w, "configured", None), 4,
    buffer={"length": (0, 32)},
)  # fmt: skip

# DOWNLOAD_FIRMWARE_EX, 18: 0:len (FW ignores it) 4:rsvd 8:fw_paddr(32-B aligned) 10:fw_len 14:bit0 COMMIT. legacy not
# UNINIT->01; 16; 09; image: length 04, address 09, signature 0A, rollback or unsupported 03, wrong type 16, memory 17,
# broadcast 13; new image refuses state->24 or 14. What an image is, is the model's: the rows that need one are named.
DOWNLOAD_RESERVED = ((32, 63), (0x14 * 8 + 1, 0x18 * 8 - 1))


def _image(status: int, *names: str) -> Row:
    return Row(
        f"image: {', '.join(names)}", status, lambda w, r: r.image in names, [ask(image=name) for name in names],
        group="image",
    )  # fmt: skip


DOWNLOAD_FIRMWARE_EX = Spec(
    0xCA,
    lambda: (
        World(), Request({"length": 0x18, "fw_paddr": SRC, "fw_len": 0x1000, "commit": 0}, {"image": "good"})
    ),
    [
        LEGACY_ON,
        reserved_row(DOWNLOAD_RESERVED),
        Row("fw_paddr not 32-byte aligned", 0x09, lambda w, r: r.fw_paddr % 32 != 0,
            [ask(fw_paddr=SRC + 1), ask(fw_paddr=SRC + 16)]),
        Row("length of the image", 0x04, lambda w, r: not 0xD0 <= r.fw_len <= MIB,
            [ask(fw_len=0), ask(fw_len=0xCF), ask(fw_len=MIB + 1)]),
        *address_rows("fw_paddr", lambda r: r.fw_len, lookup=False),
        _image(0x0A, "signature"), _image(0x03, "rollback", "unsupported"), _image(0x16, "wrong type"),
        _image(0x17, "memory"), _image(0x13, "broadcast"), _image(0x24, "refuses the state"),
        _image(0x14, "not restored"),
    ],
    size=0x18, reserved=DOWNLOAD_RESERVED,
    buffer={"length": (0, 32), "fw_paddr": (8 * 8, 64), "fw_len": (0x10 * 8, 32), "commit": (0x14 * 8, 1)},
)  # fmt: skip

# VLEK_LOAD, 10: 0:len=10h 4:wrapped_version=0 5:rsvd3 8:paddr. len/version/rsvd->16; blob TCB != ReportedTcb->21;
# tag->0B. no S check, blob page state and alignment free.
VLEK_RESERVED = ((5 * 8, 63),)
VLEK_LOAD = Spec(
    0xCD,
    lambda: (
        World(),
        Request({"length": 0x10, "wrapped_version": 0, "paddr": SRC + 7}, {"blob_tcb": "reported", "tag": True}),
    ),
    [
        length_row(0x10),
        Row("wrapped version", 0x16, lambda w, r: r.wrapped_version != 0,
            [ask(wrapped_version=1), ask(wrapped_version=255)]),
        reserved_row(VLEK_RESERVED),
        *address_rows("paddr", 432, lookup=False),
        Row("TCB of the blob", 0x21, lambda w, r: r.blob_tcb != "reported",
            [ask(blob_tcb="lower"), ask(blob_tcb="higher")]),
        Row("tag", 0x0B, lambda w, r: not r.tag, [ask(tag=False)]),
    ],
    lambda w, r: setattr(w, "vlek", True), 0x10, VLEK_RESERVED,
    buffer={"length": (0, 32), "wrapped_version": (4 * 8, 8), "paddr": (8 * 8, 64)},
)  # fmt: skip

# FEATURE_INFO, 10: 0:len=10h 4:ecx_in 8:paddr (4-B aligned, inside one page). len->16; address->09; page state->1A;
# ecx_in unknown->16. That the address rows of rule 5 stand between 09 and 1A is inferred.
FEATURE_INFO = Spec(
    0xCE, lambda: (World(pages={OUT: Page("FIRMWARE")}), Request({"length": 0x10, "ecx_in": 0, "status_paddr": OUT})),
    [
        length_row(0x10),
        Row("address", 0x09, lambda w, r: r.status_paddr % 4 != 0 or r.status_paddr % PAGE + 16 > PAGE,
            [ask(status_paddr=OUT + 2), ask(status_paddr=OUT + PAGE - 12), ask(status_paddr=IN_RMP + 2)]),
        *address_rows("status_paddr", 16),
        writable_row("status_paddr"),
        Row("unknown ecx_in", 0x16, lambda w, r: r.ecx_in > 1, [ask(ecx_in=2), ask(ecx_in=0xFFFFFFFF)]),
    ],
    size=0x10,
    buffer={"length": (0, 32), "ecx_in": (4 * 8, 32), "status_paddr": (8 * 8, 64)},
)  # fmt: skip

SPECS = {
    "SNP_INIT": INIT, "SNP_INIT_EX": INIT_EX, "SNP_SHUTDOWN": SHUTDOWN, "SNP_SHUTDOWN_EX": SHUTDOWN_EX,
    "SNP_PLATFORM_STATUS": PLATFORM_STATUS, "SNP_DF_FLUSH": DF_FLUSH, "SNP_CONFIG": CONFIG, "SNP_COMMIT": COMMIT,
    "SNP_DOWNLOAD_FIRMWARE_EX": DOWNLOAD_FIRMWARE_EX, "SNP_VLEK_LOAD": VLEK_LOAD, "SNP_FEATURE_INFO": FEATURE_INFO,
}  # fmt: skip
