"""KVM_SET_MEMORY_ATTRIBUTES: guest pages become private or shared.

The attribute says which side a fault may take; what was mapped for the pages goes. In the v7 era the RMP follows at
once, page by page, and its failures are only logged; later the RMP changes when a page is used. Sources: UPM v10; RFC
v7 patches 05 and 55; Linux virt/kvm/kvm_main.c (kvm_vm_set_mem_attributes).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.files import Argument
from snpbook.host.kvm.memslots import Memslot
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Step, Steps
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import MemoryAttribute
from snpbook.spec.uapi_kvm_structs import MEMORY_ATTRIBUTES

if TYPE_CHECKING:
    from snpbook.host.kvm.vm import Vm, VmFile


def known(vm: Vm) -> MemoryAttribute:
    """The attributes that the VM's pages can have."""
    return MemoryAttribute.PRIVATE if vm.has_private_memory else MemoryAttribute(0)


def supported(file: VmFile, process: Process, argument: Argument) -> int:
    """KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES of UPM v10."""
    argument.write(int(known(file.vm)).to_bytes(8, "little"))
    return 0


def set_attributes(file: VmFile, process: Process, argument: Argument) -> Steps[int]:
    """Make whole pages private or shared; EINVAL and nothing changed for a range or an attribute that cannot be.

    Where the era says so the structure comes back with what is left to do, which is nothing.
    """
    vm, wanted = file.vm, argument.record(MEMORY_ATTRIBUTES)
    start, size = wanted.address, wanted.size
    check(wanted.flags == 0, errno.EINVAL, "flags of memory attributes", 0, hex(wanted.flags))
    attributes = known(vm)
    check(
        not wanted.attributes & ~int(attributes),
        errno.EINVAL,
        "attributes of the VM",
        repr(attributes),
        hex(wanted.attributes),
    )
    good = 0 < size <= (1 << 64) - start and start % PAGE_SIZE == 0 == size % PAGE_SIZE
    check(good, errno.EINVAL, "address and size are whole pages", PAGE_SIZE, f"{start:#x}+{size:#x}")
    gfns = range(start >> PAGE_SHIFT, start + size >> PAGE_SHIFT)
    yield from mark(vm, gfns, private=bool(wanted.attributes & MemoryAttribute.PRIVATE))
    if vm.kernel.era.attributes_partial:
        argument.store(wanted.replace(address=(start + size) % (1 << 64), size=0))
    return 0


def mark(vm: Vm, gfns: range, *, private: bool) -> Steps[None]:
    """Set the attribute of a run: unmapped first, then stored, then what the era does to the RMP."""
    with (yield from vm.slots_lock.hold()):
        already = vm.is_private(gfns) == private
        if vm.kernel.era.rmp_at_attributes or not already.all():
            yield from vm.mmu.invalidate(gfns)
            vm.private.mark(gfns, private)
            yield Step("attributes stored")
            vm.mmu.end(gfns)
        if vm.kernel.era.rmp_at_attributes and vm.snp:
            for slot, part in vm.slots.overlapping(gfns):
                yield from _tell(vm, slot, part, private)


def _tell(vm: Vm, slot: Memslot, gfns: range, private: bool) -> Steps[None]:
    """update_mem_attr of the v7 series: what is behind the slot follows, up to a failure, which is only logged."""
    if slot.private is None:
        vm.kernel.log(f"kvm: failed to update memory attributes: slot {slot.number} has no private memory")
        return
    most = vm.kernel.step_pages or len(gfns)
    try:
        for start in range(0, len(gfns), most):
            yield Step("the RMP follows the attribute")
            slot.private.attribute_changed(slot, gfns[start : start + most], private=private)
    except KernelError as error:
        vm.kernel.log(f"kvm: failed to update memory attributes: {error}")
