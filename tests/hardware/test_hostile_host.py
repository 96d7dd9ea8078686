"""A hostile host and two guests in the same memory: whatever the host does, what the RMP promises holds at every step.

The host maps, assigns, splits and writes as it likes, a device writes too, and the real firmware launches and
reclaims. Each guest validates a page once, stops at the double-validation alarm, and remembers what it wrote.
"""

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snpbook.hardware.checks import Access, check_guest
from snpbook.hardware.exits import HostPageFault
from snpbook.hardware.host_instructions import NewState, psmash
from snpbook.hardware.iommu import DmaBlocked
from snpbook.hardware.page_instructions import pvalidate, rmpadjust
from snpbook.hardware.ports import Device
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.status import Status
from tests.machines import FREE, PAGE, Board
from tests.sampling import ALL

FIRST, REGIONS = FREE >> 12, 3
COUNT = 512 * REGIONS
PAGES = range(FIRST, FIRST + COUNT)
ASIDS = (1, 2)
GCTXS = {1: 17 << 20, 2: (17 << 20) + PAGE}
GFN, LARGE_PAGE = 0x2000, 2 << 20
ASSIGNED, LARGE, IMMUTABLE, VALIDATED = 1 << 0, 1 << 1, 1 << 2, 1 << 62

offsets = st.sampled_from([0, 0, 1, 1, 2, 511, 300])
places = st.builds(lambda region, offset: 512 * region + offset, st.integers(0, REGIONS - 1), offsets)
"""A page, counted from the first; a guest page is counted likewise."""
asids = st.sampled_from(ASIDS)
vmpls = st.integers(0, 3)
picks = st.integers(0, 1 << 16)


class HostileHost(RuleBasedStateMachine):
    """One machine, its firmware with two guests in launch, and 6 MB that everybody fights over."""

    def __init__(self) -> None:
        super().__init__()
        self.board = Board(mapping=True).initialise()
        for asid, gctx in GCTXS.items():
            self.board.start(gctx, asid)
        self.rmp, self.device = self.board.machine.rmp, Device(self.board.machine)
        self.mapping: dict[tuple[int, int], tuple[int, bool]] = {}
        """The host's nested tables: for an ASID and a guest page (or its 2 MB) a system page, and whether as 2 MB."""
        self.believed: dict[int, set[int]] = {asid: set() for asid in ASIDS}
        """The guest pages that a guest has validated and not given back."""
        self.written: dict[tuple[int, int], bytes] = {}
        self.alarmed: set[int] = set()
        self.cause = ""
        self.before = self.expanded()
        self.raw: dict[int, bytes] = {}
        """What DRAM holds in pages that somebody wrote, to see who changes it."""

    # What the table says, each 4 KB page for itself.

    def expanded(self) -> dict[str, Any]:
        pages = np.arange(FIRST, FIRST + COUNT, dtype=np.uint64)
        own, answer = self.rmp.load(PAGES).copy(), self.rmp.effective(pages)
        low = answer[:, 0]
        return {
            "own": own,
            "assigned": answer[:, 0] & np.uint64(ASSIGNED) != 0,
            "valid": answer[:, 0] & np.uint64(VALIDATED) != 0,
            "asid": (low >> np.uint64(51) & np.uint64(1023)).astype(int),
            "gfn": (low >> np.uint64(12) & np.uint64((1 << 39) - 1)).astype(int),
            "large": answer[:, 0] & np.uint64(LARGE) != 0,
            "rights": answer[:, 1],
        }

    def translate(self, asid: int, gfn: int) -> tuple[int, bool] | None:
        """The host's mapping of a guest page: a page of the table and whether a 2 MB leaf maps it."""
        small = self.mapping.get((asid, gfn))
        if small is not None:
            return small
        base = self.mapping.get((asid, -1 - gfn // 512))
        return None if base is None else (base[0] + gfn % 512, True)

    # The host.

    @rule(page=places, gfn=places, asid=st.sampled_from([0, *ASIDS]), kind=st.integers(0, 3), large=st.booleans())
    def rmpupdate(self, page: int, gfn: int, asid: int, kind: int, large: bool) -> None:
        self.cause = "RMPUPDATE"
        new = NewState(assigned=kind > 0, asid=asid if kind else 0, immutable=kind == 3, large=large)
        if large:
            page, gfn = page & -512, gfn & -512
        self.board.cpu.rmpupdate(
            np.array([FIRST + page], np.uint64), np.array([(GFN + gfn) if asid and kind else 0], np.uint64), new
        )

    @rule(page=places, asid=asids, gfn=places, large=st.booleans())
    def give(self, page: int, asid: int, gfn: int, large: bool) -> None:
        """What an honest host does too: assign and map."""
        self.map(asid, gfn, page, large)
        self.rmpupdate(page, gfn, asid, 1, large)

    @rule(asid=asids, gfn=places, page=places, large=st.booleans())
    def map(self, asid: int, gfn: int, page: int, large: bool) -> None:
        self.cause = "map"
        if large:
            self.mapping[asid, -1 - (GFN + gfn) // 512] = (FIRST + (page & -512), True)
            self.mapping.pop((asid, GFN + gfn), None)
        else:
            self.mapping[asid, GFN + gfn] = (FIRST + page, False)

    # Aimed blows: at pages that a guest holds for its own.

    def held(self, asid: int, pick: int) -> int:
        """One of the guest pages that a guest has validated, from the first of the table's."""
        known = sorted(self.believed[asid])
        return known[pick % len(known)] - GFN if known else 0

    @rule(asid=asids, pick=picks, page=places)
    def twin(self, asid: int, pick: int, page: int) -> None:
        """A second page for a guest page that has one: the double mapping."""
        self.give(page, asid, self.held(asid, pick) % COUNT, False)

    @rule(asid=asids, pick=picks, other=picks)
    def remap(self, asid: int, pick: int, other: int) -> None:
        """Another page of the same guest."""
        pages = np.flatnonzero(self.before["asid"] == asid)
        if len(pages):
            self.map(asid, self.held(asid, pick), int(pages[other % len(pages)]), bool(other % 2))

    @rule(pick=picks, change=st.integers(0, 3))
    def retarget(self, pick: int, change: int) -> None:
        """RMPUPDATE of a validated page that changes one thing, or nothing."""
        pages = np.flatnonzero(self.before["valid"])
        if len(pages):
            page = int(pages[pick % len(pages)])
            asid, gfn = int(self.before["asid"][page]), int(self.before["gfn"][page]) - GFN
            large = bool(self.before["large"][page])
            asid = 3 - asid if change == 1 else asid
            gfn = gfn + 512 * large + 1 - large if change == 2 else gfn
            self.rmpupdate(page, gfn, asid, 1, large != (change == 3))

    @rule(page=places)
    def psmash(self, page: int) -> None:
        self.cause = "PSMASH"
        psmash(self.rmp, np.array([FIRST + (page & -512)], np.uint64))

    @rule(page=places, value=st.integers(0, 255))
    def host_write(self, page: int, value: int) -> None:
        self.cause = "host write"
        spa, assigned = (FIRST + page) * PAGE, bool(self.before["assigned"][page])
        try:
            self.board.cpu.write(spa, bytes([value]) * 16)
        except HostPageFault:
            assert assigned
        else:
            assert not assigned, "a host write reached an assigned page"
            self.raw[page] = self.board.machine.dram.read(spa, PAGE)

    @rule(page=places, value=st.integers(0, 255))
    def device_write(self, page: int, value: int) -> None:
        self.cause = "device write"
        spa, assigned = (FIRST + page) * PAGE, bool(self.before["assigned"][page])
        try:
            self.device.dma_write(spa, bytes([value]) * 16)
        except DmaBlocked:
            assert assigned
        else:
            assert not assigned, "a device's write reached an assigned page"
            self.raw[page] = self.board.machine.dram.read(spa, PAGE)

    @rule(page=places)
    def host_write_in_a_large_mapping(self, page: int) -> None:
        """Through a 2 MB mapping a neighbour's owner counts too."""
        self.cause = "host write"
        region = slice(page & -512, (page & -512) + 512)
        spa, assigned = (FIRST + page) * PAGE, bool(self.before["assigned"][region].any())
        try:
            self.board.cpu.write(spa, b"large", mapping=LARGE_PAGE)
        except HostPageFault:
            assert assigned
        else:
            assert not assigned, "a write through a 2 MB mapping reached a region with an assigned page"
            self.raw[page] = self.board.machine.dram.read(spa, PAGE)

    # The firmware, on the host's behalf.

    @rule(page=places, large=st.booleans())
    def reclaim(self, page: int, large: bool) -> None:
        self.cause = "firmware"
        page = page & -512 if large else page
        self.board.command(Command.SNP_PAGE_RECLAIM, page=FIRST + page, page_size=int(large))

    @rule(page=places, asid=asids, kind=st.sampled_from([LaunchPage.NORMAL, LaunchPage.ZERO, LaunchPage.SECRETS]))
    def launch_update(self, page: int, asid: int, kind: LaunchPage) -> None:
        """A launch validates: the guest then holds the page for validated, if it is the first at its place."""
        self.cause = "firmware"
        large = bool(self.before["large"][page])
        page = page & -512 if large else page
        gfn = int(self.before["gfn"][page])
        covered = range(gfn, gfn + (512 if large else 1))
        if self.believed[asid].intersection(covered):
            return  # the measurement would tell: an honest owner's launch adds a page once
        status = self.board.command(
            Command.SNP_LAUNCH_UPDATE,
            gctx_paddr=GCTXS[asid],
            page_paddr=(FIRST + page) * PAGE,
            page_size=int(large),
            page_type=kind,
        )
        if status is Status.SUCCESS:
            self.believed[asid].update(covered)
            for number in range(page, page + len(covered)):
                self.raw[number] = self.board.machine.dram.read((FIRST + number) * PAGE, PAGE)
                self.written.pop((asid, int(gfn) + number - page), None)

    # The guests.

    def alive(self, asid: int) -> bool:
        return asid not in self.alarmed

    @rule(asid=asids, gfn=places, large=st.booleans())
    def validate(self, asid: int, gfn: int, large: bool) -> None:
        self.pvalidate(asid, GFN + (gfn & -512 if large else gfn), True, large)

    def rescind(self, asid: int, gfn: int, large: bool) -> None:
        self.pvalidate(asid, GFN + (gfn & -512 if large else gfn), False, large)

    @rule(page=places, asid=asids, gfn=places, large=st.booleans(), value=st.binary(min_size=16, max_size=16))
    def accept(self, page: int, asid: int, gfn: int, large: bool, value: bytes) -> None:
        """Host and guest do for once what they should: a page is given, accepted and used."""
        self.give(page, asid, gfn, large)
        self.promises()
        self.validate(asid, gfn, large)
        self.promises()
        self.guest_write(asid, gfn, 0, value)

    @rule(asid=asids, pick=picks)
    def rescind_held(self, asid: int, pick: int) -> None:
        self.rescind(asid, self.held(asid, pick), False)

    @rule(asid=asids, pick=picks)
    def validate_mapped(self, asid: int, pick: int) -> None:
        """A page that the host has mapped, perhaps one that the guest has given back before."""
        mapped = [(gfn, page) for (owner, gfn), page in self.mapping.items() if owner == asid and gfn >= 0]
        if mapped:
            self.pvalidate(asid, mapped[pick % len(mapped)][0], True, False)

    @rule(asid=asids, pick=picks, vmpl=vmpls, value=st.binary(min_size=16, max_size=16))
    def use_held(self, asid: int, pick: int, vmpl: int, value: bytes) -> None:
        """A page that the guest relies on: read what it wrote, and write."""
        self.guest_read(asid, self.held(asid, pick), vmpl)
        self.guest_write(asid, self.held(asid, pick), vmpl, value)

    @rule(
        asid=asids, pick=picks, caller=st.sampled_from([0, 0, 1, 2]), below=st.integers(1, 3), rights=st.integers(0, 15)
    )
    def adjust_held(self, asid: int, pick: int, caller: int, below: int, rights: int) -> None:
        gfn = self.held(asid, pick)
        found = self.translate(asid, GFN + gfn)
        if found is not None:
            self.adjust(asid, gfn, caller, min(caller + below, 3), rights, bool(self.before["large"][found[0] - FIRST]))

    def pvalidate(self, asid: int, gfn: int, validate: bool, large: bool) -> None:
        covered = set(range(gfn, gfn + (512 if large else 1)))
        known = self.believed[asid]
        found = self.translate(asid, gfn)
        if not self.alive(asid) or found is None or (known & covered if validate else not covered <= known):
            return
        self.cause = f"PVALIDATE {asid} {validate}"
        page = np.array([found[0]], np.uint64)
        done = pvalidate(self.rmp, page, np.array([gfn], np.uint64), asid, validate, large)
        if done.fault is not None or done.codes[0]:
            return
        if done.unchanged[0]:
            self.alarmed.add(asid)  # the host has swapped a page: an honest guest stops here
        elif validate:
            known |= covered
        else:
            known -= covered
        for number in covered:
            self.written.pop((asid, number), None)

    @rule(asid=asids, gfn=places, vmpl=vmpls, value=st.binary(min_size=16, max_size=16))
    def guest_write(self, asid: int, gfn: int, vmpl: int, value: bytes) -> None:
        page = self.reach(asid, GFN + gfn, vmpl, 3)
        if page is not None:
            self.cause = f"write {asid}"
            self.board.machine.memory.write(asid, page * PAGE, value)
            self.written[asid, GFN + gfn] = value
            self.raw[page - FIRST] = self.board.machine.dram.read(page * PAGE, PAGE)

    def guest_read(self, asid: int, gfn: int, vmpl: int) -> None:
        """Integrity: what a guest reads is what it wrote last."""
        page = self.reach(asid, GFN + gfn, vmpl, 1)
        if page is not None and (asid, GFN + gfn) in self.written:
            assert self.board.machine.memory.read(asid, page * PAGE, 16) == self.written[asid, GFN + gfn]

    def reach(self, asid: int, gfn: int, vmpl: int, need: int) -> int | None:
        """The page that a private access finds, where the RMP lets it through."""
        found = self.translate(asid, gfn)
        if not self.alive(asid) or found is None:
            return None
        page, large = found
        checked = check_guest(
            self.rmp, np.array([page], np.uint64), np.array([gfn], np.uint64), asid, vmpl, need, large=large
        )
        if checked[0] != Access.GRANTED:
            return None
        assert gfn in self.believed[asid], "a page that the guest never accepted"
        return page

    @rule(asid=asids, gfn=places, caller=vmpls, level=vmpls, rights=st.integers(0, 15), large=st.booleans())
    def adjust(self, asid: int, gfn: int, caller: int, level: int, rights: int, large: bool) -> None:
        gfn = GFN + (gfn & -512 if large else gfn)
        found = self.translate(asid, gfn)
        if not self.alive(asid) or found is None:
            return
        self.cause = f"RMPADJUST {asid}"
        page, held = found[0], int(self.before["rights"][found[0] - FIRST])
        numbers, gfns = np.array([page], np.uint64), np.array([gfn], np.uint64)
        done = rmpadjust(self.rmp, numbers, gfns, asid, caller, level, rights, False, large)
        if done.fault is None and not done.codes[0]:
            assert level > caller
            assert rights & ~(held >> 8 * caller & 0xFF) == 0, "more rights than the caller held"
            after = int(self.rmp.effective(numbers)[0, 1])
            assert after >> 8 * level & 0xFF == rights
            assert (after ^ held) & ~(0xFF << 8 * level) == 0, "another level's rights changed"

    # What holds whatever happened.

    @invariant()
    def promises(self) -> None:
        before, after = self.before, self.expanded()
        new = after["valid"] & ~before["valid"]
        if new.any():
            owners = set(after["asid"][new].tolist())
            allowed = self.cause == "firmware" or self.cause in {f"PVALIDATE {asid} True" for asid in owners}
            assert allowed, f"validated by {self.cause}"
        moved = (after["asid"] != before["asid"]) | ((after["gfn"] != before["gfn"]) & (after["asid"] > 0))
        moved |= (after["large"] != before["large"]) & (self.cause != "PSMASH")
        if self.cause == "RMPUPDATE":
            assert not (after["valid"] & moved).any(), "validation survived a change of owner, GPA or size"
        if self.cause not in ("RMPUPDATE", "firmware"):
            assert not (moved | (after["assigned"] != before["assigned"])).any(), self.cause
        valid = np.flatnonzero(after["valid"] & after["assigned"])
        names = after["asid"][valid] << 40 | after["gfn"][valid]
        assert len(np.unique(names)) == len(names), "two validated pages for one guest page"

        own = after["own"][:, 0].reshape(REGIONS, 512)
        assigned, heads = own & np.uint64(ASSIGNED) != 0, own[:, 0]
        whole = (heads & np.uint64(ASSIGNED | LARGE)) == np.uint64(ASSIGNED | LARGE)
        counts = np.where(whole, 0, assigned[:, 1:].sum(axis=1))
        assert (heads >> np.uint64(3) & np.uint64(511)).tolist() == counts.tolist(), "subpage counts"
        assert assigned[whole].all()
        for asid in ASIDS:
            assert self.rmp.counters(asid) == int((after["asid"] == asid).sum()), "the ASID's counter"
        for page, raw in self.raw.items():
            assert self.board.machine.dram.read((FIRST + page) * PAGE, PAGE) == raw, f"{self.cause} changed a page"
        self.before = after


HostileHost.TestCase.settings = settings(settings.default, stateful_step_count=60, max_examples=1000 if ALL else 50)
test_whatever_a_hostile_host_does = HostileHost.TestCase


def test_the_states_are_reached() -> None:
    """The rules lead somewhere: a random walk meets validated, large, immutable and foreign pages."""
    rng = np.random.default_rng(7)
    machine, seen = HostileHost(), set()
    for _ in range(3000):
        page, gfn = (int(512 * rng.integers(REGIONS) + rng.choice([0, 1, 2, 511])) for _ in range(2))
        asid, large = int(rng.integers(1, 3)), bool(rng.integers(2))
        match rng.integers(9):
            case 0 | 1:
                machine.give(page, asid, gfn, large)
            case 2:
                machine.rmpupdate(page, gfn, asid, int(rng.integers(4)), large)
            case 3 | 4:
                machine.validate(asid, gfn, large)
            case 5:
                machine.guest_write(asid, gfn, 0, bytes(16))
            case 6:
                machine.launch_update(page, asid, LaunchPage.NORMAL)
            case 7:
                machine.psmash(page)
            case 8:
                machine.adjust(asid, gfn, 0, 1, 3, large)
        machine.promises()
        seen |= set(machine.rmp.states(PAGES).tolist())
    wanted = {PageState.HYPERVISOR, PageState.PRE_GUEST, PageState.GUEST_INVALID, PageState.GUEST_VALID}
    assert wanted <= seen
    assert machine.written
