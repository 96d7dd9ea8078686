"""SNP guests whose pages are the VMM's own, as series v6 had them: registered, so pinned, and converted in place.

A page that the guest makes private is assigned where it is, and the VMM that mapped it must not write there any more.
KVM serves page state changes itself. A kernel with `registered_snp` does so for SNP guests without private slots
(MODEL: the v7 series took it away). Beyond that, what series v6 did is unconfirmed. Source: the letter of RFC v7.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Words, page_numbers
from snpbook.host.kvm.memslots import Memslot, prefix
from snpbook.host.kvm.snp_launch import add_pages
from snpbook.host.memory import Flags, whole_regions
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import assign, is_assigned, is_large, make_shared, split
from snpbook.host.steps import Step, Steps
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, LaunchPage
from snpbook.spec.vmcb import FaultError

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm


def launch(vm: Vm, call: SevCall, slot: Memslot, gfns: range, kind: LaunchPage) -> None:
    """Pages of SNP_LAUNCH_UPDATE are encrypted where they are. EINVAL where they are not registered."""
    _check_registered(vm, slot, gfns)
    frames = slot.shared_frames(vm.process.space, gfns)
    free = prefix(~is_assigned(vm.kernel.cpu, frames))
    if free:
        _, failure = add_pages(vm, call, frames[:free], page_numbers(gfns[:free]), kind)
        if failure is not None:
            raise failure
    check(free == len(gfns), errno.EFAULT, "the page is assigned to nobody yet", "shared", hex(gfns.start + free))


def convert(vm: Vm, gfns: range, *, private: bool) -> None:
    """A page state change: unmapped, then RMPUPDATE where the pages are. EINVAL where they are not registered."""
    cpu = vm.kernel.cpu
    for slot, part in vm.slots.overlapping(gfns):
        _check_registered(vm, slot, part)
        frames = slot.shared_frames(vm.process.space, part)
        vm.mmu.unmap(part)
        if private:
            assign(cpu, frames, page_numbers(part), vm.asid, is_huge(vm, slot, part) & whole_regions(part))
        else:
            make_shared(cpu, frames, whole=False)


def converted(vm: Vm, gfns: range, *, private: bool) -> bool:
    """Whether a change that the guest asked for succeeded; a failure is logged."""
    try:
        convert(vm, gfns, private=private)
    except KernelError as error:
        vm.kernel.log(f"SEV: page state change failed: {error}")
        return False
    return True


def serve_rmp_fault(vm: Vm, gfn: int, error: FaultError) -> Steps[None]:
    """An RMP #NPF: the page takes the side that the guest is on, or its 2 MB entry is split."""
    yield Step("RMP fault: entry")
    slot, gfns = vm.slots.of(gfn), range(gfn, gfn + 1)
    if slot is None:
        return
    frames, private = slot.shared_frames(vm.process.space, gfns), bool(error & FaultError.ENCRYPTED)
    mismatch = bool(error & FaultError.SIZE_MISMATCH)
    if not mismatch and bool(is_assigned(vm.kernel.cpu, frames)[0]) != private:
        converted(vm, gfns, private=private)
        return
    if is_large(vm.kernel.cpu, frames)[0]:
        split(vm.kernel.cpu, frames - frames % np.uint64(PAGES_PER_LARGE))
    vm.mmu.unmap(range(gfn, gfn + PAGES_PER_LARGE))


def is_huge(vm: Vm, slot: Memslot, gfns: range) -> Flags:
    """Which pages lie in huge pages of the VMM's memory, aligned as the guest's are."""
    files = vm.process.space.files(slot.user_pages(gfns))
    huge: Flags = np.concatenate([file.is_huge(offsets) for file, offsets in files])
    frames: Words = slot.shared_frames(vm.process.space, gfns)
    return np.asarray(huge & ((frames ^ page_numbers(gfns)) % np.uint64(PAGES_PER_LARGE) == 0))


def release(vm: Vm, frames: Words) -> None:
    """A region goes: its pages become the hypervisor's before they are let go; a failure is logged."""
    try:
        make_shared(vm.kernel.cpu, frames)
    except KernelError as error:
        vm.kernel.log(f"SEV: failed to make registered memory shared: {error}")


def _check_registered(vm: Vm, slot: Memslot, gfns: range) -> None:
    """All of the pages lie in one registered region."""
    assert vm.sev is not None
    pages = slot.user_pages(gfns)
    start, stop = pages.start << PAGE_SHIFT, pages.stop << PAGE_SHIFT
    found = any(
        region.address // PAGE_SIZE * PAGE_SIZE <= start and stop <= region.address + region.size
        for region in vm.sev.regions
    )
    check(found, errno.EINVAL, "the guest's memory is registered", "KVM_MEMORY_ENCRYPT_REG_REGION", hex(start))
