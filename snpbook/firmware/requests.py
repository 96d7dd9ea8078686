"""Guest messages: SNP_GUEST_REQUEST, and MSG_REPORT_REQ with the attestation report. Source: SNP ABI.

The mailbox answers for the envelope; what the message itself says is answered inside it, encrypted, and
costs two sequence numbers either way.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.keys import sign_report
from snpbook.firmware.pages import check_address, require_small, require_state
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.launch import ID_BLOCK
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
from snpbook.spec.payloads import REPORT_REQUEST, REPORT_RESPONSE, KeySelect
from snpbook.spec.report import (
    ATTESTATION_REPORT,
    ECDSA_P384_SHA384,
    REPORT_SIZE,
    SIGNED_SIZE,
    SigningKey,
)
from snpbook.spec.status import FirmwareRefusal, Status, require

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
    require(header.msg_version == 1, Status.INVALID_PARAM, "message version", 1, header.msg_version)
    known = header.msg_type in MESSAGES
    require(known, Status.INVALID_PARAM, "message type is one that is modelled", "REPORT_REQ", header.msg_type)

    # ACTION
    body = MESSAGES[header.msg_type](psp, context, vmpck, message)
    size = MESSAGE_HEADER.size + len(body)
    fits = response % PAGE_SIZE + size <= PAGE_SIZE
    require(fits, Status.INVALID_PARAM, "the response fits its page", PAGE_SIZE, response % PAGE_SIZE + size)

    # ANSWER
    sealed = _seal(key, header, body)
    psp.machine.memory.write(KeyId.UNENCRYPTED, response, sealed)
    psp.save_context(buffer.gctx_paddr, context.replace(**{f"msg_count{vmpck}": count + 2}))


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


def report_request(psp: SecureProcessor, context: Record, vmpck: int, message: bytes) -> bytes:
    """MSG_REPORT_REQ: an attestation report, or STATUS and a report of zeros."""
    data = message.ljust(REPORT_REQUEST.size, b"\0")[: REPORT_REQUEST.size]
    request = REPORT_REQUEST.unpack(data)
    try:
        # CHECKS
        stray = REPORT_REQUEST.reserved_set(data)
        require(not stray, Status.INVALID_PARAM, "reserved bytes of the request are zero", 0, stray)
        usable = request.key_sel in (KeySelect.VLEK_OR_VCEK, KeySelect.VCEK) and not context.vcek_dis
        require(usable, Status.INVALID_KEY, "the selected key is there", "VCEK", request.key_sel)
        require(request.vmpl >= vmpck, Status.INVALID_PARAM, "VMPL is not above the sender's", vmpck, request.vmpl)
    except FirmwareRefusal as refusal:
        return REPORT_RESPONSE.pack(status=refusal.status, report_size=REPORT_SIZE)

    # ANSWER
    report = attestation_report(psp, context, request)
    return REPORT_RESPONSE.pack(status=Status.SUCCESS, report_size=REPORT_SIZE, report=report)


def attestation_report(psp: SecureProcessor, context: Record, request: Record) -> bytes:
    """The report on a guest, signed by the chip's VCEK at the reported TCB."""
    release, identity = psp.release, ID_BLOCK.unpack(context.id_block)
    signature = psp.machine.product.signature
    cpuid = {}
    if release.report_version >= 3:
        cpuid = {
            "cpuid_family": signature.family,
            "cpuid_model": signature.model,
            "cpuid_stepping": signature.stepping,
        }
    unsigned = ATTESTATION_REPORT.pack(
        version=release.report_version,
        guest_svn=identity.guest_svn,
        policy=context.policy,
        family_id=identity.family_id,
        image_id=identity.image_id,
        vmpl=request.vmpl,
        signature_algo=ECDSA_P384_SHA384,
        current_tcb=int(psp.current_tcb),
        platform_info=release.platform_info,
        author_key_en=context.author_key_en,
        signing_key=SigningKey.VCEK,
        report_data=request.report_data,
        measurement=context.launch_digest,
        host_data=context.host_data,
        id_key_digest=context.id_key_digest,
        author_key_digest=context.author_key_digest,
        report_id=context.report_id,
        report_id_ma=context.report_id_ma,
        reported_tcb=int(psp.reported_tcb),
        chip_id=psp.chip.chip_id,
        committed_tcb=int(psp.committed_tcb),
        current_build=release.build,
        current_minor=release.abi.minor,
        current_major=release.abi.major,
        committed_build=release.build,
        committed_minor=release.abi.minor,
        committed_major=release.abi.major,
        launch_tcb=context.launch_tcb,
        **cpuid,
    )
    r, s = sign_report(psp.vcek, unsigned[:SIGNED_SIZE])
    return unsigned[:SIGNED_SIZE] + r + s + unsigned[SIGNED_SIZE + len(r) + len(s) :]


MESSAGES = {MessageType.REPORT_REQ: report_request}
"""The message types that are modelled."""
