"""The registers that QEMU gives a vCPU at reset, set by KVM's own ioctls.

They end in the VMSA and are measured, so every bit counts: `reset_vmsa` has them by VMSA name. Source: QEMU
target/i386/cpu.c (x86_cpu_reset_hold), target/i386/kvm/kvm.c (kvm_arch_put_registers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.host.kvm.registers import kvm_segment
from snpbook.host.vmm.configuration import GuestKind
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.layout import Record
from snpbook.spec.uapi_kvm import Ioctl
from snpbook.spec.vmsa import BSP_RESET_EIP, CR0_CD_NW, EFER_SVME, XSAVE_PLACES, reset_vmsa, svsm_vmsa

if TYPE_CHECKING:
    from snpbook.host.vmm.guest import VcpuHandle, Vmm

_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss")


def set_reset_registers(vmm: Vmm, handle: VcpuHandle) -> None:
    """KVM_SET_SREGS and KVM_SET_REGS as after a reset; with encrypted registers all but the first start elsewhere.

    With an SVSM all start at its entry, in protected mode.
    """
    if vmm.svsm:
        state = svsm_vmsa(vmm.svsm_gpa + vmm.svsm.svsm_entry, vmm.signature)
        _set(vmm, handle, state)
        fpu = {XSAVE_PLACES[name]: getattr(state, name) for name in ("x87_fcw", "mxcsr")}
        region = bytearray(structs.XSAVE.size)
        for place, value in fpu.items():
            region[place : place + 4] = value.to_bytes(4, "little")
        vmm.process.ioctl(handle.fd, Ioctl.SET_XSAVE, bytes(region))
        return
    eip = BSP_RESET_EIP
    if vmm.kind in (GuestKind.SEV_ES, GuestKind.SNP):
        eip = vmm.image.ap_reset_eip if handle.number else vmm.image.bsp_reset_eip
    _set(vmm, handle, reset_vmsa(eip, vmm.signature, 0))


def _set(vmm: Vmm, handle: VcpuHandle, state: Record) -> None:
    names = {"gdt": state.gdtr, "idt": state.idtr}
    sregs = structs.SREGS.pack(
        **{name: kvm_segment(getattr(state, name)) for name in _SEGMENTS},
        tr=kvm_segment(state.tr),
        ldt=kvm_segment(state.ldtr),
        **{name: structs.DTABLE.record(base=table.base, limit=table.limit) for name, table in names.items()},
        cr0=state.cr0 | CR0_CD_NW,
        cr4=state.cr4,
        efer=state.efer & ~EFER_SVME,
    )
    vmm.process.ioctl(handle.fd, Ioctl.SET_SREGS, sregs)
    regs = structs.REGS.pack(**{name: getattr(state, name) for name in structs.REGS.fields})
    vmm.process.ioctl(handle.fd, Ioctl.SET_REGS, regs)
