"""A running SEV guest goes to another platform: SEND_START to SEND_FINISH, and RECEIVE_START to RECEIVE_FINISH.

Pages go as packets, one page at most; a length of 0 asks for the lengths that are needed. The checks are Linux's from
memory, and unconfirmed. Source: Linux arch/x86/kvm/svm/sev.c (sev_send_start to sev_receive_finish).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from snpbook.host.kvm.legacy_launch import open_guest, pinned, sev_guest
from snpbook.host.refusal import check
from snpbook.spec.commands import Command
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_psp import BLOB_LIMIT

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.vm import Vm


def send_start(vm: Vm, call: SevCall) -> None:
    """SEND_START: the certificates of the receiver in, the session and the policy out.

    With session_len 0 the length comes back in it, and the call is EIO.
    """
    guest, wanted = sev_guest(vm), call.payload()
    if not wanted.session_len:
        answer, failure = call.attempt(guest.fd, Command.SEND_START, handle=guest.handle)
        call.store(wanted.replace(session_len=answer.session_len))
        if failure is not None:
            raise failure
        return
    good = wanted.pdh_cert_uaddr and wanted.pdh_cert_len and wanted.session_uaddr and wanted.session_len <= BLOB_LIMIT
    check(
        bool(good), errno.EINVAL, "a certificate, and room for the session", f"up to {BLOB_LIMIT} bytes", repr(wanted)
    )
    with (
        call.room(wanted.session_len) as session,
        call.copied(wanted.pdh_cert_uaddr, wanted.pdh_cert_len) as pdh,
        call.copied(wanted.plat_certs_uaddr, wanted.plat_certs_len) as platform,
        call.copied(wanted.amd_certs_uaddr, wanted.amd_certs_len) as amd,
    ):
        places = {"session_paddr": session, "pdh_cert_paddr": pdh, "plat_certs_paddr": platform, "amd_certs_paddr": amd}
        names = ("session_len", "pdh_cert_len", "plat_certs_len", "amd_certs_len")
        sizes = {name: getattr(wanted, name) for name in names}
        answer, failure = call.attempt(guest.fd, Command.SEND_START, handle=guest.handle, **places, **sizes)
        if failure is None:
            call.process.space.copy_out(wanted.session_uaddr, vm.kernel.cpu.read(session, wanted.session_len))
    call.store(wanted.replace(policy=answer.policy, session_len=answer.session_len))
    if failure is not None:
        raise failure


def send_update_data(vm: Vm, call: SevCall) -> None:
    """SEND_UPDATE_DATA: at most a page of the guest as a packet, with its header. Lengths of 0 ask for them (EIO)."""
    guest, wanted = sev_guest(vm), call.payload()
    if not (wanted.trans_len and wanted.hdr_len):
        answer, failure = call.attempt(guest.fd, Command.SEND_UPDATE_DATA, handle=guest.handle)
        call.store(wanted.replace(hdr_len=answer.hdr_len, trans_len=answer.trans_len))
        if failure is not None:
            raise failure
        return
    _check_packet(wanted)
    with (
        pinned(vm, wanted.guest_uaddr, wanted.guest_len, write=False) as frames,
        call.room(wanted.hdr_len) as header,
        call.room(wanted.trans_len) as packet,
    ):
        places = {"hdr_paddr": header, "trans_paddr": packet, "guest_paddr": _place(int(frames[0]), wanted)}
        call.issue(guest.fd, Command.SEND_UPDATE_DATA, handle=guest.handle, **places, **_sizes(wanted))
        call.process.space.copy_out(wanted.trans_uaddr, vm.kernel.cpu.read(packet, wanted.trans_len))
        call.process.space.copy_out(wanted.hdr_uaddr, vm.kernel.cpu.read(header, wanted.hdr_len))


def send_finish(vm: Vm, call: SevCall) -> None:
    """SEND_FINISH: the guest does not run here any more."""
    _simple(vm, call, Command.SEND_FINISH)


def send_cancel(vm: Vm, call: SevCall) -> None:
    """SEND_CANCEL: it stays."""
    _simple(vm, call, Command.SEND_CANCEL)


def receive_start(vm: Vm, call: SevCall) -> None:
    """RECEIVE_START: the sender's certificate and session; a handle, bound to the ASID."""
    sev_guest(vm)
    wanted = call.payload()
    good = wanted.pdh_uaddr and wanted.pdh_len and wanted.session_uaddr and wanted.session_len
    check(bool(good), errno.EINVAL, "a certificate and a session", "both", repr(wanted))
    with (
        call.copied(wanted.pdh_uaddr, wanted.pdh_len) as pdh,
        call.copied(wanted.session_uaddr, wanted.session_len) as session,
    ):
        blobs = {"pdh_cert_paddr": pdh, "session_paddr": session}
        sizes = {"pdh_cert_len": wanted.pdh_len, "session_len": wanted.session_len}
        open_guest(vm, call, wanted, Command.RECEIVE_START, **blobs, **sizes)


def receive_update_data(vm: Vm, call: SevCall) -> None:
    """RECEIVE_UPDATE_DATA: a packet into the guest's memory. EINVAL also for a VM without SEV."""
    guest, wanted = sev_guest(vm, errno.EINVAL), call.payload()
    check(bool(wanted.hdr_len and wanted.trans_len), errno.EINVAL, "a header and a packet", "both", repr(wanted))
    _check_packet(wanted)
    with (
        call.copied(wanted.hdr_uaddr, wanted.hdr_len) as header,
        call.copied(wanted.trans_uaddr, wanted.trans_len) as packet,
        pinned(vm, wanted.guest_uaddr, wanted.guest_len) as frames,
    ):
        places = {"hdr_paddr": header, "trans_paddr": packet, "guest_paddr": _place(int(frames[0]), wanted)}
        call.issue(guest.fd, Command.RECEIVE_UPDATE_DATA, handle=guest.handle, **places, **_sizes(wanted))


def receive_finish(vm: Vm, call: SevCall) -> None:
    """RECEIVE_FINISH: the guest may run."""
    _simple(vm, call, Command.RECEIVE_FINISH)
    sev_guest(vm).launched = True


def _simple(vm: Vm, call: SevCall, command: Command) -> None:
    guest = sev_guest(vm)
    call.issue(guest.fd, command, handle=guest.handle)


def _check_packet(wanted: Record) -> None:
    """Addresses for all parts, and guest memory inside one page."""
    there = wanted.trans_uaddr and wanted.guest_uaddr and wanted.guest_len and wanted.hdr_uaddr
    check(bool(there), errno.EINVAL, "header, packet and guest memory", "an address each", repr(wanted))
    end = wanted.guest_uaddr % PAGE_SIZE + wanted.guest_len
    check(end <= PAGE_SIZE, errno.EINVAL, "guest memory of a packet", "inside one page", hex(end))


def _sizes(wanted: Record) -> dict[str, int]:
    return {name: getattr(wanted, name) for name in ("hdr_len", "trans_len", "guest_len")}


def _place(frame: int, wanted: Record) -> int:
    return (frame << PAGE_SHIFT) + int(wanted.guest_uaddr) % PAGE_SIZE
