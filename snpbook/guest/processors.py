"""Further processors: the guest makes each one's save area itself, and tells the hypervisor where it is.

Only code at VMPL0 can mark a page as a save area, so nobody else can say with what registers a processor starts. The
page never begins at a 2 MB boundary (erratum). Sources: Linux arch/x86/coco/sev/core.c (wakeup_cpu_via_vmgexit,
snp_set_vmsa); GHCB specification.
"""

from __future__ import annotations

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.termination import terminate
from snpbook.spec.ghcb import AP_CREATION, ApCreation, Nae
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.termination import GeneralReason
from snpbook.spec.vmsa import init_vmsa

_LESS_PRIVILEGED = 1
"""RMPADJUST wants a VMPL below the caller's; it gets no rights."""


async def start(ghcb: Ghcb, apic_id: int, page: int, *, vector: int, features: int) -> None:
    """Make the private page at `page` the save area of the vCPU `apic_id`, and have it created.

    It starts at address `vector` * 4 KB in real mode. `features` are SEV_FEATURES, which the hypervisor holds against
    its own.

    `ValueError` for a page at a 2 MB boundary. Terminates where the page cannot be marked or the hypervisor refuses.
    """
    if page % PAGE_SIZE or page % LARGE_PAGE_SIZE == 0:
        raise ValueError(f"page = {page:#x}: a save area is a page, and none at a 2 MB boundary")
    await ghcb.cpu.write(page, bytes(init_vmsa(vector, features)))
    await _mark(ghcb, page, vmsa=True)
    await ghcb.call(Nae.AP_CREATION, _request(ApCreation.CREATE, apic_id), page, rax=features)


async def stop(ghcb: Ghcb, apic_id: int, page: int) -> None:
    """Have a vCPU of ours destroyed, and take its save area back as an ordinary page."""
    await ghcb.call(Nae.AP_CREATION, _request(ApCreation.DESTROY, apic_id))
    await _mark(ghcb, page, vmsa=False)


def _request(request: ApCreation, apic_id: int) -> int:
    return int.from_bytes(AP_CREATION.pack(request=request, apic_id=apic_id), "little")


async def _mark(ghcb: Ghcb, page: int, *, vmsa: bool) -> None:
    codes = await ghcb.cpu.rmpadjust(page, 1, vmpl=_LESS_PRIVILEGED, permissions=0, vmsa=vmsa)
    if codes[0] != RmpCode.SUCCESS:
        await terminate(ghcb.cpu, GeneralReason.GENERAL, f"RMPADJUST of page {page:#x}: {RmpCode(codes[0]).name}")
