"""A recount of a guest's pages: from its files, the allocator's pins, the whole RMP and the nested tables in memory.

Slow and obvious, so that the ledger can be held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from snpbook.hardware.ports import HostCpu
from snpbook.host.kvm.vm import Vm
from snpbook.host.memory import Flags, PageFile
from snpbook.spec import rmp
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.vmcb import MMIO_ENTRY, PTE_ADDRESS, PTE_LARGE, PTE_PRESENT

_CHUNK = 1 << 20
_TOP = 3
Resident = Callable[[PageFile, range], Flags]
"""Which pages of a run of a file have memory."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of 4 KB of one guest at one moment."""

    shared: int
    """Guest pages that have memory of the VMM's."""
    private: int
    """Guest pages that have memory of a private file's."""
    doubled: int
    """Guest pages that have both."""
    pinned: int
    """Frames that stay where they are: pinned for long, or in a private file."""
    assigned: int
    """Pages whose RMP entry has the guest's ASID, its VMSAs among them."""
    large: int
    """RMP entries of 2 MB among them."""
    mapped: int
    """Guest pages in the nested tables."""


def sides(vm: Vm, resident: Resident) -> tuple[Flags, Flags, int]:
    """Which guest pages of all slots have memory on the shared and on the private side; how many may not move."""
    shared, private, held = [np.zeros(0, bool)], [np.zeros(0, bool)], 0
    for slot in vm.slots:
        files = vm.process.space.files(slot.user_pages(slot.gfns))
        shared.append(np.concatenate([resident(file, offsets) for file, offsets in files]))
        private.append(np.zeros(len(slot.gfns), bool))
        if slot.private is not None:
            private[-1] = resident(slot.private.pages, slot.offsets(slot.gfns))
            held += int(private[-1].sum()) * (not slot.private.pages.movable)
    return np.concatenate(shared), np.concatenate(private), held


def recount(vm: Vm) -> Pages:
    """What the ledger must say."""
    shared, private, held = sides(vm, lambda file, offsets: file.peek(offsets) != 0)
    pinned = np.zeros(vm.kernel.memory.end, bool)
    for region in vm.sev.regions if vm.sev else ():
        pinned[region.frames[vm.kernel.memory.is_pinned(region.frames)]] = True
    assigned, large = _entries(vm.kernel.cpu, vm.asid) if vm.snp else (0, 0)
    return Pages(
        shared=int(shared.sum()),
        private=int(private.sum()),
        doubled=int((shared & private).sum()),
        pinned=int(pinned.sum()) + held,
        assigned=assigned,
        large=large,
        mapped=_leaves(vm.kernel.cpu, vm.mmu.tables.root, _TOP),
    )


def _entries(cpu: HostCpu, asid: int) -> tuple[int, int]:
    """Pages with an ASID in the whole RMP, and entries of 2 MB among them."""
    end = max(stop for _, stop in cpu.memory_map.dram) >> PAGE_SHIFT
    pages = large = 0
    for start in range(0, end, _CHUNK):
        low = cpu.rmp_words(range(start, min(start + _CHUNK, end)))[:, 0]
        mine = (low & np.uint64(rmp.ASSIGNED) != 0) & (
            (low & np.uint64(rmp.ASID)) >> np.uint64(rmp.ASID_SHIFT) == np.uint64(asid)
        )
        heads = int((mine & (low & np.uint64(rmp.LARGE) != 0)).sum())
        inside = _inside(low, mine)
        pages, large = pages + int((mine & ~inside).sum()) + (PAGES_PER_LARGE - 1) * heads, large + heads
    return pages, large


def _inside(low: np.ndarray[tuple[int], np.dtype[np.uint64]], mine: Flags) -> Flags:
    """Pages behind the first of a 2 MB entry: whatever their own entries say, the first one's counts."""
    heads = mine & (low & np.uint64(rmp.LARGE) != 0)
    count = -(-len(low) // PAGES_PER_LARGE) * PAGES_PER_LARGE
    first = np.zeros(count, bool)
    first[: len(low)] = heads
    whole = np.repeat(first.reshape(-1, PAGES_PER_LARGE)[:, 0], PAGES_PER_LARGE)[: len(low)]
    return np.asarray(whole & ~heads)


def _leaves(cpu: HostCpu, table: int, level: int) -> int:
    """Guest pages that a nested table and those below it map."""
    entries = np.frombuffer(cpu.read(table, PAGE_SIZE), "<u8")
    there = entries[(entries & np.uint64(PTE_PRESENT) != 0) & (entries != np.uint64(MMIO_ENTRY))]
    if level == 0:
        return len(there)
    large = there & np.uint64(PTE_LARGE) != 0
    below: list[int] = (there[~large] & np.uint64(PTE_ADDRESS)).tolist()
    count: int = int(large.sum()) * PAGES_PER_LARGE**level
    return count + sum(_leaves(cpu, each, level - 1) for each in below)
