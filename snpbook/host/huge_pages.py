"""Files of memory with huge pages: the first touch of a 2 MiB part brings 2 MiB of memory in a row.

So tmpfs does with `shmem_enabled` set to `always`, and anonymous memory after MADV_HUGEPAGE; where no such run is free,
single pages must do. Punching a part of a huge page splits it. Sources: Linux mm/shmem.c, mm/huge_memory.c,
Documentation/admin-guide/mm/transhuge.rst; UPM v10 (get_page).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Words, as_slice, page_numbers
from snpbook.host.memory import Flags, PageAllocator, PageFile, RestrictedFile
from snpbook.host.swap import SwappableMemory
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE

if TYPE_CHECKING:
    from snpbook.hardware.ports import HostCpu


class _HugePages(PageFile):
    """What files with huge pages have in common."""

    huge = True
    """Whether new memory may come as huge pages."""

    def __init__(self, cpu: HostCpu, allocator: PageAllocator, size: int) -> None:
        super().__init__(cpu, allocator, size)
        self._whole = np.zeros(self.size >> PAGE_SHIFT, bool)
        """Which pages lie in a huge page."""

    def get(self, offsets: range) -> Words:
        """As ever; a part of the file that has no memory at all gets a huge page where one is free."""
        self._fill(offsets)
        return super().get(offsets)

    def get_prefix(self, offsets: range) -> Words:
        self._fill(offsets)
        return super().get_prefix(offsets)

    def resize(self, size: int) -> None:
        super().resize(size)
        kept = self._whole[: size >> PAGE_SHIFT]
        self._whole = np.zeros(size >> PAGE_SHIFT, bool)
        self._whole[: len(kept)] = kept

    def is_huge(self, offsets: range) -> Flags:
        return self._whole[as_slice(offsets)].copy()

    def move(self, offsets: range) -> Flags:
        self._split(offsets)
        return super().move(offsets)

    def _fill(self, offsets: range) -> None:
        """A huge page for each part that a run of offsets touches and that has no memory yet."""
        end = len(self) // PAGES_PER_LARGE
        parts = range(offsets.start // PAGES_PER_LARGE, min(-(-offsets.stop // PAGES_PER_LARGE), end))
        if not parts or not self.huge:
            return
        inside = slice(parts.start * PAGES_PER_LARGE, parts.stop * PAGES_PER_LARGE)
        empty = ~self._frames[inside].reshape(-1, PAGES_PER_LARGE).any(1)
        for part in (np.flatnonzero(empty) + parts.start).tolist():
            pages = self.allocator.allocate_order9()
            if pages is None:
                return
            here = range(part * PAGES_PER_LARGE, (part + 1) * PAGES_PER_LARGE)
            self._frames[here.start : here.stop] = page_numbers(pages)
            self._whole[here.start : here.stop] = True
            self._prepare(pages, page_numbers(here))
            self._tell(here)

    def _split(self, offsets: range) -> None:
        first = offsets.start // PAGES_PER_LARGE * PAGES_PER_LARGE
        self._whole[first : -(-offsets.stop // PAGES_PER_LARGE) * PAGES_PER_LARGE] = False

    def _take_out(self, offsets: NDArray[np.int64]) -> None:
        self._split(range(int(offsets[0]), int(offsets[-1]) + 1) if len(offsets) else range(0))
        super()._take_out(offsets)


class HugeRestrictedFile(_HugePages, RestrictedFile):
    """memfd_restricted on a tmpfs with huge pages."""


class HugeAnonymousMemory(_HugePages, SwappableMemory):
    """Private memory of a process, with huge pages once MADV_HUGEPAGE asks for them."""

    huge = False
