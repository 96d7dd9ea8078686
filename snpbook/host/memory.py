"""Host memory: the page allocator, and files of pages that get memory when they are first touched.

A VMM's ordinary memory (`UserMemory`) can be read and written from user space; a restricted file
(memfd_restricted of the UPM series) cannot: its pages are reachable by KVM alone. Source: UPM v10.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Pages, Words, as_slice, page_numbers
from snpbook.hardware.ports import HostCpu
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages, make_shared
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.trace import Message, PagesMoved

Flags = NDArray[np.bool_]
_ABSENT = np.uint32(0)
"""No frame: page 0 is never given out. Frame numbers of 32 bits reach 16 TB."""


class PageAllocator:
    """Free page frames, as runs; the lowest that fits is given out."""

    def __init__(self, free: list[range]) -> None:
        self._free = sorted(free, key=lambda run: run.start)
        self.allocated = 0
        self.end = end = max((run.stop for run in free), default=0)
        self._pins = np.zeros(end, np.uint32)
        """How often each frame is pinned."""
        self._orphans = np.zeros(end, bool)
        """Frames that were given back while pinned: free when the last pin goes."""

    def __repr__(self) -> str:
        return f"PageAllocator({self.allocated} pages out)"

    def allocate(self, count: int, align: int = 1) -> range:
        """`count` consecutive frames, the first a multiple of `align`; ENOMEM where there are none."""
        for index, run in enumerate(self._free):
            skip = -run.start % align
            if len(run) >= skip + count:
                self._free[index : index + 1] = [rest for rest in (run[:skip], run[skip + count :]) if rest]
                self.allocated += count
                return run[skip : skip + count]
        raise KernelError(errno.ENOMEM, "free host memory", f"{count} pages in a row", f"{self.largest} pages")

    def allocate_order9(self) -> range | None:
        """2 MiB in a row that begin at 2 MiB, for a huge page; None where memory is too full or too fragmented."""
        try:
            return self.allocate(PAGES_PER_LARGE, PAGES_PER_LARGE)
        except KernelError:
            return None

    def claim(self, pages: range) -> None:
        """These very frames; ENOMEM where one of them is in use."""
        for index, run in enumerate(self._free):
            if run.start <= pages.start and pages.stop <= run.stop:
                rests = range(run.start, pages.start), range(pages.stop, run.stop)
                self._free[index : index + 1] = [rest for rest in rests if rest]
                self.allocated += len(pages)
                return
        raise KernelError(errno.ENOMEM, "free host memory", f"pages {pages.start:#x} to {pages.stop:#x}", "in use")

    def allocate_small(self) -> int:
        """One frame that does not begin 2 MB: there hardware would check a VMCB or VMSA in use as a large page."""
        pages = self.allocate(1)
        if pages.start % PAGES_PER_LARGE:
            return pages.start
        try:
            return self.allocate(1).start
        finally:
            self.release(pages)

    def take(self, count: int) -> Words:
        """`count` frames, consecutive where there are as many in a row; ENOMEM where there are too few."""
        check(count <= self.free, errno.ENOMEM, "free host memory", f"{count} pages", f"{self.free} pages")
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

    def pin(self, frames: Words) -> None:
        """Each of the frames stays with its contents until it is unpinned as often; one may be named several times."""
        np.add.at(self._pins, frames, 1)

    def unpin(self, frames: Words) -> None:
        """Take one pin off each frame; those given back meanwhile are free with their last one."""
        np.subtract.at(self._pins, frames, 1)
        free = np.unique(frames[(self._pins[frames] == 0) & self._orphans[frames]])
        self._orphans[free] = False
        for _, pages in runs(free):
            self.release(pages)

    def is_pinned(self, frames: Words) -> Flags:
        """Which of the frames are pinned."""
        return np.asarray(self._pins[frames] != 0)

    def holes(self, pages: range) -> list[range]:
        """What is free of a run of frames."""
        parts = (range(max(run.start, pages.start), min(run.stop, pages.stop)) for run in self._free)
        return [part for part in parts if part]

    @property
    def huge_pages(self) -> int:
        """How many huge pages could be given out."""
        return sum(max(run.stop // PAGES_PER_LARGE - -(-run.start // PAGES_PER_LARGE), 0) for run in self._free)

    @property
    def pinned(self) -> int:
        """Frames that are pinned, each counted once."""
        return int(np.count_nonzero(self._pins))

    def release(self, pages: range) -> None:
        """Give frames back; neighbouring runs become one. Those that are pinned wait for `unpin`."""
        held = self._pins[pages.start : pages.stop] != 0
        if held.any():
            frames = page_numbers(pages)
            self._orphans[frames[held]] = True
            for _, free in runs(frames[~held]):
                self._release(free)
            return
        self._release(pages)

    def _release(self, pages: range) -> None:
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


Lost = Callable[["PageFile", range], None]
"""Told a file and a run of its page offsets, before their pages go."""


class PageFile:
    """Pages by offset, allocated on first use; `frames` holds the page numbers."""

    movable = False
    """Whether the kernel may move its pages, or write them to a swap device."""
    anonymous = False
    """Whether it belongs to one mapping alone: then MADV_DONTNEED frees its pages."""

    def __init__(self, cpu: HostCpu, allocator: PageAllocator, size: int) -> None:
        check(size >= 0 and size % PAGE_SIZE == 0, errno.EINVAL, "the size is a multiple of a page", PAGE_SIZE, size)
        self.cpu, self.allocator, self.size = cpu, allocator, size
        self._frames = _absent(size >> PAGE_SHIFT)
        self._mappers: list[Lost] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size >> 20} MiB, {self.resident} pages resident)"

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def resident(self) -> int:
        """Pages that have memory."""
        return int((self._frames != _ABSENT).sum())

    def mapped_by(self, lost: Lost) -> None:
        """Somebody maps the file, and is told by `lost` which offsets are about to go."""
        self._mappers.append(lost)

    def unmapped_by(self, lost: Lost) -> None:
        """A mapping is gone; with its last one, anonymous memory is."""
        self._mappers.remove(lost)
        if self.anonymous and not self._mappers:
            self.close()

    def get(self, offsets: range) -> Words:
        """The frames behind a run of page offsets; pages without one get memory now."""
        frames = self._frames[as_slice(offsets)]
        missing = np.flatnonzero(frames == _ABSENT)
        if len(missing):
            fresh = self.allocator.take(len(missing))
            frames[missing] = fresh
            self._prepare(as_pages(fresh), page_numbers(offsets)[missing])
            self._tell(offsets[int(missing[0]) : int(missing[-1]) + 1])
        return frames.astype(np.uint64)

    def get_prefix(self, offsets: range) -> Words:
        """`get` for as many pages from the first on as memory allows."""
        missing = np.flatnonzero(self._frames[as_slice(offsets)] == _ABSENT)
        room = self.allocator.free
        return self.get(offsets[: int(missing[room])] if len(missing) > room else offsets)

    def peek(self, offsets: range) -> Words:
        """The frames behind a run of page offsets, 0 where there is none; nothing gets memory."""
        return self._frames[as_slice(offsets)].astype(np.uint64)

    def is_huge(self, offsets: range) -> Flags:
        """Which pages of a run lie in a huge page: none, in a file that has none."""
        return np.zeros(len(offsets), bool)

    def move(self, offsets: range) -> Flags:
        """Migrate a run: its pages get other frames and keep what DRAM holds. Which of them could be moved.

        Not those that are pinned, and no page of a file that is not `movable`. ENOMEM.
        """
        frames = self._frames[offsets.start : offsets.stop]
        can = (frames != _ABSENT) & ~self.allocator.is_pinned(self.peek(offsets)) & self.movable
        if can.any():
            fresh = self.allocator.take(int(can.sum()))
            for lost in tuple(self._mappers):
                lost(self, offsets)
            old = frames[can].astype(np.uint64)
            self.cpu.write_pages(as_pages(fresh), self.cpu.read_pages(as_pages(old)))
            frames[can] = fresh
            self._give_back(old)
        return np.asarray(can)

    def punch(self, offsets: range) -> None:
        """Give the pages of a run back, as far as the file reaches, after whoever maps them has been told."""
        offsets = range(offsets.start, min(offsets.stop, len(self)))
        for lost in tuple(self._mappers):
            lost(self, offsets)
        self._drop(offsets)

    def resize(self, size: int) -> None:
        """Another size in bytes, whole pages: what is cut off loses its memory."""
        check(size >= 0 and size % PAGE_SIZE == 0, errno.EINVAL, "the size is a multiple of a page", PAGE_SIZE, size)
        if size < self.size:
            self.punch(range(size >> PAGE_SHIFT, self.size >> PAGE_SHIFT))
        kept = self._frames[: size >> PAGE_SHIFT]
        self._frames = _absent(size >> PAGE_SHIFT)
        self._frames[: len(kept)] = kept
        self.size = size

    def close(self) -> None:
        """Give every page back to the kernel, as the hypervisor's."""
        self._drop(range(len(self._frames)))

    def _drop(self, offsets: range) -> None:
        there = self._frames[offsets.start : offsets.stop] != _ABSENT
        self._take_out(np.flatnonzero(there) + offsets.start)

    def _take_out(self, offsets: NDArray[np.int64]) -> None:
        """The pages at these offsets, ascending, have no memory any more."""
        frames = self._frames[offsets]
        gone = frames[frames != _ABSENT].astype(np.uint64)
        if len(gone):
            self._frames[offsets] = _ABSENT
            self._tell(range(int(offsets[0]), int(offsets[-1]) + 1))
            self._give_back(gone)

    def _give_back(self, frames: Words) -> None:
        for _, pages in runs(frames):
            self.allocator.release(pages)

    def _tell(self, offsets: range) -> None:
        """Tell that pages of a run got memory, or lost it."""
        if self.cpu.trace:
            resident = self._frames[as_slice(offsets)] != _ABSENT
            self.cpu.trace.emit(PagesMoved(file=self, offsets=offsets, resident=resident))

    def _prepare(self, pages: Pages, offsets: Words) -> None:
        """What is done with new pages of these offsets before anyone sees them: nothing, for a restricted file."""


class RestrictedFile(PageFile):
    """memfd_restricted: no read, write or mmap; pages stay where they are and are not zeroed."""

    def _give_back(self, frames: Words) -> None:
        """The hypervisor's again. A page that its RMP entry does not let go is only warned of, and free (Linux)."""
        try:
            make_shared(self.cpu, frames)
        except KernelError as error:
            if self.cpu.trace:
                self.cpu.trace.emit(Message(source="kernel", text=f"SEV: Failed to update RMP entry: {error}"))
        super()._give_back(frames)


class UserMemory(PageFile):
    """Memory that a process can map: zeroed, and what a guest sees as shared pages."""

    movable = True

    def _prepare(self, pages: Pages, offsets: Words) -> None:
        for _, run in runs(page_numbers(pages)):
            self.cpu.zero_pages(run)

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


class AnonymousMemory(UserMemory):
    """The memory of one private mapping: MADV_DONTNEED frees it, the last munmap ends it."""

    anonymous = True


def _absent(count: int) -> NDArray[np.uint32]:
    """So many absent frames, in a mapping of their own: a large file of which little is touched costs little.

    ENOMEM for a file so large that its frames cannot be listed (MODEL).
    """
    if not count:
        return np.zeros(0, np.uint32)
    try:
        table = mmap.mmap(-1, count * _ABSENT.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise KernelError(errno.ENOMEM, "the file's pages can be listed", "a smaller file", f"{count} pages") from error
    return np.frombuffer(table, np.uint32)


def whole_regions(pages: range) -> Flags:
    """Which of a run of pages lie in an aligned 2 MB all of which is in the run."""
    first = -(-pages.start // PAGES_PER_LARGE) * PAGES_PER_LARGE
    last = pages.stop // PAGES_PER_LARGE * PAGES_PER_LARGE
    numbers = np.arange(pages.start, pages.stop)
    return np.asarray((numbers >= first) & (numbers < last))


def runs(frames: Words) -> Iterator[tuple[int, range]]:
    """The consecutive runs in an array of frames, each with its index."""
    if not len(frames):
        return
    breaks: NDArray[np.int64] = np.flatnonzero(np.diff(frames) != 1) + 1
    bounds = [0, *breaks.tolist(), len(frames)]
    for start, stop in pairwise(bounds):
        yield start, range(int(frames[start]), int(frames[start]) + stop - start)
