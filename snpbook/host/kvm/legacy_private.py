"""LAUNCH_UPDATE_DATA on private slots, as the v7 series has it for SEV guests: the lazy pinning of UPM.

Each page of the restricted file gets the contents of its shared side, is encrypted and measured, and becomes private.
Sources: RFC v7 patches 10 and 11.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.kvm.memslots import Memslot
from snpbook.host.memory import runs
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages
from snpbook.host.steps import Step, Steps
from snpbook.spec.commands import Command
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.trace import PagesCopied

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm


def update_private(vm: Vm, call: SevCall, wanted: Record) -> Steps[None]:
    """All pages of a range of user memory, slot by slot. EINVAL where no slot has it (inferred), or one is not private.

    A failure leaves the pages before it encrypted; none of its slot becomes private.
    """
    pages = range(wanted.uaddr >> PAGE_SHIFT, -(-(wanted.uaddr + wanted.len) // PAGE_SIZE))
    with (yield from vm.slots_lock.hold()):
        parts = [(slot, gfns) for slot in vm.slots if (gfns := slot.gfns_of_user(pages))]
        check(bool(parts), errno.EINVAL, "the address lies in a slot", "a slot's memory", hex(wanted.uaddr))
        for slot, gfns in parts:
            yield from _update_slot(vm, call, slot, gfns)
            vm.mmu.unmap(gfns)
            vm.private.mark(gfns, True)


def _update_slot(vm: Vm, call: SevCall, slot: Memslot, gfns: range) -> Steps[None]:
    private, guest, cpu = slot.private, vm.sev, vm.kernel.cpu
    if private is None:
        raise KernelError(errno.EINVAL, "the slot is private", "a restricted file", slot.number)
    assert guest is not None
    done, most = 0, vm.kernel.step_pages or len(gfns)
    while done < len(gfns):
        yield Step("launch update: pages")
        frames = private.frames(slot, gfns[done : done + most])
        part = gfns[done : done + len(frames)]
        cpu.write_pages(as_pages(frames), cpu.read_pages(as_pages(slot.shared_frames(vm.process.space, part))))
        if cpu.trace:
            cpu.trace.emit(PagesCopied(pages=len(frames)))
        for _, run in runs(frames):
            start, size = run.start << PAGE_SHIFT, len(run) << PAGE_SHIFT
            cpu.clflush(start, size)
            call.issue(guest.fd, Command.LAUNCH_UPDATE_DATA, handle=guest.handle, paddr=start, len=size)
        done += len(frames)
