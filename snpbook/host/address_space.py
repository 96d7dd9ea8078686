"""The address space of a process: its mappings, and user addresses resolved to page frames.

A virtual address leads to a file of pages and an offset in it; frames come with the first touch. KVM watches an
address space (`watch`) and drops what it mapped for a guest when a mapping or a page goes. Sources: Linux mm/mmap.c,
mm/madvise.c, include/linux/mmu_notifier.h.
"""

from __future__ import annotations

import errno
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Words
from snpbook.hardware.exits import HostPageFault
from snpbook.hardware.ports import HostCpu
from snpbook.host.huge_pages import HugeAnonymousMemory
from snpbook.host.memory import Flags, PageFile
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.process import USER_BASE, USER_END

if TYPE_CHECKING:
    from snpbook.host.files import File

Watcher = Callable[[range], None]
"""Told the page numbers of user addresses that are about to lose what they show."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """User pages `pages` show the pages of `file` from page offset `first` on, and keep `holder` open."""

    pages: range
    file: PageFile
    first: int
    writable: bool
    holder: File | None

    def offsets(self, pages: range) -> range:
        """The file's page offsets behind user pages of this mapping."""
        start = pages.start - self.pages.start + self.first
        return range(start, start + len(pages))

    def part(self, pages: range) -> Mapping:
        return replace(self, pages=pages, first=self.offsets(pages).start)


class AddressSpace:
    """The memory of one process. `EFAULT` where an address is not its own."""

    def __init__(self, cpu: HostCpu) -> None:
        self.cpu = cpu
        self._mappings: list[Mapping] = []
        self.split: set[int] = set()
        """2 MB of user addresses, by number, whose large mapping was split."""
        self._watchers: list[Watcher] = []

    def __repr__(self) -> str:
        return f"AddressSpace({len(self._mappings)} mappings, {sum(len(m.pages) for m in self._mappings)} pages)"

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Tell `watcher` before pages go; the value returned ends it."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def map(
        self,
        file: PageFile,
        offset: int,
        size: int,
        *,
        writable: bool = True,
        address: int = 0,
        holder: File | None = None,
    ) -> int:
        """Map a range of pages (bytes, whole pages), at `address` or where there is room: the address.

        `holder` is the open file whose pages they are.
        """
        count = size >> PAGE_SHIFT
        pages = range(address >> PAGE_SHIFT, (address >> PAGE_SHIFT) + count) if address else self._room(count)
        self.unmap(pages)
        self._add(Mapping(pages, file, offset >> PAGE_SHIFT, writable, holder))
        return pages.start << PAGE_SHIFT

    def unmap(self, pages: range) -> None:
        """Remove what is mapped in a run of user pages: anonymous memory is gone, files keep their pages."""
        found = list(self._within(pages))
        if not found:
            return
        self._tell(pages)
        for whole, part in found:
            self._mappings.remove(whole)
            for rest in (range(whole.pages.start, part.start), range(part.stop, whole.pages.stop)):
                if rest:
                    self._add(whole.part(rest))
            if whole.file.anonymous:
                whole.file.punch(whole.offsets(part))
            whole.file.unmapped_by(self._lost)
        for whole, _ in found:
            if whole.holder is not None:
                whole.holder.let_go()

    def _add(self, mapping: Mapping) -> None:
        insort(self._mappings, mapping, key=lambda each: each.pages.start)
        mapping.file.mapped_by(self._lost)
        if mapping.holder is not None:
            mapping.holder.hold()

    def discard(self, pages: range) -> None:
        """MADV_DONTNEED: anonymous memory loses its pages, a file's stay. ENOMEM where a part is not mapped."""
        self._tell(pages)
        for mapping, part in self._within(pages):
            if mapping.file.anonymous:
                mapping.file.punch(mapping.offsets(part))
        self._whole(pages, errno.ENOMEM)

    def remove(self, pages: range) -> None:
        """MADV_REMOVE: the file behind the mapping loses its pages. ENOMEM where a part is not mapped.

        EINVAL for anonymous memory, EACCES for what may not be written; what lies before is done.
        """
        for mapping, part in self._within(pages):
            check(not mapping.file.anonymous, errno.EINVAL, "a shared mapping of a file", "memfd", "anonymous memory")
            check(mapping.writable, errno.EACCES, "the mapping may be written", "PROT_WRITE", hex(part.start))
            mapping.file.punch(mapping.offsets(part))
        self._whole(pages, errno.ENOMEM)

    def want_huge(self, pages: range, huge: bool) -> None:
        """MADV_HUGEPAGE and its opposite."""
        self._whole(pages, errno.ENOMEM)
        for mapping, _ in self._within(pages):
            if isinstance(mapping.file, HugeAnonymousMemory):
                mapping.file.huge = huge

    def mapped(self, pages: range) -> int:
        """How many of the first pages of a run are mapped."""
        at = pages.start
        for _, part in self._within(pages):
            if part.start > at:
                break
            at = part.stop
        return at - pages.start

    def frames(self, pages: range, *, write: bool = True) -> Words:
        """The frames behind a run of user pages (n,), which get memory now (get_user_pages).

        EFAULT also where a file has become shorter than its mapping: a SIGBUS for who touches that.
        """
        self._whole(pages, errno.EFAULT)
        found = list(self._within(pages))
        short = next((part for mapping, part in found if mapping.offsets(part).stop > len(mapping.file)), None)
        where = hex(short.start << PAGE_SHIFT) if short else ""
        check(short is None, errno.EFAULT, "the file reaches as far as its mapping", "pages inside the file", where)
        readonly = next((mapping for mapping, _ in found if write and not mapping.writable), None)
        where = hex(readonly.pages.start << PAGE_SHIFT) if readonly else ""
        check(readonly is None, errno.EFAULT, "the memory may be written", "PROT_WRITE", where)
        parts = [mapping.file.get(mapping.offsets(part)) for mapping, part in found]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def files(self, pages: range) -> list[tuple[PageFile, range]]:
        """Which offsets of which files a run of user pages shows."""
        self._whole(pages, errno.EFAULT)
        return [(mapping.file, mapping.offsets(part)) for mapping, part in self._within(pages)]

    def copy_in(self, address: int, size: int) -> bytes:
        """copy_from_user: bytes at a user address."""
        if not size:
            return b""
        frames = self.frames(_span(address, size), write=False)
        start = address % PAGE_SIZE
        if len(frames) == 1:
            return self.cpu.read((int(frames[0]) << PAGE_SHIFT) + start, size)
        return self.cpu.read_pages(as_pages(frames)).reshape(-1)[start : start + size].tobytes()

    def copy_out(self, address: int, data: bytes) -> None:
        """copy_to_user. A page that the RMP protects is EFAULT, too."""
        try:
            self.put(address, data)
        except HostPageFault as fault:
            raise KernelError(errno.EFAULT, fault.rule, fault.expected, fault.found, fault.cite) from fault

    def put(self, address: int, data: bytes) -> None:
        """Store bytes through the page tables. `HostPageFault` where that is refused, and that piece is not stored."""
        if not data:
            return
        pages = _span(address, len(data))
        frames, large, start = self.frames(pages), self.is_large(pages), address % PAGE_SIZE
        if large.any():
            bounds = range(PAGES_PER_LARGE - pages.start % PAGES_PER_LARGE, len(pages), PAGES_PER_LARGE)
            for first, last in pairwise([0, *bounds, len(pages)]):
                begin, end = max((first << PAGE_SHIFT) - start, 0), (last << PAGE_SHIFT) - start
                inside = start if first == 0 else 0
                if large[first]:
                    where = (int(frames[first]) << PAGE_SHIFT) + inside
                    self.cpu.write(where, data[begin:end], mapping=LARGE_PAGE_SIZE)
                else:
                    self._put(frames[first:last], inside, data[begin:end])
            return
        self._put(frames, start, data)

    def _put(self, frames: Words, start: int, data: bytes) -> None:
        if len(frames) == 1:
            self.cpu.write((int(frames[0]) << PAGE_SHIFT) + start, data)
            return
        whole = np.array(self.cpu.read_pages(as_pages(frames)))
        whole.reshape(-1)[start : start + len(data)] = np.frombuffer(data, np.uint8)
        self.cpu.write_pages(as_pages(frames), whole)

    def is_large(self, pages: range) -> Flags:
        """Which user pages a 2 MB entry of the process's page tables maps: aligned huge pages that nobody has split."""
        parts = []
        for mapping, part in self._within(pages):
            offsets = mapping.offsets(part)
            fits = (part.start - offsets.start) % PAGES_PER_LARGE == 0
            parts.append(mapping.file.is_huge(offsets) & fits)
        found: Flags = np.concatenate(parts)
        if self.split and found.any():
            numbers = np.arange(pages.start, pages.stop) // PAGES_PER_LARGE
            found &= ~np.isin(numbers, list(self.split))
        return found

    def page_of(self, frame: int, address: int, size: int) -> int:
        """The user page of a range of addresses that shows a frame."""
        pages = _span(address, size)
        return pages[int(np.argmax(self.frames(pages) == np.uint64(frame)))]

    def clear(self) -> None:
        """The process ends: nothing is mapped any more."""
        if self._mappings:
            self.unmap(range(self._mappings[0].pages.start, self._mappings[-1].pages.stop))

    def _within(self, pages: range) -> Iterator[tuple[Mapping, range]]:
        """The mappings that overlap a run, each with the part inside it, by address."""
        first = max(bisect_right(self._mappings, pages.start, key=lambda mapping: mapping.pages.start) - 1, 0)
        for mapping in self._mappings[first:]:
            if mapping.pages.start >= pages.stop:
                return
            part = range(max(pages.start, mapping.pages.start), min(pages.stop, mapping.pages.stop))
            if part:
                yield mapping, part

    def _whole(self, pages: range, number: int) -> None:
        """Every page of a run is mapped."""
        at = pages.start + self.mapped(pages)
        good = at >= pages.stop > 0 <= pages.start
        check(good, number, "an address of the process", "mapped memory", hex(at << PAGE_SHIFT))

    def _room(self, count: int) -> range:
        """The highest gap that is large enough, below the other mappings, as Linux gives them out; 2 MB aligned."""
        end = USER_END >> PAGE_SHIFT
        for mapping in reversed(self._mappings):
            room = end - mapping.pages.stop
            if room >= count + (end - count) % PAGES_PER_LARGE * (count >= PAGES_PER_LARGE):
                break
            end = mapping.pages.start
        if count >= PAGES_PER_LARGE:  # so that huge pages fit
            end -= (end - count) % PAGES_PER_LARGE
        check(end - count >= USER_BASE >> PAGE_SHIFT, errno.ENOMEM, "room in the address space", f"{count} pages", end)
        return range(end - count, end)

    def _lost(self, file: PageFile, offsets: range) -> None:
        """A file is about to lose pages: whoever watches is told by user addresses."""
        for mapping in self._mappings:
            if mapping.file is file:
                first = max(offsets.start - mapping.first, 0) + mapping.pages.start
                last = min(offsets.stop - mapping.first + mapping.pages.start, mapping.pages.stop)
                if first < last:
                    self._tell(range(first, last))

    def _tell(self, pages: range) -> None:
        for watcher in tuple(self._watchers):
            watcher(pages)


def _span(address: int, size: int) -> range:
    """The pages of a range of bytes; EFAULT for what is no user address."""
    good = 0 < address <= address + size <= USER_END
    check(good, errno.EFAULT, "an address of the process", "a user address", hex(address))
    return range(address >> PAGE_SHIFT, (address + size - 1 >> PAGE_SHIFT) + 1)
