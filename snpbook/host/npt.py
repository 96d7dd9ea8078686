"""Nested page tables: what KVM writes for the hardware to walk. Four levels, leaves of 4 KB and of 2 MB.

Table pages are ordinary host memory, written through the checked host port. A leaf has the size of the page's RMP
entry, or hardware refuses it. Sources: APM2 15.25, 15.36.10; RFC v7 patch 41.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from snpbook.hardware.dram import Pages, Words, page_numbers
from snpbook.hardware.ports import HostCpu
from snpbook.host.memory import Flags, PageAllocator, runs
from snpbook.host.rmp import as_pages
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.vmcb import (
    MMIO_ENTRY,
    PTE_LARGE,
    PTE_PRESENT,
    PTE_SIZE,
    PTE_USER,
    PTE_WRITE,
    PTES_PER_TABLE,
)
from snpbook.trace import NestedMapping

_LEVELS = 4
GFN_LIMIT = PTES_PER_TABLE**_LEVELS
"""Guest page numbers that four levels reach."""
_RIGHTS = PTE_PRESENT | PTE_WRITE | PTE_USER
_PER_TABLE = np.uint64(PTES_PER_TABLE)
_TABLES = 512
"""Tables that are written at once."""


class NestedTables:
    """The tables of one guest; `root` is its nCR3."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator) -> None:
        self._cpu, self._memory = cpu, memory
        self._tables: dict[tuple[int, int], int] = {}
        """System pages by level and number."""
        self._large: set[int] = set()
        """2 MB of the guest that one leaf maps, by number."""
        self._unlinked: set[int] = set()
        """2 MB to which no table is linked, though there may be one left."""
        self.changes = 0
        """How often entries were changed or removed that a TLB may hold: what ran before must flush."""
        (page,) = self._at(_LEVELS - 1, range(1))
        self.root = int(page) << PAGE_SHIFT

    def __repr__(self) -> str:
        return f"NestedTables({self.root:#x}, {len(self._tables)} tables)"

    def map(self, gfn: int, frames: Words, large: Flags | None = None, step: int = 1) -> None:
        """Map guest pages from `gfn` on, one every `step`, to system pages; `large` ones by the whole of their 2 MB."""
        if large is None or not large.any():
            gfns = range(gfn, gfn + len(frames) * step, step)
            self._store(gfns, frames << np.uint64(PAGE_SHIFT) | np.uint64(_RIGHTS))
            return
        edges = [0, *(np.flatnonzero(np.diff(large)) + 1).tolist(), len(frames)]
        for start, stop in pairwise(edges):
            if large[start]:
                self._map_large(range(gfn + start * step, gfn + stop * step, step), frames[start:stop])
            else:
                self.map(gfn + start * step, frames[start:stop], step=step)

    def _map_large(self, gfns: range, frames: Words) -> None:
        """One leaf for each 2 MB of which a page is among `gfns`."""
        numbers = page_numbers(gfns) // _PER_TABLE
        first = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - np.uint64(1)))
        heads = frames[first] & ~(_PER_TABLE - np.uint64(1))
        regions = range(int(numbers[0]), int(numbers[-1]) + 1)
        self._link(1, regions, heads << np.uint64(PAGE_SHIFT) | np.uint64(_RIGHTS | PTE_LARGE))
        self._large.update(regions)
        self.changes += len(regions)
        self._tell(_pages_of(regions), mapped=True)

    def map_mmio(self, gfn: int) -> None:
        """Map one guest page to nothing, by an entry with a reserved bit: hardware tells an access as MMIO."""
        self._store(range(gfn, gfn + 1), np.array([MMIO_ENTRY], np.uint64))

    def mapped(self, gfns: range) -> int:
        """How many of the first pages of a run are mapped, of those that share the first one's table."""
        number, index = divmod(gfns.start, PTES_PER_TABLE)
        count = min(len(gfns), PTES_PER_TABLE - index)
        if number in self._large:
            return count
        if (0, number) not in self._tables or number in self._unlinked:
            return 0
        start = (self._tables[0, number] << PAGE_SHIFT) + index * PTE_SIZE
        entries = np.frombuffer(self._cpu.read(start, count * PTE_SIZE), "<u8")
        there = entries & np.uint64(PTE_PRESENT) != 0
        return count if there.all() else int(np.argmin(there))

    def zap(self, gfn: int, count: int) -> None:
        """Remove the mappings of a run of guest pages; a 2 MB leaf goes as a whole."""
        self.changes += 1
        first, last = gfn // PTES_PER_TABLE, (gfn + count - 1) // PTES_PER_TABLE
        numbers = range(first, last + 1)
        many = len(numbers) >= len(self._tables)  # then what there is takes less time to look through
        for number in [*self._large] if many else numbers:
            if number in self._large and number in numbers:
                self._link(1, range(number, number + 1), np.zeros(1, np.uint64))
        for number in [n for level, n in self._tables if level == 0] if many else numbers:
            if number in numbers and (0, number) in self._tables and number not in self._unlinked:
                start = max(gfn, number * PTES_PER_TABLE)
                stop = min(gfn + count, (number + 1) * PTES_PER_TABLE)
                self._write(self._tables[0, number], start % PTES_PER_TABLE, np.zeros(stop - start, np.uint64))
                self._tell(range(start, stop), mapped=False)

    def free(self) -> None:
        """Give the table pages back."""
        for _, pages in runs(np.array(sorted(self._tables.values()), np.uint64)):
            self._memory.release(pages)
        self._tables.clear()
        self._large.clear()
        self._tell(range(GFN_LIMIT), mapped=False)

    def _store(self, gfns: range, entries: Words) -> None:
        """Store leaves of 4 KB, so many tables at a time; to change one that was there counts."""
        most = _TABLES * PTES_PER_TABLE // gfns.step
        for start in range(0, len(gfns), most):
            numbers, index = np.divmod(page_numbers(gfns[start : start + most]), _PER_TABLE)
            pages = self._at(0, range(int(numbers[0]), int(numbers[-1]) + 1))
            content = np.array(self._cpu.read_pages(pages))
            places = (numbers - numbers[0]) * _PER_TABLE + index
            words = content.view("<u8").reshape(-1)
            self.changes += int(np.count_nonzero(words[places]))
            words[places] = entries[start : start + most]
            self._cpu.write_pages(pages, content)
        self._tell(gfns, mapped=int(entries[0]) != MMIO_ENTRY)

    def _at(self, level: int, numbers: range) -> Pages:
        """Where a run of tables lies, each made with its parents where it is missing."""
        missing = np.array([n for n in numbers if (level, n) not in self._tables], np.uint64)
        if len(missing):
            pages = self._memory.take(len(missing))
            self._cpu.zero_pages(as_pages(pages))
            self._tables.update(zip(((level, n) for n in missing.tolist()), pages.tolist(), strict=True))
            if level < _LEVELS - 1:
                self._link_tables(level, missing)
        if level == 0 and not self._unlinked.isdisjoint(numbers):
            stale = np.array(sorted(self._unlinked.intersection(numbers)), np.uint64)
            self._cpu.zero_pages(self._found(0, stale.tolist()))
            self._link_tables(0, stale)
        return self._found(level, numbers)

    def _found(self, level: int, numbers: Iterable[int]) -> Pages:
        """The system pages of tables that there are."""
        return as_pages(np.array([self._tables[level, number] for number in numbers], np.uint64))

    def _link_tables(self, level: int, numbers: Words) -> None:
        """Link tables into those above them."""
        for _, run in runs(numbers):
            pages = page_numbers(self._found(level, run))
            self._link(level + 1, run, pages << np.uint64(PAGE_SHIFT) | np.uint64(_RIGHTS))

    def _link(self, level: int, numbers: range, entries: Words) -> None:
        """Store a run of the entries of all tables of a level: they are of one kind."""
        if level == 1:
            for number in sorted(self._large.intersection(numbers)):
                self._large.discard(number)
                self._tell(_pages_of(range(number, number + 1)), mapped=False)
            if entries[0] and not int(entries[0]) & PTE_LARGE:
                self._unlinked.difference_update(numbers)
            else:
                self._unlinked.update(numbers)
        done = 0
        while done < len(numbers):
            parent, index = divmod(numbers[done], PTES_PER_TABLE)
            part = entries[done : done + PTES_PER_TABLE - index]
            (page,) = self._at(level, range(parent, parent + 1))
            self._write(page, index, part)
            done += len(part)

    def _tell(self, gfns: range, *, mapped: bool) -> None:
        if self._cpu.trace:
            self._cpu.trace.emit(NestedMapping(root=self.root, gfns=gfns, mapped=mapped))

    def _write(self, page: int, index: int, entries: Words) -> None:
        self._cpu.write((page << PAGE_SHIFT) + index * PTE_SIZE, entries.astype("<u8").tobytes())


def _pages_of(regions: range) -> range:
    """The guest pages of a run of 2 MB."""
    return range(regions.start * PTES_PER_TABLE, regions.stop * PTES_PER_TABLE)
