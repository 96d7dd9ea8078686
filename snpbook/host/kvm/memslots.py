"""Memory slots: runs of guest pages, the user addresses of their shared pages, and the file of their private ones.

The checks and their order are Linux's. A slot with a file does not change; deleting one drops what was mapped for it.
Sources: Linux virt/kvm/kvm_main.c (__kvm_set_memory_region), arch/x86/kvm/x86.c; UPM v10.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from snpbook.hardware.dram import Words
from snpbook.host.address_space import AddressSpace
from snpbook.host.memory import Flags, PageFile
from snpbook.host.npt import GFN_LIMIT
from snpbook.host.refusal import KernelError, check
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import NR_MEMSLOTS, MemFlag

_ADDRESS_SPACES = 2
"""x86 has two, of which the second is System Management Mode's."""


class PrivateMemory(Protocol):
    """The file behind a slot's private pages, by page offsets of the file."""

    @property
    def pages(self) -> PageFile:
        """The pages themselves, by offset."""

    def bind(self, slot: Memslot) -> None:
        """The slot now uses the file."""

    def unbind(self, slot: Memslot) -> None:
        """No more."""

    def frames(self, slot: Memslot, gfns: range) -> Words:
        """The frames of private pages, which get memory now, ready for the guest: a prefix, of one page at least."""

    def to_fill(self, slot: Memslot, gfns: range) -> tuple[Words, KernelError | None]:
        """The frames of pages that a launch fills, unprepared: a prefix, and what is wrong with the page behind it."""

    def filled(self, slot: Memslot, gfns: range) -> None:
        """A launch has filled these pages and given them to the guest."""

    def is_huge(self, slot: Memslot, gfns: range) -> Flags:
        """Which pages lie in a huge page of the host, so that a leaf of the nested tables may have 2 MB."""

    def attribute_changed(self, slot: Memslot, gfns: range, *, private: bool) -> None:
        """The attribute of guest pages was set, in a kernel whose RMP follows it at once."""


@dataclass(frozen=True, slots=True)
class Memslot:
    """Guest pages `gfns` of a VM; shared ones lie at the user page `user` and behind it."""

    number: int
    gfns: range
    user: int
    flags: MemFlag
    private: PrivateMemory | None = None
    private_offset: int = 0
    """Page offset of the slot's first page in its private file."""

    def user_pages(self, gfns: range) -> range:
        """The user pages of a run of guest pages."""
        shift = self.user - self.gfns.start
        return range(gfns.start + shift, gfns.stop + shift, gfns.step)

    def offsets(self, gfns: range) -> range:
        """The private file's page offsets of a run of guest pages."""
        shift = self.private_offset - self.gfns.start
        return range(gfns.start + shift, gfns.stop + shift, gfns.step)

    def gfns_at(self, offsets: range) -> range:
        """The guest pages of a run of the private file's offsets, clipped to the slot."""
        shift = self.gfns.start - self.private_offset
        return range(max(offsets.start + shift, self.gfns.start), min(offsets.stop + shift, self.gfns.stop))

    def gfns_of_user(self, pages: range) -> range:
        """The guest pages of a run of user pages, clipped to the slot."""
        shift = self.gfns.start - self.user
        return range(max(pages.start + shift, self.gfns.start), min(pages.stop + shift, self.gfns.stop))

    def part(self, gfns: range) -> range:
        """What of a run of guest pages lies in the slot."""
        before, inside = (max(-(-(end - gfns.start) // gfns.step), 0) for end in (self.gfns.start, self.gfns.stop))
        return gfns[before:inside]

    def shared_frames(self, space: AddressSpace, gfns: range) -> Words:
        """The frames of shared pages, which get memory now."""
        return space.frames(self.user_pages(gfns), write=not self.flags & MemFlag.READONLY)


class Memslots:
    """The slots of one VM by number."""

    def __init__(self) -> None:
        self._slots: dict[int, Memslot] = {}

    def __repr__(self) -> str:
        return f"Memslots({len(self._slots)} slots, {sum(len(slot.gfns) for slot in self)} pages)"

    def __iter__(self) -> Iterator[Memslot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, number: int) -> Memslot | None:
        return self._slots.get(number)

    def of(self, gfn: int) -> Memslot | None:
        """The slot that holds a guest page."""
        return next((slot for slot in self if gfn in slot.gfns), None)

    def overlapping(self, gfns: range) -> list[tuple[Memslot, range]]:
        """The slots that a run of guest pages touches, each with the part inside it."""
        return [(slot, part) for slot in self if (part := slot.part(gfns))]

    def put(self, slot: Memslot) -> None:
        self._slots[slot.number] = slot

    def drop(self, number: int) -> None:
        del self._slots[number]

    def checked(self, region: Record, flags: MemFlag, *, address_spaces: int) -> Memslot:
        """The slot that a region asks for, after the checks that need no file; of size 0 to delete one.

        EINVAL for a region that is no whole pages or does not fit, EEXIST where it overlaps another slot.
        """
        gpa, size, user = region.guest_phys_addr, region.memory_size, region.userspace_addr
        whole = not (gpa % PAGE_SIZE or size % PAGE_SIZE or user % PAGE_SIZE)
        check(
            whole,
            errno.EINVAL,
            "size, guest and user address are whole pages",
            PAGE_SIZE,
            f"{gpa:#x}+{size:#x}, {user:#x}",
        )
        space, number = divmod(region.slot, 1 << 16)
        check(space < address_spaces, errno.EINVAL, "an address space of the VM", f"below {address_spaces}", space)
        check(number < NR_MEMSLOTS, errno.EINVAL, "a slot's number", f"below {NR_MEMSLOTS}", number)
        gfns = range(gpa >> PAGE_SHIFT, gpa + size >> PAGE_SHIFT)
        check(
            gfns.stop <= GFN_LIMIT,
            errno.EINVAL,
            "the slot is in the guest's address space",
            hex(GFN_LIMIT),
            hex(gfns.stop),
        )
        wanted, old = Memslot(region.slot, gfns, user >> PAGE_SHIFT, flags), self.get(region.slot)
        if not size:
            check(old is not None, errno.EINVAL, "the slot to delete exists", "a slot", region.slot)
            return wanted
        if old is not None:
            has_file = bool((old.flags | flags) & MemFlag.GUEST_MEMFD)
            check(
                not has_file, errno.EINVAL, "a slot with a private file does not change", "delete it first", region.slot
            )
            same = len(old.gfns) == len(gfns) and old.user == wanted.user
            same = same and not (old.flags ^ flags) & MemFlag.READONLY
            check(same, errno.EINVAL, "a slot keeps size, user address and READONLY", repr(old), repr(wanted))
        clash = [slot.number for slot in self if slot.number != region.slot and slot.part(gfns)]
        check(not clash, errno.EEXIST, "slots do not overlap in the guest", "free guest pages", f"slots {clash}")
        return wanted

    @staticmethod
    def with_file(slot: Memslot, private: PrivateMemory, offset: int) -> Memslot:
        """The same slot with a file for private pages, from page `offset` on."""
        return replace(slot, private=private, private_offset=offset)


def prefix(flags: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int:
    """How many of the first entries are set."""
    return len(flags) if flags.all() else int(np.argmin(flags))
