"""Open files: what a descriptor of a process refers to, and the argument of an ioctl.

A kind of file is a class that overrides what it can do; everything else is refused with the errno of Linux's virtual
file system. References are counted: a file is released when the last descriptor, mapping or other holder lets it go.
Sources: Linux fs/open.c, fs/ioctl.c, mm/mmap.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from snpbook.host.refusal import KernelError
from snpbook.spec.layout import Layout, Record

if TYPE_CHECKING:
    from snpbook.host.memory import PageFile
    from snpbook.host.process import Process
    from snpbook.host.steps import Steps


class Argument:
    """The third argument of an ioctl: a number, which may be an address of the process, or a buffer of its caller.

    `fields` holds what was decoded of it, for the trace.
    """

    def __init__(self, process: Process, value: int | bytearray) -> None:
        self._process, self._value = process, value
        self.fields: dict[str, Any] = {} if isinstance(value, bytearray) else {"argument": value}

    @property
    def number(self) -> int:
        """The argument itself, where the kernel takes a number; a buffer's address is none that a caller can name."""
        return self._value if isinstance(self._value, int) else -1

    @property
    def null(self) -> bool:
        return isinstance(self._value, int) and self._value == 0

    def read(self, size: int) -> bytes:
        """copy_from_user; EFAULT where the memory is not the process's, or the buffer is too short."""
        if isinstance(self._value, int):
            return self._process.space.copy_in(self._value, size)
        if len(self._value) < size:
            raise KernelError(errno.EFAULT, "the buffer holds the structure", f"{size} bytes", len(self._value))
        return bytes(self._value[:size])

    def write(self, data: bytes) -> None:
        """copy_to_user."""
        if isinstance(self._value, int):
            self._process.space.copy_out(self._value, data)
        elif len(self._value) < len(data):
            raise KernelError(errno.EFAULT, "the buffer holds the answer", f"{len(data)} bytes", len(self._value))
        else:
            self._value[: len(data)] = data

    def record(self, layout: Layout) -> Record:
        """The structure that the argument points to; reserved fields are the handler's to check."""
        record = layout.unpack(self.read(layout.size))
        self.fields = {name: getattr(record, name) for name in layout.fields}
        return record

    def store(self, record: Record) -> None:
        """Copy a structure back."""
        self.write(bytes(record))


@dataclass(frozen=True, slots=True)
class Call:
    """One ioctl of a kind of file: its name, and what it does. A handler that others can cut into gives steps."""

    name: str
    handler: Callable[[Any, Process, Argument], int | Steps[int]]


class File:
    """An open file description."""

    device: ClassVar[str] = "file"
    """What the trace calls its kind."""

    def __init__(self, flags: int = 0) -> None:
        self.flags = flags
        self.references = 0

    def hold(self) -> None:
        """One more descriptor, mapping or kernel object refers to it."""
        self.references += 1

    def let_go(self) -> None:
        """One less; the last one releases the file."""
        self.references -= 1
        if self.references == 0:
            self.release()

    def release(self) -> None:
        """The last reference is gone."""

    def admit(self, process: Process) -> None:
        """Whether a process may use the file's ioctls at all."""

    def calls(self) -> Mapping[int, Call]:
        """The ioctls of this file by number."""
        return {}

    def unknown(self) -> int:
        """The errno for an ioctl number that is none of `calls`."""
        return errno.ENOTTY

    def read(self, size: int, offset: int | None = None) -> bytes:
        raise KernelError(errno.EINVAL, "the file can be read", "a readable kind of file", self.device)

    def write(self, data: bytes, offset: int | None = None) -> int:
        raise KernelError(errno.EINVAL, "the file can be written", "a writable kind of file", self.device)

    def mapping(self, offset: int, size: int) -> PageFile:
        """What mmap of a range shows, by offsets of the file."""
        raise KernelError(errno.ENODEV, "the file can be mapped", "a kind of file with mmap", self.device)

    def truncate(self, size: int) -> None:
        raise KernelError(errno.EINVAL, "the file has a size that can change", "a file of pages", self.device)

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        raise KernelError(errno.ENODEV, "the file is a regular one", "a file of pages", self.device)

    def stat(self) -> Stat:
        return Stat(0, 0)


@dataclass(frozen=True, slots=True)
class Stat:
    """What fstat tells: size in bytes, the block size, the inode's number, blocks of 512 bytes that have memory."""

    size: int
    inode: int
    block_size: int = 4096
    blocks: int = 0
