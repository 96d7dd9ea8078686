"""Files of memory that a process holds by descriptors: memfd_create, and memfd_restricted of UPM v10.

The first is ordinary memory with a descriptor; the second cannot be read, written or mapped, and tells those who bound
it before and after a hole is punched. Sources: Linux mm/memfd.c, mm/shmem.c; UPM v10 (mm/restrictedmem.c).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

from snpbook.host.files import File, Stat
from snpbook.host.memory import Lost, PageFile, RestrictedFile, UserMemory
from snpbook.host.refusal import check
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import FallocateMode

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel

PUNCH = FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE
_BLOCK = 512


class _PagesByDescriptor(File):
    """What both have in common: pages, an inode, fallocate and fstat."""

    pages: PageFile

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.inode = kernel.new_inode()

    def __repr__(self) -> str:
        return f"{self.device}({self.pages!r})"

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        """Allocate, or punch a hole. Whole pages: that tmpfs also takes parts of pages is not modelled (EINVAL)."""
        known = (0, FallocateMode.KEEP_SIZE, PUNCH)
        check(mode in known, errno.EOPNOTSUPP, "a mode of fallocate", "0, KEEP_SIZE or PUNCH_HOLE with it", hex(mode))
        whole = offset % PAGE_SIZE == 0 == size % PAGE_SIZE
        check(whole, errno.EINVAL, "offset and size are whole pages", PAGE_SIZE, f"{offset:#x}+{size:#x}")
        if mode == 0 and offset + size > self.pages.size:
            self.pages.resize(offset + size)
        offsets = range(offset >> PAGE_SHIFT, min(offset + size, self.pages.size) >> PAGE_SHIFT)
        if offsets and mode == PUNCH:
            self.punch(offsets)
        elif offsets:
            self.pages.get(offsets)

    def punch(self, offsets: range) -> None:
        self.pages.punch(offsets)

    def stat(self) -> Stat:
        return Stat(self.pages.size, self.inode, blocks=self.pages.resident * (PAGE_SIZE // _BLOCK))

    def release(self) -> None:
        self.pages.close()


class MemoryFile(_PagesByDescriptor):
    """memfd_create: its pages can be mapped; of a size in whole pages (MODEL)."""

    device = "memfd"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.pages = _HeldByMappings(self, kernel)

    def truncate(self, size: int) -> None:
        self.pages.resize(size)

    def mapping(self, offset: int, size: int) -> PageFile:
        """The pages; ENXIO stands for the SIGBUS behind the end of the file, told when it is mapped (MODEL)."""
        end = self.pages.size
        check(offset + size <= end, errno.ENXIO, "the mapping lies inside the file", hex(end), hex(offset + size))
        return self.pages


class _HeldByMappings(UserMemory):
    """Pages whose mappings hold their file open."""

    def __init__(self, file: File, kernel: Kernel) -> None:
        super().__init__(kernel.cpu, kernel.memory, 0)
        self._file = file

    def mapped_by(self, lost: Lost) -> None:
        super().mapped_by(lost)
        self._file.hold()

    def unmapped_by(self, lost: Lost) -> None:
        super().unmapped_by(lost)
        self._file.let_go()


class Notifier(Protocol):
    """Who has bound a restricted file: told offsets of the file, which it clips itself."""

    def invalidate_start(self, offsets: range) -> None: ...

    def invalidate_end(self, offsets: range) -> None: ...


class RestrictedMemory(_PagesByDescriptor):
    """memfd_restricted: no read, write or mmap. Its size is set once."""

    device = "restrictedmem"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self.pages = RestrictedFile(kernel.cpu, kernel.memory, 0)
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
        """Start of the invalidation, the hole, end of the invalidation."""
        for notifier in tuple(self._notifiers):
            notifier.invalidate_start(offsets)
        self.pages.punch(offsets)
        for notifier in tuple(self._notifiers):
            notifier.invalidate_end(offsets)

    def release(self) -> None:
        self._tell_all(range(len(self.pages)))
        super().release()

    def _tell_all(self, offsets: range) -> None:
        for notifier in tuple(self._notifiers):
            notifier.invalidate_start(offsets)
            notifier.invalidate_end(offsets)
