"""KVM_PRE_FAULT_MEMORY: map a range before the guest touches it.

Source: Linux virt/kvm/kvm_main.c (kvm_vcpu_pre_fault_memory), arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.files import Argument
from snpbook.host.kvm import fault
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Step, Steps
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm_structs import PRE_FAULT_MEMORY

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu, VcpuFile


def pre_fault_memory(file: VcpuFile, process: Process, argument: Argument) -> Steps[int]:
    """Fault a range in; the structure comes back with what is left. 0 if a page was done, else why none was.

    EINVAL for flags or no range of pages, EOPNOTSUPP before an SNP launch is finished, ENOENT where no slot is,
    EFAULT for a private page without a private file.
    """
    vcpu, wanted = file.vcpu, argument.record(PRE_FAULT_MEMORY)
    vm, gpa, size = vcpu.vm, wanted.gpa, wanted.size
    check(wanted.flags == 0, errno.EINVAL, "flags of KVM_PRE_FAULT_MEMORY", 0, hex(wanted.flags))
    good = 0 < size <= (1 << 64) - gpa and gpa % PAGE_SIZE == 0 == size % PAGE_SIZE
    check(good, errno.EINVAL, "gpa and size are whole pages", PAGE_SIZE, f"{gpa:#x}+{size:#x}")
    allowed = not vm.snp or (vm.sev is not None and vm.sev.launched)
    check(allowed, errno.EOPNOTSUPP, "an SNP guest's launch is finished", "SNP_LAUNCH_FINISH", "not yet")
    gfns = range(gpa >> PAGE_SHIFT, gpa + size >> PAGE_SHIFT)
    try:
        while gfns:
            gfns = gfns[(yield from _some(vcpu, gfns)) :]
    except KernelError:
        if gfns.start << PAGE_SHIFT == gpa:
            raise
    finally:
        argument.store(wanted.replace(gpa=gfns.start << PAGE_SHIFT, size=len(gfns) << PAGE_SHIFT))
    return 0


def _some(vcpu: Vcpu, gfns: range) -> Steps[int]:
    """Map what is not mapped at the beginning of a run: how many pages are now."""
    vm = vcpu.vm
    private = bool(vm.is_private(gfns[:1])[0]) and vm.has_private_memory
    slot = vm.slots.of(gfns.start)
    if not private:
        check(slot is not None, errno.ENOENT, "a memslot holds the guest page", "a slot", hex(gfns.start))
    mapped = vm.mmu.tables.mapped(gfns)
    if mapped:
        return mapped
    yield Step("pre-fault")
    yield from fault.serve(vcpu, gfns, private, write=True)
    return 0
