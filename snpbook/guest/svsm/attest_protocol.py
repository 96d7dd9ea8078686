"""The attestation protocol: a report at VMPL0 that binds what the SVSM says of its services.

REPORT_DATA is the SHA-512 of the guest's nonce and of the manifest, so that nobody else can have said it. Buffers are
checked before anything is asked of the firmware. Sources: Secure VM Service Module for SEV-SNP Guests (58019), chapter
7; COCONUT-SVSM kernel/src/protocols/attest.rs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha512
from uuid import UUID

from snpbook.guest.messages import Channel, RequestFailed
from snpbook.guest.svsm.call import Answer, Call, Processor
from snpbook.guest.svsm.errors import Refused, check
from snpbook.guest.svsm.tpm import Tpm
from snpbook.spec.layout import Layout, Record
from snpbook.spec.messages import MessageType
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.payloads import REPORT_REQUEST, REPORT_RESPONSE
from snpbook.spec.report import REPORT_SIZE
from snpbook.spec.status import Status
from snpbook.spec.svsm import (
    ATTEST_SERVICES,
    ATTEST_SINGLE_SERVICE,
    CERTIFICATES_LIMIT,
    MANIFEST_ENTRY,
    MANIFEST_HEADER,
    NONCE_SIZE,
    SERVICES_MANIFEST,
    VTPM_SERVICE,
    Attest,
    SvsmCode,
)

_BUFFERS = ("report", "manifest", "certificates")


async def _services(processor: Processor, call: Call) -> Answer:
    """RCX: the operation. The manifest lists all services with what each says of itself."""
    asked = await _operation(processor, call, ATTEST_SERVICES)
    said = {VTPM_SERVICE: await Tpm(processor.cpu, processor.places).public()}
    return await _attest(processor, asked, _manifest(said))


async def _single_service(processor: Processor, call: Call) -> Answer:
    """RCX: the operation, which names one service: what that says of itself."""
    asked = await _operation(processor, call, ATTEST_SINGLE_SERVICE)
    known = UUID(bytes_le=asked.guid) == VTPM_SERVICE
    check(asked.manifest_version == 0, SvsmCode.INVALID_PARAMETER, f"manifest version 0: {asked.manifest_version}")
    check(known, SvsmCode.UNSUPPORTED_PROTOCOL, f"a service with GUID {UUID(bytes_le=asked.guid)}")
    return await _attest(processor, asked, await Tpm(processor.cpu, processor.places).public())


async def _operation(processor: Processor, call: Call, layout: Layout) -> Record:
    """The structure that the caller filled in, copied once. INVALID_PARAMETER where it cannot be."""
    raw = await processor.memory.read(call.rcx, layout.size)
    asked = layout.unpack(raw)
    check(not layout.reserved_set(raw), SvsmCode.INVALID_PARAMETER, "reserved fields are zero")
    crosses = asked.nonce_gpa % PAGE_SIZE + asked.nonce_size > PAGE_SIZE
    nonce = asked.nonce_size == NONCE_SIZE and not crosses
    check(nonce, SvsmCode.INVALID_PARAMETER, f"a nonce of {NONCE_SIZE} bytes in one page: {asked.nonce_size}")
    few = asked.certificates_size <= CERTIFICATES_LIMIT
    check(few, SvsmCode.INVALID_PARAMETER, f"up to {CERTIFICATES_LIMIT:#x} bytes of certificates")
    for name in _BUFFERS:
        gpa, size = getattr(asked, f"{name}_gpa"), getattr(asked, f"{name}_size")
        if size or name != "certificates":
            check(gpa % PAGE_SIZE == 0, SvsmCode.INVALID_PARAMETER, f"the {name} buffer at {gpa:#x} is a page")
            await processor.memory.check(gpa, size)
    return asked


async def _attest(processor: Processor, asked: Record, manifest: bytes) -> Answer:
    """Report, manifest and certificates into their buffers. RCX, RDX and R8: how many bytes of which there are.

    INVALID_PARAMETER, with these registers, where a buffer is too small; INVALID_REQUEST where the firmware refuses.
    """
    sizes = {"rcx": len(manifest), "rdx": 0, "r8": REPORT_SIZE}
    if len(manifest) > asked.manifest_size or asked.report_size < REPORT_SIZE:
        raise Refused(SvsmCode.INVALID_PARAMETER, f"buffers for manifest and report: {sizes}", **sizes)
    nonce = await processor.memory.read(asked.nonce_gpa, NONCE_SIZE)
    report, certificates = await _report(processor, sha512(nonce + manifest).digest(), asked.certificates_size, sizes)
    await processor.memory.write(asked.report_gpa, report)
    await processor.memory.write(asked.manifest_gpa, manifest)
    if certificates:
        await processor.memory.write(asked.certificates_gpa, certificates)
    return Answer(rcx=len(manifest), rdx=len(certificates), r8=len(report))


async def _report(processor: Processor, data: bytes, room: int, sizes: Mapping[str, int]) -> tuple[bytes, bytes]:
    """A report at VMPL0 and, where there is room for any, the host's certificates."""
    place, pages = processor.places.layout, room >> PAGE_SHIFT
    channel = Channel(processor.ghcb, place)
    body = REPORT_REQUEST.pack(report_data=data, vmpl=0)
    await processor.cpu.write(place.certificates, bytes(pages * PAGE_SIZE))
    try:
        raw = await channel.exchange(MessageType.REPORT_REQ, body, certificate_pages=pages if room else -1)
    except RequestFailed as failure:
        if failure.pages:
            needed = {**sizes, "rdx": failure.pages << PAGE_SHIFT}
            raise Refused(SvsmCode.INVALID_PARAMETER, f"room for certificates: {needed}", **needed) from failure
        raise Refused(SvsmCode.INVALID_REQUEST, f"the firmware reports: {failure}") from failure
    answer = REPORT_RESPONSE.unpack(raw)
    check(answer.status == Status.SUCCESS, SvsmCode.INVALID_REQUEST, f"the firmware reports: status {answer.status}")
    table = await processor.cpu.read(place.certificates, pages * PAGE_SIZE)
    return answer.report, table if any(table) else b""


def _manifest(said: Mapping[UUID, bytes]) -> bytes:
    """The manifest of all services: a table, then what each says."""
    at = MANIFEST_HEADER.size + len(said) * MANIFEST_ENTRY.size
    entries, end = b"", at
    for service, text in said.items():
        entries += MANIFEST_ENTRY.pack(guid=service.bytes_le, offset=end, size=len(text))
        end += len(text)
    head = MANIFEST_HEADER.pack(guid=SERVICES_MANIFEST.bytes_le, size=end, count=len(said))
    return head + entries + b"".join(said.values())


CALLS: Mapping[int, Callable[[Processor, Call], Awaitable[Answer]]] = {
    Attest.SERVICES: _services,
    Attest.SINGLE_SERVICE: _single_service,
}
