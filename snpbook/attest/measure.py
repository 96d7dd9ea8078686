"""The launch digest that a guest ought to have, from its firmware, kernel hashes and vCPUs alone.

Computed from the documents with hashlib, and apart from the firmware model on purpose: each is the other's check.
Sources: SNP ABI (SNP_LAUNCH_UPDATE), QEMU, EC2 and GCE for the order of pages, SEV API for legacy guests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from snpbook.attest.measure_chain import ZERO_DIGEST, Run, launch_digest
from snpbook.spec import guid
from snpbook.spec.image import FOUR_GIB, Image, ImageError, Section, SectionType
from snpbook.spec.launch import kernel_hash_page
from snpbook.spec.pages import PAGE_SIZE, LaunchPage
from snpbook.spec.vmsa import (
    BSP_RESET_EIP,
    INITIAL_VMSA_GPA,
    SNP_ACTIVE,
    UNMEASURED_FROM,
    UNMEASURED_TO,
    Vmm,
    reset_vmsa,
    svsm_vmsa,
)


def firmware_digest(image: Image) -> bytes:
    """The launch digest after the firmware's own pages: the start value of a launch that leaves the file aside."""
    return launch_digest([_firmware(image)])


def snp_digest(
    image: Image,
    vmsas: Iterable[bytes],
    *,
    vmm: Vmm = Vmm.QEMU,
    kernel_hashes: bytes | None = None,
    firmware: bytes | None = None,
) -> bytes:
    """The measurement of an SNP guest: firmware, metadata sections in file order, then one VMSA per vCPU.

    `vmsas` are pages as of `vmsa_pages`, `kernel_hashes` the table of `spec.launch.kernel_hash_table`, `firmware` a
    `firmware_digest` to start from. `ImageError` where the image cannot be launched so.
    """
    runs = snp_runs(image, vmsas, vmm=vmm, kernel_hashes=kernel_hashes, firmware=firmware)
    return launch_digest(runs, firmware or ZERO_DIGEST)


def snp_runs(
    image: Image,
    vmsas: Iterable[bytes],
    *,
    vmm: Vmm = Vmm.QEMU,
    kernel_hashes: bytes | None = None,
    firmware: bytes | None = None,
) -> list[Run]:
    """What the launch of `snp_digest` adds, without the firmware's own pages where `firmware` stands for them."""
    pages = [] if firmware else [_firmware(image)]
    return [*pages, *_sections(image, vmm, kernel_hashes), *_vmsas(vmsas)]


def svsm_runs(image: Image, svsm: Image, vars_size: int, vmsas: Iterable[bytes]) -> list[Run]:
    """What the launch of a guest with an SVSM adds under QEMU: the SVSM's image carries the sections.

    `vars_size` is the size in bytes of the variable store between the two images.
    """
    module = Run("SVSM", LaunchPage.NORMAL, svsm_gpa(image, svsm, vars_size), svsm.data)
    return [_firmware(image), module, *_sections(svsm, Vmm.QEMU, None), *_vmsas(vmsas)]


def legacy_runs(image: Image, *, vmsas: Iterable[bytes] = (), kernel_hashes: bytes | None = None) -> list[Run]:
    """What the launch of an SEV guest adds, or with `vmsas` of an SEV-ES guest: plain bytes in any number.

    `ImageError` where a kernel is given and the image has no place for its hashes.
    """
    runs = [Run("firmware", LaunchPage.NORMAL, FOUR_GIB - len(image.data), image.data)]
    if kernel_hashes:
        if not image.hash_table_base:
            raise ImageError("a kernel is given, but the image has no area for kernel hashes in its GUID table")
        runs.append(Run("kernel hashes", LaunchPage.NORMAL, image.hash_table_base, kernel_hashes))
    return runs + [Run(_vmsa_name(vcpu), LaunchPage.VMSA, INITIAL_VMSA_GPA, page) for vcpu, page in enumerate(vmsas)]


def vmsa_pages(
    image: Image, vcpus: int, vcpu_signature: int, sev_features: int = SNP_ACTIVE, vmm: Vmm = Vmm.QEMU
) -> list[bytes]:
    """The reset state of each vCPU: the first starts at the reset vector, the others where the image says.

    `vcpu_signature` is CPUID Fn1 EAX of the vCPU type; `sev_features` is 0 for SEV-ES.
    """
    ap_eip = image.ap_reset_eip
    first = bytes(reset_vmsa(BSP_RESET_EIP, vcpu_signature, sev_features, vmm))
    if vcpus == 1:
        return [first]
    if not ap_eip:
        raise ImageError("the image's SEV-ES reset block is 0: only one vCPU can start")
    return [first, *[bytes(reset_vmsa(ap_eip, vcpu_signature, sev_features, vmm))] * (vcpus - 1)]


def svsm_vmsa_pages(image: Image, svsm: Image, vars_size: int, vcpus: int, vcpu_signature: int) -> list[bytes]:
    """The start state of each vCPU of a guest with an SVSM: all start at the entry that the SVSM's table gives."""
    entry = svsm.svsm_entry
    return [bytes(svsm_vmsa(svsm_gpa(image, svsm, vars_size) + entry, vcpu_signature))] * vcpus


def svsm_gpa(image: Image, svsm: Image, vars_size: int) -> int:
    """Where QEMU puts an SVSM: below the variable store, which lies below the firmware."""
    gpa = image.gpa - vars_size - len(svsm.data)
    if gpa < 0 or len(svsm.data) % PAGE_SIZE:
        raise ImageError(f"an SVSM of {len(svsm.data)} bytes is not whole pages, or does not fit below the firmware")
    return gpa


def vmsa_run(vcpu: int, page: bytes, gpa: int = INITIAL_VMSA_GPA) -> Run:
    """The VMSA of one vCPU as SNP measures it: the fields for its TSC count as zero."""
    measured = page[:UNMEASURED_FROM] + bytes(UNMEASURED_TO - UNMEASURED_FROM) + page[UNMEASURED_TO:]
    return Run(_vmsa_name(vcpu), LaunchPage.VMSA, gpa, measured)


def _vmsa_name(vcpu: int) -> str:
    return f"VMSA of vCPU {vcpu}"


def _vmsas(pages: Iterable[bytes]) -> list[Run]:
    return [vmsa_run(vcpu, page) for vcpu, page in enumerate(pages)]


def _firmware(image: Image) -> Run:
    return Run("firmware", LaunchPage.NORMAL, image.gpa, image.data)


def _sections(image: Image, vmm: Vmm, kernel_hashes: bytes | None) -> Iterator[Run]:
    sections = image.sections
    if kernel_hashes and not image.sections_of(SectionType.KERNEL_HASHES):
        raise ImageError("a kernel is given, but the image's SEV metadata has no section for kernel hashes")
    if vmm is Vmm.EC2:  # adds the CPUID page last
        sections = tuple(sorted(sections, key=lambda section: section.type is SectionType.CPUID))
    for section in sections:
        name = f"section {section.type.name}"
        match section.type:
            case SectionType.SECRETS:
                yield Run(name, LaunchPage.SECRETS, section.gpa, blank=PAGE_SIZE)
            case SectionType.CPUID:
                yield Run(name, LaunchPage.CPUID, section.gpa, blank=PAGE_SIZE)
            case SectionType.KERNEL_HASHES if kernel_hashes:
                yield Run(name, LaunchPage.NORMAL, section.gpa, _kernel_page(image, section, kernel_hashes))
            case _ if section.size % PAGE_SIZE:
                raise ImageError(f"{section} is not whole pages")
            case SectionType.SEC_MEM if vmm is Vmm.GCE:
                yield Run(name, LaunchPage.UNMEASURED, section.gpa, blank=section.size)
            case SectionType.SEC_MEM | SectionType.SVSM_CAA | SectionType.KERNEL_HASHES:
                yield Run(name, LaunchPage.ZERO, section.gpa, blank=section.size)


def _kernel_page(image: Image, section: Section, kernel_hashes: bytes) -> bytes:
    if guid.HASH_TABLE_AREA not in image.table:
        raise ImageError("a kernel is given, but the image has no area for kernel hashes in its GUID table")
    if section.size != PAGE_SIZE:
        raise ImageError(f"{section}: kernel hashes take one page")
    try:
        return kernel_hash_page(kernel_hashes, image.hash_table_base)
    except ValueError as error:
        raise ImageError(str(error)) from error
