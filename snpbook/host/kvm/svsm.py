"""What an SVSM asks of its host beyond Linux 6.12: to run at another VMPL, a doorbell page, the list of APIC IDs.

No kernel that is published upstream has any of it, and everything here is unconfirmed: behaviour is that of AMD's
SVSM tree where that is known, and what is left of the interrupt events is refused. Sources: GHCB specification
(through COCONUT-SVSM); AMD's SVSM host tree.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from snpbook.host.kvm import ap_creation
from snpbook.host.kvm.exchange import Exchange
from snpbook.host.refusal import KernelError
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import Doorbell, GhcbError, MsrCode, Nae
from snpbook.spec.pages import PAGE_SIZE

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.kvm.vm import Vm

_VMPLS = 4
_LOW = (1 << 32) - 1
_FAILED = 1 << 32
"""The error half of the MSR protocol's answer to run VMPL."""


def knows(vm: Vm, event: Nae) -> bool:
    """Whether this kernel takes the event: run VMPL and the doorbell by its era, the others with them."""
    era = vm.kernel.era
    return era.hv_doorbell if event is Nae.HV_DOORBELL else era.run_vmpl


def run_by_msr(vcpu: Vcpu, value: int) -> None:
    """Run VMPL by the MSR protocol. The caller finds the answer when it runs again."""
    vmpl = spec.MSR_RUN_VMPL.unpack(value.to_bytes(spec.MSR_RUN_VMPL.size, "little")).vmpl
    done = _has(vcpu, vmpl)
    vcpu.set_control("ghcb_gpa", _FAILED * (not done) | MsrCode.RUN_VMPL)
    if done and vmpl != vcpu.vmpl:
        ap_creation.switch(vcpu, vmpl)


def _run_vmpl(exchange: Exchange) -> bool:
    """Run VMPL by its event: SW_EXITINFO1 is the VMPL. One without a save area is SW_EXITINFO1 = 2."""
    vcpu, vmpl = exchange.vcpu, exchange.info_1 & _LOW
    if not _has(vcpu, vmpl):
        exchange.answer(spec.MALFORMED)
        return False
    exchange.close()
    vcpu.exchange = None
    if vmpl != vcpu.vmpl:
        ap_creation.switch(vcpu, vmpl)
    return False


def _has(vcpu: Vcpu, vmpl: int) -> bool:
    """Whether the vCPU can run at a VMPL: it does, or has or gets a save area there."""
    if not vcpu.vm.snp or vmpl >= _VMPLS:
        return False
    if vmpl in vcpu.queued:
        ap_creation.initialise(vcpu)
        return True
    return vmpl == vcpu.vmpl or (vmpl in vcpu.parked and vcpu.parked[vmpl].vmsa is not None)


def _doorbell(exchange: Exchange) -> bool:
    """The #HV doorbell page of the vCPU: SW_EXITINFO2 answers with its guest address, all ones for none."""
    vcpu, gpa = exchange.vcpu, exchange.info_2
    none = spec.GFN_NONE << spec.MSR_DATA_SHIFT | spec.MSR_CODE_MASK
    match exchange.info_1:
        case Doorbell.GET_PREFERRED:
            exchange.answer(info_2=none)
        case Doorbell.SET if gpa % PAGE_SIZE == 0 and vcpu.vm.slots.of(gpa // PAGE_SIZE) is not None:
            vcpu.doorbell = gpa
            exchange.answer(info_2=gpa)
        case Doorbell.QUERY:
            exchange.answer(info_2=none if vcpu.doorbell is None else vcpu.doorbell)
        case Doorbell.CLEAR:
            vcpu.doorbell = None
            exchange.answer(info_2=none)
        case _:
            exchange.refuse(GhcbError.INVALID_INPUT)
    return False


def _apic_ids(exchange: Exchange) -> bool:
    """The APIC IDs of all vCPUs into RAX pages at SW_EXITINFO1; too few pages: RAX says how many it takes."""
    vcpu, gpa = exchange.vcpu, exchange.info_1
    numbers = sorted(vcpu.vm.vcpus)
    table = struct.pack(f"<{len(numbers) + 1}I", len(numbers), *numbers)
    pages = vcpu.state.rax
    if len(table) > pages * PAGE_SIZE:
        vcpu.state = vcpu.state.replace(rax=-(-len(table) // PAGE_SIZE))
        return False
    try:
        if gpa % PAGE_SIZE:
            raise KernelError(errno.EINVAL, "the buffer is a page", PAGE_SIZE, hex(gpa))
        vcpu.vm.write(gpa, table)
    except KernelError:
        exchange.refuse(GhcbError.INVALID_INPUT)
    return False


def _refused(exchange: Exchange) -> bool:
    """Interrupts by the hypervisor need an interrupt controller, which the model has not (MODEL)."""
    exchange.refuse(GhcbError.INVALID_EVENT)
    return False


EVENTS: Mapping[int, Callable[[Exchange], bool]] = {
    **dict.fromkeys(spec.SVSM_EVENTS, _refused),
    Nae.RUN_VMPL: _run_vmpl,
    Nae.HV_DOORBELL: _doorbell,
    Nae.APIC_ID_LIST: _apic_ids,
}
