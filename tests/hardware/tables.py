"""Random tables and random operations, carried out by the library and by the reference, and compared field by field."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from snpbook.hardware import checks, host_instructions, page_instructions
from snpbook.hardware.checks import Access
from snpbook.hardware.dram import Dram
from snpbook.hardware.rmp import Rmp
from snpbook.hardware.rmp_range import RmpRange, RmpSegments
from snpbook.spec.pages import VmplPermission
from tests.reference.rmp import Entry, ReferenceRmp

ENTRIES = 4 * 512
BASE = 0x2000
SIZE = 0x4000 + 16 * ENTRIES
ASIDS = (1, 2, 509)
SHIFTS = (0, 1, 512, 0x49800, (1 << 39) - 2000)

LIBRARY = SimpleNamespace(
    rmpupdate=host_instructions.rmpupdate,
    psmash=host_instructions.psmash,
    rmpread=host_instructions.rmpread,
    pvalidate=page_instructions.pvalidate,
    rmpadjust=page_instructions.rmpadjust,
    rmpquery=page_instructions.rmpquery,
    check_guest=checks.check_guest,
    check_write=checks.check_write,
)


def table(mapping: bool = True) -> Rmp:
    """An empty table with `ENTRIES` entries."""
    return Rmp(Dram(0x200000, mapping=mapping), RmpRange(BASE, BASE + SIZE - 1))


SEGMENT = 1024
"""Pages of a segment: four regions of 2 MB lie in three segments, of which the last two are half covered."""


def segments() -> Rmp:
    """An empty table of as many entries in three segments, with a hole in the middle."""
    megabyte = 1 << 20
    where = RmpSegments(0, 4 * megabyte, (megabyte, 0x108000, 0x110000), (4 * megabyte, 2 * megabyte, 2 * megabyte))
    return Rmp(Dram(0x200000), where)


def placed(rmp: Rmp, pages: Any) -> Any:
    """Where the reference's pages lie in a table: those without an entry, in segments, in the hole."""
    if isinstance(rmp.where, RmpRange):
        return pages
    numbers = np.array(pages, np.uint64)
    hole = np.uint64(SEGMENT + SEGMENT // 2)
    moved = np.where(numbers >= hole, numbers + np.uint64(SEGMENT // 2), numbers)
    return np.where(numbers >= ENTRIES, hole + numbers % np.uint64(SEGMENT // 2), moved)


def words(model: ReferenceRmp) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The reference's raw entries; those that it has never looked at are zero."""
    result = np.zeros((model.entries, 2), np.uint64)
    for page, entry in model.table.items():
        result[page] = entry.raw()
    return result


def copy(model: ReferenceRmp, rmp: Rmp) -> None:
    """Give the library's table the reference's contents."""
    rmp.store(placed(rmp, range(ENTRIES)), words(model))
    for asid, count in model.counters.items():
        rmp.dram.write(rmp.where.base + 8 * asid, count.to_bytes(8, "little"))


def assert_same(model: ReferenceRmp, rmp: Rmp) -> None:
    """Every entry bit for bit, and the counters."""
    mine, theirs = rmp.load(placed(rmp, range(ENTRIES))), words(model)
    wrong = np.flatnonzero((mine != theirs).any(1))
    assert not len(wrong), f"page {wrong[0]:#x}: {mine[wrong[0]]} instead of {model.entry(int(wrong[0]))}"
    counters = {asid: rmp.counters(asid) for asid in ASIDS}
    assert counters == {asid: model.counters.get(asid, 0) for asid in ASIDS}


def _gfn(rng: random.Random, page: int) -> int:
    return (page + rng.choice(SHIFTS)) % (1 << 39)


def _entry(rng: random.Random, page: int) -> Entry:
    """A page in one of the states that the machine knows."""
    kind = rng.randrange(9)
    if kind < 4:
        return [
            Entry(immutable=True),
            Entry(assigned=True, immutable=True, lock=rng.random() < 0.5),
            Entry(assigned=True),
            Entry(assigned=True, immutable=True, lock=True, vmsa=True),
        ][kind]
    return Entry(
        assigned=True,
        asid=rng.choice(ASIDS),
        gfn=_gfn(rng, page),
        immutable=rng.random() < 0.25,
        validated=rng.random() < 0.7,
        vmsa=rng.random() < 0.2,
        vmpl=[rng.choice((15, rng.randrange(32))) for _ in range(4)],
    )


def fill(model: ReferenceRmp, rng: random.Random) -> None:
    """Each 2 MB region: the hypervisor's, one 2 MB entry, some pages, or a run of pages."""
    for head in range(0, model.entries, 512):
        kind = rng.randrange(5)
        if kind == 1:
            entry = _entry(rng, head)
            if entry.assigned:
                entry.large = True
                model.table.update({head + i: Entry(assigned=True) for i in range(1, 512)})
            model.table[head] = entry
        elif kind in (2, 3):
            for page in [head, *(head + rng.randrange(512) for _ in range(6))]:
                model.table[page] = _entry(rng, page)
        elif kind == 4:
            first, entry = rng.randrange(500), _entry(rng, 0)
            for page in range(head + first, head + rng.randrange(first + 1, 512)):
                gfn = (page + entry.gfn) % (1 << 39)
                model.table[page] = replace(entry, gfn=gfn, vmpl=list(entry.vmpl))
    model.recount()


def pages(rng: random.Random, model: ReferenceRmp, *, runs: bool = True) -> Any:
    """A run or an array of page numbers: near entries that exist, repeated, out of range."""
    known = [page for page, entry in model.table.items() if entry.assigned or entry.immutable] or [0]
    kind = rng.randrange(4)
    if runs and kind == 0:
        start = max(rng.choice(known) - rng.randrange(4), 0)
        return range(start, start + rng.choice((1, 2, 40, 700)))
    if runs and kind == 1:
        start = rng.choice((0, 512, 1024, 3))
        return range(start, start + 512 * rng.randrange(1, 6), 512)
    numbers = [_page(rng, known) for _ in range(rng.choice((1, 1, 2, 9, 30)))]
    if kind == 3:
        numbers.sort()
    return np.array(numbers, np.uint64)


def _page(rng: random.Random, known: list[int]) -> int:
    page = rng.choice(known)
    kind = rng.randrange(8)
    return [page, page, page, page - page % 512, page + 1, rng.randrange(ENTRIES), ENTRIES + rng.randrange(9), page][
        kind
    ]


def gfns(rng: random.Random, model: ReferenceRmp, places: Any) -> Any:
    """Guest pages: mostly those that the entries name."""
    if isinstance(places, range) and rng.random() < 0.3:
        shift = rng.choice(SHIFTS[:-1])
        return range(places.start + shift, places.stop + shift, places.step)
    matching = rng.random() < 0.7
    answers = [model.answering(int(p))[1] if p < model.entries else 0 for p in places]
    return np.array(
        [a if matching and rng.random() < 0.97 else _gfn(rng, int(p)) for a, p in zip(answers, places, strict=True)],
        np.uint64,
    )


def owner(rng: random.Random, model: ReferenceRmp, places: Any) -> int:
    """An ASID: mostly that of one of the pages."""
    found = model.answering(int(places[0]))[0].asid if places[0] < model.entries else 0
    return found if found and rng.random() < 0.8 else rng.choice(ASIDS)


def step(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any = LIBRARY) -> None:
    """One random vector operation of both, whose answers are compared."""
    operation = rng.choice(OPERATIONS)
    places = pages(rng, model, runs=operation in (_rmpupdate, _psmash, _rmpread, _check_guest, _check_write))
    operation(rng, model, rmp, library, places)


def _rmpupdate(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    guest, asid, large = gfns(rng, model, places), owner(rng, model, places), rng.random() < 0.3
    new = host_instructions.NewState(rng.random() < 0.7, rng.choice((0, asid)), rng.random() < 0.3, large)
    model.in_use = _in_use(rng, places)
    codes = library.rmpupdate(rmp, placed(rmp, places), guest, new, _placed_set(rmp, model.in_use))
    assert codes.tolist() == [
        model.rmpupdate(int(p), int(g), new.assigned, new.asid, new.immutable, large)
        for p, g in zip(places, guest, strict=True)
    ]


def _psmash(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    if rng.random() < 0.7:
        places = np.array(places, np.uint64) & ~np.uint64(511)
    model.in_use = _in_use(rng, places)
    codes = library.psmash(rmp, placed(rmp, places), _placed_set(rmp, model.in_use))
    assert codes.tolist() == [model.psmash(int(p)) for p in places]


def _rmpread(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    codes, found = library.rmpread(rmp, placed(rmp, places))
    wanted = [model.rmpread(int(p)) for p in places]
    assert codes.tolist() == [code for code, _ in wanted]
    assert [bytes(row) for row in found] == [stored or bytes(16) for _, stored in wanted]


def _in_use(rng: random.Random, places: Any) -> set[int]:
    """A page of a running vCPU, sometimes: one of those, or near one."""
    return {int(places[0]) + rng.choice((0, 1))} if rng.random() < 0.3 else set()


def _placed_set(rmp: Rmp, in_use: set[int]) -> set[int]:
    return {int(page) for page in placed(rmp, list(in_use))}


def _until_fault(outcomes: Any) -> tuple[list[Any], str | None]:
    """What the reference does page by page up to the first that faults, and the check that it fails."""
    done = []
    for outcome in outcomes:
        code = outcome[0]
        if isinstance(code, str):
            return done, code
        done.append(outcome)
    return done, None


def _pvalidate(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    guest, asid, large = gfns(rng, model, places), owner(rng, model, places), rng.random() < 0.3
    validate = rng.random() < 0.5
    done = library.pvalidate(rmp, placed(rmp, places), guest, asid, validate, large)
    wanted = (model.pvalidate(int(p), int(g), asid, validate, large) for p, g in zip(places, guest, strict=True))
    found = list(zip(done.codes.tolist(), done.unchanged.tolist(), strict=True)), _name(done.fault)
    assert found == _until_fault(wanted)


def _rmpadjust(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    guest, asid, large = gfns(rng, model, places), owner(rng, model, places), rng.random() < 0.3
    vmpl, target = _levels(rng)
    held = model.answering(int(places[0]))[0].vmpl[vmpl] if places[0] < model.entries else 15
    rights, vmsa = rng.choice((0, held, held & 5, rng.randrange(256))), rng.random() < 0.5
    done = library.rmpadjust(rmp, placed(rmp, places), guest, asid, vmpl, target, rights, vmsa, large)
    wanted = (
        (model.rmpadjust(int(p), int(g), asid, vmpl, target, rights, vmsa, large),)
        for p, g in zip(places, guest, strict=True)
    )
    assert ([(code,) for code in done.codes.tolist()], _name(done.fault)) == _until_fault(wanted)


def _rmpquery(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    guest, asid = gfns(rng, model, places), owner(rng, model, places)
    vmpl, target = _levels(rng)
    done = library.rmpquery(rmp, placed(rmp, places), guest, asid, vmpl, target)
    columns = (done.codes, done.large, done.permissions, done.vmsa)
    wanted = (model.rmpquery(int(p), int(g), asid, vmpl, target) for p, g in zip(places, guest, strict=True))
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert (rows, _name(done.fault)) == _until_fault(wanted)


def _levels(rng: random.Random) -> tuple[int, int]:
    """The VMPL that executes and the one whose rights it names: mostly a lower one that exists."""
    vmpl = rng.choice((0, 0, 0, 1, 2, 3))
    return vmpl, rng.choice((vmpl + 1, vmpl + 1, vmpl, 3, 4, 0))


def _check_guest(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    guest, asid, large = gfns(rng, model, places), owner(rng, model, places), rng.random() < 0.3
    vmpl, need = rng.randrange(4), VmplPermission(rng.choice((0, 1, 1, 3, 4, 8, 16)))
    found = library.check_guest(rmp, placed(rmp, places), guest, asid, vmpl, need, large=large)
    assert names(found) == [
        model.check(int(p), int(g), asid, vmpl, need, large) for p, g in zip(places, guest, strict=True)
    ]


def _check_write(rng: random.Random, model: ReferenceRmp, rmp: Rmp, library: Any, places: Any) -> None:
    large = rng.random() < 0.3
    found = library.check_write(rmp, placed(rmp, places), large=large)
    assert names(found) == [model.check_write(int(p), large) for p in places]


OPERATIONS = (
    _rmpupdate, _psmash, _rmpread, _pvalidate, _rmpadjust, _rmpadjust, _rmpquery, _check_guest, _check_write,
)  # fmt: skip


def names(found: Any) -> list[str]:
    return [Access(int(value)).name for value in found]


def _name(fault: Access | None) -> str | None:
    return None if fault is None else fault.name


def compare(rng: random.Random, rmp: Rmp, steps: int = 6, library: Any = LIBRARY) -> None:
    """A random table and some random operations on it, in both."""
    model = ReferenceRmp(ENTRIES)
    fill(model, rng)
    copy(model, rmp)
    for _ in range(steps):
        step(rng, model, rmp, library)
    assert_same(model, rmp)
