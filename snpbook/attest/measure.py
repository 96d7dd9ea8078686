"""The launch digest that a guest ought to have, from its firmware, kernel hashes and vCPUs alone.

Computed from the documents with hashlib, and apart from the firmware model on purpose: each is the other's check.
Sources: SNP ABI (PAGE_INFO, SNP_LAUNCH_UPDATE), QEMU, EC2 and GCE for the order of pages, SEV API for legacy guests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256, sha384
from struct import Struct

from snpbook.spec import guid
from snpbook.spec.image import Image, ImageError, Section, SectionType
from snpbook.spec.launch import DIGEST_SIZE, PAGE_INFO, kernel_hash_page
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

ZERO_DIGEST = bytes(DIGEST_SIZE)
"""The launch digest before the first page, and the contents of pages whose bytes are not measured."""

_pack_info = Struct(f"<{DIGEST_SIZE}s{DIGEST_SIZE}s8sQ").pack
"""PAGE_INFO in the form that a loop over pages can afford: both digests, the words below, the gpa."""
_WORDS = {
    kind: PAGE_INFO.pack(length=PAGE_INFO.size, page_type=kind)[2 * DIGEST_SIZE : PAGE_INFO.offset("gpa")]
    for kind in LaunchPage
}
"""Length, type and permissions of a page, which nothing but its type decides."""


def firmware_digest(image: Image) -> bytes:
    """The launch digest after the firmware's own pages: the start value of a launch that leaves the file aside."""
    return _add_file(ZERO_DIGEST, image.data, image.gpa)


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
    digest = firmware_digest(image) if firmware is None else firmware
    return _add_vmsas(_add_sections(digest, image, vmm, kernel_hashes), vmsas)


def svsm_digest(image: Image, svsm: Image, vars_size: int, vmsas: Iterable[bytes]) -> bytes:
    """The measurement of a guest under QEMU with an SVSM, whose image carries the sections.

    `vars_size` is the size in bytes of the variable store between the two images.
    """
    digest = _add_file(firmware_digest(image), svsm.data, svsm_gpa(image, svsm, vars_size))
    return _add_vmsas(_add_sections(digest, svsm, Vmm.QEMU, None), vmsas)


def legacy_digest(image: Image, *, vmsas: Sequence[bytes] = (), kernel_hashes: bytes | None = None) -> bytes:
    """The digest in the LAUNCH_MEASURE of an SEV guest, or with `vmsas` of an SEV-ES guest: SHA-256 of all bytes."""
    if kernel_hashes and not image.hash_table_base:
        raise ImageError("a kernel is given, but the image has no area for kernel hashes in its GUID table")
    return sha256(b"".join([image.data, kernel_hashes or b"", *vmsas])).digest()


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
    if guid.SVSM_INFO not in svsm.table:
        raise ImageError(f"no SVSM entry point ({guid.SVSM_INFO}) in the GUID table")
    entry = int.from_bytes(svsm.table[guid.SVSM_INFO][:4], "little")
    return [bytes(svsm_vmsa(svsm_gpa(image, svsm, vars_size) + entry, vcpu_signature))] * vcpus


def svsm_gpa(image: Image, svsm: Image, vars_size: int) -> int:
    """Where QEMU puts an SVSM: below the variable store, which lies below the firmware."""
    gpa = image.gpa - vars_size - len(svsm.data)
    if gpa < 0 or len(svsm.data) % PAGE_SIZE:
        raise ImageError(f"an SVSM of {len(svsm.data)} bytes is not whole pages, or does not fit below the firmware")
    return gpa


def _add_sections(digest: bytes, image: Image, vmm: Vmm, kernel_hashes: bytes | None) -> bytes:
    sections = image.sections
    if kernel_hashes and not image.sections_of(SectionType.KERNEL_HASHES):
        raise ImageError("a kernel is given, but the image's SEV metadata has no section for kernel hashes")
    if vmm is Vmm.EC2:  # adds the CPUID page last
        sections = tuple(sorted(sections, key=lambda section: section.type is SectionType.CPUID))
    for section in sections:
        match section.type:
            case SectionType.SECRETS:
                digest = _add(digest, LaunchPage.SECRETS, section.gpa)
            case SectionType.CPUID:
                digest = _add(digest, LaunchPage.CPUID, section.gpa)
            case SectionType.KERNEL_HASHES if kernel_hashes:
                digest = _add_file(digest, _kernel_page(image, section, kernel_hashes), section.gpa)
            case SectionType.SEC_MEM if vmm is Vmm.GCE:
                digest = _add_blank(digest, LaunchPage.UNMEASURED, section)
            case SectionType.SEC_MEM | SectionType.SVSM_CAA | SectionType.KERNEL_HASHES:
                digest = _add_blank(digest, LaunchPage.ZERO, section)
    return digest


def _kernel_page(image: Image, section: Section, kernel_hashes: bytes) -> bytes:
    if guid.HASH_TABLE_AREA not in image.table:
        raise ImageError("a kernel is given, but the image has no area for kernel hashes in its GUID table")
    if section.size != PAGE_SIZE:
        raise ImageError(f"{section}: kernel hashes take one page")
    try:
        return kernel_hash_page(kernel_hashes, image.hash_table_base)
    except ValueError as error:
        raise ImageError(str(error)) from error


def _add_vmsas(digest: bytes, vmsas: Iterable[bytes]) -> bytes:
    for page in vmsas:
        measured = page[:UNMEASURED_FROM] + bytes(UNMEASURED_TO - UNMEASURED_FROM) + page[UNMEASURED_TO:]
        digest = _add(digest, LaunchPage.VMSA, INITIAL_VMSA_GPA, sha384(measured).digest())
    return digest


def _add_blank(digest: bytes, kind: LaunchPage, section: Section) -> bytes:
    if section.size % PAGE_SIZE:
        raise ImageError(f"{section} is not whole pages")
    for gpa in range(section.gpa, section.gpa + section.size, PAGE_SIZE):
        digest = _add(digest, kind, gpa)
    return digest


def _add_file(digest: bytes, data: bytes, gpa: int) -> bytes:
    """Add NORMAL pages. A page equal to the one before it, as in the padding of images, is hashed once."""
    words, view = _WORDS[LaunchPage.NORMAL], memoryview(data)
    before: memoryview | None = None
    for offset in range(0, len(data), PAGE_SIZE):
        if before is None or not data.startswith(before, offset):
            before = view[offset : offset + PAGE_SIZE]
            contents = sha384(before).digest()
        digest = sha384(_pack_info(digest, contents, words, gpa + offset)).digest()
    return digest


def _add(digest: bytes, kind: LaunchPage, gpa: int, contents: bytes = ZERO_DIGEST) -> bytes:
    return sha384(_pack_info(digest, contents, _WORDS[kind], gpa)).digest()
