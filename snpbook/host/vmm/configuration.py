"""What a guest is made of, and everything that can be wrong with it before anything is made.

Sources: QEMU target/i386/sev.c (kinds of guests, sections of the SEV metadata), hw/i386/pc_sysfw.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from snpbook.spec import kvm as spec
from snpbook.spec.eras import Era
from snpbook.spec.guid import SEV_ES_RESET_BLOCK, SVSM_INFO
from snpbook.spec.image import Image, ImageError, SectionType
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.sizes import format_size
from snpbook.spec.uapi_kvm import HC_MAP_GPA_RANGE, Cap, VmType


class VmmError(ValueError):
    """A configuration that this VMM cannot launch."""


class GuestKind(Enum):
    """How much of a guest is protected."""

    PLAIN = "plain"
    SEV = "sev"
    SEV_ES = "sev-es"
    SNP = "snp"

    @property
    def vm_type(self) -> VmType:
        """Its type of VM, where the era has types."""
        return _TYPES[self]

    def has_private_memory(self, era: Era) -> bool:
        """Whether its slots have a file for private pages."""
        return self is GuestKind.SNP or (self is not GuestKind.PLAIN and era.sev_private_memory)

    def capabilities(self, era: Era, *, private: bool) -> list[tuple[Cap, int]]:
        """What is switched on for its VM, with the argument; `private` says whether it has private memory."""
        wanted = []
        if private and Cap.UNMAPPED_PRIVATE_MEM in era.capabilities:
            wanted.append((Cap.UNMAPPED_PRIVATE_MEM, 1))
        if private:
            wanted.append((Cap.EXIT_HYPERCALL, 1 << HC_MAP_GPA_RANGE))
        return wanted


_TYPES = {
    GuestKind.PLAIN: VmType.DEFAULT_VM,
    GuestKind.SEV: VmType.SEV_VM,
    GuestKind.SEV_ES: VmType.SEV_ES_VM,
    GuestKind.SNP: VmType.SNP_VM,
}


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """Kernel, initrd and command line for a direct boot, measured where kernel hashes are on."""

    kernel: bytes
    initrd: bytes = b""
    cmdline: str = ""


def check_configuration(
    image: Image, memory: int, vcpus: int, boot: DirectBoot | None, kind: GuestKind = GuestKind.SNP
) -> None:
    """Everything that can be wrong with a configuration, before anything is made; `boot` where it is measured.

    `VmmError` for a number that cannot be, `ImageError` where the image lacks what a launch needs.
    """
    if not 1 <= vcpus <= spec.MAX_VCPUS:
        raise VmmError(f"vcpus = {vcpus}: a guest has 1 to {spec.MAX_VCPUS} vCPUs")
    if memory % PAGE_SIZE or memory <= 0:
        raise VmmError(f"memory = {memory} bytes: the size of memory is a multiple of {PAGE_SIZE} bytes")
    if kind is GuestKind.SNP:
        _check_sections(image)
    if kind in (GuestKind.SEV_ES, GuestKind.SNP) and SEV_ES_RESET_BLOCK not in image.table:
        raise ImageError("the image has no SEV-ES reset block, which says where application processors start")
    need = max([spec.ONE_MIB, *(section.gpa + section.size for section in image.sections)])
    if memory < need:
        raise VmmError(f"memory of {format_size(memory)}: the image places sections up to {format_size(need)}")
    if not boot:
        return
    if kind is GuestKind.SNP and not image.sections_of(SectionType.KERNEL_HASHES):
        raise ImageError("a kernel is given, but the image has no section for kernel hashes")
    if kind is not GuestKind.SNP and not image.hash_table_base:
        raise ImageError("kernel specified but guest firmware has no hashes table GUID")


def check_svsm(svsm: Image, image: Image, era: Era, kind: GuestKind, boot: DirectBoot | None) -> None:
    """The same for a guest with an SVSM. A command line has no word for one (MODEL: QEMU's are unconfirmed)."""
    if kind is not GuestKind.SNP or not era.run_vmpl:
        raise VmmError(f"an SVSM needs an SNP guest, on a kernel that runs VMPLs: a {kind.value} guest on {era.name}")
    if boot:
        raise VmmError("a kernel is given with an SVSM: the image of an SVSM has no section for kernel hashes")
    if SVSM_INFO not in svsm.table or not svsm.sections or len(svsm.data) % PAGE_SIZE:
        raise ImageError("the image is no SVSM: whole pages, with SEV metadata and the entry point in its GUID table")
    _check_sections(svsm)
    end, top = max(section.gpa + section.size for section in svsm.sections), image.gpa - len(svsm.data)
    if end > top:
        raise ImageError(f"sections of the SVSM reach up to {end:#x}: its image begins at {top:#x}, below the firmware")


def _check_sections(image: Image) -> None:
    """Sections of whole pages that do not overlap: anything else cannot be launched page by page."""
    end = 0
    for section in sorted(image.sections, key=lambda section: section.gpa):
        if section.gpa % PAGE_SIZE or section.size % PAGE_SIZE or not section.size:
            raise ImageError(f"the section {section} of the SEV metadata is not whole pages")
        if section.gpa < end:
            raise ImageError(f"the section {section} of the SEV metadata overlaps another one")
        end = section.gpa + section.size
