"""The legacy launch: LAUNCH_START to LAUNCH_FINISH, and ATTESTATION of what was launched.

One SHA-256 runs over everything that the host gives the guest, in the order in which it comes; where in the guest it
goes, nothing measures. Sources: SEV API (LAUNCH_START to ATTESTATION); order of checks of firmware 1.55.25.
"""

from __future__ import annotations

import hmac
from dataclasses import replace

from snpbook.firmware.buffers import read_input
from snpbook.firmware.legacy_buffers import ShortBuffer, check_output
from snpbook.firmware.legacy_certificates import checked, public_key, sign
from snpbook.firmware.legacy_channel import agree, check_not_compressed, check_packet, open_packet, unwrapped
from snpbook.firmware.legacy_keys import identity_of, key_of
from snpbook.firmware.legacy_state import LegacyGuest, TransportKeys
from snpbook.firmware.pages import without_c_bit
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.save_area import seal
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import (
    HANDLES_MAX,
    LEGACY_REPORT,
    LEGACY_REPORT_SIGNED_SIZE,
    MEASURE_INPUT,
    MEASUREMENT,
    PACKET_ALIGNMENT,
    PACKET_HEADER,
    PACKET_LIMIT,
    SESSION,
    MacContext,
)
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.policy import LEGACY_POLICY
from snpbook.spec.sev_certificates import SEV_CERTIFICATE, CertAlgo, CertUsage
from snpbook.spec.states import LEGACY_GUEST_TRANSITIONS, LegacyGuestState
from snpbook.spec.status import Status, require

_NONCE_SIZE = 16


def launch_start(psp: SecureProcessor, buffer: Record) -> Record:
    """Open a launch under a policy, for an owner at the other end of a channel or for none; answers a handle.

    Without an owner nobody checks the policy's version and reserved bits, and the transport keys are zero (quirk).
    """
    # CHECKS
    platform = psp.legacy.after(Command.LAUNCH_START)
    keys = TransportKeys()
    if buffer.dh_cert_paddr:
        keys = open_channel(psp, buffer, buffer.dh_cert_paddr, buffer.dh_cert_len)
    guest = check_new_guest(psp, buffer, Command.LAUNCH_START, keys)

    # ACTION
    handle = add_guest(psp, guest)

    # STATE
    psp.legacy.state = platform
    return buffer.replace(handle=handle)


def open_channel(psp: SecureProcessor, buffer: Record, address: int, length: int) -> TransportKeys:
    """The keys in a session that the holder of a PDH has made for this platform's PDH, and the checks on its policy."""
    found, wanted = (length, buffer.session_len), (SEV_CERTIFICATE.size, SESSION.size)
    require(found == wanted, Status.INVALID_LENGTH, "lengths of certificate and session", wanted, found, "SEV")
    data = read_input(psp, address, SEV_CERTIFICATE.size, "the other's certificate")
    session = SESSION.unpack(read_input(psp, buffer.session_paddr, SESSION.size, "session_paddr"))
    other = public_key(checked(data, CertUsage.PDH))
    kek, kik = agree(key_of(identity_of(psp), "pdh"), other, session.nonce)
    keys = unwrapped(session, kek, kik, buffer.policy)
    raw = buffer.policy.to_bytes(LEGACY_POLICY.size, "little")
    policy, abi = LEGACY_POLICY.unpack(raw), psp.release.abi
    minimum, version = (policy.api_major, policy.api_minor), (abi.major, abi.minor)
    require(minimum <= version, Status.POLICY_FAILURE, "the firmware's API is new enough", minimum, version, "SEV")
    stray = LEGACY_POLICY.reserved_set(raw)
    require(not stray, Status.POLICY_FAILURE, "reserved policy bits are zero", [], stray, "SEV")
    return keys


def check_new_guest(psp: SecureProcessor, buffer: Record, command: Command, keys: TransportKeys) -> LegacyGuest:
    """A guest to be, with a memory key of its own or that of another guest whose handle the host names."""
    legacy = psp.legacy
    seed = b""
    if buffer.handle:
        other = legacy.guest(buffer.handle)
        same = other.policy_word == buffer.policy
        require(same, Status.POLICY_FAILURE, "guests that share a key have one policy", other.policy_word,
                buffer.policy, "SEV")  # fmt: skip
        require(not other.policy.noks, Status.POLICY_FAILURE, "the policy allows key sharing", "NOKS=0", 1, "SEV")
        seed = other.vek_seed
    full = len(legacy.guests) >= HANDLES_MAX
    require(not full, Status.RESOURCE_LIMIT, "a handle is left", f"below {HANDLES_MAX}", len(legacy.guests), "SEV")
    guest = LegacyGuest(LEGACY_GUEST_TRANSITIONS[LegacyGuestState.UNINIT, command], buffer.policy, seed, b"", keys)
    encrypted = legacy.es or not guest.policy.es
    require(encrypted, Status.UNSUPPORTED, "SEV-ES is initialised if the policy demands it", "INIT with ES", 0, "SEV")
    return guest


def add_guest(psp: SecureProcessor, guest: LegacyGuest) -> int:
    """Give a new guest the lowest free handle, and random keys."""
    handle = next(number for number in range(1, HANDLES_MAX + 1) if number not in psp.legacy.guests)
    seed = guest.vek_seed or psp.rng(32)
    psp.legacy.guests[handle] = replace(guest, vek_seed=seed, oek=psp.rng(32))
    return handle


def launch_update_data(psp: SecureProcessor, buffer: Record) -> None:
    """Measure memory and encrypt it in place. A range of which a later part is refused is measured up to there."""
    # CHECKS
    guest = _check_update(psp, buffer, Command.LAUNCH_UPDATE_DATA)

    # ACTION
    for offset in range(0, buffer.len, PACKET_LIMIT):
        size = min(PACKET_LIMIT, buffer.len - offset)
        guest = _measure(psp, buffer.handle, guest, buffer.paddr + offset, size)


def launch_update_vmsa(psp: SecureProcessor, buffer: Record) -> None:
    """Measure a vCPU's first registers, encrypt them in place, and keep their checksum.

    The real table of checksums has an end (RESOURCE_LIMIT); how many it holds is not published (MODEL: enough).
    """
    # CHECKS
    require(buffer.len == PAGE_SIZE, Status.INVALID_LENGTH, "a VMSA is a page", PAGE_SIZE, buffer.len, "SEV")
    guest = _check_update(psp, buffer, Command.LAUNCH_UPDATE_VMSA)

    # ACTION
    _measure(psp, buffer.handle, guest, buffer.paddr, PAGE_SIZE)
    seal(psp.machine, guest.asid, without_c_bit(psp, buffer.paddr) >> PAGE_SHIFT)


def _check_update(psp: SecureProcessor, buffer: Record, command: Command) -> LegacyGuest:
    psp.legacy.after(command)
    guest = psp.legacy.guest(buffer.handle)
    guest.after(command)
    if command is Command.LAUNCH_UPDATE_VMSA:
        require_es(guest)
    guest.require_asid()
    check_alignment(buffer.paddr, "paddr")
    whole = buffer.len > 0 and buffer.len % PACKET_ALIGNMENT == 0
    require(whole, Status.INVALID_LENGTH, "length is that of blocks", PACKET_ALIGNMENT, buffer.len, "SEV")
    return guest


def require_es(guest: LegacyGuest) -> None:
    """UNSUPPORTED for registers of a guest that has them in the clear."""
    require(bool(guest.policy.es), Status.UNSUPPORTED, "the guest is one of SEV-ES", "ES=1", 0, "SEV")


def check_alignment(address: int, name: str) -> None:
    """Guest memory is taken in blocks of 16 bytes (INVALID_ADDRESS)."""
    offset = address % PACKET_ALIGNMENT
    require(offset == 0, Status.INVALID_ADDRESS, f"{name} is aligned to {PACKET_ALIGNMENT} bytes", 0, offset, "SEV")


def _measure(psp: SecureProcessor, handle: int, guest: LegacyGuest, address: int, size: int) -> LegacyGuest:
    memory, spa = psp.machine.memory, check_output(psp, address, size, "paddr")
    plain = memory.read(KeyId.UNENCRYPTED, spa, size)
    memory.write(guest.asid, spa, plain)
    psp.legacy.guests[handle] = replace(guest, digest=guest.digest.extended(plain))
    return psp.legacy.guests[handle]


def launch_measure(psp: SecureProcessor, buffer: Record) -> Record:
    """Tell the owner what was launched: an HMAC under the key that only he shares, with a fresh nonce."""
    # CHECKS
    psp.legacy.after(Command.LAUNCH_MEASURE)
    guest = psp.legacy.guest(buffer.handle)
    state = guest.after(Command.LAUNCH_MEASURE)
    answer = buffer.replace(len=MEASUREMENT.size)
    if buffer.len < MEASUREMENT.size:
        raise ShortBuffer(answer, "the measurement fits", MEASUREMENT.size, buffer.len)
    spa = check_output(psp, buffer.paddr, MEASUREMENT.size, "paddr")

    # ACTION
    nonce = psp.rng(_NONCE_SIZE)
    measure = measurement(psp, guest, nonce)

    # ANSWER
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, MEASUREMENT.pack(measure=measure, mnonce=nonce))

    # STATE
    psp.legacy.guests[buffer.handle] = replace(guest, state=state, measure=measure)
    return answer


def measurement(psp: SecureProcessor, guest: LegacyGuest, nonce: bytes) -> bytes:
    """MEASURE: firmware version, policy and launch digest under the TIK."""
    covered = MEASURE_INPUT.pack(
        context=MacContext.MEASURE,
        api_major=psp.release.abi.major,
        api_minor=psp.release.abi.minor,
        build=psp.release.build,
        policy=guest.policy_word,
        launch_digest=guest.digest.value,
        mnonce=nonce,
    )
    return hmac.digest(guest.transport.integrity, covered, "sha256")


def launch_secret(psp: SecureProcessor, buffer: Record) -> None:
    """Put a secret of the owner's into the guest; its MAC binds it to what MEASURE said."""
    # CHECKS
    psp.legacy.after(Command.LAUNCH_SECRET)
    guest = psp.legacy.guest(buffer.handle)
    check_alignment(buffer.guest_paddr, "guest_paddr")
    check_packet_lengths(buffer)
    guest.after(Command.LAUNCH_SECRET)
    guest.require_asid()
    target = check_output(psp, buffer.guest_paddr, buffer.guest_len, "guest_paddr")
    header = read_input(psp, buffer.hdr_paddr, PACKET_HEADER.size, "hdr_paddr")
    body = read_input(psp, buffer.trans_paddr, buffer.trans_len, "trans_paddr")
    check_packet(guest.transport, MacContext.SECRET, header, buffer.guest_len, body, guest.measure)
    check_not_compressed(header)

    # ACTION
    psp.machine.memory.write(guest.asid, target, open_packet(guest.transport, header, body))


def check_packet_lengths(buffer: Record) -> None:
    """What a packet that comes in must be long: as long as what it becomes, in whole blocks, and not too much."""
    size = buffer.guest_len
    good = buffer.hdr_len >= PACKET_HEADER.size and 0 < size <= PACKET_LIMIT and size % PACKET_ALIGNMENT == 0
    require(good and size == buffer.trans_len, Status.INVALID_LENGTH, "lengths of the packet", PACKET_LIMIT,
            (buffer.hdr_len, size, buffer.trans_len), "SEV")  # fmt: skip


def launch_finish(psp: SecureProcessor, buffer: Record) -> None:
    """Close the launch: the guest may run as soon as it has an ASID, and the owner's keys are forgotten."""
    finish(psp, buffer, Command.LAUNCH_FINISH)


def finish(psp: SecureProcessor, buffer: Record, command: Command) -> None:
    """LAUNCH_FINISH and RECEIVE_FINISH."""
    # CHECKS
    psp.legacy.after(command)
    guest = psp.legacy.guest(buffer.handle)
    state = guest.after(command)
    psp.require_safe()

    # ACTION
    if guest.asid:
        psp.asids.finish(guest.asid)

    # STATE
    psp.legacy.guests[buffer.handle] = replace(guest, state=state, transport=TransportKeys())


def attestation(psp: SecureProcessor, buffer: Record) -> Record:
    """The launch digest and the policy, signed by the PEK over the host's nonce."""
    # CHECKS
    psp.legacy.after(Command.ATTESTATION)
    guest = psp.legacy.guest(buffer.handle)
    guest.after(Command.ATTESTATION)
    answer = buffer.replace(len=LEGACY_REPORT.size)
    if buffer.len < LEGACY_REPORT.size:
        raise ShortBuffer(answer, "the report fits", LEGACY_REPORT.size, buffer.len)
    spa = check_output(psp, buffer.paddr, LEGACY_REPORT.size, "paddr")

    # ANSWER
    report = LEGACY_REPORT.record(
        mnonce=buffer.mnonce,
        launch_digest=guest.digest.value,
        policy=guest.policy_word,
        sig_usage=CertUsage.PEK,
        sig_algo=CertAlgo.ECDSA_SHA256,
    )
    r, s = sign(key_of(identity_of(psp), "pek"), bytes(report)[:LEGACY_REPORT_SIGNED_SIZE])
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, bytes(report.replace(signature_r=r, signature_s=s)))
    return answer
