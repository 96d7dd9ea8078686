"""One request through a vCPU's GHCB: what the guest filled in, and what it finds there when it goes on.

KVM reads and writes these bytes of shared memory and nothing else of the guest. Its own copy of the registers is
cleared first, and holds only what the guest marked as valid. Sources: Linux arch/x86/kvm/svm/sev.c
(sev_es_sync_from_ghcb, sev_es_sync_to_ghcb, setup_vmgexit_scratch); RFC v7 patches 43, 44, 49.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Bytes, Words
from snpbook.host import psc_lists
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import is_assigned
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import GHCB, GhcbError
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import EVENT, EventKind, Vector

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_TAKEN = ("rax", "rbx", "rcx", "rdx", "rsi", "cpl")
_CLEARED = (*_TAKEN, "rdi", "rbp", "rsp", *(f"r{i}" for i in range(8, 16)))
_RETURNED = ("rax", "rbx", "rcx", "rdx")
"""What a guest gets back from every event, whether the event sets it or not."""


class Exchange:
    """A request of one vCPU through the GHCB at guest address `gpa`, until the vCPU is entered again."""

    def __init__(self, vcpu: Vcpu, gpa: int, page: Record) -> None:
        self.vcpu, self.gpa, self.page = vcpu, gpa, page
        self._valid: tuple[str, ...] = ()
        self._earlier: list[Bytes] = []
        """What was in the shared buffer when lists of page state changes before the one that is now there were done."""

    def __repr__(self) -> str:
        return f"Exchange({self.gpa:#x}, event {self.event:#x})"

    @classmethod
    def open(cls, vcpu: Vcpu, gpa: int) -> Exchange | None:
        """Take what the guest has filled in; the bitmap is clear afterwards.

        A GHCB that cannot be mapped is EFAULT or, as the era has it, None: the guest goes on and learns nothing. Where
        the era looks at the RMP, EBUSY for a page that is assigned.
        """
        vm = vcpu.vm
        try:
            page = GHCB.unpack(vm.read(gpa, PAGE_SIZE))
        except KernelError:
            vm.kernel.log(f"vmgexit: error mapping GHCB [{gpa:#x}] from guest")
            if vm.kernel.era.ghcb_must_map:
                raise
            return None
        if vm.kernel.era.ghcb_pinned and vm.snp:
            slot = vm.slots.of(gpa >> PAGE_SHIFT)
            assert slot is not None
            frame = slot.shared_frames(vm.process.space, range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1))
            free = not is_assigned(vm.kernel.cpu, frame)[0]
            check(free, errno.EBUSY, "the GHCB is no assigned page", "the hypervisor's", hex(gpa))
        exchange = cls(vcpu, gpa, page)
        given = {name: getattr(page, name) for name in _TAKEN if exchange.has(name)}
        if exchange.has("xcr0"):
            given["xcr0"] = page.xcr0
        vcpu.state = vcpu.state.replace(**dict.fromkeys(_CLEARED, 0) | given)
        exchange._put(valid_bitmap=bytes(GHCB.fields["valid_bitmap"].size))
        return exchange

    @property
    def event(self) -> int:
        """SW_EXITCODE."""
        return int(self.page.sw_exit_code)

    @property
    def info_1(self) -> int:
        """SW_EXITINFO1 as the guest set it."""
        return int(self.page.sw_exit_info_1)

    @property
    def info_2(self) -> int:
        """SW_EXITINFO2 as the guest set it."""
        return int(self.page.sw_exit_info_2)

    def has(self, *names: str) -> bool:
        """Whether the guest marked all of these fields as filled in."""
        return all(spec.is_valid(self.page.valid_bitmap, name) for name in names)

    def answer(self, info_1: int = 0, info_2: int = 0) -> None:
        """Store SW_EXITINFO1 and 2."""
        self._mark("sw_exit_info_1", "sw_exit_info_2")
        self._put(sw_exit_info_1=info_1, sw_exit_info_2=info_2)

    def refuse(self, error: GhcbError) -> None:
        """Tell the guest what is wrong with its request."""
        self.answer(spec.MALFORMED, error)

    def fault(self, vector: Vector) -> None:
        """Have the guest take an exception, without an error code, instead of its instruction."""
        event = EVENT.pack(vector=vector, kind=EventKind.EXCEPTION, valid=1)
        self.answer(spec.INJECT, int.from_bytes(event, "little"))

    def close(self) -> None:
        """The guest goes on: its registers into the page."""
        if self._earlier:
            self.vcpu.answered(np.concatenate(self._earlier))
        self._mark(*_RETURNED)
        self._put(**{name: getattr(self.vcpu.state, name) for name in _RETURNED})

    def scratch(self, size: int) -> int | None:
        """The guest address of the scratch area for `size` bytes; None where it is not allowed, and the guest told.

        It lies in the shared buffer of the GHCB; only for version 1 of the protocol anywhere in shared memory, too, up
        to 64 KiB long.
        """
        area, sev = int(self.page.sw_scratch) if self.has("sw_scratch") else 0, self.vcpu.vm.sev
        assert sev is not None
        if area & -PAGE_SIZE == self.gpa:
            start = self.gpa + spec.SHARED_BUFFER_OFFSET
            good = start <= area and area + size <= start + spec.SHARED_BUFFER_SIZE
        else:
            good = 0 < area < (1 << 64) - size and size <= spec.SCRATCH_LIMIT
            good = good and sev.ghcb_version < spec.PROTOCOL_VERSION
        if not good:
            self.vcpu.vm.kernel.log(f"vmgexit: scratch area [{area:#x} - {area + size:#x}] is not allowed")
            self.refuse(GhcbError.INVALID_SCRATCH)
            return None
        return area

    def room(self, area: int) -> int:
        """How many bytes a scratch area at `area` has: up to the end of the shared buffer (outside of it: MODEL)."""
        end = self.gpa + spec.SHARED_BUFFER_OFFSET + spec.SHARED_BUFFER_SIZE
        return end - area if area & -PAGE_SIZE == self.gpa else spec.SHARED_BUFFER_SIZE

    def following(self, area: int) -> Words:
        """Lists of page state changes that come into a scratch area behind the one that is there."""
        buffers = self.vcpu.executor.following[sum(map(len, self._earlier)) :]
        return psc_lists.following(buffers if area == self.gpa + spec.SHARED_BUFFER_OFFSET else buffers[:0])

    def move_on(self, area: int, count: int) -> None:
        """The list in the scratch area is done, and so are `count` entries of those that follow: the last comes in."""
        buffers, now = self.following(area).view(np.uint8), self.vcpu.vm.read(area, spec.SHARED_BUFFER_SIZE)
        self.vcpu.vm.write(area, psc_lists.move_on(now, buffers, count, self._earlier.append))

    def _mark(self, *names: str) -> None:
        self._valid = (*self._valid, *names)
        self._put(valid_bitmap=spec.valid_bitmap(*self._valid))

    def _put(self, **fields: int | bytes) -> None:
        for name, value in fields.items():
            field = GHCB.fields[name]
            data = value if isinstance(value, bytes) else value.to_bytes(field.size, "little")
            self.vcpu.vm.write(self.gpa + field.offset, data)
