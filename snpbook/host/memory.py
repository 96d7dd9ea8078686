"""Host memory: the page allocator, and files of pages that get memory when they are first touched.

A VMM's ordinary memory (`UserMemory`) can be read and written from user space; a restricted file
(memfd_restricted of the UPM series) cannot: its pages are reachable by KVM alone. Source: UPM v10.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Pages, Words, page_numbers
from snpbook.hardware.ports import HostCpu
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages, make_shared
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

_ABSENT = np.uint64(2**64 - 1)


class PageAllocator:
    """Free page frames, as runs; the lowest that fits is given out."""

    def __init__(self, free: list[range]) -> None:
        self._free = sorted(free, key=lambda run: run.start)
        self.allocated = 0

    def __repr__(self) -> str:
        return f"PageAllocator({self.allocated} pages out)"

    def allocate(self, count: int) -> range:
        """`count` consecutive frames; ENOMEM where there are none."""
        for index, run in enumerate(self._free):
            if len(run) >= count:
                self._free[index : index + 1] = [run[count:]] if len(run) > count else []
                self.allocated += count
                return run[:count]
        raise KernelError(errno.ENOMEM, "free host memory", f"{count} pages in a row", self.largest)

    def take(self, count: int) -> Words:
        """`count` frames, consecutive where there are as many in a row; ENOMEM where there are too few."""
        check(count <= self.free, errno.ENOMEM, "free host memory", f"{count} pages", self.free)
        if count <= self.largest:
            return page_numbers(self.allocate(count))
        taken: list[range] = []
        while count:
            taken.append(self.allocate(min(count, len(self._free[0]))))
            count -= len(taken[-1])
        return np.concatenate([page_numbers(pages) for pages in taken])

    @property
    def largest(self) -> int:
        """The longest free run, in pages."""
        return max(map(len, self._free), default=0)

    @property
    def free(self) -> int:
        """All free pages."""
        return sum(map(len, self._free))

    def release(self, pages: range) -> None:
        """Give frames back; neighbouring runs become one."""
        start, stop = pages.start, pages.stop
        kept: list[range] = []
        for run in self._free:
            if run.stop == start:
                start = run.start
            elif run.start == stop:
                stop = run.stop
            else:
                kept.append(run)
        self._free = sorted([*kept, range(start, stop)], key=lambda run: run.start)
        self.allocated -= len(pages)


class PageFile:
    """Pages by offset, allocated on first use; `frames` holds the page numbers."""

    def __init__(self, cpu: HostCpu, allocator: PageAllocator, size: int) -> None:
        check(size > 0 and size % PAGE_SIZE == 0, errno.EINVAL, "the size is a multiple of a page", PAGE_SIZE, size)
        self.cpu, self._allocator, self.size = cpu, allocator, size
        self._frames: Words = np.full(size >> PAGE_SHIFT, _ABSENT, np.uint64)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size >> 20} MiB, {self.resident} pages resident)"

    @property
    def resident(self) -> int:
        """Pages that have memory."""
        return int((self._frames != _ABSENT).sum())

    def get(self, offsets: range) -> Words:
        """The frames behind a run of page offsets; pages without one get memory now."""
        frames = self._frames[offsets.start : offsets.stop]
        missing = np.flatnonzero(frames == _ABSENT)
        if len(missing):
            fresh = self._allocator.take(len(missing))
            frames[missing] = fresh
            self._prepare(as_pages(fresh))
        return frames

    def get_prefix(self, offsets: range) -> Words:
        """`get` for as many pages from the first on as memory allows."""
        missing = np.flatnonzero(self._frames[offsets.start : offsets.stop] == _ABSENT)
        room = self._allocator.free
        return self.get(offsets[: int(missing[room])] if len(missing) > room else offsets)

    def close(self) -> None:
        """Give every page back to the kernel, as the hypervisor's."""
        frames = self._frames[self._frames != _ABSENT]
        make_shared(self.cpu, frames)
        for _, pages in runs(frames):
            self._allocator.release(pages)
        self._frames[:] = _ABSENT

    def _prepare(self, pages: Pages) -> None:
        """What is done with new pages before anyone sees them: nothing, for a restricted file."""


class RestrictedFile(PageFile):
    """memfd_restricted: no read, write or mmap; pages stay where they are and are not zeroed."""


class UserMemory(PageFile):
    """Anonymous memory of the VMM: what the guest sees as shared pages."""

    def _prepare(self, pages: Pages) -> None:
        self.cpu.write_pages(pages, np.zeros((len(pages), PAGE_SIZE), np.uint8))

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the mapping."""
        first, last = offset >> PAGE_SHIFT, offset + size - 1 >> PAGE_SHIFT
        data = self.cpu.read_pages(as_pages(self.get(range(first, last + 1)))).reshape(-1)
        start = offset % PAGE_SIZE
        return data[start : start + size].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        """Store bytes in the mapping."""
        first, last = offset >> PAGE_SHIFT, offset + len(data) - 1 >> PAGE_SHIFT
        frames = as_pages(self.get(range(first, last + 1)))
        start = offset % PAGE_SIZE
        if start or len(data) % PAGE_SIZE:
            whole = np.array(self.cpu.read_pages(frames))
            whole.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
        else:
            whole = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
        self.cpu.write_pages(frames, whole)


def runs(frames: Words) -> Iterator[tuple[int, range]]:
    """The consecutive runs in an array of frames, each with its index."""
    if not len(frames):
        return
    breaks: NDArray[np.int64] = np.flatnonzero(np.diff(frames) != 1) + 1
    bounds = [0, *breaks.tolist(), len(frames)]
    for start, stop in pairwise(bounds):
        yield start, range(int(frames[start]), int(frames[start]) + stop - start)
