"""The launch of SEV and SEV-ES guests: LAUNCH_START to LAUNCH_FINISH, and what tells of it.

Memory is encrypted where it is, so it is pinned for that long. With SNP up the driver lends it to the firmware for each
command. The order of the checks, and those that spec tables do not name, are unconfirmed. Sources: Linux
arch/x86/kvm/svm/sev.c; RFC v7 patches 10 and 11 (private slots).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from snpbook.hardware.dram import Words
from snpbook.host.kvm import enc_regions, save_area
from snpbook.host.kvm.legacy_private import update_private
from snpbook.host.memory import runs
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Step, Steps
from snpbook.spec.commands import Command
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_psp import BLOB_LIMIT

if TYPE_CHECKING:
    from snpbook.host.kvm.sev_call import SevCall
    from snpbook.host.kvm.sev_guest import SevGuest
    from snpbook.host.kvm.vm import Vm


def sev_guest(vm: Vm, number: int = errno.ENOTTY) -> SevGuest:
    """The SEV side of a guest. ENOTTY for one without."""
    check(vm.sev is not None, number, "the VM is a SEV guest", "initialised", vm.type.name)
    assert vm.sev is not None
    return vm.sev


def start(vm: Vm, call: SevCall) -> None:
    """LAUNCH_START: a handle, and the ASID bound to it. EINVAL for bad blobs, EIO where the firmware refuses."""
    sev_guest(vm)
    wanted = call.payload()
    with (
        _optional(call, wanted.dh_uaddr, wanted.dh_len) as dh,
        _optional(call, wanted.session_uaddr, wanted.session_len) as session,
    ):
        blobs = {"dh_cert_paddr": dh, "session_paddr": session}
        lengths = {"dh_cert_len": wanted.dh_len if dh else 0, "session_len": wanted.session_len if session else 0}
        open_guest(vm, call, wanted, Command.LAUNCH_START, **blobs, **lengths)


@contextmanager
def _optional(call: SevCall, address: int, size: int) -> Iterator[int]:
    """A copy of the caller's blob, or address 0 where there is none."""
    if not address:
        yield 0
        return
    with call.copied(address, size) as paddr:
        yield paddr


def open_guest(vm: Vm, call: SevCall, wanted: Record, command: Command, **blobs: int) -> None:
    """LAUNCH_START or RECEIVE_START, then ACTIVATE; all of it undone where a later part fails."""
    guest = sev_guest(vm)
    answer = call.issue(call.fd, command, handle=wanted.handle, policy=wanted.policy, **blobs)
    try:
        with call.told():
            vm.kernel.ccp.command(Command.ACTIVATE, handle=answer.handle, asid=guest.asid)
    except KernelError:
        _decommission(vm, answer.handle)
        raise
    try:
        call.store(wanted.replace(handle=answer.handle))
    except KernelError:
        unbind(vm, answer.handle)
        raise
    guest.handle, guest.fd, guest.policy = answer.handle, call.fd, wanted.policy


def unbind(vm: Vm, handle: int) -> None:
    """DEACTIVATE and DECOMMISSION, where there is a handle; a refusal is ignored."""
    if not handle:
        return
    _ignored(vm, Command.DEACTIVATE, handle)
    _decommission(vm, handle)


def _decommission(vm: Vm, handle: int) -> None:
    _ignored(vm, Command.DECOMMISSION, handle)


def _ignored(vm: Vm, command: Command, handle: int) -> None:
    try:
        vm.kernel.ccp.command(command, handle=handle)
    except KernelError as error:
        vm.kernel.log(f"SEV: {command.name} of handle {handle} failed: {error}")


def update_data(vm: Vm, call: SevCall) -> Steps[None]:
    """LAUNCH_UPDATE_DATA: encrypt and measure user memory where it is. ENOMEM where it cannot be pinned.

    Runs of consecutive frames are one command each; those before one that fails stay encrypted.
    """
    guest = sev_guest(vm)
    wanted = call.payload()
    if vm.kernel.era.sev_private_memory and vm.has_private_memory:
        yield from update_private(vm, call, wanted)
        return
    with pinned(vm, wanted.uaddr, wanted.len) as frames:
        start, left = wanted.uaddr % PAGE_SIZE, wanted.len
        for _, pages in runs(frames):
            yield Step("launch update: pages")
            size = min((len(pages) << PAGE_SHIFT) - start, left)
            place = {"paddr": (pages.start << PAGE_SHIFT) + start, "len": size}
            call.issue(guest.fd, Command.LAUNCH_UPDATE_DATA, handle=guest.handle, **place)
            start, left = 0, left - size


@contextmanager
def pinned(vm: Vm, address: int, size: int, *, write: bool = True) -> Iterator[Words]:
    """User memory that stays where it is, out of the caches: its frames. EINVAL for no range, ENOMEM."""
    good = 0 < size <= (1 << 64) - address
    check(good, errno.EINVAL, "a range of user memory", "at least a byte", f"{address:#x}+{size:#x}")
    frames = enc_regions.pin(vm, address, size, write=write)
    region = enc_regions.EncRegion(address, size, frames)
    try:
        for _, pages in runs(frames):
            vm.kernel.cpu.clflush(pages.start << PAGE_SHIFT, len(pages) << PAGE_SHIFT)
        yield frames
    finally:
        enc_regions.unpin(vm, region)


def update_vmsa(vm: Vm, call: SevCall) -> Steps[None]:
    """LAUNCH_UPDATE_VMSA: every vCPU's registers are taken, in the order of their numbers. ENOTTY without SEV-ES."""
    check(vm.protected_state, errno.ENOTTY, "the guest has encrypted registers", "SEV-ES", vm.type.name)
    guest = sev_guest(vm)
    for _, vcpu in sorted(vm.vcpus.items()):
        yield Step(f"VMSA of vCPU {vcpu.number}")
        place = save_area.fill(vcpu).start << PAGE_SHIFT
        vm.kernel.cpu.clflush(place, PAGE_SIZE)
        call.issue(guest.fd, Command.LAUNCH_UPDATE_VMSA, handle=guest.handle, paddr=place, len=PAGE_SIZE)
        vcpu.encrypted = True


def measure(vm: Vm, call: SevCall) -> None:
    """LAUNCH_MEASURE. Of length 0 it asks for the length: EIO, with the length in the structure."""
    _answered_blob(vm, call, Command.LAUNCH_MEASURE)


def attestation_report(vm: Vm, call: SevCall) -> None:
    """GET_ATTESTATION_REPORT, with the caller's nonce; lengths as in `measure`."""
    _answered_blob(vm, call, Command.ATTESTATION)


def _answered_blob(vm: Vm, call: SevCall, command: Command) -> None:
    """A command that answers with a blob: into the caller's memory, its length into the structure."""
    guest, wanted = sev_guest(vm), call.payload()
    fields: dict[str, Any] = {"handle": guest.handle}
    if command is Command.ATTESTATION:
        fields["mnonce"] = wanted.mnonce
    if not (wanted.len and wanted.uaddr):
        answer, failure = call.attempt(guest.fd, command, **fields)
    else:
        check(wanted.len <= BLOB_LIMIT, errno.EINVAL, "the length of a blob", BLOB_LIMIT, wanted.len)
        with call.room(wanted.len) as paddr:
            answer, failure = call.attempt(guest.fd, command, **fields, paddr=paddr, len=wanted.len)
            if failure is None:
                call.process.space.copy_out(wanted.uaddr, vm.kernel.cpu.read(paddr, wanted.len))
    if failure is None or not wanted.len:
        call.store(wanted.replace(len=answer.len))
    if failure is not None:
        raise failure


def secret(vm: Vm, call: SevCall) -> None:
    """LAUNCH_SECRET: a packet of the owner's into the guest's memory. EINVAL where that is not in one piece."""
    guest, wanted = sev_guest(vm), call.payload()
    with pinned(vm, wanted.guest_uaddr, wanted.guest_len) as frames:
        pieces = [pages for _, pages in runs(frames)]
        check(len(pieces) == 1, errno.EINVAL, "the guest's memory is in one piece", "consecutive frames", len(pieces))
        target = (pieces[0].start << PAGE_SHIFT) + wanted.guest_uaddr % PAGE_SIZE
        with (
            call.copied(wanted.trans_uaddr, wanted.trans_len) as packet,
            call.copied(wanted.hdr_uaddr, wanted.hdr_len) as header,
        ):
            fields = {"guest_paddr": target, "guest_len": wanted.guest_len, "hdr_paddr": header, "trans_paddr": packet}
            sizes = {"hdr_len": wanted.hdr_len, "trans_len": wanted.trans_len}
            call.issue(guest.fd, Command.LAUNCH_SECRET, handle=guest.handle, **fields, **sizes)


def finish(vm: Vm, call: SevCall) -> None:
    """LAUNCH_FINISH."""
    guest = sev_guest(vm)
    call.issue(guest.fd, Command.LAUNCH_FINISH, handle=guest.handle)
    guest.launched = True


def status(vm: Vm, call: SevCall) -> None:
    """GUEST_STATUS: handle, policy and state, as the firmware has them."""
    guest = sev_guest(vm)
    answer = call.issue(guest.fd, Command.GUEST_STATUS, handle=guest.handle)
    layout = vm.kernel.era.payloads[call.op]
    call.store(layout.record(handle=guest.handle, policy=answer.policy, state=answer.state))
