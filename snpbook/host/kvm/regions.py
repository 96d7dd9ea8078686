"""KVM_SET_USER_MEMORY_REGION and its second version: slots are made, changed and deleted.

Checks in Linux's order; a slot that goes is first marked as going, then unmapped, so that a fault in between starts
again. Sources: Linux virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c (kvm_gmem_bind); UPM v10, RFC v7 patch 06.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.files import Argument
from snpbook.host.kvm import backends
from snpbook.host.kvm.memslots import Memslot
from snpbook.host.process import Process
from snpbook.host.refusal import check
from snpbook.host.steps import Step, Steps
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import Ioctl, MemFlag
from snpbook.spec.uapi_kvm_structs import USERSPACE_MEMORY_REGION

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm, VmFile

_SMM_SPACES = 2
"""x86 has two address spaces, the second for System Management Mode, unless the VM has private memory."""


def set_region(file: VmFile, process: Process, argument: Argument) -> Steps[int]:
    """KVM_SET_USER_MEMORY_REGION; in the v7 era a flag says that the longer structure with a private file comes."""
    region, private = argument.record(USERSPACE_MEMORY_REGION), file.vm.kernel.era
    known = MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY
    if private.set_private_region is Ioctl.SET_USER_MEMORY_REGION and region.flags & MemFlag.GUEST_MEMFD:
        region = argument.record(private.private_region)
        known |= MemFlag.GUEST_MEMFD
    return _set(file.vm, process, region, known)


def set_region2(file: VmFile, process: Process, argument: Argument) -> Steps[int]:
    """KVM_SET_USER_MEMORY_REGION2."""
    region = argument.record(file.vm.kernel.era.private_region)
    return _set(file.vm, process, region, MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY | MemFlag.GUEST_MEMFD)


def _set(vm: Vm, process: Process, region: Record, known: MemFlag) -> Steps[int]:
    with (yield from vm.slots_lock.hold()):
        flags = MemFlag(region.flags)
        _check_flags(vm, flags, known)
        spaces = 1 if vm.has_private_memory else _SMM_SPACES
        slot = vm.slots.checked(region, flags, address_spaces=spaces)
        old = vm.slots.get(slot.number)
        if slot.gfns and flags & MemFlag.GUEST_MEMFD:
            slot = _bound(vm, process, region, slot)
        if old is not None:
            yield from _remove(vm, old, moved=slot.gfns != old.gfns)
        if slot.gfns:
            vm.slots.put(slot)
            vm.mmu.unmap(slot.gfns)  # what an access found to be no memory
    return 0


def _check_flags(vm: Vm, flags: MemFlag, known: MemFlag) -> None:
    private = bool(flags & MemFlag.GUEST_MEMFD)
    plain = not flags & (MemFlag.LOG_DIRTY_PAGES | MemFlag.READONLY)
    check(not flags & ~int(known), errno.EINVAL, "flags of a slot", repr(known), hex(flags))
    check(
        plain or not private,
        errno.EINVAL,
        "a private slot is neither logged nor read-only",
        "GUEST_MEMFD alone",
        repr(flags),
    )
    readonly = bool(flags & MemFlag.READONLY) and vm.protected_state
    check(
        not readonly, errno.EINVAL, "a guest with encrypted registers has no read-only slots", "writable", repr(flags)
    )
    check(vm.has_private_memory or not private, errno.EINVAL, "the VM has private memory", "an SNP VM", vm.type.name)


def _bound(vm: Vm, process: Process, region: Record, slot: Memslot) -> Memslot:
    """The slot with its private file bound; EBADF or EINVAL where the descriptor is none of the right kind."""
    names = region.layout.fields
    offset, fd = (region.restricted_offset, region.restricted_fd) if "restricted_fd" in names else (
        region.guest_memfd_offset, region.guest_memfd
    )  # fmt: skip
    wraps = offset + (len(slot.gfns) << PAGE_SHIFT) >= 1 << 64
    check(
        offset % PAGE_SIZE == 0 and not wraps, errno.EINVAL, "the file's offset is whole pages", PAGE_SIZE, hex(offset)
    )
    private = backends.private_memory(vm, process.file(fd))
    slot = vm.slots.with_file(slot, private, offset >> PAGE_SHIFT)
    private.bind(slot)
    return slot


def _remove(vm: Vm, old: Memslot, *, moved: bool) -> Steps[None]:
    """Take a slot away: what was mapped for it, and its private file. A slot that only changes flags stays mapped."""
    if not moved:
        return
    vm.deleting.add(old.number)
    yield Step("slot is going")
    vm.mmu.unmap(old.gfns)
    yield Step("slot is unmapped")
    vm.deleting.discard(old.number)
    vm.slots.drop(old.number)
    if old.private is not None:
        old.private.unbind(old)
