"""guest_memfd: a file of private pages of one VM, which no process can read, write or map.

A page is zeroed and handed to the guest in the RMP (`prepare`) when a fault first needs it, or filled by a launch
(`populate`); it goes back when a hole is punched or the file is gone. One page is 4 KiB: Linux 6.12 has no larger
ones here. Source: Linux virt/kvm/guest_memfd.c, arch/x86/kvm/svm/sev.c (sev_gmem_*).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from snpbook.hardware.dram import Words, as_slice, page_numbers
from snpbook.hardware.host_instructions import NewState
from snpbook.host.files import File, Stat
from snpbook.host.kvm.memslots import Memslot, prefix
from snpbook.host.memory import Flags, RestrictedFile, runs
from snpbook.host.memory_files import PUNCH
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages, is_assigned, rmpupdate
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.process import FallocateMode
from snpbook.spec.uapi_kvm import EHWPOISON, Ioctl
from snpbook.spec.uapi_kvm_structs import CREATE_GUEST_MEMFD

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm
    from snpbook.host.process import Process


class GuestMemfd(File):
    """The file; it keeps its VM alive, and slots bind parts of it."""

    device = "guest_memfd"

    def __init__(self, vm: Vm, size: int) -> None:
        super().__init__()
        self.vm, self.inode = vm, vm.kernel.new_inode()
        self.pages = RestrictedFile(vm.kernel.cpu, vm.kernel.memory, size)
        self.prepared = np.zeros(len(self.pages), bool)
        """Which pages are up to date: zeroed or filled, and the guest's in the RMP."""
        self.poisoned = np.zeros(len(self.pages), bool)
        """Which pages met a memory error."""
        self._slots: list[Memslot] = []
        vm.hold()

    def __repr__(self) -> str:
        return f"GuestMemfd({self.pages!r}, {int(self.prepared.sum())} prepared)"

    # What a descriptor can do.

    def stat(self) -> Stat:
        return Stat(self.pages.size, self.inode)

    def read(self, size: int, offset: int | None = None) -> bytes:
        """EINVAL, and for pread ESPIPE (inferred)."""
        return super().read(size) if offset is None else self._no_position()

    def write(self, data: bytes, offset: int | None = None) -> int:
        """EINVAL, and for pwrite ESPIPE (inferred)."""
        return super().write(data) if offset is None else self._no_position()

    def _no_position(self) -> NoReturn:
        raise KernelError(errno.ESPIPE, "the file has positions", "a file that can be read at an offset", self.device)

    def fallocate(self, mode: int, offset: int, size: int) -> None:
        """Allocate pages, or punch a hole; EOPNOTSUPP for other modes, EINVAL for parts of pages."""
        known = (int(FallocateMode.KEEP_SIZE), int(PUNCH))
        check(mode in known, errno.EOPNOTSUPP, "a mode of fallocate", "KEEP_SIZE, alone or with PUNCH_HOLE", hex(mode))
        whole = offset % PAGE_SIZE == 0 == size % PAGE_SIZE
        check(whole, errno.EINVAL, "offset and size are whole pages", PAGE_SIZE, f"{offset:#x}+{size:#x}")
        offsets = range(offset >> PAGE_SHIFT, offset + size >> PAGE_SHIFT)
        if mode == PUNCH:
            self.punch(range(offsets.start, min(offsets.stop, len(self.pages))))
            return
        inside = offsets.stop <= len(self.pages)
        check(inside, errno.EINVAL, "the range lies in the file", hex(self.pages.size), f"{offset:#x}+{size:#x}")
        self.pages.get(offsets)

    def release(self) -> None:
        """The last descriptor is closed: slots lose the file, then the VM loses a holder, then the pages go."""
        for slot in self._slots:
            self.vm.mmu.unmap(slot.gfns)
        self._slots.clear()
        self.vm.let_go()
        self._free(range(len(self.pages)))

    # What the VM does with it.

    def bind(self, slot: Memslot) -> None:
        """A slot uses a part of the file. EINVAL where it is too short or another slot has a page of it."""
        part = slot.offsets(slot.gfns)
        check(
            part.stop <= len(self.pages),
            errno.EINVAL,
            "the file covers the slot",
            f"{part.stop} pages",
            len(self.pages),
        )
        clash = [other.number for other in self._slots if _overlap(part, other.offsets(other.gfns))]
        check(not clash, errno.EINVAL, "each page of the file belongs to one slot", "free pages", f"slots {clash}")
        self._slots.append(slot)

    def unbind(self, slot: Memslot) -> None:
        if slot in self._slots:
            self._slots.remove(slot)

    def bound(self, slot: Memslot) -> bool:
        """Whether a slot still has the file: not after its last descriptor is closed."""
        return slot in self._slots

    def frames(self, slot: Memslot, gfns: range) -> Words:
        """Get and prepare the pages of a fault: a prefix of the run, as far as memory and health allow.

        EFAULT where the file is gone, EHWPOISON for a page with a memory error, ENOMEM; what preparing answers.
        """
        check(self.bound(slot), errno.EFAULT, "the slot's file is open", "guest_memfd", "closed")
        offsets = slot.offsets(gfns)
        healthy = ~self.poisoned[as_slice(offsets)]
        check(bool(healthy[0]), EHWPOISON, "the page is healthy", "no memory error", hex(gfns.start))
        count = len(healthy) if healthy.all() else int(np.argmin(healthy))
        frames = self.pages.get_prefix(offsets[:count])
        check(len(frames) > 0, errno.ENOMEM, "free host memory", "a page", 0)
        self.prepare(slot, gfns[: len(frames)], frames)
        return frames

    def to_fill(self, slot: Memslot, gfns: range) -> tuple[Words, KernelError | None]:
        """Pages that are private, healthy and filled by nobody yet. The page that fails gets memory, too."""
        if not self.bound(slot):
            return np.zeros(0, np.uint64), KernelError(errno.EFAULT, "the slot's file is open", "guest_memfd", "closed")
        offsets = slot.offsets(gfns)
        poisoned, prepared = self.poisoned[as_slice(offsets)], self.prepared[as_slice(offsets)]
        good = prefix(~poisoned & ~prepared & self.vm.is_private(gfns))
        frames = self.pages.get_prefix(offsets[: good + 1])
        if len(frames) < good or (len(frames) == good < len(gfns)):
            return frames, KernelError(errno.ENOMEM, "free host memory", "a page", 0)
        if good == len(gfns):
            return frames, None
        where = hex(gfns[good])
        if poisoned[good]:
            why = KernelError(EHWPOISON, "the page is healthy", "no memory error", where)
        elif prepared[good]:
            why = KernelError(errno.EEXIST, "the page is filled once", "not prepared", where)
        else:
            why = KernelError(errno.EINVAL, "the page is private", "KVM_SET_MEMORY_ATTRIBUTES", where)
        return frames[:good], why

    def filled(self, slot: Memslot, gfns: range) -> None:
        """Prepared: a fault finds them as they are."""
        self.prepared[as_slice(slot.offsets(gfns))] = True

    def is_huge(self, slot: Memslot, gfns: range) -> Flags:
        """None: one page is 4 KiB."""
        return np.zeros(len(gfns), bool)

    def attribute_changed(self, slot: Memslot, gfns: range, *, private: bool) -> None:
        """Nothing: a page becomes the guest's when it is first used, and stays so until it is punched."""

    def prepare(self, slot: Memslot, gfns: range, frames: Words) -> None:
        """Zero what is not up to date and give it to the guest; EINVAL where RMPUPDATE refuses, the page unprepared."""
        offsets = slot.offsets(gfns)
        fresh = ~self.prepared[as_slice(offsets)]
        if not fresh.any():
            return
        mine, names = frames[fresh], page_numbers(gfns)[fresh]
        cpu = self.vm.kernel.cpu
        if self.vm.snp:
            ours = ~is_assigned(cpu, mine)
            mine, names = mine[ours], names[ours]
        for _, run in runs(mine):
            cpu.zero_pages(run)
        if self.vm.snp and len(mine):
            try:
                rmpupdate(cpu, as_pages(mine), names, NewState(assigned=True, asid=self.vm.asid))
            except KernelError as error:
                rule = "the page becomes the guest's"
                raise KernelError(errno.EINVAL, rule, error.expected, error.found, error.cite) from error
        self.prepared[as_slice(offsets)] = True

    def punch(self, offsets: range) -> None:
        """Unmap a run from the guest and free its pages. The attribute stays: the next fault gets a new page."""
        for slot in self._slots:
            gfns = slot.gfns_at(offsets)
            if gfns:
                self.vm.mmu.unmap(gfns)
        self._free(offsets)

    def fail(self, offsets: range) -> None:
        """A memory error: the pages are unmapped, and using them again is EHWPOISON. Their frames are never used again.

        A punch makes room for others.
        """
        frames = self.pages.peek(offsets)
        self.vm.kernel.memory.pin(frames[frames != 0])
        self.poisoned[offsets.start : offsets.stop] = True
        for slot in self._slots:
            gfns = slot.gfns_at(offsets)
            if gfns:
                self.vm.mmu.unmap(gfns)

    def _free(self, offsets: range) -> None:
        self.prepared[offsets.start : offsets.stop] = False
        self.poisoned[offsets.start : offsets.stop] = False
        self.pages.punch(offsets)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def create(process: Process, vm_fd: int, size: int) -> int:
    """A descriptor of a new file: KVM_CREATE_GUEST_MEMFD."""
    return int(process.ioctl(vm_fd, Ioctl.CREATE_GUEST_MEMFD, bytearray(CREATE_GUEST_MEMFD.pack(size=size))))


def own(vm: Vm, file: GuestMemfd) -> GuestMemfd:
    """The file for a slot of the VM that made it. EINVAL for another VM's."""
    check(file.vm is vm, errno.EINVAL, "the guest_memfd is this VM's", "its own", "another VM's")
    return file
