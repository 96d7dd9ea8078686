"""KVM_CHECK_EXTENSION and KVM_ENABLE_CAP: what this kernel can do, and switching it on for one VM.

Sources: Linux arch/x86/kvm/x86.c (kvm_vm_ioctl_check_extension, kvm_vm_ioctl_enable_cap), virt/kvm/kvm_main.c; RFC v7
patch 02.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.files import Argument, File
from snpbook.host.kvm import attributes, migration
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Steps
from snpbook.spec.kvm import MAX_VCPUS
from snpbook.spec.uapi_kvm import HC_MAP_GPA_RANGE, NR_MEMSLOTS, Cap, MemoryAttribute
from snpbook.spec.uapi_kvm_structs import ENABLE_CAP

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel
    from snpbook.host.kvm.vm import Vm, VmFile

EXIT_HYPERCALL_MASK = 1 << HC_MAP_GPA_RANGE
_PRESENT = frozenset({
    Cap.IRQCHIP, Cap.USER_MEMORY, Cap.EXT_CPUID, Cap.MP_STATE, Cap.DESTROY_MEMORY_REGION_WORKS, Cap.INTERNAL_ERROR_DATA,
    Cap.DEBUGREGS, Cap.ENABLE_CAP, Cap.XSAVE, Cap.XCRS, Cap.READONLY_MEM, Cap.ENABLE_CAP_VM, Cap.CHECK_EXTENSION_VM,
    Cap.IMMEDIATE_EXIT, Cap.SYSTEM_EVENT_DATA, Cap.VM_COPY_ENC_CONTEXT_FROM, Cap.VM_MOVE_ENC_CONTEXT_FROM,
})  # fmt: skip
"""Capabilities that are there or not, and are in every era."""


def value(kernel: Kernel, cap: int, vm: Vm | None) -> int:
    """What KVM_CHECK_EXTENSION answers: 0 for what is not there."""
    era = kernel.era
    if cap not in Cap._value2member_map_:
        return 0
    if cap in _PRESENT:
        encrypted = cap in (Cap.VM_COPY_ENC_CONTEXT_FROM, Cap.VM_MOVE_ENC_CONTEXT_FROM)
        return int(not encrypted or kernel.kvm.sev)
    match cap:
        case Cap.NR_VCPUS:
            return min(len(kernel.cpu.cores), MAX_VCPUS)
        case Cap.MAX_VCPUS | Cap.MAX_VCPU_ID:
            return MAX_VCPUS
        case Cap.NR_MEMSLOTS:
            return NR_MEMSLOTS
        case Cap.EXIT_HYPERCALL:
            return EXIT_HYPERCALL_MASK
        case Cap.SYS_ATTRIBUTES:
            return int(Cap.VM_TYPES in era.capabilities)
    if cap not in era.capabilities:
        return 0
    match cap:
        case Cap.VM_TYPES:
            return sum(1 << kind for kind in kernel.kvm.vm_types)
        case Cap.MEMORY_ATTRIBUTES | Cap.MEMORY_ATTRIBUTES_V10:
            return int(attributes.known(vm) if vm else MemoryAttribute.PRIVATE)
        case Cap.GUEST_MEMFD:
            return int(vm is None or vm.has_private_memory)
    return 1


def check_on_vm(file: VmFile, process: Process, argument: Argument) -> int:
    """KVM_CHECK_EXTENSION of one VM."""
    return value(file.vm.kernel, argument.number, file.vm)


def enable(file: VmFile, process: Process, argument: Argument) -> Steps[int]:
    """KVM_ENABLE_CAP. EINVAL for flags, for what cannot be enabled, and for bits that are none of it."""
    vm, wanted = file.vm, argument.record(ENABLE_CAP)
    check(not wanted.flags, errno.EINVAL, "flags of KVM_ENABLE_CAP", 0, wanted.flags)
    match wanted.cap:
        case Cap.EXIT_HYPERCALL:
            check(
                not wanted.arg0 & ~EXIT_HYPERCALL_MASK,
                errno.EINVAL,
                "hypercalls",
                hex(EXIT_HYPERCALL_MASK),
                hex(wanted.arg0),
            )
            vm.exit_hypercalls = wanted.arg0
        case Cap.UNMAPPED_PRIVATE_MEM if Cap.UNMAPPED_PRIVATE_MEM in vm.kernel.era.capabilities:
            vm.unmapped_private_mem = True
        case Cap.VM_COPY_ENC_CONTEXT_FROM:
            return (yield from migration.copy_context(vm, process, wanted.arg0))
        case Cap.VM_MOVE_ENC_CONTEXT_FROM:
            return (yield from migration.move_context(vm, process, wanted.arg0))
        case _:
            raise KernelError(errno.EINVAL, "a capability that can be enabled", "one of those modelled", wanted.cap)
    return 0


def create_irqchip(file: File, process: Process, argument: Argument) -> int:
    """KVM_CREATE_IRQCHIP: the interrupt controllers in the kernel. Nothing delivers interrupts through them (MODEL)."""
    return 0
