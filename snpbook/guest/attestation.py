"""The sev-guest driver: a report on this guest, asked of the firmware under the host's eyes.

The message key and the sequence number are in the secrets page; the number is written back before a
message goes out, because a number used twice would repeat an AES-GCM nonce. Source: Linux
drivers/virt/coco/sev-guest; SNP ABI, guest messages.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec.ghcb import Nae
from snpbook.spec.launch import SECRETS_PAGE
from snpbook.spec.messages import (
    AAD_FROM,
    ALGO_AES_256_GCM,
    HEADER_VERSION,
    MESSAGE_HEADER,
    TAG_SIZE,
    MessageType,
    iv,
)
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.payloads import REPORT_REQUEST, REPORT_RESPONSE
from snpbook.spec.status import Status


class RequestFailed(ProgramFailure):
    """The firmware or the hypervisor did not answer as it should; the guest must not retry blindly."""


async def request_report(cpu: GuestCpu, place: Layout, report_data: bytes, vmpl: int = 0) -> bytes:
    """The 1184 bytes of an attestation report over 64 bytes of the guest's own choice."""
    body = REPORT_REQUEST.pack(report_data=report_data, vmpl=vmpl)
    answer = REPORT_RESPONSE.unpack(await _exchange(cpu, place, MessageType.REPORT_REQ, body))
    if answer.status != Status.SUCCESS:
        raise RequestFailed(f"MSG_REPORT_REQ answered status {answer.status:#x}")
    report: bytes = answer.report
    return report


async def _exchange(cpu: GuestCpu, place: Layout, kind: MessageType, body: bytes) -> bytes:
    """Seal a request with VMPCK0, send it, open the response."""
    ghcb = Ghcb(cpu, place.ghcb)
    secrets = SECRETS_PAGE.unpack(await cpu.read(place.secrets, PAGE_SIZE))
    seqno, counter = secrets.msg_seqno_0 + 1, SECRETS_PAGE.fields["msg_seqno_0"]
    if seqno + 1 > counter.limit:
        raise RequestFailed(f"VMPCK0 is used up: sequence number {seqno} is the last")
    await cpu.write(place.secrets + counter.offset, (seqno + 1).to_bytes(counter.size, "little"))
    key = AESGCM(secrets.vmpck0)
    header = MESSAGE_HEADER.record(
        msg_seqno=seqno,
        algo=ALGO_AES_256_GCM,
        hdr_version=HEADER_VERSION,
        hdr_size=MESSAGE_HEADER.size,
        msg_type=kind,
        msg_version=1,
        msg_size=len(body),
        msg_vmpck=0,
    )
    sealed = key.encrypt(iv(seqno), body, bytes(header)[AAD_FROM:])
    tag = sealed[-TAG_SIZE:].ljust(32, b"\0")
    await cpu.write(place.request, (bytes(header.replace(authtag=tag)) + sealed[:-TAG_SIZE]).ljust(PAGE_SIZE, b"\0"))
    answer = await ghcb.call(Nae.GUEST_REQUEST, place.request, place.response)
    if answer.sw_exit_info_2:
        raise RequestFailed(f"SNP_GUEST_REQUEST answered {answer.sw_exit_info_2:#x}")
    return _open(key, await cpu.read(place.response, PAGE_SIZE), seqno + 1, kind)


def _open(key: AESGCM, page: bytes, seqno: int, kind: MessageType) -> bytes:
    header = MESSAGE_HEADER.unpack(page)
    size = header.msg_size
    if header.msg_seqno != seqno or header.msg_type != kind + 1 or MESSAGE_HEADER.size + size > PAGE_SIZE:
        raise RequestFailed(f"the response has number {header.msg_seqno} and type {header.msg_type}")
    body = page[MESSAGE_HEADER.size : MESSAGE_HEADER.size + size]
    try:
        return key.decrypt(iv(seqno), body + header.authtag[:TAG_SIZE], page[AAD_FROM : MESSAGE_HEADER.size])
    except InvalidTag:
        raise RequestFailed("the response's authentication tag is wrong: somebody changed it") from None
