"""The legacy commands on guests: rows of the firmware sheet's section 1.3 as ordered checks.

All of them: platform not W -> 01; bad handle -> 10, in that order, but for what the rows say. Above each command stands
what the sheet says of it; H is the handle at 00. What memory holds is told by what it means. Sources: firmware sheet
1.2, 1.3, 3.4, 4, 5.6.
"""

from __future__ import annotations

from tests.reference.firmware_legacy_platform import (
    buffer_reclaimed,
    data_rows,
    legacy_world,
    platform_row,
    short_row,
    writes_its_buffer,
)  # fmt: skip
from tests.reference.firmware_rows import Act, Change, Holds, Row, Spec, asid_is, ask, both, fault, length_row, world
from tests.reference.firmware_snp_guests import release_asid
from tests.reference.firmware_world import (
    API,
    ASID_LIMIT,
    DST,
    IN_RMP,
    LIST,
    MIN_SEV_ASID,
    OUT,
    PAGE,
    SRC,
    LegacyGuest,
    Page,
    Request,
    World,
)  # fmt: skip

NODBG, NOKS, ES, NOSEND, DOMAIN, SEV = (1 << bit for bit in range(6))
PLAIN_ASID, ES_ASID, HANDLE = 200, 20, 1
H = {"handle": (0, 32)}


def of_handle(state: str = "LUPDATE", held: int = PLAIN_ASID, **fields: object) -> tuple[World, Request]:
    """A legacy guest, and a request that names it."""
    w = legacy_world("WORKING")
    w.handles[HANDLE] = LegacyGuest(state, held, ES if 0 < held < MIN_SEV_ASID else 0)
    if held:
        w.set_asid(held, "ALLOCATED" if state in ("LUPDATE", "LSECRET", "RUPDATE") else "IN_USE")
    return w, Request({"handle": HANDLE, **fields})


def legacy_guest(**values: object) -> Change:
    """Another state of the guest that the command names, if there is one."""

    def act(w: World, r: Request) -> None:
        if HANDLE not in w.handles:
            return
        for name, value in values.items():
            assert hasattr(w.handles[HANDLE], name), name
            setattr(w.handles[HANDLE], name, value)

    return Change(f"guest {values}", act)


def guest_of(w: World, r: Request) -> LegacyGuest:
    return w.handles.get(r.handle, LegacyGuest("UNINIT"))


WORKING = platform_row("WORKING")
BAD_HANDLE = Row(
    "bad handle", 0x10, lambda w, r: r.handle not in w.handles, [ask(handle=n) for n in (0, 2, 1024, 1025)]
)
NO_ASID = Row("guest inactive", 0x08, lambda w, r: guest_of(w, r).asid == 0, [legacy_guest(asid=0)])
STATES = ("LUPDATE", "LSECRET", "RUNNING", "SUPDATE", "RUPDATE", "SENT")


def state_row(*admitted: str) -> Row:
    """The guest is in none of the admitted states."""
    return Row(
        f"guest not {' or '.join(admitted)}", 0x02, lambda w, r: guest_of(w, r).state not in admitted,
        [legacy_guest(state=state) for state in STATES if state not in admitted],
    )  # fmt: skip


NO_ES = Row("VMSA of a guest without ES", 0x15, lambda w, r: not guest_of(w, r).policy & ES, [legacy_guest(policy=0)])
UNSAFE = Row("hardware", 0x14, lambda w, r: "unsafe" in w.faults, [fault("unsafe")])


def moved(state: str, buffer_too: bool = False) -> Act:
    def act(w: World, r: Request) -> None:
        w.handles[r.handle].state = state
        if buffer_too:
            buffer_reclaimed(w, r)

    return act


def with_pages(case: tuple[World, Request], *addresses: int, **memory: object) -> tuple[World, Request]:
    """The same with pages for output and a meaning of the memory."""
    case[0].pages |= {address: Page("FIRMWARE") for address in addresses}
    case[1].memory |= memory
    return case


# DECOMMISSION 20: H. W. 12 if ASID still active; last guest -> I
def _decommissioned(w: World, r: Request) -> None:
    del w.handles[r.handle]
    w.legacy = w.legacy if w.handles else "INIT"


DECOMMISSION = Spec(
    0x20, lambda: of_handle("RUNNING", 0),
    [
        WORKING, BAD_HANDLE,
        Row("ASID still active", 0x12, lambda w, r: guest_of(w, r).asid != 0, [legacy_guest(asid=PLAIN_ASID)]),
    ],
    _decommissioned, 4, buffer=H,
)  # fmt: skip

# ACTIVATE 21: H 4:asid. W. sec 3.4: ASID 0 or > max->0D; in use/allocated->0C; guest already has one->12; legacy
# SENT->02; ASID dirty anywhere->0F; ES needs 1 <= ASID < MinSevNoEsAsid, plain SEV ASID >= it, else 0D.


def _wrong_kind(w: World, r: Request) -> bool:
    return (r.asid < MIN_SEV_ASID) != bool(guest_of(w, r).policy & ES)


def _asid_rows(again: bool) -> list[Row]:
    """`again`: a guest's own ASID is refused neither as owned nor because the guest has one."""

    def own(w: World, r: Request) -> bool:
        return again and guest_of(w, r).asid == r.asid

    return [
        Row("ASID owned", 0x0C,
            lambda w, r: not own(w, r) and any(s in ("ALLOCATED", "IN_USE") for s in w.asid(r.asid)),
            [asid_is("ALLOCATED"), asid_is("IN_USE")]),
        Row("guest has an ASID", 0x12, lambda w, r: not own(w, r) and guest_of(w, r).asid != 0,
            [legacy_guest(asid=PLAIN_ASID + 1)]),
        Row("guest SENT", 0x02, lambda w, r: guest_of(w, r).state == "SENT", [legacy_guest(state="SENT")]),
        Row("ASID dirty", 0x0F, lambda w, r: "DIRTY" in w.asid(r.asid), [asid_is("DIRTY")]),
        Row("ASID of the other kind", 0x0D, _wrong_kind,
            [ask(asid=ES_ASID), ask(asid=MIN_SEV_ASID - 1), legacy_guest(policy=ES)]),
    ]  # fmt: skip


ASID_OUT = Row(
    "ASID 0 or above the limit", 0x0D, lambda w, r: not 0 < r.asid <= ASID_LIMIT,
    [ask(asid=0), ask(asid=ASID_LIMIT + 1)],
)  # fmt: skip


def _activated(w: World, r: Request) -> None:
    w.handles[r.handle].asid = r.asid
    pending = w.handles[r.handle].state in ("LUPDATE", "LSECRET", "RUPDATE")
    for states in w.asids:
        if states.get(r.asid, "CLEAN") == "CLEAN":
            states[r.asid] = "ALLOCATED" if pending else "IN_USE"


ACTIVATE = Spec(
    0x21, lambda: of_handle("LUPDATE", 0, asid=PLAIN_ASID),
    [WORKING, BAD_HANDLE, ASID_OUT, *_asid_rows(again=False)], _activated, 8, buffer={**H, "asid": (32, 32)},
)  # fmt: skip

# ACTIVATE_EX 25: 0:len=18h 4:handle 8:asid c:numids 10:ids_paddr. W. 01, len 16, 10, then as SNP row: only listed
# complexes (accumulate); may be repeated with same ASID, other ASID->12
ACTIVATE_EX = Spec(
    0x25,
    lambda: with_pages(of_handle("LUPDATE", 0, length=0x18, asid=PLAIN_ASID, numids=1, ids_paddr=LIST), apic_ids=[0]),
    [
        WORKING, length_row(0x18), BAD_HANDLE, ASID_OUT,
        Row("unsupported", 0x15, lambda w, r: "no ACTIVATE_EX" in w.faults, [fault("no ACTIVATE_EX")]),
        Row("numids", 0x16, lambda w, r: not 0 < r.numids <= 1024, [ask(numids=0), ask(numids=1025)]),
        Row("APIC id not present", 0x03, lambda w, r: any(i >= len(w.cores) for i in r.apic_ids), [ask(apic_ids=[2])]),
        *_asid_rows(again=True),
    ],
    _activated, 0x18,
    buffer={"length": (0, 32), "handle": (32, 32), "asid": (64, 32), "numids": (96, 32), "ids_paddr": (128, 64)},
)  # fmt: skip


# DEACTIVATE 22: H. W. 08 if inactive
def _deactivated(w: World, r: Request) -> None:
    release_asid(w, w.handles[r.handle].asid)
    w.handles[r.handle].asid = 0


DEACTIVATE = Spec(0x22, lambda: of_handle("RUNNING"), [WORKING, BAD_HANDLE, NO_ASID], _deactivated, 4, buffer=H)

# GUEST_STATUS 23: H 4:policy 8:asid c:u8 state. I,W. bad handle -> SUCCESS with state 0
GUEST_STATUS = Spec(
    0x23, lambda: of_handle("RUNNING"), writes_its_buffer([platform_row("INIT", "WORKING")]),
    buffer_reclaimed, 0x10, buffer=H,
)  # fmt: skip

# COPY 24: H 4:len 8:src 10:dst. W. 08, len 0 or not 4096x 04, unaligned 09, 1A
COPY = Spec(
    0x24, lambda: with_pages(of_handle("RUNNING", length=PAGE, src_paddr=SRC, dst_paddr=DST), DST),
    [
        WORKING, BAD_HANDLE, NO_ASID,
        Row("length", 0x04, lambda w, r: r.length == 0 or r.length % PAGE != 0, [ask(length=0), ask(length=PAGE - 16)]),
        Row("unaligned", 0x09, lambda w, r: r.src_paddr % PAGE or r.dst_paddr % PAGE,
            [ask(src_paddr=SRC + 16), ask(dst_paddr=DST + 16)]),
        *data_rows("src_paddr", PAGE, written=False), *data_rows("dst_paddr", PAGE, written=True),
    ],
    size=0x18, buffer={**H, "length": (32, 32), "src_paddr": (64, 64), "dst_paddr": (128, 64)},
)  # fmt: skip

# LAUNCH_START 30: H(in: share key with; 0=new) 4:policy 8:dh_cert 10:len 18:session 20:len. I,W. 5.6: DH cert address
# 0 skips the channel (policy version and reserved bits unchecked). Order: lengths 04, cert 06, WRAP_MAC 0B,
# POLICY_MAC 0B, API 07, reserved 07, share handle 10/07, 17, 15. RECEIVE_START 50: session and PDH mandatory (04); ->
# RUPDATE
START_BUFFER = {
    **H, "policy": (32, 32), "dh_cert_paddr": (64, 64), "dh_cert_len": (128, 32), "session_paddr": (0x18 * 8, 64),
    "session_len": (0x20 * 8, 32),
}  # fmt: skip


def _start() -> tuple[World, Request]:
    case = of_handle("RUNNING", policy=0, dh_cert_paddr=SRC, dh_cert_len=2084, session_paddr=DST, session_len=0x80)
    case[1].fields["handle"] = 0
    return with_pages(case, cert="good", wrap_mac=True, policy_mac=True)


def _channel(w: World, r: Request) -> bool:
    return bool(r.dh_cert_paddr)


def _wrong_share(w: World, r: Request) -> bool:
    return r.handle != 0 and (guest_of(w, r).policy != r.policy or bool(r.policy & NOKS))


def _start_rows(*front: Row) -> list[Row]:
    def when(holds: Holds) -> Holds:
        return lambda w, r: _channel(w, r) and holds(w, r)

    full = Change("1024 guests", lambda w, r: w.handles.update({n: LegacyGuest("RUNNING") for n in range(2, 1025)}))
    return writes_its_buffer([
        platform_row("INIT", "WORKING"), *front,
        Row("lengths", 0x04, when(lambda w, r: r.dh_cert_len != 2084 or r.session_len != 0x80),
            [ask(dh_cert_len=2083), ask(dh_cert_len=0), ask(session_len=0x7F), ask(session_len=0)]),
        *data_rows("dh_cert_paddr", 2084, written=False, when=_channel),
        *data_rows("session_paddr", 0x80, written=False, when=_channel),
        Row("certificate", 0x06, when(lambda w, r: r.cert != "good"), [ask(cert="usage"), ask(cert="algorithm")]),
        Row("WRAP_MAC", 0x0B, when(lambda w, r: not r.wrap_mac), [ask(wrap_mac=False)]),
        Row("POLICY_MAC", 0x0B, when(lambda w, r: not r.policy_mac), [ask(policy_mac=False)]),
        Row("API of the policy", 0x07, when(lambda w, r: (r.policy >> 16 & 0xFF, r.policy >> 24) > API),
            [ask(policy=1 << 16 | 56 << 24), ask(policy=2 << 16)]),
        Row("reserved policy bits", 0x07, when(lambda w, r: r.policy & 0xFFC0),
            [ask(policy=1 << 6), ask(policy=1 << 15)]),
        Row("handle to share with", 0x10, lambda w, r: r.handle != 0 and r.handle not in w.handles,
            [ask(handle=2), ask(handle=1025)]),
        Row("sharing not allowed", 0x07, _wrong_share,
            [ask(handle=HANDLE, policy=NODBG), both(ask(handle=HANDLE, policy=NOKS), legacy_guest(policy=NOKS))]),
        Row("no handle left", 0x17, lambda w, r: len(w.handles) >= 1024, [full]),
        Row("ES without the platform's", 0x15, lambda w, r: r.policy & ES and not w.legacy_es,
            [both(ask(policy=ES), world(legacy_es=False))]),
    ])  # fmt: skip


def _started(state: str) -> Act:
    def act(w: World, r: Request) -> None:
        free = next(n for n in range(1, 1025) if n not in w.handles)
        w.handles[free], w.legacy = LegacyGuest(state, 0, r.policy), "WORKING"
        buffer_reclaimed(w, r)

    return act


LAUNCH_START = Spec(0x30, _start, _start_rows(), _started("LUPDATE"), 0x24, buffer=START_BUFFER)
RECEIVE_START = Spec(
    0x50, _start,
    _start_rows(Row("session or PDH missing", 0x04, lambda w, r: not r.dh_cert_paddr or not r.session_paddr,
                    [ask(dh_cert_paddr=0), ask(session_paddr=0)])),
    _started("RUPDATE"), 0x24, buffer=START_BUFFER,
)  # fmt: skip

# LAUNCH_UPDATE_DATA / _VMSA 31/32: H 8:paddr 10:u32 len. VMSA len != 1000h 04 (before all else); 01, 10, 02, VMSA
# without ES 15, 08, addr not 16-B 09, len 0 or not 16x 04, 1A
UPDATE_BUFFER = {**H, "paddr": (64, 64), "length": (128, 32)}


def _update_rows(*es: Row) -> list[Row]:
    return [
        WORKING, BAD_HANDLE, state_row("LUPDATE"), *es, NO_ASID,
        Row("address not 16-byte aligned", 0x09, lambda w, r: r.paddr % 16 != 0,
            [ask(paddr=SRC + 8), ask(paddr=IN_RMP + 8)]),
        Row("length", 0x04, lambda w, r: r.length == 0 or r.length % 16 != 0, [ask(length=0), ask(length=0x18)]),
        *data_rows("paddr", lambda r: int(r.length), written=True),
    ]  # fmt: skip


LAUNCH_UPDATE_DATA = Spec(
    0x31, lambda: with_pages(of_handle(paddr=SRC, length=PAGE), SRC), _update_rows(), size=0x14, buffer=UPDATE_BUFFER
)
LAUNCH_UPDATE_VMSA = Spec(
    0x32, lambda: with_pages(of_handle("LUPDATE", ES_ASID, paddr=SRC, length=PAGE), SRC),
    [Row("VMSA length", 0x04, lambda w, r: r.length != PAGE, [ask(length=0), ask(length=PAGE - 16)]),
     *[row for row in _update_rows(NO_ES) if row.name != "length"]],
    size=0x14, buffer=UPDATE_BUFFER,
)  # fmt: skip

# LAUNCH_MEASURE 33: H 8:paddr 10:len(>=30h). LUPDATE. 01, 10, 02, 04, 1A; no ASID needed; -> LSECRET
LAUNCH_MEASURE = Spec(
    0x33, lambda: with_pages(of_handle("LUPDATE", 0, paddr=OUT, length=0x30), OUT),
    writes_its_buffer(
        [WORKING, BAD_HANDLE, state_row("LUPDATE"), short_row("length", 0x30), *data_rows("paddr", 0x30, written=True)]
    ),
    moved("LSECRET", buffer_too=True), 0x14, buffer=UPDATE_BUFFER,
)  # fmt: skip

# LAUNCH_FINISH 35: H. LSECRET -> RUNNING, TIK/TEK erased; no ASID needed; 14. SEND_FINISH / SEND_CANCEL 43/44:
# SUPDATE -> SENT / RUNNING. RECEIVE_FINISH 53: RUPDATE -> RUNNING, 14


def _finished(w: World, r: Request) -> None:
    w.handles[r.handle].state = "RUNNING"
    if w.handles[r.handle].asid:
        w.set_asid(w.handles[r.handle].asid, "IN_USE")


LAUNCH_FINISH = Spec(
    0x35, lambda: of_handle("LSECRET"), [WORKING, BAD_HANDLE, state_row("LSECRET"), UNSAFE], _finished, 4, buffer=H
)
RECEIVE_FINISH = Spec(
    0x53, lambda: of_handle("RUPDATE"), [WORKING, BAD_HANDLE, state_row("RUPDATE"), UNSAFE], _finished, 4, buffer=H
)
SEND_FINISH = Spec(
    0x43, lambda: of_handle("SUPDATE"), [WORKING, BAD_HANDLE, state_row("SUPDATE")], moved("SENT"), 4, buffer=H
)
SEND_CANCEL = Spec(
    0x44, lambda: of_handle("SUPDATE"), [WORKING, BAD_HANDLE, state_row("SUPDATE")], moved("RUNNING"), 4, buffer=H
)

# ATTESTATION 36: H 8:paddr 10:mnonce16 20:len(>=D0h). LSECRET, RUNNING, SUPDATE, SENT. 1.2: writes its length back
# without rule 3 (quirk)
ATTESTATION = Spec(
    0x36, lambda: with_pages(of_handle("RUNNING", paddr=OUT, length=0xD0), OUT),
    [WORKING, BAD_HANDLE, state_row("LSECRET", "RUNNING", "SUPDATE", "SENT"), short_row("length", 0xD0),
     *data_rows("paddr", 0xD0, written=True)],
    size=0x24, buffer={**H, "paddr": (64, 64), "length": (0x20 * 8, 32)},
)  # fmt: skip

# DBG_DECRYPT / DBG_ENCRYPT 60/61: H 8:src 10:dst 18:len. any guest state. in order 09 (16-B align), 04 (len 16x), 10,
# 07 if NODBG, 1A, 08. That 01 comes before all, and len 0 passes, is unconfirmed.


def _dbg(number: int) -> Spec:
    return Spec(
        number, lambda: with_pages(of_handle("RUNNING", src_paddr=SRC, dst_paddr=DST, length=PAGE), DST),
        [
            WORKING,
            Row("unaligned", 0x09, lambda w, r: r.src_paddr % 16 or r.dst_paddr % 16,
                [ask(src_paddr=SRC + 8), ask(dst_paddr=DST + 8)]),
            Row("length", 0x04, lambda w, r: r.length % 16 != 0, [ask(length=8), ask(length=PAGE + 1)]),
            BAD_HANDLE,
            Row("NODBG", 0x07, lambda w, r: guest_of(w, r).policy & NODBG, [legacy_guest(policy=NODBG)]),
            *data_rows("src_paddr", PAGE, written=False), *data_rows("dst_paddr", PAGE, written=True), NO_ASID,
        ],
        size=0x1C, buffer={**H, "src_paddr": (64, 64), "dst_paddr": (128, 64), "length": (0x18 * 8, 32)},
    )  # fmt: skip


SPECS = {
    "DECOMMISSION": DECOMMISSION, "ACTIVATE": ACTIVATE, "DEACTIVATE": DEACTIVATE, "GUEST_STATUS": GUEST_STATUS,
    "COPY": COPY, "ACTIVATE_EX": ACTIVATE_EX, "LAUNCH_START": LAUNCH_START, "LAUNCH_UPDATE_DATA": LAUNCH_UPDATE_DATA,
    "LAUNCH_UPDATE_VMSA": LAUNCH_UPDATE_VMSA, "LAUNCH_MEASURE": LAUNCH_MEASURE, "LAUNCH_FINISH": LAUNCH_FINISH,
    "ATTESTATION": ATTESTATION, "SEND_FINISH": SEND_FINISH, "SEND_CANCEL": SEND_CANCEL,
    "RECEIVE_START": RECEIVE_START, "RECEIVE_FINISH": RECEIVE_FINISH, "DBG_DECRYPT": _dbg(0x60),
    "DBG_ENCRYPT": _dbg(0x61),
}  # fmt: skip
