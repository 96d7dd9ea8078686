"""Nested page tables: what KVM writes for the hardware to walk. Four levels, leaves of 4 KB and of 2 MB.

Table pages are ordinary host memory, written through the checked host port. A leaf has the size of the page's RMP
entry, or hardware refuses it. Sources: APM2 15.25, 15.36.10; RFC v7 patch 41.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from snpbook.hardware.dram import Words
from snpbook.hardware.ports import HostCpu
from snpbook.host.memory import Flags, PageAllocator
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import (
    MMIO_ENTRY,
    PTE_ADDRESS,
    PTE_LARGE,
    PTE_PRESENT,
    PTE_SIZE,
    PTE_USER,
    PTE_WRITE,
    PTES_PER_TABLE,
)
from snpbook.trace import NestedMapping

_LEVELS = 4
_INDEX_BITS = 9
GFN_LIMIT = PTES_PER_TABLE**_LEVELS
"""Guest page numbers that four levels reach."""
_RIGHTS = PTE_PRESENT | PTE_WRITE | PTE_USER


class NestedTables:
    """The tables of one guest; `root` is its nCR3."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator) -> None:
        self._cpu, self._memory = cpu, memory
        self._tables: dict[tuple[int, int], int] = {}
        self._large: set[int] = set()
        """2 MB of the guest that one leaf maps, by number."""
        self._unlinked: set[int] = set()
        """2 MB to which no table is linked, though there may be one left."""
        self.changes = 0
        """How often entries were changed or removed that a TLB may hold: what ran before must flush."""
        self.root = self._table(_LEVELS - 1, 0)

    def __repr__(self) -> str:
        return f"NestedTables({self.root:#x}, {len(self._tables)} tables)"

    def map(self, gfn: int, frames: Words, large: Flags | None = None) -> None:
        """Map consecutive guest pages from `gfn` on to system pages; those that are `large` by their whole 2 MB."""
        if large is None or not large.any():
            self._store(gfn, frames << np.uint64(PAGE_SHIFT) | np.uint64(_RIGHTS))
            return
        edges = [0, *(np.flatnonzero(np.diff(large)) + 1).tolist(), len(frames)]
        for start, stop in pairwise(edges):
            if large[start]:
                self._map_large(range(gfn + start, gfn + stop), frames[start:stop])
            else:
                self.map(gfn + start, frames[start:stop])

    def _map_large(self, gfns: range, frames: Words) -> None:
        """One leaf for each 2 MB of which a page is among `gfns`."""
        first, last = gfns.start // PTES_PER_TABLE, (gfns.stop - 1) // PTES_PER_TABLE
        for number in range(first, last + 1):
            page = int(frames[max(number * PTES_PER_TABLE - gfns.start, 0)]) // PTES_PER_TABLE * PTES_PER_TABLE
            self._link(1, number, page << PAGE_SHIFT | _RIGHTS | PTE_LARGE)
            self._large.add(number)
            self.changes += 1
            self._tell(range(number * PTES_PER_TABLE, (number + 1) * PTES_PER_TABLE), mapped=True)

    def map_mmio(self, gfn: int) -> None:
        """Map one guest page to nothing, by an entry with a reserved bit: hardware tells an access as MMIO."""
        self._store(gfn, np.array([MMIO_ENTRY], np.uint64))

    def mapped(self, gfns: range) -> int:
        """How many of the first pages of a run are mapped, of those that share the first one's table."""
        number, index = divmod(gfns.start, PTES_PER_TABLE)
        count = min(len(gfns), PTES_PER_TABLE - index)
        if number in self._large:
            return count
        if (0, number) not in self._tables or number in self._unlinked:
            return 0
        entries = np.frombuffer(self._cpu.read(self._tables[0, number] + index * PTE_SIZE, count * PTE_SIZE), "<u8")
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
                self._link(1, number, 0)
        for number in [n for level, n in self._tables if level == 0] if many else numbers:
            if number in numbers and (0, number) in self._tables and number not in self._unlinked:
                start = max(gfn, number * PTES_PER_TABLE)
                stop = min(gfn + count, (number + 1) * PTES_PER_TABLE)
                self._write(self._tables[0, number], start % PTES_PER_TABLE, np.zeros(stop - start, np.uint64))
                self._tell(range(start, stop), mapped=False)

    def free(self) -> None:
        """Give the table pages back."""
        for address in self._tables.values():
            page = address >> PAGE_SHIFT
            self._memory.release(range(page, page + 1))
        self._tables.clear()
        self._large.clear()
        self._tell(range(GFN_LIMIT), mapped=False)

    def _store(self, gfn: int, entries: Words) -> None:
        done = 0
        while done < len(entries):
            number, index = divmod(gfn + done, PTES_PER_TABLE)
            count = min(len(entries) - done, PTES_PER_TABLE - index)
            table = self._table(0, number)
            self.changes += any(self._cpu.read(table + index * PTE_SIZE, count * PTE_SIZE))
            self._write(table, index, entries[done : done + count])
            self._tell(range(gfn + done, gfn + done + count), mapped=int(entries[done]) != MMIO_ENTRY)
            done += count

    def _table(self, level: int, number: int) -> int:
        """The address of a table, made with its parents where it is missing."""
        if (level, number) not in self._tables:
            page = self._memory.allocate(1)[0]
            self._cpu.write(page << PAGE_SHIFT, bytes(PAGE_SIZE))
            self._tables[level, number] = page << PAGE_SHIFT
            if level < _LEVELS - 1:
                self._link(level + 1, number, page << PAGE_SHIFT & PTE_ADDRESS | _RIGHTS)
        elif level == 0 and number in self._unlinked:
            self._cpu.write(self._tables[0, number], bytes(PAGE_SIZE))
            self._link(1, number, self._tables[0, number] | _RIGHTS)
        return self._tables[level, number]

    def _link(self, level: int, number: int, entry: int) -> None:
        """Store the entry number `number` of all tables of a level."""
        if level == 1:
            table = entry and not entry & PTE_LARGE
            if number in self._large:
                self._large.discard(number)
                self._tell(range(number * PTES_PER_TABLE, (number + 1) * PTES_PER_TABLE), mapped=False)
            self._unlinked.discard(number) if table else self._unlinked.add(number)
        self._write(self._table(level, number >> _INDEX_BITS), number % PTES_PER_TABLE, np.array([entry], np.uint64))

    def _tell(self, gfns: range, *, mapped: bool) -> None:
        if self._cpu.trace:
            self._cpu.trace.emit(NestedMapping(root=self.root, gfns=gfns, mapped=mapped))

    def _write(self, table: int, index: int, entries: Words) -> None:
        self._cpu.write(table + index * PTE_SIZE, entries.astype("<u8").tobytes())
