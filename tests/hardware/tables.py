"""Random tables and random operations, carried out by the library and by the reference, and compared field by field."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from snpbook.hardware import checks, instructions
from snpbook.hardware.checks import Access
from snpbook.hardware.dram import Dram
from snpbook.hardware.rmp import Rmp
from snpbook.hardware.rmp_range import RmpRange
from snpbook.spec.pages import VmplPermission
from tests.reference.rmp import Entry, ReferenceRmp

ENTRIES = 4 * 512
BASE = 0x2000
SIZE = 0x4000 + 16 * ENTRIES
ASIDS = (1, 2, 509)
SHIFTS = (0, 1, 512, 0x49800, (1 << 39) - 2000)

LIBRARY = SimpleNamespace(
    rmpupdate=instructions.rmpupdate,
    pvalidate=instructions.pvalidate,
    check_guest=checks.check_guest,
    check_write=checks.check_write,
)


def table(mapping: bool = True) -> Rmp:
    """An empty table with `ENTRIES` entries."""
    return Rmp(Dram(0x200000, mapping=mapping), RmpRange(BASE, BASE + SIZE - 1))


def words(model: ReferenceRmp) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array([model.entry(page).raw() for page in range(model.entries)], np.uint64)


def copy(model: ReferenceRmp, rmp: Rmp) -> None:
    """Give the library's table the reference's contents."""
    rmp.store(range(rmp.entries), words(model))
    for asid, count in model.counters.items():
        rmp.dram.write(BASE + 8 * asid, count.to_bytes(8, "little"))


def assert_same(model: ReferenceRmp, rmp: Rmp) -> None:
    """Every entry bit for bit, and the counters."""
    mine, theirs = rmp.load(range(rmp.entries)), words(model)
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
                model.table[page] = Entry(
                    **{name: getattr(entry, name) for name in _COPIED}, gfn=(page + entry.gfn) % (1 << 39)
                )
    model.recount()


_COPIED = ("assigned", "immutable", "asid", "vmsa", "validated", "lock", "vmpl")


def pages(rng: random.Random, model: ReferenceRmp, *, runs: bool = True) -> Any:
    """A run or an array of page numbers: near entries that exist, repeated, out of range."""
    known = [page for page, entry in model.table.items() if entry.raw() != (0, 0)] or [0]
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
    """One random vector operation of both, compared."""
    kind = rng.randrange(4)
    places = pages(rng, model, runs=kind != 1)
    guest, asid, large = gfns(rng, model, places), owner(rng, model, places), rng.random() < 0.3
    numbers = list(zip(map(int, places), map(int, guest), strict=True))
    if kind == 0:
        new = instructions.NewState(rng.random() < 0.7, rng.choice((0, asid)), rng.random() < 0.3, large)
        model.in_use = {numbers[0][0] + rng.choice((0, 1))} if rng.random() < 0.2 else set()
        codes = library.rmpupdate(rmp, places, guest, new, frozenset(model.in_use))
        wanted: Any = [model.rmpupdate(p, g, new.assigned, new.asid, new.immutable, large) for p, g in numbers]
        assert codes.tolist() == wanted
    elif kind == 1:
        validate = rng.random() < 0.5
        done = library.pvalidate(rmp, places, np.asarray(guest, np.uint64), asid, validate, large)
        wanted, fault = [], None
        for page, gfn in numbers:
            code, carry = model.pvalidate(page, gfn, asid, validate, large)
            if isinstance(code, str):
                fault = code
                break
            wanted.append((code, carry))
        assert list(zip(done.codes.tolist(), done.unchanged.tolist(), strict=True)) == wanted
        assert (done.fault.name if done.fault is not None else None) == fault
    elif kind == 2:
        vmpl, need = rng.randrange(4), VmplPermission(rng.choice((0, 1, 1, 3, 4, 8, 16)))
        found = library.check_guest(rmp, places, guest, asid, vmpl, need, large=large)
        assert names(found) == [model.check(p, g, asid, vmpl, need, large) for p, g in numbers]
    else:
        found = library.check_write(rmp, places, large=large)
        assert names(found) == [model.check_write(p, large) for p, _ in numbers]
    assert_same(model, rmp)


def names(found: Any) -> list[str]:
    return [Access(int(value)).name for value in found]


def compare(rng: random.Random, mapping: bool, steps: int = 6, library: Any = LIBRARY) -> None:
    """A random table and some random operations on it, in both."""
    model, rmp = ReferenceRmp(ENTRIES), table(mapping)
    fill(model, rng)
    copy(model, rmp)
    for _ in range(steps):
        step(rng, model, rmp, library)
