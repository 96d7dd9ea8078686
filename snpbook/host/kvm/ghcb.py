"""VMGEXIT: what a guest with encrypted registers asks for, through its GHCB or by the GHCB MSR.

KVM answers most of it itself; port and MMIO accesses, page state changes and the end of the guest go to the VMM, whose
answer is taken as the vCPU is entered again. Sources: GHCB specification; Linux arch/x86/kvm/svm/sev.c
(sev_handle_vmgexit, sev_es_validate_vmgexit); RFC v7 patches 43 to 54.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from snpbook.host.kvm import ap_creation, ghcb_io, ghcb_msr, guest_requests, instructions, interrupts, psc, svsm
from snpbook.host.kvm.exchange import Exchange
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Steps
from snpbook.spec import ghcb as spec
from snpbook.spec.cpuid import XSAVE_LEAF
from snpbook.spec.ghcb import IOIO, ApCreation, GhcbError, Nae
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import MpState

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_SIZE_BITS = 7


def handle(vcpu: Vcpu) -> Steps[bool]:
    """Serve one VMGEXIT: whether the VMM is needed.

    EINVAL for a GHCB that the SNP guest has not registered, and for an event that the guest itself does not support;
    EFAULT for memory that is not there.
    """
    value = vcpu.control().ghcb_gpa
    if value & spec.MSR_CODE_MASK:
        return ghcb_msr.handle(vcpu, value)
    if not value:
        vcpu.vm.kernel.log("vmgexit: GHCB gpa is not set")
        return False
    exchange = Exchange.open(vcpu, value)
    if exchange is None:
        return False
    vcpu.exchange = exchange
    registered = not vcpu.vm.snp or value >> PAGE_SHIFT == vcpu.ghcb_registered
    check(registered, errno.EINVAL, "the GHCB is registered", vcpu.ghcb_registered, hex(value))
    error = _error(exchange)
    if error is not None:
        vcpu.vm.kernel.log(f"vmgexit: exit code {exchange.event:#x}: {error.name}")
        exchange.refuse(error)
        return False
    exchange.answer()
    if exchange.event in guest_requests.EVENTS:
        return (yield from guest_requests.handle(exchange))
    handler = _EVENTS.get(exchange.event)
    if handler is not None:
        return handler(exchange)
    return instructions.handle(vcpu, exchange.event, exchange.info_1, exchange.info_2)


def prepare_entry(vcpu: Vcpu) -> None:
    """Before a vCPU is entered: the answer to its last request, its start, the save area to use, and interrupts."""
    if vcpu.mp_state is MpState.SIPI_RECEIVED:
        _started(vcpu)
    if vcpu.exchange is not None and vcpu.mp_state is MpState.RUNNABLE:
        exchange, vcpu.exchange = vcpu.exchange, None
        exchange.close()
    ap_creation.update_vmsa(vcpu)
    interrupts.present(vcpu)


def _started(vcpu: Vcpu) -> None:
    """INIT and SIPI: a vCPU that waits in AP reset hold hears of it; a save area chosen for INIT is taken."""
    if vcpu.exchange is not None:
        vcpu.exchange.answer(info_2=1)
    else:
        ghcb_msr.started(vcpu)
    vcpu.mp_state = MpState.RUNNABLE
    ap_creation.initialise(vcpu)


def _error(exchange: Exchange) -> GhcbError | None:
    """The first thing that is wrong with a GHCB, or None."""
    if exchange.page.usage:
        return GhcbError.INVALID_USAGE
    if not exchange.has("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2"):
        return GhcbError.MISSING_INPUT
    if exchange.event not in Nae._value2member_map_:
        return GhcbError.INVALID_EVENT
    event, era = Nae(exchange.event), exchange.vcpu.vm.kernel.era
    if event in spec.SVSM_EVENTS and not svsm.knows(exchange.vcpu.vm, event):
        return GhcbError.INVALID_EVENT
    guarded = event in spec.SNP_EVENTS and era.snp_requests_guarded and not exchange.vcpu.vm.snp
    if guarded or not exchange.has(*spec.NAE_INPUTS.get(event, ()), *_more_inputs(exchange, event)):
        return GhcbError.MISSING_INPUT
    if event in guest_requests.EVENTS and not era.request_errors_are_status:
        request, response = exchange.info_1, exchange.info_2
        if request % PAGE_SIZE or response % PAGE_SIZE or request == response:
            return GhcbError.MISSING_INPUT
    return None


def _more_inputs(exchange: Exchange, event: Nae) -> tuple[str, ...]:
    """The fields that an event needs because of what it asks for."""
    era = exchange.vcpu.vm.kernel.era
    match event:
        case Nae.CPUID if exchange.page.rax == XSAVE_LEAF:
            return ("xcr0",)
        case Nae.MSR if exchange.info_1:
            return ("rax", "rdx")
        case Nae.IOIO:
            info = _port_info(exchange)
            return ("sw_scratch",) if info.is_string else () if info.is_in else ("rax",)
        case Nae.PAGE_STATE_CHANGE if era.snp_requests_guarded:
            return ("sw_scratch",)
        case Nae.AP_CREATION:
            destroys = ap_creation.request(exchange) == ApCreation.DESTROY and not era.ap_destroy_needs_rax
            return () if destroys else ("rax",)
    return ()


# Events that take one step.


def _port_info(exchange: Exchange) -> Record:
    return IOIO.unpack(exchange.info_1.to_bytes(IOIO.size, "little"))


def _port(exchange: Exchange) -> bool:
    """IN and OUT; a size that is none is an invalid input (MODEL: Linux looks at the bits of the size alone)."""
    info = _port_info(exchange)
    size = exchange.info_1 >> IOIO.fields["size_8"].lo & _SIZE_BITS
    if size not in ghcb_io.SIZES:
        exchange.refuse(GhcbError.INVALID_INPUT)
        return False
    if info.is_string:
        return ghcb_io.string(exchange, info.port, size, is_in=bool(info.is_in))
    return instructions.handle(exchange.vcpu, Nae.IOIO, exchange.info_1)


def _nothing(exchange: Exchange) -> bool:
    """NMI complete: nothing delivers NMIs here (MODEL)."""
    return False


def _reset_hold(exchange: Exchange) -> bool:
    return ghcb_msr.hold(exchange.vcpu)


def _jump_table(exchange: Exchange) -> bool:
    sev = exchange.vcpu.vm.sev
    assert sev is not None
    match exchange.info_1:
        case 0:
            sev.ap_jump_table = exchange.info_2
        case 1:
            exchange.answer(info_2=sev.ap_jump_table)
        case _:
            exchange.refuse(GhcbError.INVALID_INPUT)
    return False


def _features(exchange: Exchange) -> bool:
    exchange.answer(info_2=exchange.vcpu.vm.kernel.era.hypervisor_features)
    return False


def _terminate(exchange: Exchange) -> bool:
    vcpu = exchange.vcpu
    vcpu.vm.kernel.log(f"SEV-ES guest requested termination: reason {exchange.info_1:#x} info {exchange.info_2:#x}")
    return ghcb_msr.terminated(vcpu)


def _unsupported(exchange: Exchange) -> bool:
    raise KernelError(
        errno.EINVAL, "the guest supports what it meets", "another event", f"unsupported event {exchange.info_1:#x}"
    )


_EVENTS: Mapping[int, Callable[[Exchange], bool]] = {
    Nae.IOIO: _port,
    Nae.MMIO_READ: ghcb_io.mmio,
    Nae.MMIO_WRITE: ghcb_io.mmio,
    Nae.NMI_COMPLETE: _nothing,
    Nae.AP_RESET_HOLD: _reset_hold,
    Nae.AP_JUMP_TABLE: _jump_table,
    Nae.PAGE_STATE_CHANGE: psc.change,
    Nae.AP_CREATION: ap_creation.create,
    Nae.FEATURES: _features,
    Nae.TERMINATE: _terminate,
    Nae.UNSUPPORTED: _unsupported,
    **svsm.EVENTS,
}
"""Guest requests take a lock and so have their own way; all other events are intercepts."""
