"""VMGEXIT: what the guest asks through its GHCB or the GHCB MSR, and what KVM answers itself.

KVM reads and writes GHCB bytes in shared memory and nothing else of the guest. Page state changes go
raw to the VMM (KVM_EXIT_VMGEXIT), port accesses as KVM_EXIT_IO. Sources: GHCB specification; RFC v7,
patches 43 to 54.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from snpbook.host.kvm import RunExit, Vcpu
from snpbook.host.refusal import KernelError, check
from snpbook.host.rmp import printk
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import GHCB, GhcbError, MsrCode, Nae
from snpbook.spec.kvm import KvmExit
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.status import Status
from snpbook.spec.vmcb import VMCB

_ALWAYS_VALID = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2")


def handle_vmgexit(vcpu: Vcpu) -> RunExit | None:
    """Serve one VMGEXIT; an exit for the VMM, or None to enter the guest again."""
    value = VMCB.unpack(vcpu.vm.cpu.read(vcpu.vmcb, PAGE_SIZE)).ghcb_gpa
    if value & spec.MSR_CODE_MASK:
        return _msr_protocol(vcpu, value)
    registered = vcpu.ghcb_registered
    check(value >> PAGE_SHIFT == registered, errno.EINVAL, "the GHCB is registered", registered, value >> PAGE_SHIFT)
    return _event(vcpu)


def _msr_protocol(vcpu: Vcpu, value: int) -> RunExit | None:
    """The MSR protocol: the answer goes back into the MSR. An unknown code is left as it is."""
    product = vcpu.vm.cpu.product
    match value & spec.MSR_CODE_MASK:
        case MsrCode.SEV_INFO_REQUEST:
            info = spec.SEV_INFO.pack(
                code=MsrCode.SEV_INFO,
                c_bit=product.c_bit,
                min_version=spec.PROTOCOL_MINIMUM,
                max_version=spec.PROTOCOL_VERSION,
            )
            answer_msr(vcpu, int.from_bytes(info, "little"))
        case MsrCode.FEATURES_REQUEST:
            answer_msr(vcpu, spec.FEATURE_SNP << spec.MSR_DATA_SHIFT | MsrCode.FEATURES)
        case MsrCode.REGISTER_GPA_REQUEST:
            vcpu.ghcb_registered = value >> spec.MSR_DATA_SHIFT
            answer_msr(vcpu, vcpu.ghcb_registered << spec.MSR_DATA_SHIFT | MsrCode.REGISTER_GPA)
        case MsrCode.PREFERRED_GPA_REQUEST:
            answer_msr(vcpu, spec.GFN_NONE << spec.MSR_DATA_SHIFT | MsrCode.PREFERRED_GPA)
        case MsrCode.PAGE_STATE_REQUEST:
            return RunExit(KvmExit.VMGEXIT, {"ghcb_msr": value})
        case MsrCode.TERMINATE:
            request = spec.TERMINATE.unpack(value.to_bytes(8, "little"))
            printk(vcpu.vm.cpu, f"SEV-ES guest requested termination: {request.reason_set:#x}:{request.reason:#x}")
            return RunExit(KvmExit.SYSTEM_EVENT, {"ghcb_msr": value})
    return None


def answer_msr(vcpu: Vcpu, value: int) -> None:
    """Put an answer of the MSR protocol where the guest finds it."""
    vcpu.vm.cpu.write(vcpu.vmcb + VMCB.offset("ghcb_gpa"), value.to_bytes(8, "little"))


def read_ghcb(vcpu: Vcpu) -> Record:
    """The registered GHCB page."""
    return GHCB.unpack(_memory(vcpu, vcpu.ghcb_registered << PAGE_SHIFT, PAGE_SIZE))


def _memory(vcpu: Vcpu, gpa: int, size: int) -> bytes:
    """Bytes of guest memory as the host sees them: of the slot's shared backing."""
    slot = vcpu.vm.slot_of(gpa >> PAGE_SHIFT)
    if slot is None:
        raise KernelError(errno.EFAULT, "a memslot holds the guest page", "a slot", gpa)
    return slot.shared.read(gpa - (slot.gfn << PAGE_SHIFT), size)


def _store(vcpu: Vcpu, gpa: int, data: bytes) -> None:
    slot = vcpu.vm.slot_of(gpa >> PAGE_SHIFT)
    if slot is None:
        raise KernelError(errno.EFAULT, "a memslot holds the guest page", "a slot", gpa)
    slot.shared.write(gpa - (slot.gfn << PAGE_SHIFT), data)


def complete(vcpu: Vcpu, info1: int = 0, info2: int = 0, **fields: Any) -> None:
    """Finish an event: results and the fields that are valid into the GHCB."""
    names = ("sw_exit_info_1", "sw_exit_info_2", "rax", "rbx", "rcx", "rdx")
    ghcb = read_ghcb(vcpu).replace(
        sw_exit_info_1=info1, sw_exit_info_2=info2, valid_bitmap=spec.valid_bitmap(*names), **fields
    )
    _store(vcpu, vcpu.ghcb_registered << PAGE_SHIFT, bytes(ghcb))


def _event(vcpu: Vcpu) -> RunExit | None:
    ghcb = read_ghcb(vcpu)
    error = _malformed(ghcb)
    if error is not None:
        complete(vcpu, spec.MALFORMED, error)
        return None
    return _EVENTS[Nae(ghcb.sw_exit_code)](vcpu, ghcb)


def _malformed(ghcb: Record) -> GhcbError | None:
    """The first thing that is wrong with a GHCB, or None. Of port accesses only plain bytes are modelled (MODEL)."""
    if ghcb.usage:
        return GhcbError.INVALID_USAGE
    if not all(spec.is_valid(ghcb.valid_bitmap, name) for name in _ALWAYS_VALID):
        return GhcbError.MISSING_INPUT
    if ghcb.sw_exit_code not in Nae._value2member_map_:
        return GhcbError.INVALID_EVENT
    if ghcb.sw_exit_code == Nae.IOIO:
        info = _ioio_info(ghcb)
        needed = "sw_scratch" if info.is_string else "" if info.is_in else "rax"
        if needed and not spec.is_valid(ghcb.valid_bitmap, needed):
            return GhcbError.MISSING_INPUT
        if info.is_string or not info.size_8:
            return GhcbError.INVALID_INPUT
    return None


def _ioio(vcpu: Vcpu, ghcb: Record) -> RunExit:
    info = _ioio_info(ghcb)
    return RunExit(KvmExit.IO, {"is_in": info.is_in, "port": info.port, "value": ghcb.rax & 0xFF})


def _ioio_info(ghcb: Record) -> Record:
    return spec.IOIO.unpack(ghcb.sw_exit_info_1.to_bytes(8, "little"))


def _page_state_change(vcpu: Vcpu, ghcb: Record) -> RunExit:
    return RunExit(KvmExit.VMGEXIT, {"ghcb_msr": vcpu.ghcb_registered << PAGE_SHIFT})


def _features(vcpu: Vcpu, ghcb: Record) -> None:
    complete(vcpu, info2=spec.FEATURE_SNP)


def _guest_request(vcpu: Vcpu, ghcb: Record) -> None:
    """An encrypted message to the firmware, copied through the host's own pages."""
    request, response = ghcb.sw_exit_info_1, ghcb.sw_exit_info_2
    good = request % PAGE_SIZE == 0 and response % PAGE_SIZE == 0 and request != response
    if not good:
        complete(vcpu, spec.MALFORMED, GhcbError.MISSING_INPUT)
        return
    assert vcpu.vm.gctx is not None
    try:
        answer = vcpu.vm.ccp.guest_request(vcpu.vm.gctx, _memory(vcpu, request, PAGE_SIZE))
    except KernelError as error:
        if error.firmware is None:
            raise
        complete(vcpu, info2=error.firmware)
        return
    _store(vcpu, response, answer)
    complete(vcpu, info2=Status.SUCCESS)


_EVENTS: dict[Nae, Callable[[Vcpu, Record], RunExit | None]] = {
    Nae.IOIO: _ioio,
    Nae.PAGE_STATE_CHANGE: _page_state_change,
    Nae.GUEST_REQUEST: _guest_request,
    Nae.FEATURES: _features,
}
