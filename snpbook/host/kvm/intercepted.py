"""Exits of guests whose registers are in the clear, and the way of their registers into the processor and back.

VMRUN takes some registers from the VMCB's save area and leaves the others where the host has put them: in the core.
Source: Linux arch/x86/kvm/svm/svm.c, arch/x86/kvm/svm/vmenter.S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.hardware.exits import Intercepted
from snpbook.host.kvm import instructions
from snpbook.spec.vmcb import SAVE_AREA_OFFSET
from snpbook.spec.vmsa import DEBUG_REGISTERS, SAVE_AREA, UNSAVED_REGISTERS

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_IN_CORE = (*UNSAVED_REGISTERS, *DEBUG_REGISTERS)


def load(vcpu: Vcpu) -> None:
    """Put the registers where VMRUN finds them."""
    cpu, state = vcpu.vm.kernel.cpu, vcpu.state
    cpu.write(vcpu.vmcb + SAVE_AREA_OFFSET, SAVE_AREA.pack(**{name: getattr(state, name) for name in SAVE_AREA.fields}))
    cpu.registers(vcpu.core).update({name: getattr(state, name) for name in _IN_CORE})


def save(vcpu: Vcpu) -> None:
    """Keep the registers after an exit."""
    cpu = vcpu.vm.kernel.cpu
    area = SAVE_AREA.unpack(cpu.read(vcpu.vmcb + SAVE_AREA_OFFSET, SAVE_AREA.size))
    held = cpu.registers(vcpu.core)
    vcpu.state = vcpu.state.replace(**dict(area), **{name: held[name] for name in _IN_CORE})


def handle(vcpu: Vcpu, exit_: Intercepted) -> bool:
    """Do what the guest wanted; True where the VMM is needed, who is told of an exit that KVM does not know."""
    return instructions.handle(vcpu, exit_.code, exit_.info_1, exit_.info_2)
