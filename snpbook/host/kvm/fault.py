"""A nested page fault: which side a guest page is on, the frames behind it, and the way into the nested tables.

The order is that of kvm_faultin_pfn, and at every step others may change memory: a fault that finds the sequence moved
starts again. An exit may stand for a run of pages, of which a prefix is resolved. Sources: Linux
arch/x86/kvm/mmu/mmu.c, arch/x86/kvm/svm/sev.c; RFC v7 patches 04, 12, 41, 51, 56.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.hardware.dram import Words
from snpbook.hardware.exits import Npf
from snpbook.host.kvm import registered, rmp_fault
from snpbook.host.kvm.memslots import Memslot, prefix
from snpbook.host.memory import Flags
from snpbook.host.refusal import KernelError
from snpbook.host.rmp import is_large
from snpbook.host.steps import Step, Steps
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.uapi_kvm_structs import EXIT_MEMORY_FAULT, EXIT_MMIO
from snpbook.spec.vmcb import FaultError

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.kvm.vm import Vm

Left = bool
"""Whether the VMM is needed: then `kvm_run` says why."""


def handle(vcpu: Vcpu, fault: Npf) -> Steps[Left]:
    """Serve a fault of the guest; KernelError EFAULT or EHWPOISON where the era tells the VMM so."""
    vm, gfns = vcpu.vm, fault.gfns
    first = gfns.start
    if vm.in_place and fault.error & FaultError.RMP:
        yield from registered.serve_rmp_fault(vm, first, fault.error)
        return False
    left = yield from serve(vcpu, gfns, is_private(vm, fault, gfns), write=bool(fault.error & FaultError.WRITE))
    if not left and fault.error & FaultError.RMP and vm.snp:
        yield from rmp_fault.handle(vcpu, first, fault.error)
    return left


def is_private(vm: Vm, fault: Npf, gfns: range) -> bool:
    """Whether the access was a private one: hardware says so under SNP, elsewhere the attribute must do."""
    if vm.snp:
        return bool(fault.error & FaultError.ENCRYPTED)
    return vm.has_private_memory and bool(vm.is_private(gfns[:1])[0])


def serve(vcpu: Vcpu, gfns: range, private: bool, *, write: bool) -> Steps[Left]:
    """Map a prefix of a run of guest pages on the side that the access is on, as often as memory changes meanwhile."""
    vm = vcpu.vm
    yield Step("fault: sequence")
    sequence = vm.mmu.sequence
    attribute = vm.is_private(gfns) == (private and not vm.in_place)
    if not attribute[0]:
        return _memory_fault(vcpu, gfns.start, private)
    gfns = gfns[: prefix(attribute) if gfns.step == 1 or (private and not vm.in_place) else 1]
    yield Step("fault: slot")
    slot = vm.slots.of(gfns.start)
    if slot is None:
        return _memory_fault(vcpu, gfns.start, private) if private else _mmio(vcpu, gfns.start, write)
    gfns = slot.part(gfns)
    if slot.number in vm.deleting or vm.mmu.busy(gfns):
        return False
    if private and slot.private is None and not vm.in_place:
        return _memory_fault(vcpu, gfns.start, private)
    yield Step("fault: frames")
    frames = _frames(vcpu, slot, gfns, private)
    if frames is None:
        return False
    yield Step("fault: map")
    if vm.mmu.sequence == sequence and not vm.mmu.busy(gfns):
        side = private or vm.in_place
        gfns = gfns[: len(frames)]
        large = _large(vm, slot, gfns, frames) if side else None
        vm.mmu.tables.map(gfns.start, frames, large, step=gfns.step)
    return False


def _frames(vcpu: Vcpu, slot: Memslot, gfns: range, private: bool) -> Words | None:
    """The frames of the chosen side; what a private file answers is told as a memory fault where the era does so.

    In the v7 series it is not told, and the guest faults again: None.
    """
    if not private or slot.private is None:
        return slot.shared_frames(vcpu.vm.process.space, gfns)
    try:
        return slot.private.frames(slot, gfns)
    except KernelError as error:
        if not vcpu.vm.kernel.era.private_fault_errors:
            vcpu.unserved = error
            return None
        _tell(vcpu, gfns.start, private)
        raise KernelError(error.errno or errno.EFAULT, error.rule, error.expected, error.found, error.cite) from error


def _large(vm: Vm, slot: Memslot, gfns: range, frames: Words) -> Flags:
    """Which private pages a leaf of 2 MB maps: those whose page and RMP entry both have that size."""
    huge = slot.private.is_huge(slot, gfns) if slot.private else registered.is_huge(vm, slot, gfns)
    return huge & is_large(vm.kernel.cpu, frames) if vm.snp and huge.any() else np.zeros(len(gfns), bool)


def _memory_fault(vcpu: Vcpu, gfn: int, private: bool) -> Left:
    """KVM_EXIT_MEMORY_FAULT: always one page."""
    _tell(vcpu, gfn, private)
    if vcpu.vm.kernel.era.memory_fault_fails:
        side = "private" if private else "shared"
        raise KernelError(
            errno.EFAULT, "an access is on the side of the page's attribute", "a conversion", f"{side}, gfn {gfn:#x}"
        )
    return True


def _tell(vcpu: Vcpu, gfn: int, private: bool) -> None:
    era = vcpu.vm.kernel.era
    flags = era.memory_fault_private if private else 0
    vcpu.leave(era.memory_fault_exit, EXIT_MEMORY_FAULT, flags=flags, gpa=gfn << PAGE_SHIFT, size=PAGE_SIZE)


def _mmio(vcpu: Vcpu, gfn: int, write: bool) -> Left:
    """KVM_EXIT_MMIO for an access to what no slot holds.

    KVM would decode the instruction; a guest program has none, so that the length is 0 (MODEL). A guest with
    encrypted registers is told by #VC instead: its nested entry gets a reserved bit.
    """
    if vcpu.vm.protected_state:
        vcpu.vm.mmu.tables.map_mmio(gfn)
        return False
    vcpu.leave(Exit.MMIO, EXIT_MMIO, phys_addr=gfn << PAGE_SHIFT, is_write=int(write))
    return True
