"""The reverse map table: one 16-byte entry for each page of DRAM, in DRAM itself.

Entries are seen as `uint64[n, 2]`, bit for bit as the hardware keeps them, wherever `rmp_range` has them in memory.
This file reads and writes raw entries and names their states; who may change what is decided by the
instructions and by the firmware. Sources: PPR, APM2 15.36.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Dram, Pages, Words, as_slice, checked_pages, page_numbers, whole
from snpbook.hardware.rmp_range import NO_TABLE, RmpRange, RmpSegments
from snpbook.spec import rmp as spec
from snpbook.spec.layout import Record
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGES_PER_LARGE, PageState

CHUNK = 16384
"""Entries per step of a long operation: 256 KB, which stay in the second-level cache."""

U64 = np.uint64
LARGE_MASK = U64(PAGES_PER_LARGE - 1)


class Rmp:
    """The table of a machine. Page numbers from `entries` on have no entry: Default pages."""

    def __init__(self, dram: Dram, where: RmpRange | RmpSegments) -> None:
        if where is not NO_TABLE and not where.fits(dram.size):
            raise ValueError(f"where = {where!r}: 8 KB steps, and all of the table within {dram!r}")
        self.dram, self.where = dram, where
        self.entries = where.entries
        self.changes = 0
        """How often entries were written. Each time, no core's translations from before count any longer."""
        self._table: Words | None = None
        self.words: memoryview | None = None
        """The table as 64-bit words for the one-page path; None in the dictionary."""
        self.counts: memoryview | None = None
        """The counters of assigned pages by ASID, likewise."""
        if dram.mapped and isinstance(where, RmpRange):
            ((_, piece),) = dram.writable(where.base + spec.BOOKKEEPING_SIZE, self.entries * spec.ENTRY_SIZE)
            self._table = piece.view("<u8").reshape(-1, 2)
            self.words = piece.data.cast("B").cast("Q")
            ((_, piece),) = dram.writable(where.base, spec.BOOKKEEPING_SIZE)
            self.counts = piece.data.cast("B").cast("Q")

    def __repr__(self) -> str:
        return f"Rmp({self.where}, {self.entries} entries)"

    def covers(self, pages: Words) -> NDArray[np.bool_]:
        """Which pages have an entry."""
        return self.where.covers(pages)

    def changed(self, page: int) -> None:
        """Note that the one-page path has written a page's entry, that of its region or a counter.

        The entries of a region lie in one 8 KB step of the table, and so within one piece of DRAM that has a flag.
        """
        self.changes += 1
        written, base = self.dram.written, self.where.base
        written[(base + spec.BOOKKEEPING_SIZE + page * spec.ENTRY_SIZE) // LARGE_PAGE_SIZE] = 1
        written[base // LARGE_PAGE_SIZE] = 1

    def snapshot(self) -> int:
        """What the table holds besides its memory: how often it was changed."""
        return self.changes

    def restore(self, changes: int) -> None:
        self.changes = changes

    def load(self, pages: Pages) -> Words:
        """Raw entries (n, 2) of covered pages: a view for a run in the mapping (do not write), else a copy.

        `ValueError` or `TypeError` where `pages` are no covered pages.
        """
        pages = checked_pages("pages", pages, self.entries)
        if self._table is not None:
            if isinstance(pages, range):
                return self._table[as_slice(pages)]
            return _whole(self._table).take(pages.view(np.int64)).view("<u8").reshape(-1, 2)
        address = self._addresses(page_numbers(pages))
        return np.stack([self.dram.words(address), self.dram.words(address + U64(8))], axis=1)

    def store(self, pages: Pages, entries: Words) -> None:
        """Write raw entries (n, 2) of covered pages, whatever they hold: not an instruction."""
        pages = checked_pages("pages", pages, self.entries)
        if entries.shape != (len(pages), 2):
            raise ValueError(f"entries = {entries.shape}: an array of words ({len(pages)}, 2)")
        self.changes += 1
        if self._table is not None:
            self._mark(pages)
            if isinstance(pages, range):
                self._table[as_slice(pages)] = entries
            else:
                _whole(self._table)[pages.view(np.int64)] = _whole(np.ascontiguousarray(entries))
            return
        addresses = self._addresses(page_numbers(pages))
        for start, stop in _runs(addresses):
            self.dram.write(int(addresses[start]), entries[start:stop].tobytes())

    def _addresses(self, pages: Words) -> Words:
        """Where the entries of pages lie; `ValueError` for a page without one."""
        covered = self.covers(pages)
        if not covered.all():
            raise ValueError(f"pages: page {int(pages[~covered][0]):#x} has no entry")
        return self.where.addresses(pages)

    def _mark(self, pages: Pages) -> None:
        """Note that the entries of covered pages are being written."""
        if not len(pages):
            return
        first = self.where.base + spec.BOOKKEEPING_SIZE
        if isinstance(pages, range) or len(pages) == 1:
            start, stop = int(pages[0]), int(pages[-1]) + 1
            self.dram.mark(first + start * spec.ENTRY_SIZE, (stop - start) * spec.ENTRY_SIZE)
        else:
            regions = (U64(first) + pages * U64(spec.ENTRY_SIZE)) // U64(LARGE_PAGE_SIZE)
            np.frombuffer(self.dram.written, np.uint8)[regions] = 1

    def fill(self, pages: range, low: int) -> None:
        """Give a run of pages the same first quadword and an empty second one: how the firmware builds the table."""
        value = np.array([low, 0], U64)
        self.changes += 1
        for part in chunks(pages):
            self.store(part, np.broadcast_to(value, (len(part), 2)))

    def peek(self, pages: Pages) -> Words:
        """A copy of raw entries (n, 2) of any pages; those without an entry read as zero."""
        pages = checked_pages("pages", pages)
        if isinstance(pages, range) and len(pages) and pages[-1] < self.entries and self._table is not None:
            return self.load(pages).copy()
        places = page_numbers(pages)
        covered = self.covers(places)
        if covered.all():
            return self.load(places)
        entries = np.zeros((len(places), 2), U64)
        entries[covered] = self.load(places[covered])
        return entries

    def entry(self, page: int) -> Record:
        """One entry of a covered page, decoded."""
        page = whole("page", page)
        return spec.RMP_ENTRY.unpack(self.load(range(page, page + 1)).tobytes())

    def effective(self, pages: Words) -> Words:
        """The entries that answer for covered pages: inside a 2 MB entry that entry, a guest's GPA moved along.

        In the firmware's own entries the field is a tag and stays as it is. Source: APM2 15.36.10 (which entry
        answers: inferred from RMPUPDATE and PSMASH).
        """
        entries, base = self.load(pages), self.load(pages & ~LARGE_MASK)  # of an array: copies
        large = base[:, 0] & U64(spec.LARGE | spec.ASSIGNED) == U64(spec.LARGE | spec.ASSIGNED)
        if large.any():
            heads = base[large]
            offset = (pages[large] & LARGE_MASK) << U64(spec.GFN_SHIFT)
            moved = heads[:, 0] & U64(~spec.GFN & 2**64 - 1) | heads[:, 0] + offset & U64(spec.GFN)
            heads[:, 0] = np.where(heads[:, 0] & U64(spec.ASID), moved, heads[:, 0])
            entries[large] = heads
        return entries

    def counters(self, asid: int) -> int:
        """Pages of 4 KB assigned to a guest's ASID, from the bookkeeping area."""
        if not 0 <= whole("asid", asid) < spec.ASID_COUNTERS:
            raise ValueError(f"asid = {asid}: there are {spec.ASID_COUNTERS} counters")
        return int(self.dram.words(np.array([self.where.base + 8 * asid], U64))[0])

    def count(self, asid: int, pages: int) -> None:
        """Add to the counter of an ASID's assigned pages; ASID 0, the firmware, is not counted."""
        if asid and pages:
            value = self.counters(asid) + pages
            self.dram.write(self.where.base + 8 * asid, value.to_bytes(8, "little"))

    def state(self, page: int) -> PageState:
        """The state of one page, on plain integers where the table is one array; as `states` has it."""
        if self.words is not None and page < self.entries:
            head = self.words[2 * (page & -PAGES_PER_LARGE)]
            if head & (spec.ASSIGNED | spec.LARGE) != spec.ASSIGNED | spec.LARGE:
                return _state(self.words[2 * page])
        return PageState(int(self.states(range(page, page + 1))[0]))

    def states(self, pages: range) -> NDArray[np.uint8]:
        """One `PageState` per page of a run, as the firmware would name it; beyond the table Default."""
        if not isinstance(pages, range) or pages.step != 1 or pages.start < 0:
            raise ValueError(f"pages = {pages}: a run of page numbers with step 1")
        result = np.full(len(pages), PageState.DEFAULT, np.uint8)
        numbers = np.arange(pages.start, min(pages.stop, self.entries), dtype=U64)
        for start in range(0, len(numbers), CHUNK):
            part = numbers[start : start + CHUNK]
            covered = self.covers(part)
            result[start : start + len(part)][covered] = decode_states(self.effective(part[covered]))
        return result


_FIRST, _LAST = 3, 61
"""A state looks at bits 2:0 and 63:61 of the first word, at whether there is an ASID, and at the GPA's kind."""
_FLAGS = ("assigned", "page_size", "immutable", "vmsa", "validated", "lock", "owned")


def _state_table() -> NDArray[np.uint8]:
    """The state for each combination of what `PAGE_STATES` asks about, as `decode_states` numbers them."""
    table = np.full(len(spec.GfnKind) << len(_FLAGS), PageState.INVALID, np.uint8)
    for number in range(len(table)):
        found = {name: number >> place & 1 for place, name in enumerate(_FLAGS)} | {"gfn": number >> len(_FLAGS)}
        for state, row in spec.PAGE_STATES.items():
            if all(found[name] == wanted for name, wanted in row.items()):
                table[number] = state
    return table


_STATES = _state_table()


def _state(low: int) -> PageState:
    """`decode_states` of one first word."""
    gfn = (low & spec.GFN) >> spec.GFN_SHIFT
    tag, tagged = gfn >> spec.GFN_TAG_SHIFT, gfn & (1 << spec.GFN_TAG_SHIFT) - 1
    kind = spec.GfnKind.OTHER if gfn else spec.GfnKind.ZERO
    if tag == spec.GFN_TAG_IOMMU and tagged == 1:
        kind = spec.GfnKind.IOMMU
    elif tag == spec.GFN_TAG_METADATA and tagged:
        kind = spec.GfnKind.METADATA
    number = low & (1 << _FIRST) - 1 | low >> _LAST << _FIRST | bool(low & spec.ASID) << len(_FLAGS) - 1
    return PageState(int(_STATES[number | kind << len(_FLAGS)]))


def decode_states(entries: Words) -> NDArray[np.uint8]:
    """The page state of each raw entry, by the table `PAGE_STATES`."""
    low = entries[:, 0]
    owned = low & U64(spec.ASID) != 0
    number = low & U64((1 << _FIRST) - 1) | low >> U64(_LAST) << U64(_FIRST)
    number |= owned.astype(U64) << U64(len(_FLAGS) - 1)
    if not owned.all():  # a guest's pages are in the same state wherever they lie
        gfn = (low & U64(spec.GFN)) >> U64(spec.GFN_SHIFT)
        tag, tagged = gfn >> U64(spec.GFN_TAG_SHIFT), gfn & U64((1 << spec.GFN_TAG_SHIFT) - 1)
        kind = np.where(gfn == 0, U64(spec.GfnKind.ZERO), U64(spec.GfnKind.OTHER))
        kind[(tag == spec.GFN_TAG_IOMMU) & (tagged == 1)] = spec.GfnKind.IOMMU
        kind[(tag == spec.GFN_TAG_METADATA) & (tagged > 0)] = spec.GfnKind.METADATA
        number |= kind << U64(len(_FLAGS))
    states: NDArray[np.uint8] = _STATES[number]
    return states


def _whole(entries: Words) -> NDArray[np.complex128]:
    """Entries (n, 2) as items of 16 bytes (n,), which NumPy moves many times as fast as rows; never computed with."""
    return entries.view(np.complex128)[:, 0]


def regions(pages: Pages) -> tuple[Words, NDArray[np.int64]]:
    """The 2 MB regions that pages lie in, by their first page, and for each page the index of its region."""
    if isinstance(pages, range) and pages.step == 1 and len(pages):
        places = page_numbers(pages) // U64(PAGES_PER_LARGE)
        member = (places - places[0]).astype(np.int64)
        return np.arange(places[0], places[-1] + U64(1), dtype=U64) * U64(PAGES_PER_LARGE), member
    bases, inverse = np.unique(page_numbers(pages) & ~LARGE_MASK, return_inverse=True)
    return bases, inverse


def chunks(pages: Pages, size: int = CHUNK) -> Iterator[Pages]:
    """A long operation in steps of at most `size` pages."""
    for start in range(0, len(pages), size):
        yield pages[start : start + size]


def _runs(addresses: Words) -> Iterator[tuple[int, int]]:
    """Maximal stretches of entries that lie one behind the other, as index pairs."""
    breaks = np.flatnonzero(np.diff(addresses) != spec.ENTRY_SIZE) + 1
    bounds = [0, *breaks.tolist(), len(addresses)]
    return pairwise(bounds) if len(addresses) else iter(())
