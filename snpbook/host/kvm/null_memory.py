"""The back end that does nothing: a file of private pages for a guest that nobody encrypts.

It shows what a back end owes KVM: frames for a fault, and unmapping before pages go. The hooks stay empty. Source: UPM
v10, whose self-tests run such guests on restricted files.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Pages, Words
from snpbook.host.kvm.memslots import Memslot
from snpbook.host.memory import Flags, PageFile
from snpbook.host.memory_files import FileOfPages
from snpbook.host.refusal import KernelError, check

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel
    from snpbook.host.kvm.vm import Vm
    from snpbook.host.process import Process


class _ZeroedPages(PageFile):
    """Pages that begin as zeros, and that nothing keeps where they are."""

    movable = True

    def _prepare(self, pages: Pages, offsets: Words) -> None:
        self.cpu.zero_pages(pages)


class NullMemory(FileOfPages):
    """The file, of a fixed size in bytes."""

    device = "null memory"

    def __init__(self, kernel: Kernel, size: int) -> None:
        super().__init__(kernel)
        self.pages = _ZeroedPages(kernel.cpu, kernel.memory, size)
        self.bindings: list[NullBinding] = []

    def punch(self, offsets: range) -> None:
        for binding in self.bindings:
            binding.unmap(offsets)
        super().punch(offsets)


def create(process: Process, vm_fd: int, size: int) -> int:
    """A descriptor of a new one. No kernel has a call for that (MODEL)."""
    return process.install(NullMemory(process.kernel, size))


class NullBinding:
    """One slot's share of the file."""

    def __init__(self, vm: Vm, file: NullMemory) -> None:
        self.vm, self.file = vm, file
        self._slot: Memslot | None = None

    @property
    def pages(self) -> PageFile:
        return self.file.pages

    def __repr__(self) -> str:
        return f"NullBinding({self.file!r})"

    def bind(self, slot: Memslot) -> None:
        """EINVAL where the file is shorter than the slot."""
        last, size = slot.offsets(slot.gfns).stop, len(self.file.pages)
        check(last <= size, errno.EINVAL, "the file covers the slot", f"{last} pages", size)
        self._slot = slot
        self.file.bindings.append(self)
        self.file.hold()

    def unbind(self, slot: Memslot) -> None:
        self.file.bindings.remove(self)
        self._slot = None
        self.file.let_go()

    def frames(self, slot: Memslot, gfns: range) -> Words:
        """ENOMEM."""
        frames = self.file.pages.get_prefix(slot.offsets(gfns))
        check(len(frames) > 0, errno.ENOMEM, "free host memory", "a page", 0)
        return frames

    def to_fill(self, slot: Memslot, gfns: range) -> tuple[Words, KernelError | None]:
        """Any pages of the file."""
        try:
            return self.frames(slot, gfns), None
        except KernelError as error:
            return np.zeros(0, np.uint64), error

    def filled(self, slot: Memslot, gfns: range) -> None:
        """Nothing."""

    def is_huge(self, slot: Memslot, gfns: range) -> Flags:
        return np.zeros(len(gfns), bool)

    def attribute_changed(self, slot: Memslot, gfns: range, *, private: bool) -> None:
        """Nothing."""

    def unmap(self, offsets: range) -> None:
        """Pages of the file are about to go."""
        gfns = self._slot.gfns_at(offsets) if self._slot else range(0)
        if gfns:
            self.vm.mmu.unmap(gfns)
