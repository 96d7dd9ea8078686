"""Page walks: nested tables in host memory, guest tables in private guest memory, for many pages at once.

A nested walk reads raw DRAM; a guest walk reads each table page through the nested tables and the
guest's key, whatever the C-bit says. Four levels; 4 KB, 2 MB and 1 GB leaves. Accessed and dirty bits
are not updated, and no-execute is not looked at (LIMITATIONS). Source: APM2 5.3, 15.25, 15.34.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Words
from snpbook.hardware.memory import Memory
from snpbook.hardware.rmp import U64
from snpbook.spec.encryption import KeyId
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.vmcb import (
    PTE_ADDRESS,
    PTE_LARGE,
    PTE_PRESENT,
    PTE_SIZE,
    PTE_USER,
    PTE_WRITE,
    PTES_PER_TABLE,
    FaultError,
)

_LEVELS = (3, 2, 1, 0)
_INDEX_BITS = 9
_INDEX = U64(PTES_PER_TABLE - 1)
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class NestedWalk:
    """Where guest pages lie: system page numbers, and per page whether a 2 MB or 1 GB leaf maps it.

    `faults` says which pages the tables refuse, `errors` their bits PRESENT and RESERVED of `FaultError`.
    """

    pages: Words
    large: Flags
    faults: Flags
    errors: Words


def nested_walk(memory: Memory, root: int, gfns: Words, write: bool = False) -> NestedWalk:
    """Translate guest page numbers through the nested tables at `root`.

    Every nested access is a user access (APM2 15.25.5). An entry that leads out of DRAM counts as one with reserved
    bits set (MODEL).
    """
    count = len(gfns)
    needed = U64(PTE_USER | PTE_WRITE * write)
    table = np.full(count, root & PTE_ADDRESS, U64)
    pages = np.zeros(count, U64)
    open_ = gfns >> U64(_INDEX_BITS * len(_LEVELS)) == 0
    present, refused, large = np.zeros(count, bool), np.zeros(count, bool), np.zeros(count, bool)
    reserved = open_ & (table >= memory.size)
    for level in _LEVELS:
        open_ &= ~reserved
        table = np.where(open_, table, U64(0))
        shift = U64(_INDEX_BITS * level)
        entries = memory.words(KeyId.UNENCRYPTED, table + ((gfns >> shift) & _INDEX) * U64(PTE_SIZE))
        open_ &= entries & U64(PTE_PRESENT) != 0
        refused |= open_ & (entries & needed != needed)
        leaf = open_ & ((entries & U64(PTE_LARGE) != 0) if level in (1, 2) else level == 0)
        inside = (U64(1) << shift) - U64(1)
        table = entries & U64(PTE_ADDRESS)
        frames = table >> U64(PAGE_SHIFT)
        pages = np.where(leaf, frames & ~inside | gfns & inside, pages)
        reserved |= open_ & (np.where(leaf, pages << U64(PAGE_SHIFT), table) >= memory.size)
        large |= leaf & bool(level)
        present |= leaf
        open_ &= ~leaf
    errors = U64(FaultError.PRESENT) * (present | reserved) | U64(FaultError.RESERVED) * reserved
    return NestedWalk(pages, large, ~present | refused | reserved, errors)


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
    address = PTE_ADDRESS & ~(1 << c_bit)
    current = np.full(count, (root & address) >> PAGE_SHIFT, U64)
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
        frames = (entries & U64(address)) >> U64(PAGE_SHIFT)
        gfns = np.where(leaf, frames & ~inside | virtual & inside, gfns)
        private |= leaf & (entries >> U64(c_bit) & U64(1) != 0)
        present |= leaf
        open_ &= ~leaf
        current = np.where(open_, frames, U64(0))
    return GuestWalk(gfns, private, present, present & writable, stop, fault)
