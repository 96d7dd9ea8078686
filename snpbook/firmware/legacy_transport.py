"""Sending a legacy guest to another platform and receiving one: SEND_START to RECEIVE_FINISH.

The sender trusts the receiver's PDH as far as the guest's policy says: anybody's, one that AMD vouches for, one of the
same owner. Sources: SEV API (SEND_START to RECEIVE_FINISH); order of checks of firmware 1.55.25.
"""

from __future__ import annotations

from dataclasses import replace

from snpbook.firmware.buffers import read_input
from snpbook.firmware.legacy_buffers import ShortBuffer, check_output
from snpbook.firmware.legacy_certificates import check_amd_chain, check_signed, checked, public_key
from snpbook.firmware.legacy_channel import (
    IV_SIZE,
    agree,
    check_not_compressed,
    check_packet,
    open_packet,
    seal_packet,
    wrapped,
)
from snpbook.firmware.legacy_keys import CHAIN_SIZE, identity_of, key_of
from snpbook.firmware.legacy_launch import (
    add_guest,
    check_alignment,
    check_new_guest,
    check_packet_lengths,
    finish,
    open_channel,
    require_es,
)
from snpbook.firmware.legacy_state import LegacyGuest, TransportKeys
from snpbook.firmware.pages import check_address
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.save_area import is_sealed, seal
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.key_derivation import SESSION_KEY_SIZE
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import PACKET_ALIGNMENT, PACKET_HEADER, PACKET_LIMIT, SESSION, MacContext
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.sev_certificates import SEV_CERTIFICATE, CertUsage
from snpbook.spec.status import Status, require

_VMSA_COMMANDS = (Command.SEND_UPDATE_VMSA, Command.RECEIVE_UPDATE_VMSA)


# Sending.


def send_start(psp: SecureProcessor, buffer: Record) -> Record:
    """Open a channel to the platform whose PDH the host brings, if the guest's policy lets it go there.

    What of the certificates no policy asks for is not looked at.
    """
    # CHECKS
    psp.legacy.after(Command.SEND_START)
    guest = psp.legacy.guest(buffer.handle)
    answer = buffer.replace(policy=guest.policy_word, session_len=SESSION.size)
    if buffer.session_len != SESSION.size:
        needed = buffer.replace(session_len=SESSION.size)
        raise ShortBuffer(needed, "length of the session", SESSION.size, buffer.session_len)
    state = guest.after(Command.SEND_START)
    require(not guest.policy.nosend, Status.POLICY_FAILURE, "the policy lets the guest go", "NOSEND=0", 1, "SEV")
    if guest.policy.sev:
        _check_sev_platform(psp, guest, buffer)
    session_spa = check_output(psp, buffer.session_paddr, SESSION.size, "session_paddr")
    if guest.policy.domain:
        _check_same_owner(psp, buffer)
    pdh = checked(_pdh(psp, buffer), CertUsage.PDH)

    # ACTION
    nonce, iv = psp.rng(IV_SIZE), psp.rng(IV_SIZE)
    keys = TransportKeys(psp.rng(SESSION_KEY_SIZE), psp.rng(SESSION_KEY_SIZE))
    kek, kik = agree(key_of(identity_of(psp), "pdh"), public_key(pdh), nonce)

    # ANSWER
    session = wrapped(keys, kek, kik, nonce, iv, guest.policy_word)
    psp.machine.memory.write(KeyId.UNENCRYPTED, session_spa, bytes(session))

    # STATE
    psp.legacy.guests[buffer.handle] = replace(guest, state=state, transport=keys)
    return answer


def _pdh(psp: SecureProcessor, buffer: Record) -> bytes:
    return read_input(psp, buffer.pdh_cert_paddr, SEV_CERTIFICATE.size, "pdh_cert_paddr")


def _platform_chain(psp: SecureProcessor, buffer: Record) -> tuple[Record, bytes, bytes]:
    """The receiver's PEK, and its OCA and CEK as they came."""
    data, size = read_input(psp, buffer.plat_certs_paddr, CHAIN_SIZE, "plat_certs_paddr"), SEV_CERTIFICATE.size
    return checked(data[:size], CertUsage.PEK), data[size : 2 * size], data[2 * size :]


def _check_sev_platform(psp: SecureProcessor, guest: LegacyGuest, buffer: Record) -> None:
    """The receiver is a part of AMD's, with firmware that the policy takes."""
    wanted, found = (SEV_CERTIFICATE.size, CHAIN_SIZE), (buffer.pdh_cert_len, buffer.plat_certs_len)
    require(found == wanted, Status.INVALID_LENGTH, "lengths of PDH and chain", wanted, found, "SEV")
    amd = read_input(psp, buffer.amd_certs_paddr, buffer.amd_certs_len, "amd_certs_paddr")
    ask = check_amd_chain(amd, psp.chip.sev_root)
    pek, _, cek_data = _platform_chain(psp, buffer)
    pdh, cek = checked(_pdh(psp, buffer), CertUsage.PDH), checked(cek_data, CertUsage.CEK)
    check_signed(cek, ask)
    check_signed(pek, cek)
    check_signed(pdh, pek)
    minimum, version = (guest.policy.api_major, guest.policy.api_minor), (pek.api_major, pek.api_minor)
    require(version >= minimum, Status.POLICY_FAILURE, "the receiver's API is new enough", minimum, version, "SEV")


def _check_same_owner(psp: SecureProcessor, buffer: Record) -> None:
    """The receiver belongs to this platform's owner."""
    pek, oca_data, _ = _platform_chain(psp, buffer)
    oca, pdh = checked(oca_data, CertUsage.OCA), checked(_pdh(psp, buffer), CertUsage.PDH)
    check_signed(oca, oca)
    check_signed(pek, oca)
    check_signed(pdh, pek)
    own = SEV_CERTIFICATE.unpack(identity_of(psp).oca)
    require(oca.pubkey == own.pubkey, Status.POLICY_FAILURE, "the receiver's owner", "this platform's", "another",
            "SEV")  # fmt: skip


def send_update_data(psp: SecureProcessor, buffer: Record) -> Record:
    """One packet of the guest's memory."""
    return _send_update(psp, buffer, Command.SEND_UPDATE_DATA)


def send_update_vmsa(psp: SecureProcessor, buffer: Record) -> Record:
    """One packet with a vCPU's registers, if their checksum holds. It looks like one of data (quirk)."""
    return _send_update(psp, buffer, Command.SEND_UPDATE_VMSA)


def _send_update(psp: SecureProcessor, buffer: Record, command: Command) -> Record:
    # CHECKS
    psp.legacy.after(command)
    if buffer.hdr_len < PACKET_HEADER.size:
        needed = buffer.replace(hdr_len=PACKET_HEADER.size)
        raise ShortBuffer(needed, "the header fits", PACKET_HEADER.size, buffer.hdr_len)
    guest = psp.legacy.guest(buffer.handle)
    guest.after(command)
    if command in _VMSA_COMMANDS:
        require_es(guest)
    guest.require_asid()
    size = buffer.guest_len
    whole = 0 < size <= PACKET_LIMIT and size % PACKET_ALIGNMENT == 0
    require(whole, Status.INVALID_LENGTH, "length of the guest's memory", PACKET_LIMIT, size, "SEV")
    answer = buffer.replace(hdr_len=PACKET_HEADER.size, trans_len=size)
    if buffer.trans_len < size:
        raise ShortBuffer(answer, "the packet fits", size, buffer.trans_len)
    check_alignment(buffer.guest_paddr, "guest_paddr")
    source = check_address(psp, buffer.guest_paddr, size, "guest_paddr", lookup=False)
    header_spa = check_output(psp, buffer.hdr_paddr, PACKET_HEADER.size, "hdr_paddr")
    trans_spa = check_output(psp, buffer.trans_paddr, size, "trans_paddr")
    if command in _VMSA_COMMANDS:
        sealed = is_sealed(psp.machine, guest.asid, source >> PAGE_SHIFT)
        require(sealed, Status.INVALID_PARAM, "the VMSA has its checksum", "valid", "invalid", "SEV")

    # ANSWER
    plain = psp.machine.memory.read(guest.asid, source, size)
    header, body = seal_packet(guest.transport, psp.rng(IV_SIZE), plain)
    psp.machine.memory.write(KeyId.UNENCRYPTED, header_spa, header)
    psp.machine.memory.write(KeyId.UNENCRYPTED, trans_spa, body)
    return answer


def send_finish(psp: SecureProcessor, buffer: Record) -> None:
    """The guest is gone: it can be activated no more."""
    _leave_sending(psp, buffer, Command.SEND_FINISH)


def send_cancel(psp: SecureProcessor, buffer: Record) -> None:
    """The guest stays; what the receiver has of it, it keeps."""
    _leave_sending(psp, buffer, Command.SEND_CANCEL)


def _leave_sending(psp: SecureProcessor, buffer: Record, command: Command) -> None:
    # CHECKS
    psp.legacy.after(command)
    guest = psp.legacy.guest(buffer.handle)
    state = guest.after(command)

    # STATE
    psp.legacy.guests[buffer.handle] = replace(guest, state=state, transport=TransportKeys())


# Receiving.


def receive_start(psp: SecureProcessor, buffer: Record) -> Record:
    """Open the sender's session for a guest that is to come; answers a handle."""
    # CHECKS
    platform = psp.legacy.after(Command.RECEIVE_START)
    there = bool(buffer.pdh_cert_paddr and buffer.session_paddr)
    require(there, Status.INVALID_LENGTH, "PDH and session are there", "addresses", 0, "SEV")
    keys = open_channel(psp, buffer, buffer.pdh_cert_paddr, buffer.pdh_cert_len)
    guest = check_new_guest(psp, buffer, Command.RECEIVE_START, keys)

    # ACTION
    handle = add_guest(psp, guest)

    # STATE
    psp.legacy.state = platform
    return buffer.replace(handle=handle)


def receive_update_data(psp: SecureProcessor, buffer: Record) -> None:
    """Put one packet into the guest's memory. Nothing says which comes first, or that it comes once."""
    _receive_update(psp, buffer, Command.RECEIVE_UPDATE_DATA)


def receive_update_vmsa(psp: SecureProcessor, buffer: Record) -> None:
    """Put a vCPU's registers into a page, and keep their checksum."""
    guest, target = _receive_update(psp, buffer, Command.RECEIVE_UPDATE_VMSA)
    seal(psp.machine, guest.asid, target >> PAGE_SHIFT)


def _receive_update(psp: SecureProcessor, buffer: Record, command: Command) -> tuple[LegacyGuest, int]:
    # CHECKS
    psp.legacy.after(command)
    guest = psp.legacy.guest(buffer.handle)
    guest.after(command)
    if command in _VMSA_COMMANDS:
        require_es(guest)
    guest.require_asid()
    check_packet_lengths(buffer)
    check_alignment(buffer.guest_paddr, "guest_paddr")
    target = check_output(psp, buffer.guest_paddr, buffer.guest_len, "guest_paddr")
    header = read_input(psp, buffer.hdr_paddr, PACKET_HEADER.size, "hdr_paddr")
    body = read_input(psp, buffer.trans_paddr, buffer.trans_len, "trans_paddr")
    check_not_compressed(header)
    check_packet(guest.transport, MacContext.DATA, header, buffer.guest_len, body)

    # ACTION
    psp.machine.memory.write(guest.asid, target, open_packet(guest.transport, header, body))
    return guest, target


def receive_finish(psp: SecureProcessor, buffer: Record) -> None:
    """The guest has arrived: it may run as soon as it has an ASID."""
    finish(psp, buffer, Command.RECEIVE_FINISH)
