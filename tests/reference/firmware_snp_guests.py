"""The SNP commands on guests: rows of the firmware sheet's section 1.5 as ordered checks; [P S G] is `prefix`.

Above each command stands what the sheet says of it. Sources: firmware sheet 1.4, 1.5, 3.4.
"""

from __future__ import annotations

from tests.reference.firmware_rows import (
    NOT_INIT,
    Change,
    Row,
    Spec,
    address_rows,
    asid_is,
    ask,
    both,
    fault,
    gstate_row,
    guest,
    large,
    length_row,
    low_rows,
    pages_other_than,
    prefix,
    world,
    world_with_guest,
    writable_row,
)  # fmt: skip
from tests.reference.firmware_world import (
    AGENT,
    ASID_COUNTERS,
    ASID_LIMIT,
    C_BIT,
    GCTX,
    IN_NOTHING,
    LIST,
    MIN_SEV_ASID,
    OUT,
    PAGE,
    POLICY,
    SINGLE_SOCKET,
    SRC,
    Core,
    Guest,
    Page,
    Request,
    World,
    bad_address,
)  # fmt: skip


# GCTX_CREATE, 8: 0:gctx. [P S]; page not Firmware->1A; RMP size 2M->19; MMIO overlap->03. GSTATE INIT, ASID 0; ->
# Context
def _gctx_create() -> tuple[World, Request]:
    return World(pages={GCTX: Page("FIRMWARE")}), Request({"gctx_paddr": GCTX})


def _in_a_hole(w: World, r: Request, large: bool) -> None:
    r.set("gctx_paddr", IN_NOTHING)
    w.pages[IN_NOTHING] = Page("FIRMWARE", large=large)


def _created(w: World, r: Request) -> None:
    w.guests[GCTX], w.pages[GCTX] = Guest(), Page("CONTEXT", vmsa=True)


GCTX_CREATE = Spec(
    0x93, _gctx_create,
    [
        *low_rows("gctx_paddr"), NOT_INIT, *list(address_rows("gctx_paddr"))[:2],
        Row("page not Firmware", 0x1A, lambda w, r: w.at(r.gctx_paddr).state != "FIRMWARE",
            [*pages_other_than("gctx_paddr", "FIRMWARE"), ask(gctx_paddr=IN_NOTHING), ask(gctx_paddr=1 << 30)]),
        Row("page of 2 MB", 0x19, lambda w, r: w.at(r.gctx_paddr).large,
            [large("gctx_paddr"), Change("2 MB in a hole", lambda w, r: _in_a_hole(w, r, large=True))]),
        # A page of a hole is HV-Fixed, beyond the table's coverage Default, as the firmware makes them.
        Row("MMIO", 0x03, lambda w, r: bad_address(w, r.gctx_paddr) == 0x03,
            [Change("a Firmware page in a hole", lambda w, r: _in_a_hole(w, r, large=False))]),
    ],
    _created, 8,
    buffer={"gctx_paddr": (0, 64)},
)  # fmt: skip


# DECOMMISSION, 8: 0:gctx. [P S G]. deactivates; in-use CCX -> dirty, merely allocated -> clean; count-1 if GSTATE !=
# INIT; any GSTATE; -> Firmware. Guest pages stay assigned
def of_guest(gstate: str = "LAUNCH", asid: int = 1, **fields: object) -> tuple[World, Request]:
    """A world with a guest, and a request that names it."""
    return world_with_guest(gstate, asid), Request({"gctx_paddr": GCTX, **fields})


def release_asid(w: World, asid: int) -> None:
    """What DECOMMISSION does to an ASID, complex by complex (3.4)."""
    for number, states in enumerate(w.asids):
        if states.get(asid) == "IN_USE":
            states[asid] = "DIRTY"
            for one in w.cores[8 * number : 8 * number + 8]:
                one.wbinvd = False
        elif states.get(asid) == "ALLOCATED":
            states[asid] = "CLEAN"


def _decommissioned(w: World, r: Request) -> None:
    gone = w.guests.pop(r.gctx_paddr & ~C_BIT)
    release_asid(w, gone.asid)
    w.guest_count -= gone.gstate != "INIT"
    w.pages[r.gctx_paddr & ~C_BIT] = Page("FIRMWARE")


DECOMMISSION = Spec(0x90, lambda: of_guest("RUNNING"), prefix(), _decommissioned, 8, buffer={"gctx_paddr": (0, 64)})

# ACTIVATE, c: 0:gctx 8:asid. [P S G]; GSTATE not LAUNCH/RUNNING->02; RMP has pages of that ASID->03; SINGLE_SOCKET
# and 2 sockets->07; then sec 3.4: ASID 0 or > max->0D; in use/allocated->0C; guest already has one->12; ASID dirty
# anywhere->0F; not clean on all CCX->0C; ES and SNP guests need 1 <= ASID < MinSevNoEsAsid, else 0D. Order: RMP
# counter look-up (ASID >= 2048->0D, pages->03), 07, 0D, 0C, 12, 0F, 0C, 0D. The second 0C cannot be seen: what is not
# clean is dirty, allocated or in use, and those have answered before.


def _with_asid(case: tuple[World, Request]) -> tuple[World, Request]:
    """ACTIVATE of a free ASID on a machine of two core complexes."""
    w, r = case
    w.cores, w.asids = [Core() for _ in range(16)], [dict(states) for states in w.asids * 2]
    r.fields["asid"] = 5
    return w, r


def _carries() -> Change:
    """A page somewhere carries the ASID."""

    def act(w: World, r: Request) -> None:
        w.pages[SRC] = Page("GUEST_INVALID", asid=min(r.asid, 1023) or 1)  # an entry holds 10 bits

    return Change("pages carry the ASID", act)


def _owned(w: World, r: Request) -> bool:
    return any(state in ("ALLOCATED", "IN_USE") for state in w.asid(r.asid))


def _activated(w: World, r: Request) -> None:
    one = w.guest(r.gctx_paddr)
    one.asid = r.asid
    w.set_asid(r.asid, "IN_USE" if one.gstate == "RUNNING" else "ALLOCATED")


PAGES_OF_ASID = Row("pages carry the ASID", 0x03, lambda w, r: w.of_asid(r.asid), [_carries()])
TWO_SOCKETS = Row(
    "SINGLE_SOCKET on two sockets", 0x07,
    lambda w, r: w.sockets == 2 and bool(w.guest(r.gctx_paddr).policy & SINGLE_SOCKET),
    [both(guest(policy=POLICY | SINGLE_SOCKET), world(sockets=2))],
)  # fmt: skip
ASID_OUT = Row(
    "ASID 0 or above the limit", 0x0D, lambda w, r: not 0 < r.asid <= ASID_LIMIT,
    [ask(asid=0), ask(asid=ASID_LIMIT + 1), ask(asid=ASID_COUNTERS - 1)],
)  # fmt: skip
ACTIVATE = Spec(
    0x91, lambda: _with_asid(of_guest(asid=0)),
    [
        *prefix(),
        gstate_row("LAUNCH", "RUNNING"),
        Row("ASID without a counter", 0x0D, lambda w, r: r.asid >= ASID_COUNTERS,
            [ask(asid=ASID_COUNTERS), ask(asid=0xFFFFFFFF)]),
        PAGES_OF_ASID,
        TWO_SOCKETS,
        ASID_OUT,
        Row("ASID owned", 0x0C, _owned,
            [asid_is("ALLOCATED"), asid_is("IN_USE"), asid_is("ALLOCATED", True)]),
        Row("guest has an ASID", 0x12, lambda w, r: w.guest(r.gctx_paddr).asid != 0, [guest(asid=7)]),
        Row("ASID dirty", 0x0F, lambda w, r: "DIRTY" in w.asid(r.asid), [asid_is("DIRTY"), asid_is("DIRTY", True)]),
        Row("ASID of plain SEV", 0x0D, lambda w, r: r.asid >= MIN_SEV_ASID,
            [ask(asid=MIN_SEV_ASID), ask(asid=ASID_LIMIT)]),
    ],
    _activated, 0xC,
    buffer={"gctx_paddr": (0, 64), "asid": (8 * 8, 32)},
)  # fmt: skip


# ACTIVATE_EX, 20: 0:len=20h 4:rsvd 8:gctx 10:asid 14:numids 18:ids_paddr. len->16; [P S G]; 02; (if inactive) pages
# with ASID->03; asid->0D; unsupported->15; numids 0 or >1024->16; APIC id not present->03; SINGLE_SOCKET: MA not
# active, or other socket than MA or than before, or both->07; then sec 3.4. only listed CCX (accumulate); may be
# repeated with same ASID, other ASID->12. That an active guest's own ASID passes 0C is inferred from the repetition.
ACTIVATE_EX_RESERVED = ((32, 63),)


def _activate_ex() -> tuple[World, Request]:
    """On a machine of two sockets with a core complex each, and for a guest whose migration agent is active."""
    w, r = _with_asid(of_guest("LAUNCH", 0, length=0x20, numids=1, ids_paddr=LIST))
    w.sockets, w.guests[GCTX].ma = 2, AGENT
    w.guests[AGENT], w.pages[AGENT] = Guest("RUNNING", 9, POLICY), Page("CONTEXT", vmsa=True)
    w.asids[0][9] = "IN_USE"
    w.guest_count = 2
    r.memory["apic_ids"] = [0]
    return w, r


def _leaves_its_socket(w: World, r: Request) -> bool:
    """SINGLE_SOCKET: the complexes asked for, those that it has and those of its agent, which must be active."""
    one = w.guest(r.gctx_paddr)
    if not one.policy & SINGLE_SOCKET:
        return False
    agent = w.guests[one.ma].asid if one.ma is not None else 0
    held = {n for n, states in enumerate(w.asids) if any(asid and states.get(asid) for asid in (one.asid, agent))}
    return (one.ma is not None and agent == 0) or len(held | {apic_id // 8 for apic_id in r.apic_ids}) > 1


def _on_one_socket(*changes: Change) -> Change:
    return both(guest(policy=POLICY | SINGLE_SOCKET), *changes)


def _agent(asid: int) -> Change:
    def act(w: World, r: Request) -> None:
        w.guests[AGENT].asid = asid

    return Change(f"agent's ASID {asid}", act)


def _active_on(complex_: int) -> Change:
    """The guest has the ASID already, on one complex."""

    def act(w: World, r: Request) -> None:
        w.guests[GCTX].asid = r.asid
        w.asids[complex_][r.asid] = "ALLOCATED"

    return Change(f"active on complex {complex_}", act)


def _own(w: World, r: Request) -> bool:
    return w.guest(r.gctx_paddr).asid == r.asid


def _activated_ex(w: World, r: Request) -> None:
    one = w.guest(r.gctx_paddr)
    one.asid = r.asid
    for apic_id in r.apic_ids:
        w.asids[apic_id // 8][r.asid] = "IN_USE" if one.gstate == "RUNNING" else "ALLOCATED"


ACTIVATE_EX = Spec(
    0x95, _activate_ex,
    [
        length_row(0x20),
        *prefix(ACTIVATE_EX_RESERVED),
        gstate_row("LAUNCH", "RUNNING"),
        Row("pages carry the ASID", 0x03, lambda w, r: w.guest(r.gctx_paddr).asid == 0 and w.of_asid(r.asid),
            [_carries()]),
        ASID_OUT,
        Row("unsupported", 0x15, lambda w, r: "no ACTIVATE_EX" in w.faults, [fault("no ACTIVATE_EX")]),
        Row("numids", 0x16, lambda w, r: not 0 < r.numids <= 1024, [ask(numids=0), ask(numids=1025)]),
        Row("APIC id not present", 0x03, lambda w, r: any(i >= len(w.cores) for i in r.apic_ids),
            [ask(apic_ids=[16]), ask(apic_ids=[511])]),
        Row("SINGLE_SOCKET on two", 0x07, _leaves_its_socket,
            [_on_one_socket(ask(apic_ids=[8])), _on_one_socket(ask(numids=2, apic_ids=[0, 8]), guest(ma=None)),
             _on_one_socket(_agent(0)), _on_one_socket(guest(ma=None), ask(apic_ids=[8]), _active_on(0))]),
        Row("ASID owned", 0x0C, lambda w, r: not _own(w, r) and _owned(w, r),
            [asid_is("ALLOCATED"), asid_is("IN_USE")]),
        Row("guest has another ASID", 0x12, lambda w, r: w.guest(r.gctx_paddr).asid != 0 and not _own(w, r),
            [guest(asid=7)]),
        Row("ASID dirty", 0x0F, lambda w, r: "DIRTY" in w.asid(r.asid), [asid_is("DIRTY")]),
        Row("ASID of plain SEV", 0x0D, lambda w, r: r.asid >= MIN_SEV_ASID, [ask(asid=MIN_SEV_ASID)]),
    ],
    _activated_ex, 0x20, ACTIVATE_EX_RESERVED,
    buffer={
        "length": (0, 32), "gctx_paddr": (8 * 8, 64), "asid": (0x10 * 8, 32), "numids": (0x14 * 8, 32),
        "ids_paddr": (0x18 * 8, 64),
    },
)  # fmt: skip

# GUEST_STATUS, 10: 0:gctx 8:status_paddr. reserved/cross-page->16; S; G; status page not Firmware/Default->1A
GUEST_STATUS = Spec(
    0x92, lambda: _with_status(of_guest("RUNNING")),
    [
        *low_rows("gctx_paddr"),
        Row("status crosses its page", 0x16, lambda w, r: r.status_paddr % PAGE + 32 > PAGE,
            [ask(status_paddr=OUT + PAGE - 31)]),
        NOT_INIT, *address_rows("status_paddr", 32), *prefix()[-4:],
        writable_row("status_paddr"),
    ],
    size=0x10,
    buffer={"gctx_paddr": (0, 64), "status_paddr": (8 * 8, 64)},
)  # fmt: skip


def _with_status(case: tuple[World, Request]) -> tuple[World, Request]:
    w, r = case
    w.pages[OUT] = Page("FIRMWARE")
    r.fields["status_paddr"] = OUT
    return w, r


SPECS = {
    "SNP_GCTX_CREATE": GCTX_CREATE, "SNP_DECOMMISSION": DECOMMISSION, "SNP_ACTIVATE": ACTIVATE,
    "SNP_ACTIVATE_EX": ACTIVATE_EX, "SNP_GUEST_STATUS": GUEST_STATUS,
}  # fmt: skip
