"""Nested page tables: what KVM writes for the hardware to walk. 4 KB leaves, four levels.

Table pages are ordinary host memory, written through the checked host port. Source: APM2 15.25.
"""

from __future__ import annotations

import numpy as np

from snpbook.hardware.dram import Words
from snpbook.hardware.ports import HostCpu
from snpbook.host.memory import PageAllocator
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import MMIO_ENTRY, PTE_ADDRESS, PTE_PRESENT, PTE_SIZE, PTE_USER, PTE_WRITE, PTES_PER_TABLE

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
        self.changes = 0
        """How often entries were changed or removed that a TLB may hold: what ran before must flush."""
        self.root = self._table(_LEVELS - 1, 0)

    def __repr__(self) -> str:
        return f"NestedTables({self.root:#x}, {len(self._tables)} tables)"

    def map(self, gfn: int, frames: Words) -> None:
        """Map consecutive guest pages from `gfn` on to system pages."""
        self._store(gfn, frames << np.uint64(PAGE_SHIFT) | np.uint64(_RIGHTS))

    def map_mmio(self, gfn: int) -> None:
        """Map one guest page to nothing, by an entry with a reserved bit: hardware tells an access as MMIO."""
        self._store(gfn, np.array([MMIO_ENTRY], np.uint64))

    def mapped(self, gfns: range) -> int:
        """How many of the first pages of a run are mapped, of those that share the first one's table."""
        number, index = divmod(gfns.start, PTES_PER_TABLE)
        if (0, number) not in self._tables:
            return 0
        count = min(len(gfns), PTES_PER_TABLE - index)
        entries = np.frombuffer(self._cpu.read(self._tables[0, number] + index * PTE_SIZE, count * PTE_SIZE), "<u8")
        there = entries & np.uint64(PTE_PRESENT) != 0
        return count if there.all() else int(np.argmin(there))

    def zap(self, gfn: int, count: int) -> None:
        """Remove the mappings of a run of guest pages."""
        self.changes += 1
        first, last = gfn // PTES_PER_TABLE, (gfn + count - 1) // PTES_PER_TABLE
        numbers = range(first, last + 1)
        there = numbers if len(numbers) < len(self._tables) else [n for level, n in self._tables if level == 0]
        for number in there:
            if number in numbers and (0, number) in self._tables:
                start = max(gfn, number * PTES_PER_TABLE)
                stop = min(gfn + count, (number + 1) * PTES_PER_TABLE)
                self._write(self._tables[0, number], start % PTES_PER_TABLE, np.zeros(stop - start, np.uint64))

    def free(self) -> None:
        """Give the table pages back."""
        for address in self._tables.values():
            page = address >> PAGE_SHIFT
            self._memory.release(range(page, page + 1))
        self._tables.clear()

    def _store(self, gfn: int, entries: Words) -> None:
        done = 0
        while done < len(entries):
            number, index = divmod(gfn + done, PTES_PER_TABLE)
            count = min(len(entries) - done, PTES_PER_TABLE - index)
            table = self._table(0, number)
            self.changes += any(self._cpu.read(table + index * PTE_SIZE, count * PTE_SIZE))
            self._write(table, index, entries[done : done + count])
            done += count

    def _table(self, level: int, number: int) -> int:
        """The address of a table, made with its parents where it is missing."""
        if (level, number) not in self._tables:
            page = self._memory.allocate(1)[0]
            self._cpu.write(page << PAGE_SHIFT, bytes(PAGE_SIZE))
            self._tables[level, number] = page << PAGE_SHIFT
            if level < _LEVELS - 1:
                parent = self._table(level + 1, number >> _INDEX_BITS)
                entry = np.array([page << PAGE_SHIFT & PTE_ADDRESS | _RIGHTS], np.uint64)
                self._write(parent, number % PTES_PER_TABLE, entry)
        return self._tables[level, number]

    def _write(self, table: int, index: int, entries: Words) -> None:
        self._cpu.write(table + index * PTE_SIZE, entries.astype("<u8").tobytes())
