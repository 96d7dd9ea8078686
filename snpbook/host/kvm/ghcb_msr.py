"""The MSR protocol of the GHCB: requests and answers in the GHCB MSR, for guests that have no GHCB yet.

The VMCB holds the MSR. A request that KVM does not know stays there as it is. Sources: GHCB specification; Linux
arch/x86/kvm/svm/sev.c (sev_handle_vmgexit_msr_protocol); RFC v7 patches 33, 34, 45, 47.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.host.kvm import instructions, psc, svsm
from snpbook.spec import ghcb as spec
from snpbook.spec.cpuid import Registers
from snpbook.spec.ghcb import MsrCode
from snpbook.spec.uapi_kvm import Exit, MpState, SystemEvent
from snpbook.spec.uapi_kvm_structs import EXIT_SYSTEM_EVENT

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.kvm.vm import Vm

_FOR_SNP = (MsrCode.PREFERRED_GPA_REQUEST, MsrCode.REGISTER_GPA_REQUEST, MsrCode.PAGE_STATE_REQUEST)


def handle(vcpu: Vcpu, value: int) -> bool:
    """Serve one request: whether the VMM is needed."""
    vm, code, data = vcpu.vm, value & spec.MSR_CODE_MASK, value >> spec.MSR_DATA_SHIFT
    if code in _FOR_SNP and vm.kernel.era.snp_requests_guarded and not vm.snp:
        return terminated(vcpu)
    match code:
        case MsrCode.SEV_INFO_REQUEST:
            answer(vcpu, information(vm))
        case MsrCode.CPUID_REQUEST:
            _cpuid(vcpu, value)
        case MsrCode.AP_RESET_HOLD_REQUEST:
            answer(vcpu, MsrCode.AP_RESET_HOLD)
            return hold(vcpu)
        case MsrCode.FEATURES_REQUEST:
            answer(vcpu, vm.kernel.era.hypervisor_features << spec.MSR_DATA_SHIFT | MsrCode.FEATURES)
        case MsrCode.REGISTER_GPA_REQUEST:
            vcpu.ghcb_registered = data
            answer(vcpu, data << spec.MSR_DATA_SHIFT | MsrCode.REGISTER_GPA)
        case MsrCode.PREFERRED_GPA_REQUEST:
            answer(vcpu, spec.GFN_NONE << spec.MSR_DATA_SHIFT | MsrCode.PREFERRED_GPA)
        case MsrCode.PAGE_STATE_REQUEST:
            return psc.change_by_msr(vcpu, value)
        case MsrCode.RUN_VMPL_REQUEST if vm.kernel.era.run_vmpl:
            svsm.run_by_msr(vcpu, value)
        case MsrCode.TERMINATE:
            request = spec.TERMINATE.unpack(value.to_bytes(spec.TERMINATE.size, "little"))
            vm.kernel.log(f"SEV-ES guest requested termination: {request.reason_set:#x}:{request.reason:#x}")
            return terminated(vcpu)
    return False


def answer(vcpu: Vcpu, value: int) -> None:
    """Put an answer where the guest finds it."""
    vcpu.set_control("ghcb_gpa", value)


def information(vm: Vm) -> int:
    """SEV information: the versions of the protocol and the C-bit's place. The MSR has it when a vCPU is made."""
    assert vm.sev is not None
    info = spec.SEV_INFO.pack(
        code=MsrCode.SEV_INFO,
        c_bit=vm.kernel.cpu.product.c_bit,
        min_version=spec.PROTOCOL_MINIMUM,
        max_version=vm.sev.ghcb_version,
    )
    return int.from_bytes(info, "little")


def _cpuid(vcpu: Vcpu, value: int) -> None:
    """One register of a leaf's subleaf 0; the bits between code and register stay as they are."""
    request = spec.MSR_CPUID.unpack(value.to_bytes(spec.MSR_CPUID.size, "little"))
    vcpu.state = vcpu.state.replace(rax=request.value, rcx=0)
    instructions.cpuid(vcpu)
    found = Registers(*(getattr(vcpu.state, name) for name in ("rax", "rbx", "rcx", "rdx")))
    kept = value & ~spec.MSR_CODE_MASK & (1 << spec.MSR_CPUID.fields["value"].lo) - 1
    answer(vcpu, found[request.register] << spec.MSR_CPUID.fields["value"].lo | kept | MsrCode.CPUID)


def hold(vcpu: Vcpu) -> bool:
    """AP reset hold: the vCPU waits for a SIPI. A kernel's thread would sleep; here the VMM is told (MODEL)."""
    vcpu.mp_state = MpState.AP_RESET_HOLD
    vcpu.leave(Exit.AP_RESET_HOLD)
    return True


def started(vcpu: Vcpu) -> None:
    """A SIPI for a vCPU that waits by the MSR protocol: the answer becomes one that is not zero."""
    if vcpu.control().ghcb_gpa & spec.MSR_CODE_MASK == MsrCode.AP_RESET_HOLD:
        answer(vcpu, 1 << spec.MSR_DATA_SHIFT | MsrCode.AP_RESET_HOLD)


def terminated(vcpu: Vcpu) -> bool:
    """KVM_EXIT_SYSTEM_EVENT: the guest wants to end, or asked for what it cannot have."""
    fields = {"type": SystemEvent.SEV_TERM, "ndata": 1, "data0": vcpu.control().ghcb_gpa}
    vcpu.leave(Exit.SYSTEM_EVENT, EXIT_SYSTEM_EVENT, **fields)
    return True
