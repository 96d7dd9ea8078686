"""Guest messages: SNP_GUEST_REQUEST, the envelope around what a guest asks of the firmware. Source: SNP ABI.

The mailbox answers for the envelope; what the message itself says is answered inside it, encrypted, and
costs two sequence numbers either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.attestation import report_request
from snpbook.firmware.cpuid_policing import cpuid_request
from snpbook.firmware.key_requests import key_request
from snpbook.firmware.migration import (
    absorb_noma_request,
    absorb_request,
    export_request,
    import_request,
    vmrk_request,
)
from snpbook.firmware.pages import check_address, require_small, require_state, state_of, without_c_bit
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.sender import Sender
from snpbook.firmware.tsc import tsc_info_request
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.messages import (
    AAD_FROM,
    ALGO_AES_256_GCM,
    HEADER_VERSION,
    LAST_SEQNO,
    MESSAGE_HEADER,
    TAG_SIZE,
    MessageType,
    iv,
)
from snpbook.spec.pages import PAGE_SIZE, PageState
from snpbook.spec.status import FirmwareRefusal, Status, require

MESSAGES: Mapping[MessageType, Callable[[SecureProcessor, Sender, bytes], bytes]] = {
    MessageType.CPUID_REQ: cpuid_request,
    MessageType.KEY_REQ: key_request,
    MessageType.REPORT_REQ: report_request,
    MessageType.EXPORT_REQ: export_request,
    MessageType.IMPORT_REQ: import_request,
    MessageType.ABSORB_REQ: absorb_request,
    MessageType.VMRK_REQ: vmrk_request,
    MessageType.ABSORB_NOMA_REQ: absorb_noma_request,
    MessageType.TSC_INFO_REQ: tsc_info_request,
}
"""What answers each type of message: from the processor, the sender and the payload, the payload of the response."""
VMPCKS = 4
_HEADER_CHECKS = {"hdr_version": HEADER_VERSION, "hdr_size": MESSAGE_HEADER.size, "algo": ALGO_AES_256_GCM}


def snp_guest_request(psp: SecureProcessor, buffer: Record) -> None:
    """Open a guest's message, answer it, and seal the answer with the same key."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    request = check_address(psp, buffer.request_paddr, 1, "request_paddr")
    response = check_address(psp, buffer.response_paddr, 1, "response_paddr")
    context = psp.context(buffer.gctx_paddr)
    require_state(psp, response, "response_paddr", PageState.FIRMWARE)
    require_small(psp, request, "request_paddr")
    require_small(psp, response, "response_paddr")
    psp.next_state(context, Command.SNP_GUEST_REQUEST)
    header, raw_header, payload = _open_envelope(psp, request)
    vmpck = header.msg_vmpck
    require(vmpck < VMPCKS, Status.INVALID_PARAM, "VMPCK", f"below {VMPCKS}", vmpck)
    key = AESGCM(getattr(context, f"vmpck{vmpck}"))
    message = _decrypt(key, header, raw_header, payload)
    count = getattr(context, f"msg_count{vmpck}")
    require(count != LAST_SEQNO, Status.AEAD_OFLOW, "sequence numbers are left", f"below {LAST_SEQNO}", count)
    require(header.msg_seqno == count + 1, Status.AEAD_OFLOW, "sequence number", count + 1, header.msg_seqno)
    version, newest = header.msg_version, psp.release.abi.message_version(header.msg_type)
    require(0 < version <= newest, Status.INVALID_PARAM, "message version", f"1..{newest}", version)
    known = header.msg_type in MESSAGES
    require(known, Status.INVALID_PARAM, "message type is that of a request", "an odd one up to 17", header.msg_type)

    # ACTION
    gctx = without_c_bit(psp, buffer.gctx_paddr)
    body = MESSAGES[header.msg_type](psp, Sender(gctx, context, vmpck, version), message)
    size = MESSAGE_HEADER.size + len(body)
    fits = response % PAGE_SIZE + size <= PAGE_SIZE
    require(fits, Status.INVALID_PARAM, "the response fits its page", PAGE_SIZE, response % PAGE_SIZE + size)

    # ANSWER
    psp.machine.memory.write(KeyId.UNENCRYPTED, response, _seal(key, header, body))
    _count_exchange(psp, gctx, f"msg_count{vmpck}")


def _count_exchange(psp: SecureProcessor, gctx: int, name: str) -> None:
    """Two more numbers are used up, whatever the context has become: an absorbed one has counters of its own.

    That of a guest which has exported itself is gone (both inferred: so the next number on the other side fits).
    """
    if state_of(psp, gctx) is PageState.CONTEXT:
        context = psp.context(gctx)
        count = (getattr(context, name) + 2) % (LAST_SEQNO + 2)
        psp.save_context(gctx, context.replace(**{name: count}))


def _open_envelope(psp: SecureProcessor, request: int) -> tuple[Record, bytes, bytes]:
    offset = request % PAGE_SIZE
    whole = offset + MESSAGE_HEADER.size <= PAGE_SIZE
    require(whole, Status.INVALID_PARAM, "the header stays in its page", PAGE_SIZE, offset + MESSAGE_HEADER.size)
    raw = psp.machine.memory.read(KeyId.UNENCRYPTED, request, MESSAGE_HEADER.size)
    header = MESSAGE_HEADER.unpack(raw)
    for name, wanted in _HEADER_CHECKS.items():
        found = getattr(header, name)
        require(found == wanted, Status.INVALID_PARAM, name.replace("_", " "), wanted, found)
    size = header.msg_size
    require(size > 0 and size % TAG_SIZE == 0, Status.INVALID_PARAM, "message size", "a multiple of 16", size)
    end = offset + MESSAGE_HEADER.size + size
    require(end <= PAGE_SIZE, Status.INVALID_PARAM, "the payload stays in its page", PAGE_SIZE, end)
    return header, raw, psp.machine.memory.read(KeyId.UNENCRYPTED, request + MESSAGE_HEADER.size, size)


def _decrypt(key: AESGCM, header: Record, raw: bytes, payload: bytes) -> bytes:
    tag = header.authtag[:TAG_SIZE]
    try:
        return key.decrypt(iv(header.msg_seqno), payload + tag, raw[AAD_FROM:])
    except InvalidTag:
        raise FirmwareRefusal(Status.BAD_MEASUREMENT, "authentication tag of the message", "valid", "invalid") from None


def _seal(key: AESGCM, request: Record, body: bytes) -> bytes:
    """The response: type and sequence number are the request's plus one."""
    header = request.replace(
        authtag=bytes(32), msg_seqno=request.msg_seqno + 1, msg_type=request.msg_type + 1, msg_size=len(body)
    )
    sealed = key.encrypt(iv(header.msg_seqno), body, bytes(header)[AAD_FROM:])
    tag = sealed[-TAG_SIZE:].ljust(32, b"\0")
    return bytes(header.replace(authtag=tag)) + sealed[:-TAG_SIZE]
