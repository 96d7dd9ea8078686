"""KVM_RUN: enter the guest, handle what KVM handles itself, return to the VMM for the rest.

KVM decides whether a fault was private by the error code's bit 34, maps what the attribute allows and
leaves conversions to the VMM. Sources: RFC v7, patches 42 to 56; Linux arch/x86/kvm/mmu/mmu.c.
"""

from __future__ import annotations

import errno

import numpy as np

from snpbook.hardware.exits import Exit, Hlt, Intercepted, Invalid, Npf, Shutdown, Vmgexit
from snpbook.host.ghcb import handle_vmgexit
from snpbook.host.kvm import RunExit, Vcpu
from snpbook.host.refusal import KernelError, check
from snpbook.spec.kvm import KvmExit
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import VMCB, FaultError, TlbControl
from snpbook.trace import VmExit

FAULT_LIMIT = 8
"""How often the same fault may repeat without progress; real hardware would loop for ever."""

PRIVATE_FAULT = 1
"""KVM_MEMORY_EXIT_FLAG_PRIVATE, bit 0 in UPM v10 (bit 3 upstream)."""


def run(vcpu: Vcpu) -> RunExit:
    """Run a vCPU until the VMM is needed.

    `KernelError` EINVAL before the launch is finished, EFAULT for a fault that no slot explains, ELOOP
    where the guest makes no progress.
    """
    with vcpu.vm.ioctl("KVM_RUN", vcpu=vcpu.number):
        check(vcpu.vm.launched, errno.EINVAL, "the launch is finished", "SNP_LAUNCH_FINISH", "not yet")
        repeated, last = 0, None
        while True:
            _flush(vcpu)
            exit_ = vcpu.vm.cpu.vmrun(vcpu.vmcb, vcpu.executor, f"vcpu{vcpu.number}")
            _trace(vcpu, exit_)
            repeated = repeated + 1 if exit_ == last and isinstance(exit_, Npf) else 0
            last = exit_
            check(repeated < FAULT_LIMIT, errno.ELOOP, "the guest gets on after a fault", "progress", str(exit_))
            match exit_:
                case Npf():
                    result = _handle_fault(vcpu, exit_)
                case Vmgexit():
                    result = handle_vmgexit(vcpu)
                case Hlt():
                    result = RunExit(KvmExit.HLT, {})
                case Shutdown():
                    result = RunExit(KvmExit.SHUTDOWN, {})
                case Intercepted(code=code):
                    raise KernelError(errno.EINVAL, "KVM knows the exit", "one that it handles", code.name, "APM2")
                case Invalid(rule=rule):
                    raise KernelError(errno.EINVAL, f"VMRUN: {rule}", "a consistent state", "VMEXIT_INVALID", "APM2")
            if result is not None:
                return result


def _flush(vcpu: Vcpu) -> None:
    """KVM_REQ_TLB_FLUSH: VMRUN flushes the guest's ASID where nested entries were changed since the vCPU last ran."""
    changes = vcpu.vm.tables.changes
    control = TlbControl.NOTHING if vcpu.flushed == changes else TlbControl.ASID
    vcpu.vm.cpu.write(vcpu.vmcb + VMCB.offset("tlb_control"), bytes([control]))
    vcpu.flushed = changes


def _trace(vcpu: Vcpu, exit_: Exit) -> None:
    trace = vcpu.vm.cpu.trace
    if trace:
        detail = {"gpa": exit_.gpa, "error": int(exit_.error)} if isinstance(exit_, Npf) else {}
        pages = exit_.count if isinstance(exit_, Npf) else 1
        trace.emit(VmExit(vcpu=vcpu.number, reason=exit_.code.name, detail=detail, pages=pages))


def _handle_fault(vcpu: Vcpu, fault: Npf) -> RunExit | None:
    """A nested page fault: map a prefix of its run, or hand a conversion to the VMM."""
    vm = vcpu.vm
    private = bool(fault.error & FaultError.ENCRYPTED)
    gfns = range(fault.gpa >> PAGE_SHIFT, (fault.gpa >> PAGE_SHIFT) + fault.count)
    slot = vm.slot_of(gfns.start)
    attribute = vm.is_private(gfns)
    if attribute[0] != private:
        flags = PRIVATE_FAULT if private else 0
        return RunExit(KvmExit.MEMORY_FAULT, {"flags": flags, "gpa": fault.gpa, "size": PAGE_SIZE})
    if slot is None:
        raise KernelError(errno.EFAULT, "a memslot holds the guest page", "a slot", fault.gpa)
    same = attribute[: min(len(gfns), slot.gfn + slot.count - gfns.start)] == private
    count = len(same) if same.all() else int(np.argmin(same))
    start = gfns.start - slot.gfn
    backing = slot.restricted if private else slot.shared
    vm.tables.map(gfns.start, backing.get(range(start, start + count)))
    return None
