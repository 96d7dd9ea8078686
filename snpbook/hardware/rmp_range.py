"""Where the reverse map table lies: one piece between RMP_BASE and RMP_END, or segments that a table of its own lists.

Pure arithmetic on addresses; the entries are `rmp`'s. Sources: APM2 15.36.4; for segments Linux arch/x86/virt/svm/sev.c
(mainline after 6.12).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Dram, Words
from snpbook.spec import rmp as spec
from snpbook.spec.msr import RMP_ADDRESS_MASK, RMP_ALIGNMENT
from snpbook.spec.pages import PAGE_SHIFT

U64 = np.uint64


@dataclass(frozen=True, slots=True)
class RmpRange:
    """RMP_BASE and RMP_END: the first and the last byte of the table. An end below the base means no table."""

    base: int
    end: int

    def __str__(self) -> str:
        return f"{self.base:#x}-{self.end:#x}"

    @property
    def entries(self) -> int:
        """Pages that have an entry."""
        return max(self.end + 1 - self.base - spec.BOOKKEEPING_SIZE, 0) // spec.ENTRY_SIZE

    def fits(self, memory: int) -> bool:
        """Whether base and end + 1 are multiples of 8 KB within `memory` bytes."""
        return not (self.base | self.end + 1) & ~RMP_ADDRESS_MASK and self.base <= self.end < memory

    def covers(self, pages: Words) -> NDArray[np.bool_]:
        return pages < U64(self.entries)

    def addresses(self, pages: Words) -> Words:
        """The addresses of the entries of covered pages."""
        return U64(self.base + spec.BOOKKEEPING_SIZE) + pages * U64(spec.ENTRY_SIZE)


NO_TABLE = RmpRange(0, -1)
"""What SNP finds where the registers name no possible place: no page has an entry."""


@dataclass(frozen=True, slots=True)
class RmpSegments:
    """A segmented table: of each `segment_size` bytes of memory, `sizes[i]` bytes have entries, from `bases[i]` on.

    `base` is RMP_BASE, where the bookkeeping area lies.
    """

    base: int
    segment_size: int
    bases: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.base:#x}, {sum(map(bool, self.sizes))} segments"

    @classmethod
    def read(cls, dram: Dram, base: int, log2_size: int, most: int) -> RmpSegments:
        """The segments that the table behind the bookkeeping area at `base` lists, each of 2^`log2_size` bytes.

        A size larger than a segment is cut to it, and beyond the first `most` segments there are none. A base that
        leaves no room in memory lists none.
        """
        if base + spec.BOOKKEEPING_SIZE + spec.SEGMENT_TABLE_SIZE > dram.size:
            return cls(base, 1 << log2_size, (), ())
        raw = dram.read(base + spec.BOOKKEEPING_SIZE, spec.SEGMENT_TABLE_SIZE)
        entries = [spec.RMP_SEGMENT.unpack(raw[at : at + 8]) for at in range(0, len(raw), 8)][:most]
        size = 1 << log2_size
        covered = [min(entry.covered_gib << spec.GIB_SHIFT, size) for entry in entries]
        while covered and not covered[-1]:
            covered.pop()
        bases = [entry.base << spec.SEGMENT_BASE_SHIFT for entry in entries[: len(covered)]]
        return cls(base, size, tuple(bases), tuple(covered))

    @property
    def end(self) -> int:
        """The last byte of what lies at RMP_BASE: the bookkeeping area and the list of segments."""
        return self.base + spec.BOOKKEEPING_SIZE + spec.SEGMENT_TABLE_SIZE - 1

    @property
    def entries(self) -> int:
        """The page behind the last that has an entry."""
        return ((len(self.sizes) - 1) * self.segment_size + self.sizes[-1]) >> PAGE_SHIFT if self.sizes else 0

    def fits(self, memory: int) -> bool:
        """Whether all of the table lies within `memory` bytes, and begins at a multiple of 1 MB."""
        if self.base % RMP_ALIGNMENT:
            return False
        tables = zip(self.bases, self.sizes, strict=True)
        return max([self.end + 1, *(base + (size >> PAGE_SHIFT) * spec.ENTRY_SIZE for base, size in tables)]) <= memory

    def covers(self, pages: Words) -> NDArray[np.bool_]:
        segment, inside = self._place(pages)
        known = segment < U64(len(self.sizes))
        sizes = np.array([*self.sizes, 0], U64)[np.where(known, segment, U64(len(self.sizes))).astype(np.int64)]
        covered: NDArray[np.bool_] = inside << U64(PAGE_SHIFT) < sizes
        return covered

    def addresses(self, pages: Words) -> Words:
        """The addresses of the entries of covered pages."""
        segment, inside = self._place(pages)
        found: Words = np.array(self.bases, U64)[segment.astype(np.int64)] + inside * U64(spec.ENTRY_SIZE)
        return found

    def _place(self, pages: Words) -> tuple[Words, Words]:
        per_segment = U64(self.segment_size >> PAGE_SHIFT)
        return pages // per_segment, pages % per_segment
