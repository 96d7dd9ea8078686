"""Conversions of a running kernel: pages to shared and back, and bounce buffers through which devices see data.

Tables and the guest's validation change in the one order that leaves no moment in which a page is private to one and
shared to the other and still used. Sources: Linux arch/x86/coco/sev (snp_set_memory_shared, _private), mm/mem_encrypt.c
(swiotlb sizes), kernel/dma/swiotlb.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from snpbook.guest import page_tables
from snpbook.guest.acceptance import accept, give_up
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.spec.ghcb import PSC_ENTRIES
from snpbook.spec.pages import PAGE_SIZE

BOUNCE_PERCENT, BOUNCE_LEAST, BOUNCE_MOST = 6, 64 << 20, 1 << 30
SLOT_SIZE, SEGMENT_SLOTS = 2048, 128
"""Bounce buffers are given out in slots of 2 KB, at most 128 at a time."""


def bounce_size(memory: int) -> int:
    """How much of `memory` bytes a guest gives to bounce buffers."""
    return min(max(memory * BOUNCE_PERCENT // 100, BOUNCE_LEAST), BOUNCE_MOST)


async def make_shared(ghcb: Ghcb, place: Layout, c_bit: int, pages: range, entries: int = PSC_ENTRIES) -> None:
    """Private pages become shared (set_memory_decrypted): rescinded, asked for, then without their C-bit."""
    await give_up(ghcb, pages, entries)
    await page_tables.mark(ghcb.cpu, place, c_bit, pages, private=False)


async def make_private(ghcb: Ghcb, place: Layout, c_bit: int, pages: range, entries: int = PSC_ENTRIES) -> None:
    """Shared pages become private (set_memory_encrypted): with their C-bit, asked for, then validated."""
    await page_tables.mark(ghcb.cpu, place, c_bit, pages, private=True)
    await accept(ghcb, pages, entries)


@dataclass(slots=True)
class BounceBuffers:
    """A pool of shared pages. Which slots are in use is the guest's own knowledge, and not in the pool.

    A mapping remembers where and how long it is; what a device says of lengths is never used to copy.
    """

    ghcb: Ghcb
    pages: range
    used: dict[int, int] = field(default_factory=dict)
    """Slots in use: the first of each mapping, and its size in bytes."""

    async def map(self, data: bytes) -> int:
        """Copy data out for a device: the guest address where it lies. `ValueError` where nothing is free."""
        slots = -(-len(data) // SLOT_SIZE)
        if not 0 < slots <= SEGMENT_SLOTS:
            raise ValueError(f"{len(data)} bytes: a mapping has 1 to {SEGMENT_SLOTS * SLOT_SIZE}")
        first = self._free(slots)
        self.used[first] = len(data)
        await self.ghcb.cpu.write(self._address(first), data)
        return self._address(first)

    async def unmap(self, address: int, claimed: int | None = None) -> bytes:
        """Copy back, once, what a device has left in a mapping, and wipe it.

        `claimed` is how much the device says it has written: more than was mapped is cut. `KeyError` for an address
        that is no mapping's.
        """
        size = self.used.pop((address - self.pages.start * PAGE_SIZE) // SLOT_SIZE)
        data: bytes = await self.ghcb.cpu.read(address, size)
        await self.ghcb.cpu.write(address, bytes(size))
        return data if claimed is None else data[: max(claimed, 0)]

    def _address(self, slot: int) -> int:
        return self.pages.start * PAGE_SIZE + slot * SLOT_SIZE

    def _free(self, slots: int) -> int:
        first = 0
        for start, size in sorted(self.used.items()):
            if start - first >= slots:
                break
            first = start + -(-size // SLOT_SIZE)
        if first + slots > len(self.pages) * PAGE_SIZE // SLOT_SIZE:
            raise ValueError(f"the bounce buffers have no {slots} slots in a row")
        return first
