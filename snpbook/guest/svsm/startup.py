"""The start of an SVSM: on the first processor everything that guest and services need, on the others their own GHCB.

What the guest's firmware finds as it starts is put there: memory that its metadata names, a secrets page without the
keys of more privileged VMPLs, a CPUID page that tells of the SVSM, an empty calling area. Sources: COCONUT-SVSM
kernel/src/fw_meta.rs, kernel/src/svsm.rs; Secure VM Service Module for SEV-SNP Guests (58019), chapter 3.
"""

from __future__ import annotations

import numpy as np

from snpbook.guest import boot, page_tables, protections
from snpbook.guest.acceptance import ask
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.memory_map import memory_ranges
from snpbook.guest.msr_protocol import register
from snpbook.guest.svsm.call import Processor
from snpbook.guest.svsm.places import HEAD, PROCESSORS, Places
from snpbook.guest.svsm.registry import Registry
from snpbook.guest.svsm.tpm import Tpm
from snpbook.guest.svsm.validation import grant
from snpbook.guest.termination import terminate
from snpbook.guest.vc import VcHandler
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.cpuid import ENCRYPTED_MEMORY_LEAF, INITIAL_APIC_ID, SIGNATURE_LEAF, SevCapability
from snpbook.spec.ghcb import AP_CREATION, ApCreation, Nae, PageOperation
from snpbook.spec.image import FOUR_GIB, Image, Section, SectionType
from snpbook.spec.launch import CPUID_PAGE, SECRETS_PAGE
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.sev_features import SEV_STATUS_SHIFT
from snpbook.spec.svsm import GUEST_VMPL, VERSION, VMSA_RIGHTS
from snpbook.spec.termination import GeneralReason, Reason
from snpbook.spec.vmcb import Vector
from snpbook.spec.vmsa import BSP_RESET_EIP, reset_vmsa, svsm_vmsa

_LESS_PRIVILEGED = 1


async def first(cpu: GuestCpu, places: Places, entry: int) -> Processor:
    """The first processor, once: a second start is the host's attempt to have everything made anew, and ends."""
    begun, _ = places.field("begun")
    if await cpu.exchange(begun, b"\1") != b"\0":
        await terminate(cpu, GeneralReason.GENERAL, "the SVSM is started a second time")
    kernel = await boot.start(cpu, places.layout)
    c_bit, ghcb = kernel.protections.c_bit, kernel.channel
    assert c_bit is not None
    await page_tables.mark(cpu, places.layout, c_bit, places.shared, private=False)
    low, *high = await memory_ranges(cpu)
    top = high[0].stop if high else 0
    head = HEAD.pack(begun=1, low_end=low.stop, high_end=top)
    await cpu.write(places.state, head)
    processor = Processor(0, ghcb, Registry(cpu, places))
    await Tpm(cpu, places).manufacture()
    apic_ids = await _apic_ids(processor)
    await processor.registry.set_processors(apic_ids)
    firmware = Image.parse(await cpu.read(places.firmware, FOUR_GIB - places.firmware))
    calling_area = await _prepare(processor, firmware)
    features = await cpu.rdmsr(Msr.SEV_STATUS) >> SEV_STATUS_SHIFT
    await _first_save_area(processor, calling_area, features)
    for number, apic_id in enumerate(apic_ids[1:], 1):
        await _further(processor, number, apic_id, entry, features)
    return processor


async def further(cpu: GuestCpu, places: Places, number: int) -> Processor:
    """Another processor, which starts from the save area that the first has made for it."""
    handler = VcHandler(places.layout)
    cpu.set_handler(Vector.VC, handler)
    found = await protections.find(cpu)
    await page_tables.use(cpu, places.layout, found.c_bit)
    handler.c_bit = found.c_bit
    gpa = places.ghcb(number)
    await register(cpu, gpa)
    handler.ghcb = Ghcb(cpu, gpa)
    return Processor(number, handler.ghcb, Registry(cpu, places))


async def _apic_ids(processor: Processor) -> list[int]:
    """The APIC IDs of all processors, the own one first, as the host lists them; each is there once."""
    ghcb = processor.ghcb
    buffer = processor.places.layout.certificates
    await ghcb.call(Nae.APIC_ID_LIST, buffer, rax=1, needs=("rax",))
    raw = np.frombuffer(await ghcb.cpu.read(buffer, PAGE_SIZE), "<u4")
    count, own = int(raw[0]), (await ghcb.cpu.cpuid(SIGNATURE_LEAF)).ebx >> INITIAL_APIC_ID
    found = raw[1 : 1 + count].tolist()
    if not 0 < count <= PROCESSORS or len(set(found)) != count or own not in found:
        detail = f"{count} processors, the own one {own}: each once, and up to {PROCESSORS}"
        await terminate(ghcb.cpu, GeneralReason.GENERAL, detail)
    return [own, *(each for each in found if each != own)]


# What the guest finds.


async def _prepare(processor: Processor, firmware: Image) -> int:
    """The firmware and the memory that it starts with: where its calling area is."""
    cpu, places = processor.cpu, processor.places
    kinds = (SectionType.SECRETS, SectionType.CPUID, SectionType.SVSM_CAA)
    secrets, cpuid, area = [await _section(cpu, firmware, kind) for kind in kinds]
    await grant(cpu, places.firmware, FOUR_GIB - places.firmware >> PAGE_SHIFT)
    for section in firmware.sections:
        await _accept(processor, section)
    own = SECRETS_PAGE.unpack(await cpu.read(places.layout.secrets, PAGE_SIZE))
    keys = {f"vmpck{vmpl}": bytes(len(own.vmpck0)) for vmpl in range(GUEST_VMPL)}
    told = {
        "svsm_base": places.own.start,
        "svsm_size": len(places.own),
        "svsm_caa": area.gpa,
        "svsm_max_version": VERSION,
        "svsm_guest_vmpl": GUEST_VMPL,
    }
    await cpu.write(secrets.gpa, bytes(own.replace(**keys, **told)))
    page = CPUID_PAGE.unpack(await cpu.read(places.layout.cpuid, PAGE_SIZE))
    bit = SevCapability.SVSM_COMM_PAGE_MSR
    entries = tuple(
        each.replace(eax=each.eax | bit) if each.eax_in == ENCRYPTED_MEMORY_LEAF else each for each in page.entries
    )
    await cpu.write(cpuid.gpa, bytes(page.replace(entries=entries)))
    return area.gpa


async def _section(cpu: GuestCpu, firmware: Image, kind: SectionType) -> Section:
    """The firmware's one section of a kind; terminates where there is none."""
    found = firmware.sections_of(kind)
    if len(found) != 1:
        await terminate(cpu, GeneralReason.GENERAL, f"the firmware has {len(found)} sections {kind.name}, and not one")
    return found[0]


async def _accept(processor: Processor, section: Section) -> None:
    """Memory of a section: asked for, validated, zeroed, granted. It lies outside of the SVSM's own."""
    cpu, own = processor.cpu, processor.places.own
    pages = range(section.gpa >> PAGE_SHIFT, section.gpa + section.size >> PAGE_SHIFT)
    if section.gpa < own.stop and section.gpa + section.size > own.start:
        await terminate(cpu, GeneralReason.GENERAL, f"{section} of the firmware lies in the SVSM's memory")
    await ask(processor.ghcb, [pages], PageOperation.PRIVATE)
    codes, unchanged = await cpu.pvalidate(section.gpa, len(pages))
    if codes.any() or unchanged.any():
        await terminate(cpu, Reason.PVALIDATE, f"{section} of the firmware")
    await cpu.write(section.gpa, bytes(section.size))
    await grant(cpu, section.gpa, len(pages))


# Save areas.


async def _first_save_area(processor: Processor, calling_area: int, features: int) -> None:
    """The guest's first processor: from the reset vector on, at its VMPL; the host hears of it."""
    cpu, page = processor.cpu, processor.places.save_area(0)
    identity = await cpu.cpuid(SIGNATURE_LEAF)
    await cpu.write(page, bytes(reset_vmsa(BSP_RESET_EIP, identity.eax, features).replace(vmpl=GUEST_VMPL)))
    await _mark(cpu, page, GUEST_VMPL, VMSA_RIGHTS)
    await processor.registry.register(page, calling_area, 0)
    await processor.registry.use(page)
    await _create(processor, page, GUEST_VMPL, identity.ebx >> INITIAL_APIC_ID, features, ApCreation.ON_INIT)


async def _further(processor: Processor, number: int, apic_id: int, entry: int, features: int) -> None:
    """Another processor at VMPL0, which finds its number in RDI. It waits there for the guest to make it one."""
    page = processor.places.save_area(number)
    area = svsm_vmsa(entry, 0).replace(rdi=number, sev_features=features)
    await processor.cpu.write(page, bytes(area))
    await _mark(processor.cpu, page, _LESS_PRIVILEGED, 0)
    await _create(processor, page, 0, apic_id, features, ApCreation.CREATE)


async def _mark(cpu: GuestCpu, page: int, vmpl: int, rights: int) -> None:
    codes = await cpu.rmpadjust(page, 1, vmpl=vmpl, permissions=rights, vmsa=True)
    if codes.any():
        await terminate(cpu, GeneralReason.GENERAL, f"RMPADJUST of the save area {page:#x}: {codes[0]}")


async def _create(processor: Processor, page: int, vmpl: int, apic_id: int, features: int, request: ApCreation) -> None:
    info = AP_CREATION.pack(request=request, vmpl=vmpl, apic_id=apic_id)
    await processor.ghcb.call(Nae.AP_CREATION, int.from_bytes(info, "little"), page, rax=features)
