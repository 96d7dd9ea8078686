"""A slot's share of a restricted file: how pages of memfd_restricted become the guest's in the v7 series, and go back.

Pages are pinned by being allocated; nothing zeroes them. Their RMP entries follow the attribute, and are
the hypervisor's again when the file tells of a hole. Sources: RFC v7 patches 05, 06, 55, 57; UPM v10.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Words, page_numbers
from snpbook.host.kvm.memslots import Memslot
from snpbook.host.memory import Flags, PageFile, whole_regions
from snpbook.host.memory_files import RestrictedMemory
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import assign, make_shared
from snpbook.spec.pages import PAGES_PER_LARGE

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm
    from snpbook.host.process import Process


def create(process: Process, vm_fd: int, size: int) -> int:
    """A descriptor of a new file: memfd_restricted, then ftruncate."""
    fd = process.memfd_restricted()
    process.ftruncate(fd, size)
    return fd


class RestrictedBinding:
    """One slot on one restricted file: the file tells it of holes."""

    def __init__(self, vm: Vm, file: RestrictedMemory) -> None:
        self.vm, self.file = vm, file
        self._slot: Memslot | None = None

    @property
    def pages(self) -> PageFile:
        return self.file.pages

    def __repr__(self) -> str:
        return f"RestrictedBinding({self.file!r})"

    def bind(self, slot: Memslot) -> None:
        """EINVAL where the file is shorter than the slot. Several slots may share pages: v10 does not look."""
        last = slot.offsets(slot.gfns).stop
        check(
            last <= len(self.file.pages),
            errno.EINVAL,
            "the file covers the slot",
            f"{last} pages",
            len(self.file.pages),
        )
        self._slot = slot
        self.file.hold()
        self.file.bind(self)

    def unbind(self, slot: Memslot) -> None:
        """The file is invalidated as a whole, for all who bound it, and let go."""
        self.file.unbind(self)
        self._slot = None
        self.file.let_go()

    def frames(self, slot: Memslot, gfns: range) -> Words:
        """Frames of a prefix of private pages, allocated where they have none. EFAULT once unbound, ENOMEM."""
        check(self._slot is slot, errno.EFAULT, "the slot has its file", "a restricted file", "unbound")
        frames = self.file.pages.get_prefix(slot.offsets(gfns))
        check(len(frames) > 0, errno.ENOMEM, "free host memory", "a page", 0)
        return frames

    def to_fill(self, slot: Memslot, gfns: range) -> tuple[Words, KernelError | None]:
        """Any pages of the file: a launch that fills one again is not noticed."""
        try:
            return self.frames(slot, gfns), None
        except KernelError as error:
            return np.zeros(0, np.uint64), error

    def filled(self, slot: Memslot, gfns: range) -> None:
        """Nothing."""

    def is_huge(self, slot: Memslot, gfns: range) -> Flags:
        return self.file.pages.is_huge(slot.offsets(gfns))

    def attribute_changed(self, slot: Memslot, gfns: range, *, private: bool) -> None:
        """RMP entries of a run follow the attribute. A page that gets no memory is skipped with a warning.

        A huge page inside the run, aligned in the guest as it is in the host, has one 2 MB entry; to shared it goes
        page by page.
        """
        vm, offsets = self.vm, slot.offsets(gfns)
        frames = self.file.pages.get_prefix(offsets)
        if len(frames) < len(gfns):
            vm.kernel.log(f"kvm: no memory for private pages from gfn {gfns.start + len(frames):#x}")
        if not private:
            make_shared(vm.kernel.cpu, frames, whole=False)
            return
        names = page_numbers(gfns[: len(frames)])
        huge = vm.kernel.era.rmp_2m & self.file.pages.is_huge(offsets[: len(frames)])
        huge &= (frames ^ names) % np.uint64(PAGES_PER_LARGE) == 0
        assign(vm.kernel.cpu, frames, names, vm.asid, huge & whole_regions(gfns[: len(frames)]))

    # What the file tells.

    def invalidate_start(self, offsets: range) -> None:
        """Unmap, then give pages that are still private back to the hypervisor; failures are logged."""
        slot = self._slot
        gfns = slot.gfns_at(offsets) if slot else range(0)
        if slot is None or not gfns:
            return
        self.vm.mmu.begin(gfns)
        self.vm.mmu.tables.zap(gfns.start, len(gfns))
        if not self.vm.snp:
            return
        frames = self.file.pages.peek(slot.offsets(gfns))
        mine = frames[self.vm.is_private(gfns) & (frames != np.uint64(0))]
        try:
            make_shared(self.vm.kernel.cpu, mine)
        except KernelError as error:
            self.vm.kernel.log(f"kvm: failed to invalidate private memory: {error}")

    def invalidate_end(self, offsets: range) -> None:
        gfns = self._slot.gfns_at(offsets) if self._slot else range(0)
        if gfns:
            self.vm.mmu.end(gfns)
