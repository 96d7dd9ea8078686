"""The VMM: reads a firmware image, lays out guest memory, launches it page by page, serves its exits.

The order of the launch is QEMU's: the image as NORMAL pages, then the sections of the SEV metadata in
file order, then the VMSAs. Source: QEMU target/i386/sev.c; RFC v7's QEMU for conversions.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from snpbook.host.convert import change_page_state, change_page_state_by_msr
from snpbook.host.ghcb import complete
from snpbook.host.kernel import Kernel
from snpbook.host.kvm import Vcpu, Vm
from snpbook.host.memory import UserMemory
from snpbook.host.refusal import KernelError, check
from snpbook.host.run import FAULT_LIMIT, PRIVATE_FAULT, run
from snpbook.spec import kvm as spec
from snpbook.spec.ghcb import MSR_CODE_MASK
from snpbook.spec.guid import SEV_ES_RESET_BLOCK
from snpbook.spec.image import FOUR_GIB, Image, ImageError, Section, SectionType
from snpbook.spec.kvm import Cmos, KvmExit, MemoryAttribute
from snpbook.spec.launch import CPUID_PAGE, kernel_hash_page, kernel_hash_table
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.sizes import format_size
from snpbook.spec.vmsa import reset_vmsa

_SECTION_PAGES = {
    SectionType.SEC_MEM: LaunchPage.ZERO,
    SectionType.SECRETS: LaunchPage.SECRETS,
    SectionType.CPUID: LaunchPage.CPUID,
    SectionType.SVSM_CAA: LaunchPage.ZERO,
    SectionType.KERNEL_HASHES: LaunchPage.ZERO,
}


class VmmError(ValueError):
    """A configuration that this VMM cannot launch."""


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """Kernel, initrd and command line for a measured direct boot."""

    kernel: bytes
    initrd: bytes = b""
    cmdline: str = ""


class Vmm:
    """One guest: `memory` bytes of RAM, `vcpus` processors, a firmware image.

    `VmmError` for a size that cannot be, `ImageError` where the image lacks what is asked of it.
    """

    def __init__(
        self, kernel: Kernel, image: Image, *, memory: int, vcpus: int, vcpu_signature: int, boot: DirectBoot | None
    ) -> None:
        check_configuration(image, memory, vcpus, boot)
        self.image, self.memory, self.boot = image, memory, boot
        self._signature = vcpu_signature
        self.vm: Vm = kernel.kvm.create_vm()
        self._cmos_index = 0
        try:
            self._add_memory(kernel, image)
            self.vcpus: list[Vcpu] = [self.vm.create_vcpu(number) for number in range(vcpus)]
        except KernelError:
            self.vm.destroy()
            raise

    def __repr__(self) -> str:
        return f"Vmm({self.memory >> 20} MiB, {len(self.vcpus)} vCPUs, {self.image!r})"

    def _add_memory(self, kernel: Kernel, image: Image) -> None:
        low = min(self.memory, spec.LOW_RAM_END)
        regions = [(0, low), (image.gpa, len(image.data))]
        if self.memory > low:
            regions.append((FOUR_GIB, self.memory - low))
        files: list[UserMemory] = []
        for number, (gpa, size) in enumerate(regions):
            files.append(kernel.kvm.user_memory(size))
            self.vm.set_memory_region(number, gpa >> PAGE_SHIFT, files[-1], kernel.kvm.restricted_file(size))
        self.ram, rom = files[0], files[1]
        rom.write(0, image.data)

    def launch(
        self, policy: int, host_data: bytes = bytes(32), progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Launch the guest; `progress(what, pages done, pages in all)` is called between the parts."""
        parts = [(LaunchPage.NORMAL, self.image.gpa, len(self.image.data)), *map(self._section, self.image.sections)]
        total = sum(size >> PAGE_SHIFT for _, _, size in parts)
        self.vm.snp_launch_start(policy)
        done = 0
        for kind, gpa, size in parts:
            self.vm.snp_launch_update(gpa, size, kind)
            done += size >> PAGE_SHIFT
            if progress:
                progress(kind.name, done, total)
        for vcpu in self.vcpus:
            eip = self.image.ap_reset_eip if vcpu.number else self.image.bsp_reset_eip
            vcpu.set_registers(reset_vmsa(eip, self._signature, spec.SEV_FEATURES))
        self.vm.snp_launch_finish(host_data)

    def _section(self, section: Section) -> tuple[LaunchPage, int, int]:
        """What a section becomes in the launch, its contents put into RAM first."""
        kind, size = _SECTION_PAGES[section.type], section.size
        if section.type is SectionType.KERNEL_HASHES and self.boot:
            table = kernel_hash_table(self.boot.kernel, self.boot.initrd, self.boot.cmdline)
            self.ram.write(section.gpa, kernel_hash_page(table, self.image.hash_table_base))
            kind = LaunchPage.NORMAL
        elif section.type is SectionType.CPUID:
            self.ram.write(section.gpa, CPUID_PAGE.pack())
        if section.type in (SectionType.SECRETS, SectionType.CPUID):
            size = PAGE_SIZE
        return kind, section.gpa, size

    def run(self, vcpu: Vcpu) -> KvmExit:
        """Run a vCPU until it halts or ends, serving its exits; why it stopped.

        `KernelError` ELOOP where converting one page to and fro does not get the guest on.
        """
        repeated, last = 0, -1
        while True:
            exit_ = run(vcpu)
            detail = exit_.detail
            gpa = detail["gpa"] if exit_.reason is KvmExit.MEMORY_FAULT else -1
            repeated, last = repeated + 1 if gpa == last >= 0 else 0, gpa
            check(repeated < FAULT_LIMIT, errno.ELOOP, "a conversion gets the guest on", "progress", gpa)
            match exit_.reason:
                case KvmExit.IO:
                    complete(vcpu, rax=self._port(**detail))
                case KvmExit.VMGEXIT if detail["ghcb_msr"] & MSR_CODE_MASK:
                    change_page_state_by_msr(self.vm, vcpu, detail["ghcb_msr"])
                case KvmExit.VMGEXIT:
                    change_page_state(self.vm, vcpu)
                case KvmExit.MEMORY_FAULT:
                    private = MemoryAttribute.PRIVATE if detail["flags"] & PRIVATE_FAULT else MemoryAttribute(0)
                    self.vm.set_memory_attributes(detail["gpa"], detail["size"], private)
                case reason:
                    return reason

    def _port(self, is_in: int, port: int, value: int) -> int:
        """The clock's registers, where firmware reads the size of memory; other ports read all ones."""
        if port == Cmos.INDEX_PORT and not is_in:
            self._cmos_index = value & spec.CMOS_MASK
        if port == Cmos.DATA_PORT and is_in:
            return self._cmos().get(self._cmos_index, 0)
        return value if not is_in else 0xFF

    def _cmos(self) -> dict[int, int]:
        low = min(self.memory, spec.LOW_RAM_END)
        above_1m = min(low - spec.ONE_MIB, spec.CMOS_LIMIT_1M) // spec.CMOS_UNIT_1M
        above_16m = max(low - spec.SIXTEEN_MIB, 0) // spec.CMOS_UNIT_16M
        above_4g = (self.memory - low) // spec.CMOS_UNIT_16M
        return {
            Cmos.ABOVE_1M_LOW: above_1m & 0xFF,
            Cmos.ABOVE_1M_HIGH: above_1m >> 8,
            Cmos.ABOVE_16M_LOW: above_16m & 0xFF,
            Cmos.ABOVE_16M_HIGH: above_16m >> 8,
            Cmos.ABOVE_4G_LOW: above_4g & 0xFF,
            Cmos.ABOVE_4G_MID: above_4g >> 8 & 0xFF,
            Cmos.ABOVE_4G_HIGH: above_4g >> 16,
        }


def check_configuration(image: Image, memory: int, vcpus: int, boot: DirectBoot | None) -> None:
    """Everything that can be wrong with a configuration, before anything is made.

    `VmmError` for a number that cannot be, `ImageError` where the image lacks what a launch needs.
    """
    if not 1 <= vcpus <= spec.MAX_VCPUS:
        raise VmmError(f"vcpus = {vcpus}: a guest has 1 to {spec.MAX_VCPUS} vCPUs")
    if memory % PAGE_SIZE or memory <= 0:
        raise VmmError(f"memory = {memory} bytes: the size of memory is a multiple of {PAGE_SIZE} bytes")
    _check_sections(image)
    if SEV_ES_RESET_BLOCK not in image.table:
        raise ImageError("the image has no SEV-ES reset block, which says where application processors start")
    need = max([spec.ONE_MIB, *(section.gpa + section.size for section in image.sections)])
    if memory < need:
        raise VmmError(f"memory of {format_size(memory)}: the image places sections up to {format_size(need)}")
    if boot and not image.sections_of(SectionType.KERNEL_HASHES):
        raise ImageError("a kernel is given, but the image has no section for kernel hashes")


def _check_sections(image: Image) -> None:
    """Sections of whole pages that do not overlap: anything else cannot be launched page by page."""
    end = 0
    for section in sorted(image.sections, key=lambda section: section.gpa):
        if section.gpa % PAGE_SIZE or section.size % PAGE_SIZE or not section.size:
            raise ImageError(f"the section {section} of the SEV metadata is not whole pages")
        if section.gpa < end:
            raise ImageError(f"the section {section} of the SEV metadata overlaps another one")
        end = section.gpa + section.size
