"""Memory of the VMM's own process: the guest's RAM as user memory, and room for the structures of ioctls.

Source: QEMU system/memory.c, accel/kvm/kvm-all.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from snpbook.host.process import Process
from snpbook.spec.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A run of guest memory: where the guest has it, where the process has it, and its file for private pages."""

    slot: int
    gpa: int
    size: int
    address: int
    private_fd: int = -1

    def __contains__(self, gpa: object) -> bool:
        return isinstance(gpa, int) and self.gpa <= gpa < self.gpa + self.size

    def user(self, gpa: int) -> int:
        """The process's address of a guest address."""
        return self.address + gpa - self.gpa


class Scratch:
    """A part of the process's memory for arguments that an ioctl names by address."""

    def __init__(self, process: Process, size: int = 64 * PAGE_SIZE) -> None:
        self._process, self._size = process, size
        self._base = process.mmap(size)
        self._used = 0

    @contextmanager
    def placed(self, data: bytes) -> Iterator[int]:
        """The address of a copy of `data`, for as long as the block lasts; 0 for nothing, as C code passes NULL."""
        if not data:
            yield 0
            return
        if self._used + len(data) > self._size:
            raise ValueError(f"{len(data)} bytes do not fit the {self._size - self._used} bytes left for arguments")
        address, used = self._base + self._used, self._used
        self._used += -(-len(data) // 8) * 8
        self._process.store(address, data)
        try:
            yield address
        finally:
            self._used = used
