"""RMPUPDATE in the kernel's way. Source: Linux arch/x86/virt/svm/sev.c."""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Pages, Words
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.ports import HostCpu
from snpbook.host.refusal import KernelError
from snpbook.spec.pages import PAGES_PER_LARGE
from snpbook.spec.rmp import ASSIGNED, LARGE, RmpCode

Flags = NDArray[np.bool_]
_INSIDE = np.uint64(PAGES_PER_LARGE - 1)
"""The bits of a page number that tell its place in 2 MB."""


def rmpupdate(cpu: HostCpu, pages: Pages, gfns: Pages, new: NewState) -> None:
    """RMPUPDATE of each page: any refusal is EFAULT and names the first page; the others are done."""
    codes = cpu.rmpupdate(pages, gfns, new)
    if codes.any():
        index = int(np.argmax(codes != RmpCode.SUCCESS))
        rule = f"RMPUPDATE of page {int(pages[index]):#x}"
        raise KernelError(errno.EFAULT, rule, RmpCode.SUCCESS.name, RmpCode(int(codes[index])).name, "APM2 15.36.5")


def is_assigned(cpu: HostCpu, frames: Words) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which pages a guest or the firmware owns, read from the table in memory."""
    return np.asarray(cpu.rmp_words(frames)[:, 0] & np.uint64(ASSIGNED) != 0)


def is_large(cpu: HostCpu, frames: Words) -> Flags:
    """Which pages lie in a 2 MB entry: the first entry of their 2 MB tells."""
    both = np.uint64(ASSIGNED | LARGE)
    return np.asarray(cpu.rmp_words(frames & ~_INSIDE)[:, 0] & both == both)


def assign(cpu: HostCpu, frames: Words, gfns: Words, asid: int, huge: Flags) -> None:
    """Give pages to a guest, with 2 MB entries for those that are `huge`: whole 2 MB, aligned as the guest's are."""
    new, heads = NewState(assigned=True, asid=asid), huge & (frames & _INSIDE == 0)
    if heads.any():
        rmpupdate(cpu, frames[heads], gfns[heads], NewState(assigned=True, asid=asid, large=True))
    if not huge.all():
        rmpupdate(cpu, as_pages(frames[~huge]), gfns[~huge], new)


def make_shared(cpu: HostCpu, frames: Words, *, whole: bool = True) -> None:
    """Make those of the pages that are assigned the hypervisor's again.

    A 2 MB entry all of whose pages are among them goes as one, if `whole`; any other is split first.
    """
    mine = frames[is_assigned(cpu, frames)]
    large = is_large(cpu, mine)
    if large.any():
        heads, count = np.unique(mine[large] & ~_INSIDE, return_counts=True)
        full = (count == PAGES_PER_LARGE) & whole
        if full.any():
            rmpupdate(cpu, heads[full], np.zeros(int(full.sum()), np.uint64), HYPERVISOR)
            mine = mine[~np.isin(mine & ~_INSIDE, heads[full])]
        if not full.all():
            split(cpu, heads[~full])
    if len(mine):
        rmpupdate(cpu, as_pages(mine), np.zeros(len(mine), np.uint64), HYPERVISOR)


def split(cpu: HostCpu, heads: Words) -> None:
    """PSMASH of 2 MB entries, by their first pages; a refusal is EFAULT."""
    codes = cpu.psmash(heads)
    if codes.any():
        index = int(np.argmax(codes != RmpCode.SUCCESS))
        rule = f"PSMASH of page {int(heads[index]):#x}"
        raise KernelError(errno.EFAULT, rule, RmpCode.SUCCESS.name, RmpCode(int(codes[index])).name, "APM2 15.36.11")


def as_pages(frames: Words) -> Pages:
    """Frames as a run where they are consecutive: runs are the fast form."""
    first = int(frames[0]) if len(frames) else 0
    if len(frames) and bool((frames == first + np.arange(len(frames), dtype=np.uint64)).all()):
        return range(first, first + len(frames))
    return frames
