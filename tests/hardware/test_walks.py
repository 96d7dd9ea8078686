"""Both page walks of random guests against the slow oracle: pages, faults, and every accessed and dirty bit."""

import copy
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.checks import AccessKind
from snpbook.hardware.exits import GuestException, Npf
from tests.hardware.guests import ASID, LONG_MODE, PAGE, Bench
from tests.reference.rmp import Entry, ReferenceRmp
from tests.reference.walks import Result, Vcpu
from tests.sampling import ALL

C_BIT, WIDTH, DRAM_WIDTH = 51, 48, 26
GFNS = 48
"""Small guest pages of a random guest; 2 MB more begin at guest page 512."""
LARGE_PAGE, FIRST_PAGE = 0x600, 0x900
"""Where its 2 MB page and its small pages lie in memory."""
ACTORS = {"snp": (1, 1, 1), "sev-es": (1, 1, 0), "sev": (1, 0, 0), "guest": (0, 0, 0)}
"""SEV, SEV-ES and SNPActive of each."""
KINDS = {"read": AccessKind.READ, "write": AccessKind.WRITE, "fetch": AccessKind.FETCH}
RARE = (1 << 63, 1 << 63, 1 << 49, 1 << 45, 1 << 7, 1 << 13, 1 << 12, 1 << 8)
"""Bits that an entry has now and then: no-execute, reserved ones, large."""


class RandomGuest:
    """Nested tables, RMP entries and guest tables drawn at random, in the library and in the oracle."""

    def __init__(self, rng: random.Random, actor: str = "", *, odd: float = 1) -> None:
        self.rng, self.odd, self.bench = rng, odd, Bench()
        self.actor = actor or rng.choice(("snp", "snp", "snp", *ACTORS))
        machine = self.bench.machine
        self.rmp = ReferenceRmp(machine.rmp.entries)
        self.places = rng.sample(range(FIRST_PAGE, FIRST_PAGE + GFNS), GFNS)
        for gfn, page in enumerate(self.places):
            table = gfn < 5  # the guest's tables are mostly sound
            if not self.chance(0.01 if table else 0.03):
                target = 0x9000 if not table and self.chance(0.05) else page
                self.bench.map(gfn, target, self.flags(0.02 if table else 0.06))
            if (self.actor == "snp") != self.chance(0.02 if table else 0.2):
                self.rmp.table[page] = self.entry(gfn, 0.02 if table else 0.2)
        self.bench.map(512, LARGE_PAGE, self.flags(0.05), level=rng.choice((0, 1, 1, 1)))
        self.bench.map(1 << 18, 0, self.flags(0.05), level=2)
        self.large_entries()
        if self.chance(0.1):  # a nested table that is the hypervisor's no more
            self.rmp.table[self.bench.nested_root // PAGE + rng.randrange(5)] = Entry(assigned=True, asid=6)
        self.rmp.recount()
        for page, entry in self.rmp.table.items():
            machine.rmp.store(range(page, page + 1), np.array([entry.raw()], np.uint64))
        self.enter()

    def chance(self, part: float) -> bool:
        return self.rng.random() < part * self.odd

    def flags(self, rare: float) -> int:
        """Present, writable, user, and sometimes fewer or others."""
        bits = self.rng.choice((7, 7, 0x27, 0x67))
        if self.chance(rare):
            bits ^= self.rng.choice((1, 2, 2, 4, 4, *RARE))
        return bits

    def large_entries(self) -> None:
        kind = self.rng.randrange(4)
        if kind == 0:
            self.rmp.table[LARGE_PAGE] = Entry(**self.owned(512), large=True)
            self.rmp.table.update({LARGE_PAGE + i: Entry(assigned=True) for i in range(1, 512)})
        elif kind == 1:
            self.rmp.table.update({LARGE_PAGE + i: Entry(**self.owned(512 + i)) for i in range(5)})
        elif kind == 2:
            self.rmp.table[LARGE_PAGE + self.rng.choice((0, 77))] = Entry(**self.owned(512))

    @staticmethod
    def owned(gfn: int) -> dict[str, Any]:
        return {"assigned": True, "asid": ASID, "gfn": gfn, "validated": True, "vmpl": [15, 15, 7, 11]}

    def entry(self, gfn: int, odd: float) -> Entry:
        wrong: list[dict[str, Any]] = [{"validated": False}, {"asid": 6}, {"gfn": gfn + 1}, {"immutable": True}]
        wrong += [{"vmpl": [rights] * 4} for rights in (1, 2, 4, 5, 9, 14, 0)]
        return Entry(**{**self.owned(gfn), **(self.rng.choice(wrong) if self.chance(odd) else {})})

    def enter(self) -> None:
        """A core with the registers that this guest runs with, the oracle's vCPU with the same, and the tables."""
        rng, (sev, sev_es, snp) = self.rng, ACTORS[self.actor]
        vtom = rng.choice((None, None, 10 * PAGE, 1 << 21)) if snp else None
        vmpl, cpl = rng.randrange(4) if snp else 0, rng.choice((0, 0, 3))
        protect, no_execute = rng.random() < 0.5, rng.random() < 0.8
        self.c = 1 << C_BIT if sev and vtom is None else 0
        registers = {**LONG_MODE, "cr0": 0x80000011 | protect << 16, "efer": 0x1500 | no_execute << 11, "cr3": self.c}
        features = snp | (vtom is not None or not snp) << 1  # without SNP that of vTOM means nothing
        registers |= {"vmpl": vmpl, "cpl": cpl, "sev_features": features, "virtual_tom": vtom or 0}
        self.core = self.bench.core({"sev": sev, "sev_es": sev_es}, **registers)
        self.key = ASID if sev else 0
        self.cpu = Vcpu(
            self.nested_words(),
            {},
            self.rmp,
            self.bench.nested_root,
            cr3=self.c,
            actor=self.actor,
            asid=ASID,
            write_protect=protect,
            no_execute=no_execute,
            c_bit=C_BIT,
            guest_width=WIDTH,
            host_width=DRAM_WIDTH,
            virtual_tom=vtom,
            vmpl=vmpl,
            cpl=cpl,
        )
        for page in (*self.places, LARGE_PAGE):
            self.bench.machine.encryption.write(self.key, page * PAGE, bytes(PAGE))
        self.tables()

    def nested_words(self) -> dict[int, int]:
        found = {}
        for page in self.bench.table_pages:
            words = np.frombuffer(self.bench.machine.dram.read(page * PAGE, PAGE), "<u8")
            found.update({page * PAGE + 8 * int(i): int(words[i]) for i in np.flatnonzero(words)})
        return found

    def put(self, table: int, index: int, gfn: int, rare: float = 0.03, extra: int = 0) -> None:
        page = self.places[gfn] if gfn < GFNS else LARGE_PAGE
        private = bool(self.c) and (page in self.rmp.table) ^ self.chance(0.07)
        word = gfn * PAGE | (self.flags(rare) | extra) ^ private * self.c
        address = self.places[table] * PAGE + 8 * index
        self.bench.machine.encryption.write(self.key, address, word.to_bytes(8, "little"))
        self.cpu.guest[address] = word

    def tables(self) -> None:
        """PML4, PDPT, PD and two page tables in guest pages 0 to 4."""
        rng = self.rng
        self.put(0, 0, 1)
        self.put(0, 511, 1)
        self.put(1, 0, 2)
        self.put(1, 1, 1 << 18, extra=0x80)
        self.put(2, 0, 3)
        self.put(2, 1, 4)
        self.put(2, 2, 512, extra=0x80)
        for index in range(80):
            self.put(3 + index // 40, index % 40, rng.choice((rng.randrange(GFNS), 5 + index // 2)), 0.12)

    def virtual(self) -> list[int]:
        """A run of virtual pages over the two page tables, the large pages, the upper half, and beyond."""
        rng = self.rng
        start = rng.choice((rng.randrange(40), 508 + rng.randrange(40), 1020, 1024, 0xFFFFFF8000000 + rng.randrange(8)))
        start = rng.choice((start,) * 9 + (0x7FFFFFFFE, (1 << 18) + FIRST_PAGE))
        return [(start + i) % 2**52 for i in range(rng.choice((1, 3, 20)))]

    def changed(self) -> list[str]:
        """The words of tables in which memory and the oracle differ."""
        memory, wrong = self.bench.machine.encryption, []
        for key, words in ((0, self.cpu.host), (self.key, self.cpu.guest)):
            for address, word in words.items():
                found = int.from_bytes(memory.read(key, address, 8), "little")
                if found != word:
                    wrong.append(f"{address:#x}: {found:#x}, not {word:#x}")
        return wrong


def shown(fault: Any, actor: str) -> Any:
    """A fault of the library in the oracle's words."""
    if isinstance(fault, Npf):
        return ("NPF", int(fault.error)), fault.gpa
    assert isinstance(fault, GuestException)
    name = {13: "#GP", 14: "#PF", 29: "#VC"}[fault.vector]
    return (name, int(fault.error)), fault.address


def wanted(result: Result, virtual: int, actor: str) -> Any:
    """An oracle's fault; with SEV-ES an #NPF of a reserved bit becomes #VC in the guest (APM2 15.35)."""
    kind, code = result.outcome
    if kind == "NPF" and code & 8 and actor in ("snp", "sev-es"):
        return ("#VC", 0x400), virtual * PAGE
    return result.outcome, result.address


def compare(guest: RandomGuest) -> None:
    """One access of the guest to a run of pages, in both; the TLB holds nothing."""
    virtual, kind = guest.virtual(), guest.rng.choice(tuple(KINDS))
    results: list[Result] = []
    for number in virtual:
        results.append(guest.cpu.access(number, kind))
        if results[-1].outcome[0] != "GRANTED":
            break
    guest.core.flush_tlb()
    found = guest.core.translate(np.array(virtual, np.uint64), KINDS[kind])
    granted = [result for result in results if result.outcome[0] == "GRANTED"]
    columns = (found.pages, found.gfns, found.private, found.entries["large"])
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert rows == [(result.page, result.gfn, result.private, result.mapping > 1) for result in granted]
    assert found.keys.tolist() == [ASID if result.private else 0 for result in granted]
    assert guest.changed() == []
    stop = len(granted)
    if stop == len(virtual):
        assert found.fault is None
        return
    assert shown(found.fault, guest.actor) == wanted(results[stop], virtual[stop], guest.actor)
    if isinstance(found.fault, Npf):
        for i in range(1, found.fault.count):
            result = copy.deepcopy(guest.cpu).access(virtual[stop + i], kind)
            assert (result.outcome, result.address) == (results[stop].outcome, results[stop].address + i * PAGE)


@given(rng=st.randoms(use_true_random=False))
def test_random_guests(rng: random.Random) -> None:
    guest = RandomGuest(rng)
    for _ in range(20 if ALL else 8):
        compare(guest)


@pytest.mark.parametrize("actor", ACTORS)
@given(rng=st.randoms(use_true_random=False))
def test_sound_guests(actor: str, rng: random.Random) -> None:
    """Tables and entries with few mistakes, so that runs get far."""
    guest = RandomGuest(rng, actor, odd=0.15)
    for _ in range(10 if ALL else 4):
        compare(guest)
