"""Unaccepted memory: a bitmap of 2 MB units that the kernel accepts only as it hands them out.

The table is in the guest's private memory, in the form that EFI gives it. What does not fill whole units is accepted
at once. Sources: Linux drivers/firmware/efi/libstub/unaccepted_memory.c, drivers/firmware/efi/unaccepted_memory.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.guest.acceptance import accept
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.termination import terminate
from snpbook.spec.boot_tables import UNACCEPTED_TABLE, UNACCEPTED_VERSION, UNIT_SIZE
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.termination import GeneralReason

_LEAST_UNITS = 2
"""Smaller regions are accepted at once."""


@dataclass(frozen=True, slots=True)
class Unaccepted:
    """The table at guest address `table`, in accepted memory; `ghcb` is how pages are asked for."""

    ghcb: Ghcb
    table: int

    @classmethod
    async def record(cls, ghcb: Ghcb, table: int, room: int, memory: Iterable[range]) -> tuple[Unaccepted, int]:
        """Note ranges of pages as unaccepted, and accept what is no whole unit; how many pages that were.

        Terminates where the table does not fit `room` bytes, of which 4 KB cover 64 GiB: the host told of the memory.
        """
        memory, accepted = list(memory), 0
        units = np.zeros(-(-max((pages.stop for pages in memory), default=0) // PAGES_PER_LARGE), np.uint8)
        if UNACCEPTED_TABLE.size + -(-len(units) // 8) > room:
            what = f"a bitmap of {len(units)} units needs more than {room} bytes"
            await terminate(ghcb.cpu, GeneralReason.GENERAL, what)
        for pages in memory:
            first, last = -(-pages.start // PAGES_PER_LARGE), pages.stop // PAGES_PER_LARGE
            whole = range(first, last) if len(pages) >= _LEAST_UNITS * PAGES_PER_LARGE else range(0)
            units[whole.start : whole.stop] = 1
            head, tail = whole.start * PAGES_PER_LARGE, whole.stop * PAGES_PER_LARGE
            for rest in (range(pages.start, head), range(tail, pages.stop)) if whole else (pages,):
                await accept(ghcb, rest)
                accepted += len(rest)
        bitmap = np.packbits(units, bitorder="little").tobytes()
        header = UNACCEPTED_TABLE.pack(version=UNACCEPTED_VERSION, unit_size=UNIT_SIZE, phys_base=0, size=len(bitmap))
        await ghcb.cpu.write(table, header + bitmap)
        return cls(ghcb, table), accepted

    async def left(self) -> NDArray[np.bool_]:
        """Which units are unaccepted."""
        header = UNACCEPTED_TABLE.unpack(await self.ghcb.cpu.read(self.table, UNACCEPTED_TABLE.size))
        raw = await self.ghcb.cpu.read(self.table + UNACCEPTED_TABLE.size, header.size)
        return np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").astype(bool)

    async def accept(self, pages: range) -> int:
        """Accept the units in which `pages` lie, as memory is allocated; how many pages became so.

        Where the end is a unit's, the next unit too: an unaligned load may read beyond (load_unaligned_zeropad).
        """
        units = await self.left()
        stop = -(-pages.stop // PAGES_PER_LARGE) + (pages.stop % PAGES_PER_LARGE == 0)
        mine = np.zeros_like(units)
        mine[pages.start // PAGES_PER_LARGE : stop] = True
        mine &= units
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
        for first, last in edges.reshape(-1, 2).tolist():
            await accept(self.ghcb, range(first * PAGES_PER_LARGE, last * PAGES_PER_LARGE))
        bitmap = np.packbits((units & ~mine).astype(np.uint8), bitorder="little").tobytes()
        await self.ghcb.cpu.write(self.table + UNACCEPTED_TABLE.size, bitmap)
        return int(mine.sum()) * PAGES_PER_LARGE

    async def holds(self, address: int) -> bool:
        """Whether the page at an address is still unaccepted."""
        unit, units = (address >> PAGE_SHIFT) // PAGES_PER_LARGE, await self.left()
        return bool(unit < len(units) and units[unit])
