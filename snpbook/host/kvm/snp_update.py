"""SNP_LAUNCH_UPDATE: memory that a guest begins with, measured and encrypted.

Linux takes each page from guest_memfd, copies it in, assigns it and has it measured, and stops at the first that fails:
those before it stay. The v7 series names pages by their shared side, and gives a whole call back. Pages go through in
runs, with a place for others in between. Sources: Linux arch/x86/kvm/svm/sev.c (snp_launch_update,
sev_gmem_post_populate), virt/kvm/guest_memfd.c (kvm_gmem_populate); RFC v7 patch 39.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Words, page_numbers
from snpbook.host.kvm import registered
from snpbook.host.kvm.memslots import Memslot, prefix
from snpbook.host.kvm.snp_launch import add_pages, context
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import as_pages, is_assigned, make_shared
from snpbook.host.steps import Step, Steps
from snpbook.spec.eras import LaunchFailure
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.status import Status
from snpbook.spec.uapi_sev import LAUNCH_PAGES
from snpbook.trace import PagesCopied

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm

Outcome = tuple[int, KernelError | None]
"""How many pages of a run are done, and what befell the next one."""


def update(vm: Vm, call: SevCall) -> Steps[None]:
    """Add pages. EINVAL for what KVM itself refuses; what befalls a page as the era has it."""
    return _by_address(vm, call) if vm.kernel.era.launch_by_hva else _by_gfn(vm, call)


# Linux: from guest_memfd.


def _by_gfn(vm: Vm, call: SevCall) -> Steps[None]:
    """EIO for whatever befalls the first page; otherwise the structure says what is left, up to the slot's end."""
    context(vm, errno.EINVAL)
    wanted = call.payload()
    whole = wanted.len % PAGE_SIZE == 0
    check(whole, errno.EINVAL, "the length is whole pages", PAGE_SIZE, hex(wanted.len))
    check(not wanted.flags, errno.EINVAL, "flags of SNP_LAUNCH_UPDATE", 0, hex(wanted.flags))
    known = wanted.type in LAUNCH_PAGES or not vm.kernel.era.launch_type_checked
    check(known, errno.EINVAL, "a page type that userspace may add", sorted(LAUNCH_PAGES), wanted.type)
    with (yield from vm.slots_lock.hold()):
        slot = vm.slots.of(wanted.gfn_start)
        if slot is None or slot.private is None:
            where = hex(wanted.gfn_start)
            raise KernelError(errno.EINVAL, "the guest page lies in a private slot", "guest_memfd", where)
        gfns = slot.part(range(wanted.gfn_start, wanted.gfn_start + (wanted.len >> PAGE_SHIFT)))
        source = None if wanted.type == LaunchPage.ZERO else wanted.uaddr
        done, failure = yield from _populate(vm, call, slot, gfns, source, wanted.type)
    if not done and failure is not None:
        call.error = int(failure.firmware or 0)
        rule = f"the first page is added: {failure.rule}"
        raise KernelError(errno.EIO, rule, failure.expected, str(failure), failure.cite, failure.firmware)
    call.store(_advanced(wanted, done))


def _advanced(wanted: Record, done: int) -> Record:
    size = done << PAGE_SHIFT
    moved = 0 if wanted.type == LaunchPage.ZERO else size
    return wanted.replace(gfn_start=wanted.gfn_start + done, uaddr=wanted.uaddr + moved, len=wanted.len - size)


def _populate(
    vm: Vm, call: SevCall, slot: Memslot, gfns: range, source: int | None, kind: LaunchPage
) -> Steps[Outcome]:
    """kvm_gmem_populate: pages of a slot until one cannot be had."""
    done, most = 0, vm.kernel.step_pages or len(gfns)
    while done < len(gfns):
        yield Step("launch update: pages")
        part = gfns[done : done + most]
        at = None if source is None else source + (done << PAGE_SHIFT)
        count, failure = _fill(vm, call, slot, part, at, kind)
        done += count
        if failure is not None:
            return done, failure
    return done, None


def _fill(vm: Vm, call: SevCall, slot: Memslot, gfns: range, source: int | None, kind: LaunchPage) -> Outcome:
    """One run: memory for its pages, their contents, the RMP, the firmware. The page that fails keeps its memory."""
    private, cpu = slot.private, vm.kernel.cpu
    assert private is not None
    frames, failure = private.to_fill(slot, gfns)
    free = prefix(~is_assigned(cpu, frames))
    if free < len(frames):
        failure = KernelError(errno.EEXIST, "the page is assigned to nobody yet", "shared", hex(gfns[free]))
        frames = frames[:free]
    if source is not None and len(frames):
        data, fault = _read(call, source, len(frames))
        failure = fault or failure
        frames = frames[: len(data)]
        cpu.write_pages(as_pages(frames), data)
        if cpu.trace:
            cpu.trace.emit(PagesCopied(pages=len(frames)))
    if not len(frames):
        return 0, failure
    done, refused = add_pages(vm, call, frames, page_numbers(gfns[: len(frames)]), kind)
    private.filled(slot, gfns[:done])
    if refused is not None and source is not None and not vm.bugged and kind == LaunchPage.CPUID:
        _hand_back(vm, call, refused, int(frames[done]), source + (done << PAGE_SHIFT))
    return done, refused or failure


def _read(
    call: SevCall, source: int, count: int
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.uint8]], KernelError | None]:
    """Pages of the caller's memory (n, 4096), as many as can be read, and the fault of the next one."""
    space, failure = call.process.space, None
    first, inside = divmod(source, PAGE_SIZE)
    pages = range(first, -(-(source + (count << PAGE_SHIFT)) // PAGE_SIZE))
    readable = max((space.mapped(pages) << PAGE_SHIFT) - inside, 0) >> PAGE_SHIFT
    if readable < count:
        where = hex(source + (readable << PAGE_SHIFT))
        failure, count = KernelError(errno.EFAULT, "an address of the process", "mapped memory", where), readable
    data = space.copy_in(source, count << PAGE_SHIFT)
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE), failure


def _hand_back(vm: Vm, call: SevCall, refused: KernelError, frame: int, address: int) -> None:
    """The CPUID page that the firmware refused, with the values that it wants, into the caller's buffer."""
    if not vm.kernel.era.cpuid_page_returned or refused.firmware is not Status.INVALID_PARAM:
        return
    try:
        call.process.space.copy_out(address, vm.kernel.cpu.read(frame << PAGE_SHIFT, PAGE_SIZE))
    except KernelError as error:
        vm.kernel.log(f"Failed to write CPUID page back to userspace: {error}")


# The v7 series: by the address of the shared side.


def _by_address(vm: Vm, call: SevCall) -> Steps[None]:
    """All pages of each slot's part, which become private, or none; the digest keeps what it has got.

    EFAULT for a page that is assigned already, with nothing undone. EINVAL for an address in no slot is inferred.
    """
    context(vm)
    wanted = call.payload()
    if not wanted.len:
        return
    pages = range(wanted.uaddr >> PAGE_SHIFT, -(-(wanted.uaddr + wanted.len) // PAGE_SIZE))
    with (yield from vm.slots_lock.hold()), call.told():
        parts = [(slot, gfns) for slot in vm.slots if (gfns := slot.gfns_of_user(pages))]
        check(bool(parts), errno.EINVAL, "the address lies in a slot", "a slot's memory", hex(wanted.uaddr))
        for slot, gfns in parts:
            if vm.in_place:
                registered.launch(vm, call, slot, gfns, wanted.page_type)
                continue
            yield from _launch_part(vm, call, slot, gfns, wanted.page_type)
            if vm.kernel.era.launch_sets_attribute:
                vm.mmu.unmap(gfns)
                vm.private.mark(gfns, True)


def _launch_part(vm: Vm, call: SevCall, slot: Memslot, gfns: range, kind: LaunchPage) -> Steps[None]:
    private = slot.private
    if private is None:
        raise KernelError(errno.EINVAL, "the slot is private", "a restricted file", slot.number)
    done, most = 0, vm.kernel.step_pages or len(gfns)
    while done < len(gfns):
        yield Step("launch update: pages")
        part = gfns[done : done + most]
        try:
            frames = private.frames(slot, part)
            free = prefix(~is_assigned(vm.kernel.cpu, frames))
            if free:
                _launch_run(vm, call, slot, part[:free], frames[:free], kind)
        except KernelError:
            if vm.kernel.era.launch_failure is LaunchFailure.RANGE_SHARED:
                _share(vm, private.pages.peek(slot.offsets(gfns)))
            raise
        check(free == len(frames), errno.EFAULT, "the page is assigned to nobody yet", "shared", hex(part[0] + free))
        done += free


def _share(vm: Vm, frames: Words) -> None:
    """All pages of a call that failed become shared; one that the firmware keeps is only logged."""
    try:
        make_shared(vm.kernel.cpu, frames[frames != 0])
    except KernelError as error:
        vm.kernel.log(f"SEV: failed to make the pages of a failed launch update shared: {error}")


def _launch_run(vm: Vm, call: SevCall, slot: Memslot, gfns: range, frames: Words, kind: LaunchPage) -> None:
    """Copy the shared side of a run, whatever the page type is, and add it."""
    cpu = vm.kernel.cpu
    cpu.write_pages(as_pages(frames), cpu.read_pages(as_pages(slot.shared_frames(vm.process.space, gfns))))
    if cpu.trace:
        cpu.trace.emit(PagesCopied(pages=len(frames)))
    _, failure = add_pages(vm, call, frames, page_numbers(gfns), kind)
    if failure is not None:
        raise failure
