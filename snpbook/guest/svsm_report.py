"""A report by the SVSM: of VMPL0, over a nonce and what the SVSM says of its services.

The structure lies in the calling area, the buffers in private pages of the kernel's. Sources: Linux
drivers/virt/coco/sev-guest (sev_svsm_report_new), arch/x86/coco/sev/core.c (snp_issue_svsm_attest_req).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from uuid import UUID

from snpbook.guest.calling_area import CallingArea
from snpbook.guest.process import SystemCallFailed
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.svsm import ATTEST_SERVICES, ATTEST_SINGLE_SERVICE, CERTIFICATES_LIMIT, Attest, Protocol, SvsmCode

BUFFER_PAGES = 3 + (CERTIFICATES_LIMIT >> PAGE_SHIFT)
"""For the nonce, the report, the manifest, and the certificates."""


@dataclass(frozen=True, slots=True)
class SvsmReport:
    """What the SVSM answers: the report, the manifest that it binds, and the host's certificates."""

    report: bytes
    manifest: bytes
    certificates: bytes


async def attest(
    area: CallingArea, pages: range, nonce: bytes, service: UUID | None = None, manifest_version: int = 0
) -> SvsmReport:
    """Have all services attested, or one. `pages` are `BUFFER_PAGES` private pages of the caller's.

    EINVAL where the SVSM refuses, as for a service that it does not have.
    """
    if len(pages) < BUFFER_PAGES:
        raise ValueError(f"{len(pages)} pages: the buffers take {BUFFER_PAGES}")
    cpu = area.cpu
    at = {name: pages[i] << PAGE_SHIFT for i, name in enumerate(("nonce", "report", "manifest", "certificates"))}
    sizes = {"report": PAGE_SIZE, "manifest": PAGE_SIZE, "certificates": CERTIFICATES_LIMIT, "nonce": len(nonce)}
    fields = {f"{name}_gpa": gpa for name, gpa in at.items()} | {f"{name}_size": size for name, size in sizes.items()}
    await cpu.write(at["nonce"], nonce)
    if service is None:
        number, operation = Attest.SERVICES, ATTEST_SERVICES.pack(**fields)
    else:
        number = Attest.SINGLE_SERVICE
        operation = ATTEST_SINGLE_SERVICE.pack(**fields, guid=service.bytes_le, manifest_version=manifest_version)
    await cpu.write(area.buffer, operation)
    answer = await area.ask(Protocol.ATTEST, number, area.buffer)
    fits = answer.rcx <= sizes["manifest"] and answer.rdx <= CERTIFICATES_LIMIT and answer.r8 <= sizes["report"]
    if answer.code != SvsmCode.SUCCESS or not fits:
        raise SystemCallFailed(errno.EINVAL, "the SVSM attests", hex(SvsmCode.SUCCESS), hex(answer.code))
    return SvsmReport(
        await cpu.read(at["report"], answer.r8),
        await cpu.read(at["manifest"], answer.rcx),
        await cpu.read(at["certificates"], answer.rdx),
    )
