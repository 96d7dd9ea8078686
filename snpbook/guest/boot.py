"""The guest's boot: from the reset vector to a kernel that holds all of its memory.

The program stands for the code in the firmware image and for the kernel behind it. It learns from its processor which
protections it has, and runs alike with none, SEV, SEV-ES or SNP. What the hypervisor says is checked before it is used,
and ends the guest where it is wrong. Sources: edk2 OvmfPkg (order of steps); Linux arch/x86/boot/compressed/sev.c,
arch/x86/coco/sev.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from snpbook.guest import calling_area, cc_blob, interrupts, msr_protocol, page_tables, protections
from snpbook.guest.acceptance import accept
from snpbook.guest.conversions import make_shared
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
from snpbook.spec.sev_features import SEV_STATUS_SHIFT, SevFeatures
from snpbook.spec.termination import GeneralReason, Reason
from snpbook.spec.vmcb import Vector

NO_FEATURES = SevFeatures(0)


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
        """The kernel of a guest that has booted, for a further program: its handlers in place, the GHCB at hand."""
        interrupts.install(Ghcb(cpu, place.ghcb), place.doorbell)
        handler = VcHandler(place, ghcb=Ghcb(cpu, place.ghcb))
        cpu.set_handler(Vector.VC, handler)
        found = await protections.find(cpu)
        handler.c_bit = found.c_bit
        if found.snp:
            handler.ghcb = Ghcb(cpu, place.ghcb, area=await calling_area.attached(cpu, place))
        return cls(cpu, place, found, handler.ghcb if found.sev_es else None)

    @property
    def channel(self) -> Ghcb:
        """The GHCB; `ValueError` for a guest without one."""
        if self.ghcb is None:
            raise ValueError(f"a guest with {self.protections} has no GHCB")
        return self.ghcb

    @property
    def vmpl(self) -> int:
        """The VMPL at which it runs (/sys/devices/system/cpu/sev/vmpl)."""
        return self.ghcb.area.vmpl if self.ghcb and self.ghcb.area else 0

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
    cpu: GuestCpu,
    image: Image,
    acceptance: Acceptance = Acceptance.EAGER,
    entries: int = PSC_ENTRIES,
    knows: SevFeatures = NO_FEATURES,
) -> Booted:
    """Bring the guest up. Its page state changes go in lists of `entries`.

    `knows` are features that it lives with beyond those of Linux 6.12; of those, restricted injection has a use here.
    """
    place = Layout.of(image)
    kernel = await start(cpu, place, knows)
    parts = unaccepted(image, place, await memory_ranges(cpu))
    messages = [str(kernel.protections)]
    if not kernel.protections.snp:
        return Booted(kernel.protections, 0, 0, tuple(messages))
    messages += [f"SEV: SNP running at VMPL{kernel.vmpl}.", "SEV: SNP guest platform device initialized."]
    total = sum(map(len, parts))
    if acceptance is Acceptance.LAZY:
        _, accepted = await Unaccepted.record(kernel.channel, place.notes, place.notes_size, parts)
    else:
        accepted = total
        for pages in parts:
            await accept(kernel.channel, pages, entries)
    left = total - accepted
    await cc_blob.leave(cpu, place)
    await _check_blob(cpu, place)
    if kernel.protections.features & SevFeatures.RESTRICTED_INJECTION:
        await _listen(kernel)
    return Booted(kernel.protections, accepted << PAGE_SHIFT, left << PAGE_SHIFT, tuple(messages))


async def start(cpu: GuestCpu, place: Layout, knows: SevFeatures = NO_FEATURES) -> Kernel:
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
        area = await calling_area.find(cpu, place)
        ghcb = await Ghcb.register(cpu, place.ghcb, area)
        await _check_features(ghcb, found, knows)
        if area:
            ghcb = replace(ghcb, area=await calling_area.remapped(area, place.calling_area))
    else:
        ghcb = Ghcb(cpu, place.ghcb, await msr_protocol.negotiate(cpu))
    handler.ghcb = ghcb
    interrupts.install(ghcb, place.doorbell)
    return Kernel(cpu, place, found, ghcb)


async def _check_blob(cpu: GuestCpu, place: Layout) -> None:
    """What a kernel that comes by EFI does first; here it knows already what it finds."""
    blob = await cc_blob.by_efi(cpu, place.boot_tables + cc_blob.TABLES, 1)
    if blob is None or (blob.secrets_phys, blob.cpuid_phys) != (place.secrets, place.cpuid):
        await terminate(cpu, GeneralReason.SNP_FEATURES, "the CC blob does not lead to the pages of this guest")


async def _listen(kernel: Kernel) -> None:
    """Share the doorbell page and register it."""
    place, c_bit = kernel.place, kernel.protections.c_bit
    assert c_bit is not None
    first = place.doorbell >> PAGE_SHIFT
    await make_shared(kernel.channel, place, c_bit, range(first, first + 1))
    await kernel.cpu.write(place.doorbell, bytes(PAGE_SIZE))
    await interrupts.listen(kernel.channel, place.doorbell)


async def _check_secrets(cpu: GuestCpu, place: Layout) -> None:
    """The secrets page is the firmware's: one that nobody has written has no version."""
    if not SECRETS_PAGE.unpack(await cpu.read(place.secrets, PAGE_SIZE)).version:
        await terminate(cpu, Reason.SECRETS_PAGE, f"the page at {place.secrets:#x} is no secrets page")


async def _check_features(ghcb: Ghcb, found: Protections, knows: SevFeatures) -> None:
    """A feature that is on and that the guest would have to know ends it."""
    unknown = found.unknown & ~(knows << SEV_STATUS_SHIFT)
    if unknown:
        await ghcb.terminate(GeneralReason.SNP_FEATURES, unknown, f"SEV_STATUS has {unknown:#x} on")
