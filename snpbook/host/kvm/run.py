"""KVM_RUN: enter the guest, serve what KVM serves itself, return to the VMM for the rest.

The answer of the VMM to the last exit is taken first. Each entry is a place where others may run; the TLB of the guest
is flushed where its nested tables changed, or another vCPU of it ran on the core. Sources: Linux arch/x86/kvm/x86.c,
arch/x86/kvm/svm/svm.c, arch/x86/kvm/svm/sev.c (pre_sev_run).
"""

from __future__ import annotations

import errno
from collections import Counter
from typing import TYPE_CHECKING

from snpbook.hardware.exits import Exit as HardwareExit
from snpbook.hardware.exits import Hlt, Intercepted, Invalid, Npf, Shutdown, Vmgexit
from snpbook.host.files import Argument
from snpbook.host.kvm import fault, ghcb, instructions, intercepted
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Step, Steps
from snpbook.spec.uapi_kvm import Exit, InternalError, MpState, VmType
from snpbook.spec.uapi_kvm_structs import EXIT_FAIL_ENTRY, EXIT_INTERNAL
from snpbook.spec.vmcb import FaultError, TlbControl
from snpbook.trace import VmExit

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

FAULT_LIMIT = 8
"""How often the same fault may repeat without progress; a real guest would fault for ever (MODEL)."""


def run(vcpu: Vcpu, argument: Argument) -> Steps[int]:
    """Run a vCPU until the VMM is needed; why is in `kvm_run`.

    EINVAL for an argument or a guest that is not ready, EINTR with `immediate_exit`, EFAULT and EHWPOISON for memory.
    EAGAIN for a vCPU that waits to be started; a kernel would sleep where only an interrupt helps (MODEL). ELOOP where
    the same fault repeats without progress (MODEL).
    """
    vm = vcpu.vm
    check(argument.number == 0, errno.EINVAL, "the argument of KVM_RUN", 0, argument.number)
    ready = vm.type < VmType.SEV_VM or vm.sev is not None
    check(ready, errno.EINVAL, "a guest with SEV is initialised", "KVM_SEV_INIT2", "not yet")
    if not len(vm.slots):
        vcpu.leave(Exit.INTERNAL_ERROR, EXIT_INTERNAL, suberror=InternalError.EMULATION)
        return 0
    if vcpu.completion is not None:
        completion, vcpu.completion = vcpu.completion, None
        if (yield from completion(vcpu)):
            return 0
    check(not vcpu.immediate_exit, errno.EINTR, "the VMM wants to run", "immediate_exit 0", 1)
    repeated, last, refused = 0, None, Counter[HardwareExit]()
    vcpu.unserved = None
    while True:
        yield Step("enter the guest")
        if vm.protected_state:
            ghcb.prepare_entry(vcpu)
        ready = vcpu.mp_state in (MpState.RUNNABLE, MpState.SIPI_RECEIVED)
        check(ready, errno.EAGAIN, "the vCPU has been started", "INIT and SIPI, or AP creation", vcpu.mp_state.name)
        exit_ = _enter(vcpu)
        repeated = repeated + 1 if exit_ == last and isinstance(exit_, Npf) else 0
        last = exit_
        if isinstance(exit_, Npf) and exit_.error & FaultError.RMP:  # others come in between as mappings are dropped
            refused[exit_] += 1
            repeated = max(repeated, refused[exit_] - 1)
        if repeated >= FAULT_LIMIT:
            found = f"{exit_}, {vcpu.unserved}" if vcpu.unserved else str(exit_)
            rule = "the guest gets on after a fault"
            raise KernelError(errno.ELOOP, rule, "progress", found) from vcpu.unserved
        if (yield from _serve(vcpu, exit_)):
            return 0


def _serve(vcpu: Vcpu, exit_: HardwareExit) -> Steps[bool]:
    """What an exit asks for; whether the VMM is needed."""
    match exit_:
        case Npf():
            return (yield from fault.handle(vcpu, exit_))
        case Vmgexit():
            return (yield from ghcb.handle(vcpu))
        case Hlt():
            instructions.skip(vcpu)
            vcpu.leave(Exit.HLT)
        case Shutdown():
            vcpu.leave(Exit.SHUTDOWN)
        case Intercepted():
            return intercepted.handle(vcpu, exit_)
        case Invalid(rule=rule, code=code):
            vcpu.leave(
                Exit.FAIL_ENTRY, EXIT_FAIL_ENTRY, hardware_entry_failure_reason=code & (1 << 64) - 1, cpu=vcpu.core
            )
            expected = "a consistent state, of a guest whose launch is finished"
            raise KernelError(errno.EINVAL, f"VMRUN: {rule}", expected, "VMEXIT_INVALID", "APM2")
    return True


def _enter(vcpu: Vcpu) -> HardwareExit:
    """One VMRUN, with the registers of a guest without SEV-ES put in place before and kept after it."""
    vm, cpu = vcpu.vm, vcpu.vm.kernel.cpu
    if vcpu.vmsa is None:
        raise KernelError(errno.EINVAL, "the vCPU has a save area", "a VMSA", "destroyed by the guest")
    _flush(vcpu)
    plain = not vm.protected_state
    if plain:
        intercepted.load(vcpu)
    exit_ = cpu.vmrun(vcpu.vmcb, vcpu.executor, f"vcpu{vcpu.number}", vcpu.core)
    if plain:
        intercepted.save(vcpu)
    if cpu.trace:
        detail = {"gpa": exit_.gpa, "error": int(exit_.error)} if isinstance(exit_, Npf) else {}
        pages = exit_.count if isinstance(exit_, Npf) else 1
        cpu.trace.emit(VmExit(vcpu=vcpu.number, reason=exit_.code.name, detail=detail, pages=pages))
    return exit_


def _flush(vcpu: Vcpu) -> None:
    """Flush the guest's ASID where its tables changed, or another VMCB of it ran last on this core."""
    vm, key = vcpu.vm, (vcpu.core, vcpu.vm.asid)
    changes = vm.mmu.tables.changes
    other = vm.kvm.last_vmcb.get(key) != vcpu.vmcb
    vm.kvm.last_vmcb[key] = vcpu.vmcb
    control = TlbControl.ASID if other or vcpu.flushed != changes else TlbControl.NOTHING
    vcpu.set_control("tlb_control", control)
    vcpu.flushed = changes
