"""RMPUPDATE in the kernel's way. Source: Linux arch/x86/virt/svm/sev.c."""

from __future__ import annotations

import errno

import numpy as np

from snpbook.hardware.dram import Pages, Words
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.ports import HostCpu
from snpbook.host.refusal import KernelError
from snpbook.spec.rmp import ASSIGNED, RmpCode


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


def make_shared(cpu: HostCpu, frames: Words) -> None:
    """Make those of the pages that are assigned the hypervisor's again."""
    mine = frames[is_assigned(cpu, frames)]
    if len(mine):
        rmpupdate(cpu, as_pages(mine), np.zeros(len(mine), np.uint64), HYPERVISOR)


def as_pages(frames: Words) -> Pages:
    """Frames as a run where they are consecutive: runs are the fast form."""
    first = int(frames[0]) if len(frames) else 0
    if len(frames) and bool((frames == first + np.arange(len(frames), dtype=np.uint64)).all()):
        return range(first, first + len(frames))
    return frames
