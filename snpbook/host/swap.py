"""Memory of a process that the kernel may write to a swap device and read back into other frames.

What goes there is what DRAM holds: of a page encrypted with another key it is ciphertext, which is worth nothing at
another address. Source: Linux mm/swap_state.c, mm/vmscan.c.
"""

from __future__ import annotations

import numpy as np

from snpbook.hardware.dram import Bytes, Pages, Words
from snpbook.hardware.ports import HostCpu
from snpbook.host.memory import AnonymousMemory, Flags, PageAllocator
from snpbook.host.rmp import as_pages
from snpbook.spec.pages import PAGE_SIZE


class SwappableMemory(AnonymousMemory):
    """Anonymous memory, some of which may be on the swap device."""

    def __init__(self, cpu: HostCpu, allocator: PageAllocator, size: int) -> None:
        super().__init__(cpu, allocator, size)
        self._swapped: Words = np.zeros(0, np.uint64)
        """The offsets of the pages on the device, and what is there of each."""
        self._slots: Bytes = np.zeros((0, PAGE_SIZE), np.uint8)

    def swap_out(self, offsets: range) -> Flags:
        """Write pages to the device and free their frames: which could go. Pinned ones stay."""
        frames = self.peek(offsets)
        can = np.asarray((frames != 0) & ~self.allocator.is_pinned(frames))
        if can.any():
            going = np.flatnonzero(can)
            contents = self.cpu.read_pages(as_pages(frames[can]))
            for lost in tuple(self._mappers):
                lost(self, offsets)
            self._take_out(going + offsets.start)
            self._swapped = np.concatenate([self._swapped, (going + offsets.start).astype(np.uint64)])
            self._slots = np.concatenate([self._slots, contents])
        return can

    def _prepare(self, pages: Pages, offsets: Words) -> None:
        """New pages are zero; those on the device get back what is there."""
        super()._prepare(pages, offsets)
        back = np.isin(self._swapped, offsets)
        if back.any():
            order = np.searchsorted(offsets, self._swapped[back])
            frames = np.asarray(pages, np.uint64)[order]
            self.cpu.write_pages(as_pages(frames), self._slots[back])
            self._swapped, self._slots = self._swapped[~back], self._slots[~back]

    def _drop(self, offsets: range) -> None:
        kept = ~((self._swapped >= offsets.start) & (self._swapped < offsets.stop))
        self._swapped, self._slots = self._swapped[kept], self._slots[kept]
        super()._drop(offsets)
