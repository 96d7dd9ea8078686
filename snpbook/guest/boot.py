"""The guest's boot: from the reset vector to a kernel that holds all of its memory.

The program stands for the code in the firmware image and for the kernel behind it. It learns from its processor which
protections it has, and runs alike with none, SEV, SEV-ES or SNP. What the hypervisor says is checked before it is used,
and ends the guest where it is wrong. Sources: edk2 OvmfPkg (order of steps); Linux arch/x86/boot/compressed/sev.c,
arch/x86/coco/sev.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from snpbook.guest import msr_protocol, page_tables, protections
from snpbook.guest.acceptance import accept
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.memory_map import memory_ranges, unaccepted
from snpbook.guest.protections import Protections
from snpbook.guest.termination import terminate
from snpbook.guest.unaccepted import Unaccepted
from snpbook.guest.vc import VcHandler
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import PSC_ENTRIES
from snpbook.spec.image import Image
from snpbook.spec.launch import SECRETS_PAGE
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.termination import GeneralReason, Reason
from snpbook.spec.vmcb import Vector


class Acceptance(StrEnum):
    """When an SNP guest validates its memory: all of it as it boots, or 2 MB units as they are allocated."""

    EAGER = "eager"
    LAZY = "lazy"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A guest's kernel on its first processor: what its programs go on with."""

    cpu: GuestCpu
    place: Layout
    protections: Protections
    ghcb: Ghcb | None

    @classmethod
    async def attach(cls, cpu: GuestCpu, place: Layout) -> Kernel:
        """The kernel of a guest that has booted, for a further program: the #VC handler in place, the GHCB at hand."""
        handler = VcHandler(place, ghcb=Ghcb(cpu, place.ghcb))
        cpu.set_handler(Vector.VC, handler)
        found = await protections.find(cpu)
        handler.c_bit = found.c_bit
        return cls(cpu, place, found, handler.ghcb if found.sev_es else None)

    @property
    def channel(self) -> Ghcb:
        """The GHCB; `ValueError` for a guest without one."""
        if self.ghcb is None:
            raise ValueError(f"a guest with {self.protections} has no GHCB")
        return self.ghcb

    @property
    def unaccepted(self) -> Unaccepted:
        """The table of unaccepted memory of a guest that has booted with lazy acceptance."""
        return Unaccepted(self.channel, self.place.notes)


@dataclass(frozen=True, slots=True)
class Booted:
    """How a boot went: bytes accepted and bytes left for later, and the kernel's messages."""

    protections: Protections
    accepted: int
    unaccepted: int
    messages: tuple[str, ...]


async def boot(
    cpu: GuestCpu, image: Image, acceptance: Acceptance = Acceptance.EAGER, entries: int = PSC_ENTRIES
) -> Booted:
    """Bring the guest up. Its page state changes go in lists of `entries`."""
    place = Layout.of(image)
    kernel = await start(cpu, place)
    parts = unaccepted(image, place, await memory_ranges(cpu))
    messages = [str(kernel.protections)]
    if not kernel.protections.snp:
        return Booted(kernel.protections, 0, 0, tuple(messages))
    messages += ["SEV: SNP running at VMPL0.", "SEV: SNP guest platform device initialized."]
    total = sum(map(len, parts))
    if acceptance is Acceptance.LAZY:
        _, accepted = await Unaccepted.record(kernel.channel, place.notes, place.notes_size, parts)
    else:
        accepted = total
        for pages in parts:
            await accept(kernel.channel, pages, entries)
    left = total - accepted
    return Booted(kernel.protections, accepted << PAGE_SHIFT, left << PAGE_SHIFT, tuple(messages))


async def start(cpu: GuestCpu, place: Layout) -> Kernel:
    """Reset vector and early kernel: #VC handler, C-bit, page tables, GHCB, and what an SNP guest checks of itself."""
    handler = VcHandler(place)
    cpu.set_handler(Vector.VC, handler)
    found = await protections.find(cpu)
    probe = page_tables.probe_of(await cpu.rdrand())
    await page_tables.enable_paging(cpu, place, found.c_bit, probe)
    await page_tables.verify_c_bit(cpu, place, probe)
    handler.c_bit = found.c_bit
    if not found.sev_es:
        return Kernel(cpu, place, found, None)
    if found.snp:
        await _check_secrets(cpu, place)
        ghcb = await Ghcb.register(cpu, place.ghcb)
        await _check_features(ghcb, found)
        await _check_vmpl(cpu, place)
    else:
        ghcb = Ghcb(cpu, place.ghcb, await msr_protocol.negotiate(cpu))
    handler.ghcb = ghcb
    return Kernel(cpu, place, found, ghcb)


async def _check_secrets(cpu: GuestCpu, place: Layout) -> None:
    """The secrets page is the firmware's: one that nobody has written has no version."""
    if not SECRETS_PAGE.unpack(await cpu.read(place.secrets, PAGE_SIZE)).version:
        await terminate(cpu, Reason.SECRETS_PAGE, f"the page at {place.secrets:#x} is no secrets page")


async def _check_features(ghcb: Ghcb, found: Protections) -> None:
    """A feature that is on and that the guest would have to know ends it."""
    if found.unknown:
        await ghcb.terminate(GeneralReason.SNP_FEATURES, found.unknown, f"SEV_STATUS has {found.unknown:#x} on")


async def _check_vmpl(cpu: GuestCpu, place: Layout) -> None:
    """Only VMPL0 may change what VMPL1 can do with a page."""
    codes = await cpu.rmpadjust(place.tables, 1, vmpl=1, permissions=0)
    if codes[0] != RmpCode.SUCCESS:
        await terminate(cpu, Reason.NOT_VMPL0, f"RMPADJUST answered {RmpCode(codes[0]).name}")
