"""The access-check table as a full product, each row executed on a machine, against its transcription.

Guests reach the page by their own tables and a nested leaf of each size, as data, as code and as a table of theirs.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.checks import AccessKind
from snpbook.hardware.exits import GuestException, HostPageFault, Npf
from snpbook.hardware.iommu import DmaBlocked
from snpbook.hardware.ports import Device
from snpbook.hardware.rmp import Rmp
from snpbook.hardware.rmp_range import RmpRange
from tests.hardware.guests import ASID, LONG_MODE, PAGE, RIGHTS, Bench
from tests.reference.access import ACTORS, GRANTED, IOMMU, NOT_VALIDATED, Outcome, access
from tests.reference.rmp import Entry, ReferenceRmp
from tests.sampling import sampled

C = 1 << 51
BASE, BEYOND, ENTRIES = 0x800, 0x2400, 0x2400
"""The 2 MB region under test, one without entries, and how many entries this machine's table has."""
TABLES = 0xC00
"""The system pages of the guest's tables, which are guest pages 0 to 3."""
WINDOWS = {1: 0x200, 512: 0x400, 512 * 512: (1 << 18) + BASE}
"""For each size of the nested leaf, the guest page that is page BASE."""
BEYOND_WINDOWS = {1: 0x600, 512: 0xA00, 512 * 512: (1 << 18) + BEYOND}
OFFSETS = (0, 5)
SEV = {"guest": (0, 0, 0), "sev": (1, 0, 0), "sev-es": (1, 1, 0), "snp": (1, 1, 1)}

STATES: dict[str, dict[str, Any]] = {
    "hypervisor": {},
    "hv-fixed": {"immutable": True},
    "firmware": {"assigned": True, "immutable": True},
    "reclaim": {"assigned": True},
    "neighbour": {"neighbour": True},
    "valid": {"assigned": True, "asid": ASID, "validated": True},
    "invalid": {"assigned": True, "asid": ASID},
    "pre-swap": {"assigned": True, "asid": ASID, "validated": True, "immutable": True},
    "pre-guest": {"assigned": True, "asid": ASID, "immutable": True},
    "vmsa": {"assigned": True, "asid": ASID, "validated": True, "vmsa": True},
    "another's": {"assigned": True, "asid": ASID + 1, "validated": True},
    "elsewhere": {"assigned": True, "asid": ASID, "validated": True, "away": 1},
    "elsewhere, invalid": {"assigned": True, "asid": ASID, "away": 512},
    "large": {"assigned": True, "asid": ASID, "validated": True, "large": True},
    "large, invalid": {"assigned": True, "asid": ASID, "large": True},
    "large, another's": {"assigned": True, "asid": ASID + 1, "validated": True, "large": True},
    "large, elsewhere": {"assigned": True, "asid": ASID, "validated": True, "large": True, "away": 512},
    "large, pre-swap": {"assigned": True, "asid": ASID, "validated": True, "large": True, "immutable": True},
    "uncovered": {"uncovered": True},
}
RIGHT_BYTES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15)


@dataclass(frozen=True, slots=True)
class Row:
    """One access: `vmpl` has the `rights`, all others the opposite."""

    actor: str
    kind: str
    c_bit: bool
    state: str
    offset: int
    mapping: int
    cpl: int = 0
    vmpl: int = 0
    rights: int = 15

    def entries(self, gfn: int) -> dict[int, Entry]:
        """The entries of the region, for a page that the access reaches as guest page `gfn`."""
        fields = dict(STATES[self.state])
        if fields.pop("uncovered", False):
            return {}
        if fields.pop("neighbour", False):
            return {BASE + 77: Entry(assigned=True, asid=ASID + 1)}
        rights = [15 & ~self.rights] * 4
        rights[self.vmpl] = self.rights
        large, gfn = fields.get("large", False), gfn + fields.pop("away", 0)
        entry = Entry(**fields, gfn=(gfn - large * self.offset) * bool(fields.get("asid")), vmpl=rights)
        if not large:
            return {BASE + self.offset: entry}
        return {BASE: entry, **{BASE + i: Entry(assigned=True) for i in range(1, 512)}}

    @property
    def page(self) -> int:
        return (BEYOND if self.state == "uncovered" else BASE) + self.offset

    @property
    def gfn(self) -> int:
        windows = BEYOND_WINDOWS if self.state == "uncovered" else WINDOWS
        return windows[self.mapping] + self.offset


DATA = [("read", False), ("read", True), ("write", False), ("write", True)]
OTHERS = [("fetch", False), ("fetch", True), ("walk", True), ("ad-update", True)]
PLACES = list(itertools.product(STATES, OFFSETS, WINDOWS))
ROWS = [
    *(
        Row(actor, kind, False, state, offset, mapping)
        for actor in ("host", "device")
        for kind in ("read", "write")
        for state, offset, mapping in PLACES
    ),
    *(
        Row(actor, kind, c_bit, state, offset, mapping, cpl)
        for actor in ("guest", "sev", "sev-es")
        for (kind, c_bit), (state, offset, mapping), cpl in itertools.product(DATA + OTHERS, PLACES, (0, 3))
    ),
    *(
        Row("snp", kind, c_bit, state, offset, mapping, cpl, vmpl, rights)
        for (kind, c_bit), (state, offset, mapping) in itertools.product(DATA + OTHERS, PLACES)
        for cpl, vmpl, rights in itertools.product((0, 3), range(4), RIGHT_BYTES)
    ),
]


class Stage:
    """A machine with one guest of a kind, whose tables reach the pages under test."""

    def __init__(self, actor: str) -> None:
        self.actor, self.bench = actor, Bench()
        machine = self.bench.machine
        base = machine.rmp.where.base
        machine.rmp = Rmp(machine.dram, RmpRange(base, base + 0x4000 + 16 * ENTRIES - 1))
        machine.iommu.snp_enabled = True
        self.device, self.model = Device(machine), ReferenceRmp(ENTRIES)
        for gfn in range(4):
            self.bench.map(gfn, TABLES + gfn)
            if actor == "snp":
                self.bench.assign(TABLES + gfn, gfn, vmpl=0x0F0F0F0F)
        for windows, page in ((WINDOWS, BASE), (BEYOND_WINDOWS, BEYOND)):
            self.bench.map(windows[512], page, level=1)
            for offset in OFFSETS:
                self.bench.map(windows[1] + offset, page + offset)
        self.bench.map(1 << 18, 0, level=2)
        if actor not in SEV:
            return
        sev, sev_es, snp = SEV[actor]
        self.key, c = ASID * sev, C * sev
        for gfn, words in enumerate(([PAGE | RIGHTS | c], [2 * PAGE | RIGHTS | c], [3 * PAGE | RIGHTS | c])):
            self.put(TABLES + gfn, [word | 0x20 for word in words])
        self.gfns = [
            window[size] + offset for window in (WINDOWS, BEYOND_WINDOWS) for size in WINDOWS for offset in OFFSETS
        ]
        self.put(TABLES + 3, [gfn * PAGE | RIGHTS | 0x60 | bit for gfn in self.gfns for bit in (0, c)])
        self.core = self.bench.core({"sev": sev, "sev_es": sev_es}, **LONG_MODE, cr3=0, sev_features=snp)

    def put(self, page: int, words: list[int]) -> None:
        data = np.zeros(512, "<u8")
        data[: len(words)] = words
        self.bench.machine.encryption.write(self.key, page * PAGE, data.tobytes())

    def set(self, row: Row) -> None:
        """Give the table the row's entries, and none besides in its region."""
        self.model.table = row.entries(row.gfn)
        self.model.recount()
        raw = np.zeros((512, 2), np.uint64)
        for page, entry in self.model.table.items():
            raw[page - BASE] = entry.raw()
        self.bench.machine.rmp.store(range(BASE, BASE + 512), raw)

    def act(self, row: Row) -> Outcome:
        """The access, on the machine."""
        if row.actor in SEV:
            return self.guest(row)
        spa, mapping = row.page * PAGE + 8, row.mapping * PAGE
        if row.kind == "read":
            read = self.bench.cpu.read if row.actor == "host" else self.device.dma_read
            assert len(read(spa, 8)) == 8
            return GRANTED
        try:
            write: Any = self.bench.cpu.write if row.actor == "host" else self.device.dma_write
            write(spa, b"x", mapping=mapping)
        except (HostPageFault, DmaBlocked) as caught:
            refusal = caught
        else:
            return GRANTED
        assert refusal.spa == row.page * PAGE
        return ("#PF", int(refusal.error)) if isinstance(refusal, HostPageFault) else IOMMU

    def guest(self, row: Row) -> Outcome:
        core = self.core
        core.registers.update(vmpl=row.vmpl, cpl=row.cpl)
        virtual, kind = 2 * self.gfns.index(row.gfn) + row.c_bit, AccessKind.READ
        if row.kind in ("walk", "ad-update"):
            # The page is the root table: empty, which is #PF once it is read; or in order but for its accessed bit.
            virtual = 0
            self.put(row.page, [PAGE | RIGHTS | C * bool(self.key)] if row.kind == "ad-update" else [])
            core.load("cr3", row.gfn * PAGE)
        else:
            kind = {"read": AccessKind.READ, "write": AccessKind.WRITE, "fetch": AccessKind.FETCH}[row.kind]
            core.load("cr3", 0)
        found = core.translate(np.array([virtual], np.uint64), kind)
        if row.kind == "ad-update":
            stored = int.from_bytes(self.bench.machine.encryption.read(self.key, row.page * PAGE, 8), "little")
            if stored & 0x20:
                return GRANTED
        if isinstance(found.fault, Npf):
            assert found.fault.gpa == row.gfn * PAGE
            return "NPF", int(found.fault.error)
        if isinstance(found.fault, GuestException):
            assert found.fault.address == virtual * PAGE
            empty = row.kind == "walk" and found.fault.vector == 14
            assert empty or found.fault.vector == 29
            return GRANTED if empty else ("#VC", found.fault.error)
        assert (found.pages.tolist(), found.gfns.tolist()) == ([row.page], [row.gfn])
        return GRANTED


def expected(row: Row, model: ReferenceRmp) -> Outcome:
    """The oracle's answer; a table is read before its bits are set."""
    c_bit = row.c_bit and row.actor not in ("host", "device", "guest")
    operands = (c_bit, model, row.page, row.gfn, ASID, row.vmpl, row.cpl, row.mapping)
    if row.kind == "ad-update":
        outcome = access(row.actor, "walk", *operands)
        if outcome != GRANTED:
            return outcome
    return access(row.actor, row.kind, *operands)


def compare(mine: Stage, count: int) -> set[str]:
    """A sample of the rows of an actor, or all of them; the outcomes that were seen."""
    seen = set()
    for row in sampled([row for row in ROWS if row.actor == mine.actor], count):
        mine.set(row)
        wanted = expected(row, mine.model)
        assert mine.act(row) == wanted, row
        seen.add(wanted[0])
    return seen


@pytest.mark.parametrize("actor", ACTORS)
def test_every_row(actor: str) -> None:
    assert compare(Stage(actor), 700 if actor == "snp" else 300) == OUTCOMES[actor]


OUTCOMES = {
    "host": {"GRANTED", "#PF"},
    "device": {"GRANTED", "IOMMU"},
    "guest": {"GRANTED", "NPF"},
    "sev": {"GRANTED", "NPF"},
    "sev-es": {"GRANTED", "NPF"},
    "snp": {"GRANTED", "NPF", NOT_VALIDATED[0]},
}


def test_the_product_is_complete() -> None:
    assert len(ROWS) == len(set(ROWS)) > 70_000
