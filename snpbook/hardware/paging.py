"""Page walks: nested tables in host memory, guest tables in private guest memory, for many pages at once.

A nested walk reads raw DRAM; a guest walk reads each table page through the nested tables and the
guest's key, whatever the C-bit says. Four levels; 4 KB, 2 MB and 1 GB leaves. Accessed and dirty bits
are not updated (LIMITATIONS). Source: APM2 5.3, 15.25, 15.34.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Dram, Words
from snpbook.hardware.rmp import U64
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.vmcb import PTE_ADDRESS, PTE_LARGE, PTE_PRESENT, PTE_SIZE, PTE_WRITE, PTES_PER_TABLE

_LEVELS = (3, 2, 1, 0)
_INDEX_BITS = 9
_INDEX = U64(PTES_PER_TABLE - 1)
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class NestedWalk:
    """Where guest pages lie: system page numbers, and per page present, writable, mapped by a 2 MB leaf."""

    pages: Words
    present: Flags
    writable: Flags
    large: Flags


def nested_walk(dram: Dram, root: int, gfns: Words) -> NestedWalk:
    """Translate guest page numbers through the nested tables at `root`."""
    count = len(gfns)
    table = np.full(count, root & PTE_ADDRESS, U64)
    pages = np.zeros(count, U64)
    open_ = np.ones(count, bool)
    writable = np.ones(count, bool)
    large = np.zeros(count, bool)
    present = np.zeros(count, bool)
    for level in _LEVELS:
        shift = U64(_INDEX_BITS * level)
        entries = dram.words(table + ((gfns >> shift) & _INDEX) * U64(PTE_SIZE))
        open_ &= entries & U64(PTE_PRESENT) != 0
        writable &= ~open_ | (entries & U64(PTE_WRITE) != 0)
        leaf = open_ & ((entries & U64(PTE_LARGE) != 0) if level in (1, 2) else level == 0)
        inside = (U64(1) << shift) - U64(1)
        frames = (entries & U64(PTE_ADDRESS)) >> U64(PAGE_SHIFT)
        pages = np.where(leaf, frames & ~inside | gfns & inside, pages)
        large |= leaf & bool(level)
        present |= leaf
        open_ &= ~leaf
        table = np.where(open_, entries & U64(PTE_ADDRESS), U64(0))
    return NestedWalk(pages, present, present & writable, large)


@dataclass(frozen=True, slots=True)
class GuestWalk:
    """Guest page numbers, the C-bit, and present, writable, of guest virtual pages.

    `fault` is the reason why a table could not be read, for page index `stop` and those behind it.
    """

    gfns: Words
    private: Flags
    present: Flags
    writable: Flags
    stop: int
    fault: object | None


def guest_walk(read_table: Callable[[int], Words | object], root: int, c_bit: int, virtual: Words) -> GuestWalk:
    """Translate guest virtual page numbers through the guest's own tables.

    `read_table(gfn)` gives the 512 entries of a table page, or the fault that reading it caused.
    """
    count = len(virtual)
    current = np.full(count, (root & PTE_ADDRESS) >> PAGE_SHIFT, U64)
    gfns = np.zeros(count, U64)
    private = np.zeros(count, bool)
    open_, writable, present = np.ones(count, bool), np.ones(count, bool), np.zeros(count, bool)
    stop, fault = count, None
    for level in _LEVELS:
        shift = U64(_INDEX_BITS * level)
        entries = np.zeros(count, U64)
        tables = current[open_]
        if len(tables) and (tables == tables[0]).all():
            tables = tables[:1]
        for table in np.unique(tables):
            where = open_ & (current == table)
            words = read_table(int(table))
            if isinstance(words, np.ndarray):
                entries[where] = words[((virtual[where] >> shift) & _INDEX).astype(np.int64)]
            elif (first := int(np.argmax(where))) < stop:
                stop, fault = first, words
        open_ &= entries & U64(PTE_PRESENT) != 0
        writable &= ~open_ | (entries & U64(PTE_WRITE) != 0)
        leaf = open_ & ((entries & U64(PTE_LARGE) != 0) if level in (1, 2) else level == 0)
        inside = (U64(1) << shift) - U64(1)
        frames = (entries & U64(PTE_ADDRESS)) >> U64(PAGE_SHIFT)
        gfns = np.where(leaf, frames & ~inside | virtual & inside, gfns)
        private |= leaf & (entries >> U64(c_bit) & U64(1) != 0)
        present |= leaf
        open_ &= ~leaf
        current = np.where(open_, frames, U64(0))
    return GuestWalk(gfns, private, present, present & writable, stop, fault)
