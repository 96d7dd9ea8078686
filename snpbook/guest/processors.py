"""Further processors: the guest makes each one's save area itself, and tells the hypervisor where it is.

Only code at VMPL0 can mark a page as a save area, so nobody else can say with what registers a processor starts; a
guest above VMPL0 has its SVSM do it. The page never begins at a 2 MB boundary (erratum). Sources: Linux
arch/x86/coco/sev/core.c (wakeup_cpu_via_vmgexit, snp_set_vmsa); GHCB specification.
"""

from __future__ import annotations

from dataclasses import replace

from snpbook.guest import interrupts, page_tables, protections
from snpbook.guest.boot import Kernel
from snpbook.guest.calling_area import attached
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.termination import terminate
from snpbook.guest.vc import VcHandler
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import AP_CREATION, ApCreation, Nae
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.svsm import Core, Protocol
from snpbook.spec.termination import GeneralReason
from snpbook.spec.vmcb import Vector
from snpbook.spec.vmsa import init_vmsa

_LESS_PRIVILEGED = 1
"""RMPADJUST wants a VMPL below the caller's; it gets no rights."""


async def start(ghcb: Ghcb, apic_id: int, page: int, *, vector: int, features: int, calling_area: int = 0) -> None:
    """Make the private page at `page` the save area of the vCPU `apic_id`, and have it created.

    It starts at address `vector` * 4 KB in real mode. `features` are SEV_FEATURES, which the hypervisor holds against
    its own. With an SVSM the vCPU calls that by the private page `calling_area`.

    `ValueError` for a page at a 2 MB boundary. Terminates where the page cannot be marked or the hypervisor refuses.
    """
    if page % PAGE_SIZE or page % LARGE_PAGE_SIZE == 0:
        raise ValueError(f"page = {page:#x}: a save area is a page, and none at a 2 MB boundary")
    area = ghcb.area
    await ghcb.cpu.write(page, bytes(init_vmsa(vector, features, _vmpl(ghcb))))
    if area:
        await area.call(Protocol.CORE, Core.CREATE_VCPU, page, calling_area, apic_id)
    else:
        await _mark(ghcb, page, vmsa=True)
    await ghcb.call(Nae.AP_CREATION, _request(ghcb, ApCreation.CREATE, apic_id), page, rax=features)


async def online(cpu: GuestCpu, place: Layout, page: int, calling_area: int = 0) -> Kernel:
    """What a further processor does first: its handlers, the kernel's tables, and a GHCB of its own.

    The GHCB is the shared page at `page`, which the processor that started it has made so; with an SVSM it calls by the
    page `calling_area` that it was started with.
    """
    own = replace(place, shared=page)
    handler = VcHandler(own)
    cpu.set_handler(Vector.VC, handler)
    found = await protections.find(cpu)
    await page_tables.use(cpu, place, found.c_bit)
    area = await attached(cpu, replace(place, calling_area=calling_area))
    handler.c_bit, handler.ghcb = found.c_bit, await Ghcb.register(cpu, page, area)
    interrupts.install(handler.ghcb)
    return Kernel(cpu, own, found, handler.ghcb)


async def stop(ghcb: Ghcb, apic_id: int, page: int) -> None:
    """Have a vCPU of ours destroyed, and take its save area back as an ordinary page."""
    await ghcb.call(Nae.AP_CREATION, _request(ghcb, ApCreation.DESTROY, apic_id))
    if ghcb.area:
        await ghcb.area.call(Protocol.CORE, Core.DELETE_VCPU, page)
    else:
        await _mark(ghcb, page, vmsa=False)


def _request(ghcb: Ghcb, request: ApCreation, apic_id: int) -> int:
    return int.from_bytes(AP_CREATION.pack(request=request, vmpl=_vmpl(ghcb), apic_id=apic_id), "little")


def _vmpl(ghcb: Ghcb) -> int:
    return ghcb.area.vmpl if ghcb.area else 0


async def _mark(ghcb: Ghcb, page: int, *, vmsa: bool) -> None:
    codes = await ghcb.cpu.rmpadjust(page, 1, vmpl=_LESS_PRIVILEGED, permissions=0, vmsa=vmsa)
    if codes[0] != RmpCode.SUCCESS:
        await terminate(ghcb.cpu, GeneralReason.GENERAL, f"RMPADJUST of page {page:#x}: {RmpCode(codes[0]).name}")
