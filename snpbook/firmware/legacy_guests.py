"""Commands on legacy guests that live: their ASIDs, their end, their status, and the host's hand in their memory.

Memory is whatever the host names: without an RMP nothing tells whose a page is. Source: SEV API (ACTIVATE to
DECOMMISSION, COPY, DBG_DECRYPT, DBG_ENCRYPT); order of checks of firmware 1.55.25.
"""

from __future__ import annotations

from dataclasses import replace

from snpbook.firmware.buffers import read_input
from snpbook.firmware.guests import check_apic_ids
from snpbook.firmware.keys import memory_key
from snpbook.firmware.legacy_buffers import check_output
from snpbook.firmware.legacy_state import LegacyGuest
from snpbook.firmware.pages import check_address
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.asids import GuestKind
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import RUN_BOUNDARY
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.legacy_buffers import ACTIVATE_EX
from snpbook.spec.legacy_launch import PACKET_ALIGNMENT
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.states import AFTER_LAST_GUEST, LegacyGuestState
from snpbook.spec.status import FirmwareRefusal, Status, require

_LAUNCHING = (LegacyGuestState.LUPDATE, LegacyGuestState.LSECRET, LegacyGuestState.RUPDATE)


def decommission(psp: SecureProcessor, buffer: Record) -> None:
    """Forget a guest that is not active; with the last one the platform stops working."""
    # CHECKS
    psp.legacy.after(Command.DECOMMISSION)
    guest = psp.legacy.guest(buffer.handle)
    require(guest.asid == 0, Status.ACTIVE, "the guest has no ASID", 0, guest.asid, "SEV")

    # ACTION
    del psp.legacy.guests[buffer.handle]

    # STATE
    if not psp.legacy.guests:
        psp.legacy.state = AFTER_LAST_GUEST


def activate(psp: SecureProcessor, buffer: Record) -> None:
    """Bind a guest to an ASID on every core complex and install its memory key there."""
    # CHECKS
    psp.legacy.after(Command.ACTIVATE)
    guest = psp.legacy.guest(buffer.handle)
    _check_asid(psp, guest, buffer.asid, Command.ACTIVATE)

    # ACTION
    _activate(psp, buffer.handle, guest, buffer.asid, None)


def activate_ex(psp: SecureProcessor, buffer: Record) -> None:
    """Bind a guest to an ASID on the core complexes of some cores; later calls with the same ASID add further ones."""
    # CHECKS
    psp.legacy.after(Command.ACTIVATE_EX)
    size = ACTIVATE_EX.size
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length, "SEV")
    guest = psp.legacy.guest(buffer.handle)
    complexes = check_apic_ids(psp, buffer.asid, buffer.numids, buffer.ids_paddr)
    _check_asid(psp, guest, buffer.asid, Command.ACTIVATE_EX)

    # ACTION
    _activate(psp, buffer.handle, guest, buffer.asid, complexes)


def _check_asid(psp: SecureProcessor, guest: LegacyGuest, asid: int, command: Command) -> None:
    gone: FirmwareRefusal | None = None
    try:
        guest.after(command)
    except FirmwareRefusal as refusal:
        gone = refusal
    kind = GuestKind.SEV_ES if guest.policy.es else GuestKind.SEV
    psp.asids.check_activate(asid, guest.asid, again=command is Command.ACTIVATE_EX, kind=kind, gone=gone)


def _activate(psp: SecureProcessor, handle: int, guest: LegacyGuest, asid: int, complexes: set[int] | None) -> None:
    running = guest.state not in _LAUNCHING
    psp.machine.encryption.install(asid, memory_key(guest.vek_seed, psp.machine.product.memory_key_size))
    psp.asids.activate(asid, running=running, complexes=complexes)
    psp.legacy.guests[handle] = replace(guest, asid=asid)


def deactivate(psp: SecureProcessor, buffer: Record) -> None:
    """Take a guest's ASID away; its key stays in the slot until the next guest's."""
    # CHECKS
    psp.legacy.after(Command.DEACTIVATE)
    guest = psp.legacy.guest(buffer.handle)
    guest.require_asid()

    # ACTION
    psp.asids.release(guest.asid)
    psp.legacy.guests[buffer.handle] = replace(guest, asid=0)


def guest_status(psp: SecureProcessor, buffer: Record) -> Record:
    """Tell the host what a guest is; of a handle that is nobody's, that its state is UNINIT."""
    # CHECKS
    psp.legacy.after(Command.GUEST_STATUS)

    # ANSWER
    guest = psp.legacy.guests.get(buffer.handle)
    if guest is None:
        return buffer.replace(policy=0, asid=0, state=LegacyGuestState.UNINIT)
    return buffer.replace(policy=guest.policy_word, asid=guest.asid, state=guest.state)


def copy(psp: SecureProcessor, buffer: Record) -> None:
    """Move whole pages of a guest to another place, where their encryption is another one.

    Firmware 1.55.25 copies nothing where the first pages overlap, which aligned pages do only as the same ones.
    """
    # CHECKS
    psp.legacy.after(Command.COPY)
    guest = psp.legacy.guest(buffer.handle)
    guest.require_asid()
    size = buffer.len
    require(size > 0 and size % PAGE_SIZE == 0, Status.INVALID_LENGTH, "length", "whole pages", size, "SEV")
    addresses = buffer.src_paddr, buffer.dst_paddr
    aligned = not any(address % PAGE_SIZE for address in addresses)
    require(aligned, Status.INVALID_ADDRESS, "the pages are aligned", PAGE_SIZE, addresses, "SEV")
    src = check_address(psp, buffer.src_paddr, size, "src_paddr", lookup=False)
    dst = check_address(psp, buffer.dst_paddr, size, "dst_paddr", lookup=psp.initialised)
    crossing = [at for at in (src, dst) if at // RUN_BOUNDARY != (at + size - 1) // RUN_BOUNDARY]
    require(not crossing, Status.INVALID_PARAM, "a range stays between multiples of 64 MB", RUN_BOUNDARY, crossing,
            "SEV")  # fmt: skip
    check_output(psp, dst, size, "dst_paddr")

    # ACTION
    memory = psp.machine.memory
    memory.write(guest.asid, dst, memory.read(guest.asid, src, size))


def dbg_decrypt(psp: SecureProcessor, buffer: Record) -> None:
    """Show the host a guest's memory, if the guest's policy allows debugging."""
    # CHECKS
    guest = _check_debug(psp, buffer, Command.DBG_DECRYPT)
    src = check_address(psp, buffer.src_paddr, max(buffer.len, 1), "src_paddr", lookup=False)
    dst = check_output(psp, buffer.dst_paddr, max(buffer.len, 1), "dst_paddr")
    guest.require_asid()

    # ACTION
    plain = psp.machine.memory.read(guest.asid, src, buffer.len)
    psp.machine.memory.write(KeyId.UNENCRYPTED, dst, plain)


def dbg_encrypt(psp: SecureProcessor, buffer: Record) -> None:
    """Let the host write a guest's memory, if the guest's policy allows debugging."""
    # CHECKS
    guest = _check_debug(psp, buffer, Command.DBG_ENCRYPT)
    plain = read_input(psp, buffer.src_paddr, max(buffer.len, 1), "src_paddr")
    dst = check_output(psp, buffer.dst_paddr, max(buffer.len, 1), "dst_paddr")
    guest.require_asid()

    # ACTION
    psp.machine.memory.write(guest.asid, dst, plain[: buffer.len])


def _check_debug(psp: SecureProcessor, buffer: Record, command: Command) -> LegacyGuest:
    """The checks that both share; that the platform's state comes first, and no length is none too, is unconfirmed."""
    psp.legacy.after(command)
    addresses = buffer.src_paddr, buffer.dst_paddr
    aligned = not any(address % PACKET_ALIGNMENT for address in addresses)
    require(aligned, Status.INVALID_ADDRESS, "addresses are aligned", PACKET_ALIGNMENT, addresses, "SEV")
    whole = buffer.len % PACKET_ALIGNMENT == 0
    require(whole, Status.INVALID_LENGTH, "length is that of blocks", PACKET_ALIGNMENT, buffer.len, "SEV")
    guest = psp.legacy.guest(buffer.handle)
    require(not guest.policy.nodbg, Status.POLICY_FAILURE, "the policy allows debugging", "NODBG=0", 1, "SEV")
    return guest
