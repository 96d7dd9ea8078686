"""What Linux does with memory behind a process's back: migrate, compact, swap, and look for equal pages.

It moves what DRAM holds. A page of a SEV guest is encrypted with a tweak made of its address: moved, it decrypts to
something else. So such pages are pinned, or kept in files that nothing moves. Sources: Linux mm/migrate.c,
mm/compaction.c, mm/vmscan.c, mm/ksm.c; APM2 15.34.9 (pages of encrypted guests are not to be moved by software).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from snpbook.hardware.dram import Bytes, page_numbers
from snpbook.host.memory import Flags, PageAllocator, PageFile
from snpbook.host.refusal import KernelError
from snpbook.host.rmp import as_pages
from snpbook.host.swap import SwappableMemory
from snpbook.spec.pages import PAGE_SIZE, PAGES_PER_LARGE

Parts = Iterable[tuple[PageFile, range]]
"""Runs of pages by file and offsets, as `AddressSpace.files` gives them for user pages; one at least."""


def migrate(parts: Parts) -> Flags:
    """move_pages(2): resident pages get other frames. Which of them moved (n,): not those that are pinned."""
    return np.concatenate([file.move(offsets) for file, offsets in parts])


def swap_out(parts: Parts) -> Flags:
    """MADV_PAGEOUT: pages go to the swap device, to come back elsewhere. Which of them went (n,)."""
    return np.concatenate(
        [
            file.swap_out(offsets) if isinstance(file, SwappableMemory) else np.zeros(len(offsets), bool)
            for file, offsets in parts
        ]
    )


def mergeable(parts: Parts) -> int:
    """How many frames KSM would save among resident pages: those that hold what another one holds.

    Pinned pages are not looked at. That the pages are then merged, and copied on a write, is not modelled.
    """
    found = [np.zeros((0, PAGE_SIZE), np.uint8)]
    for file, offsets in parts:
        frames = file.peek(offsets)
        loose = frames[(frames != 0) & ~file.allocator.is_pinned(frames)]
        if file.movable and len(loose):
            found.append(file.cpu.read_pages(as_pages(loose)))
    contents: Bytes = np.concatenate(found)
    return len(contents) - len(np.unique(contents.view(f"V{PAGE_SIZE}")))


def compact(memory: PageAllocator, files: Iterable[PageFile]) -> int:
    """Make room for huge pages: move movable pages out of 2 MB that hold nothing else. How many huge pages are free.

    The emptiest first, as long as there are frames elsewhere.
    """
    owned = [file for file in files if file.movable]
    while True:
        before = memory.huge_pages
        if not _empty_one(memory, owned) or memory.huge_pages <= before:
            return memory.huge_pages


def _empty_one(memory: PageAllocator, files: list[PageFile]) -> bool:
    """Move everything out of the 2 MB with the fewest pages to move; False where no such part can be emptied."""
    where = [(file, np.flatnonzero(file.peek(range(len(file))))) for file in files]
    frames = (
        np.concatenate([file.peek(range(len(file)))[at] for file, at in where]) if where else np.zeros(0, np.uint64)
    )
    frames = frames[~memory.is_pinned(frames)]
    regions, counts = np.unique(frames // np.uint64(PAGES_PER_LARGE), return_counts=True)
    for index in np.argsort(counts, kind="stable").tolist():
        block = range(int(regions[index]) * PAGES_PER_LARGE, (int(regions[index]) + 1) * PAGES_PER_LARGE)
        holes = memory.holes(block)
        if sum(map(len, holes)) + int(counts[index]) < PAGES_PER_LARGE:
            continue  # something else lies there
        for hole in holes:
            memory.claim(hole)
        kept = [*holes, *iter(memory.allocate_order9, None)]  # pages go where there is no huge page to lose
        try:
            for file, at in where:
                mine = at[np.isin(file.peek(range(len(file)))[at] // np.uint64(PAGES_PER_LARGE), regions[index])]
                for offset in _runs(mine):
                    file.move(offset)
        except KernelError:
            return False
        finally:
            for pages in kept:
                memory.release(pages)
        return True
    return False


def _runs(offsets: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[range]:
    if not len(offsets):
        return []
    parts = np.split(offsets, np.flatnonzero(np.diff(offsets) != 1) + 1)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def fragment(memory: PageAllocator, every: int = PAGES_PER_LARGE) -> list[range]:
    """Take one frame of each `every` that are free, so that long runs are gone: what was taken, to be released."""
    free = np.concatenate([page_numbers(run) for run in memory.holes(range(memory.end))])
    taken = [range(page, page + 1) for page in free[free % np.uint64(every) == 0].tolist()]
    for pages in taken:
        memory.claim(pages)
    return taken
