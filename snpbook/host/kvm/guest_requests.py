"""Guest requests: an encrypted message from the guest to the firmware and back, and certificates beside it.

KVM carries messages that it cannot read, one at a time for each VM, through pages of its own; in the v7 era the guest's
response page is the firmware's meanwhile. Sources: GHCB specification; Linux arch/x86/kvm/svm/sev.c
(snp_handle_guest_req, snp_handle_ext_guest_req); RFC v7 patches 32, 52, 62.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.kvm.exchange import Exchange
from snpbook.host.refusal import KernelError
from snpbook.host.steps import Mutex, Steps
from snpbook.spec.commands import Command
from snpbook.spec.eras import Certificates
from snpbook.spec.ghcb import EMPTY_CERTIFICATES, GhcbError, Nae, VmmError
from snpbook.spec.messages import MESSAGE_HEADER, MessageType
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.status import Status
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.uapi_kvm_structs import EXIT_SNP_REQ_CERTS
from snpbook.spec.uapi_sev import CERTS_LIMIT_V7

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu
    from snpbook.host.kvm.vm import Vm

EVENTS = (Nae.GUEST_REQUEST, Nae.EXTENDED_GUEST_REQUEST)
_TYPE = MESSAGE_HEADER.offset("msg_type")
_BURST = 2


def handle(exchange: Exchange) -> Steps[bool]:
    """Serve a guest request: whether the VMM is needed, which is asked for certificates alone.

    The firmware's status goes to the guest in SW_EXITINFO2. Without one KVM_RUN fails: ETIMEDOUT and EBUSY where the
    secure processor is dead, EIO where a page of the guest is not there.
    """
    vm = exchange.vcpu.vm
    with (yield from _lock(vm).hold()):
        if vm.kernel.era.requests_throttled and _too_many(vm):
            _answer(exchange, vmm=VmmError.BUSY)
            return False
        if not vm.kernel.era.requests_bounced:
            exchange.answer(info_2=_in_place(exchange))
            return False
        wanted = exchange.event == Nae.EXTENDED_GUEST_REQUEST and _wants_certificates(exchange)
        if wanted and not _table(exchange):
            return exchange.vcpu.completion is not None
        _answer(exchange, _bounced(exchange))
    return False


def _too_many(vm: Vm) -> bool:
    """Whether a request comes too fast.

    Without time of day: after two of them the guest is told to wait, and has waited when it asks again (MODEL).
    """
    assert vm.sev is not None
    vm.sev.requests = (vm.sev.requests + 1) % (_BURST + 1)
    return vm.sev.requests == 0


def _answer(exchange: Exchange, status: int = 0, *, vmm: int = 0) -> None:
    exchange.answer(info_2=vmm << 32 | status)


# Since Linux 6.11: bounced, and certificates beside the report.


def _bounced(exchange: Exchange) -> Status:
    """The message through KVM's own pages; after a refusal the guest gets what was left in the response page."""
    vm = exchange.vcpu.vm
    assert vm.sev is not None
    request, response = vm.sev.bounce
    message = _copy_in(vm, exchange.info_1, PAGE_SIZE)
    vm.kernel.cpu.write(request << PAGE_SHIFT, message)
    status = Status.SUCCESS
    try:
        _issue(vm, request, response)
    except KernelError as error:
        if error.firmware is None:
            raise
        status = error.firmware
    _copy_out(vm, exchange.info_2, vm.kernel.cpu.read(response << PAGE_SHIFT, PAGE_SIZE))
    return status


def _wants_certificates(exchange: Exchange) -> bool:
    """Whether there are certificates with the message: with any, or when it asks for a report alone."""
    if exchange.vcpu.vm.kernel.era.certificates_always:
        return True
    return _copy_in(exchange.vcpu.vm, exchange.info_1 + _TYPE, 1)[0] == MessageType.REPORT_REQ


def _table(exchange: Exchange) -> bool:
    """The certificates for the guest's pages at RAX, RBX of them; False where the request does not go on now."""
    vcpu, vm = exchange.vcpu, exchange.vcpu.vm
    gpa, pages = vcpu.state.rax, vcpu.state.rbx
    if not exchange.has("rax", "rbx") or gpa % PAGE_SIZE:
        exchange.refuse(GhcbError.INVALID_INPUT)
        return False
    assert vm.sev is not None
    if vm.kernel.era.certificates is Certificates.USERSPACE and vm.sev.asks_certificates:
        vcpu.leave(Exit.SNP_REQ_CERTS, EXIT_SNP_REQ_CERTS, gpa=gpa, npages=pages)
        vcpu.completion = _fetched
        return False
    if pages:
        _copy_out(vm, gpa, EMPTY_CERTIFICATES)
    return True


def _fetched(vcpu: Vcpu) -> Steps[bool]:
    """The VMM has written the certificates, or says why not. EINVAL for a reason that is none."""
    answer, exchange = vcpu.answer(EXIT_SNP_REQ_CERTS), vcpu.exchange
    assert exchange is not None
    match answer.ret:
        case 0:
            with (yield from _lock(vcpu.vm).hold()):
                _answer(exchange, _bounced(exchange))
        case errno.ENOSPC:
            vcpu.state = vcpu.state.replace(rbx=answer.npages)
            _answer(exchange, vmm=VmmError.INVALID_LEN)
        case errno.EAGAIN:
            _answer(exchange, vmm=VmmError.BUSY)
        case errno.EIO:
            _answer(exchange, vmm=VmmError.GENERIC)
        case _:
            raise KernelError(errno.EINVAL, "why there are no certificates", "0, ENOSPC, EAGAIN, EIO", answer.ret)
    return False


# The v7 series: in the guest's own pages.


def _in_place(exchange: Exchange) -> int:
    """The message from and into the guest's pages: SW_EXITINFO2. Every failure is told to the guest as a status.

    A command without a status, because the secure processor is dead, is told as success.
    """
    vcpu, vm = exchange.vcpu, exchange.vcpu.vm
    if not vm.snp:
        return Status.INVALID_GUEST
    extended = exchange.event == Nae.EXTENDED_GUEST_REQUEST
    gpa, pages = vcpu.state.rax, vcpu.state.rbx
    if extended and gpa % PAGE_SIZE:
        return Status.INVALID_ADDRESS
    if extended and pages << PAGE_SHIFT > CERTS_LIMIT_V7:
        return Status.INVALID_PARAM
    if exchange.info_1 % PAGE_SIZE or exchange.info_2 % PAGE_SIZE:
        return Status.INVALID_PARAM
    certificates = _certificates(vm) if extended else b""
    try:
        request, response = _frame(vm, exchange.info_1), _frame(vm, exchange.info_2)
        if pages << PAGE_SHIFT < len(certificates):
            vcpu.state = vcpu.state.replace(rbx=len(certificates) >> PAGE_SHIFT)
            return VmmError.INVALID_LEN << 32
        status = _lent(vm, request, response)
        if status is Status.SUCCESS:
            vm.write(gpa, certificates)
    except KernelError:
        return Status.INVALID_ADDRESS
    return status


def _lent(vm: Vm, request: int, response: int) -> Status:
    """The command while the response page is the firmware's. KernelError where the page does not go or come back."""
    ccp, page, status = vm.kernel.ccp, range(response, response + 1), Status.SUCCESS
    ccp.convert(page)
    try:
        _issue(vm, request, response)
    except KernelError as error:
        status = error.firmware or Status.SUCCESS
    ccp.reclaim(page)
    return status


def _certificates(vm: Vm) -> bytes:
    """The VM's own blob, else the host's."""
    assert vm.sev is not None
    return vm.sev.certificates or vm.kernel.ccp.certificates


def _frame(vm: Vm, gpa: int) -> int:
    """The frame behind a page that the guest shares."""
    gfn = gpa >> PAGE_SHIFT
    slot = vm.slots.of(gfn)
    if slot is None:
        raise KernelError(errno.EFAULT, "a memslot holds the guest page", "a slot", hex(gpa))
    return int(slot.shared_frames(vm.process.space, range(gfn, gfn + 1))[0])


# Both.


def _lock(vm: Vm) -> Mutex:
    assert vm.sev is not None
    return vm.sev.request_lock


def _issue(vm: Vm, request: int, response: int) -> None:
    """SNP_GUEST_REQUEST from one page into another, which is the firmware's."""
    assert vm.sev is not None
    assert vm.sev.gctx is not None
    vm.kernel.ccp.command(
        Command.SNP_GUEST_REQUEST,
        gctx_paddr=vm.sev.gctx,
        request_paddr=request << PAGE_SHIFT,
        response_paddr=response << PAGE_SHIFT,
    )


def _copy_in(vm: Vm, gpa: int, size: int) -> bytes:
    """Guest memory; EIO where it is not there."""
    try:
        return vm.read(gpa, size)
    except KernelError as error:
        raise KernelError(errno.EIO, error.rule, error.expected, error.found, error.cite) from error


def _copy_out(vm: Vm, gpa: int, data: bytes) -> None:
    try:
        vm.write(gpa, data)
    except KernelError as error:
        raise KernelError(errno.EIO, error.rule, error.expected, error.found, error.cite) from error
