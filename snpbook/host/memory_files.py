"""Files of memory that a process holds by descriptors: memfd_create, and memfd_restricted of UPM v10.

The first is ordinary memory with a descriptor; the second cannot be read, written or mapped, and tells those who bound
it before and after a hole is punched. Sources: Linux mm/memfd.c, mm/shmem.c; UPM v10 (mm/restrictedmem.c).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from snpbook.host.files import File, Stat
from snpbook.host.huge_pages import HugeRestrictedFile
from snpbook.host.memory import PageFile, RestrictedFile, UserMemory
from snpbook.host.refusal import KernelError, check
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import FallocateMode

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel

PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
_BLOCK = 512


class FileOfPages(File):
    """What both have in common: pages, an inode, fallocate and fstat."""

    pages: PageFile

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.inode = kernel.new_inode()

    def __repr__(self) -> str:
        return f"{self.device}({self.pages!r})"

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        """Allocate, or punch a hole; a file that was to grow keeps its size where there is no memory for it (ENOMEM).

        Whole pages: that tmpfs also takes parts of pages is not modelled (EINVAL).
        """
        known = (0, FallocateMode.KEEP_SIZE, PUNCH)
        check(mode in known, errno.EOPNOTSUPP, "a mode of fallocate", "0, KEEP_SIZE or PUNCH_HOLE with it", hex(mode))
        whole = offset % PAGE_SIZE == 0 == size % PAGE_SIZE
        check(whole, errno.EINVAL, "offset and size are whole pages", PAGE_SIZE, f"{offset:#x}+{size:#x}")
        before, end = self.pages.size, offset + size
        if mode == 0 and end > before:
            self.pages.resize(end)
        offsets = range(offset >> PAGE_SHIFT, min(end, self.pages.size) >> PAGE_SHIFT)
        if offsets and mode == PUNCH:
            self.punch(offsets)
        elif offsets:
            try:
                self.pages.get(offsets)
            except KernelError:
                if self.pages.size != before:
                    self.pages.resize(before)
                raise

    def punch(self, offsets: range) -> None:
        self.pages.punch(offsets)

    def stat(self) -> Stat:
        return Stat(self.pages.size, self.inode, blocks=self.pages.resident * (PAGE_SIZE // _BLOCK))

    def release(self) -> None:
        self.pages.close()


class MemoryFile(FileOfPages):
    """memfd_create: its pages can be mapped; of a size in whole pages (MODEL)."""

    device = "memfd"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.pages = UserMemory(kernel.cpu, kernel.memory, 0)

    def truncate(self, size: int) -> None:
        self.pages.resize(size)

    def mapping(self, offset: int, size: int) -> PageFile:
        """The pages, also behind the end of the file, where a touch is a SIGBUS."""
        return self.pages


class Notifier(Protocol):
    """Who has bound a restricted file: told offsets of the file, which it clips itself."""

    def invalidate_start(self, offsets: range) -> None: ...

    def invalidate_end(self, offsets: range) -> None: ...


class RestrictedMemory(FileOfPages):
    """memfd_restricted: no read, write or mmap. Its size is set once."""

    device = "restrictedmem"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        kind = HugeRestrictedFile if kernel.shmem_huge else RestrictedFile
        self.pages = kind(kernel.cpu, kernel.memory, 0)
        self._notifiers: list[Notifier] = []

    def bind(self, notifier: Notifier) -> None:
        self._notifiers.append(notifier)

    def unbind(self, notifier: Notifier) -> None:
        """Everything is invalidated first, for all who bound it (v7 patch 06)."""
        self._tell_all(range(len(self.pages)))
        self._notifiers.remove(notifier)

    def truncate(self, size: int) -> None:
        """EPERM once it has a size, EINVAL for one that is no whole pages."""
        check(self.pages.size == 0, errno.EPERM, "the size is set once", "size 0", self.pages.size)
        self.pages.resize(size)

    def punch(self, offsets: range) -> None:
        """Start of the invalidation, the hole, end of the invalidation, also after a hole that failed."""
        for notifier in tuple(self._notifiers):
            notifier.invalidate_start(offsets)
        try:
            self.pages.punch(offsets)
        finally:
            for notifier in tuple(self._notifiers):
                notifier.invalidate_end(offsets)

    def release(self) -> None:
        self._tell_all(range(len(self.pages)))
        super().release()

    def _tell_all(self, offsets: range) -> None:
        for notifier in tuple(self._notifiers):
            notifier.invalidate_start(offsets)
            notifier.invalidate_end(offsets)
