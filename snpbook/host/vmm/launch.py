"""The encrypted launch, call by call: what is measured, in which order.

SNP: the firmware image as NORMAL pages, the sections of its SEV metadata in file order, then the VMSAs. SEV and SEV-ES:
the image, the table of kernel hashes, the VMSAs, the measurement. Source: QEMU target/i386/sev.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from snpbook.host.vmm.configuration import GuestKind
from snpbook.host.vmm.cpuid import cpuid_page
from snpbook.host.vmm.registers import set_reset_registers
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.image import Section, SectionType
from snpbook.spec.launch import kernel_hash_page, kernel_hash_table
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.uapi_kvm import Ioctl, MemoryAttribute
from snpbook.spec.uapi_sev import SevOp

if TYPE_CHECKING:
    from snpbook.host.vmm.guest import Vmm

Progress = Callable[[str, int, int], None]
_SECTION_PAGES = {
    SectionType.SEC_MEM: LaunchPage.ZERO,
    SectionType.SECRETS: LaunchPage.SECRETS,
    SectionType.CPUID: LaunchPage.CPUID,
    SectionType.SVSM_CAA: LaunchPage.ZERO,
    SectionType.KERNEL_HASHES: LaunchPage.ZERO,
}


def launch_guest(vmm: Vmm, policy: int, host_data: bytes, progress: Progress | None) -> None:
    """Launch a guest of any kind; one without SEV has nothing to launch but its registers."""
    for handle in vmm.handles:
        set_reset_registers(vmm, handle)
    if vmm.kind is GuestKind.SNP:
        _launch_snp(vmm, policy, host_data, progress)
    elif vmm.kind is not GuestKind.PLAIN:
        _launch_sev(vmm, policy)


def _launch_snp(vmm: Vmm, policy: int, host_data: bytes, progress: Progress | None) -> None:
    vmm.sev(SevOp.SNP_LAUNCH_START, policy=policy)
    parts = [(LaunchPage.NORMAL, vmm.image.gpa, len(vmm.image.data)), *(_section(vmm, s) for s in vmm.image.sections)]
    total, done = sum(size >> PAGE_SHIFT for _, _, size in parts), 0
    for kind, gpa, size in parts:
        _update(vmm, kind, gpa, size)
        done += size >> PAGE_SHIFT
        if progress:
            progress(kind.name, done, total)
    vmm.sev(SevOp.SNP_LAUNCH_FINISH, host_data=host_data)


def _section(vmm: Vmm, section: Section) -> tuple[LaunchPage, int, int]:
    """What a section becomes in the launch, its contents put into RAM first."""
    kind, size = _SECTION_PAGES[section.type], section.size
    if section.type is SectionType.KERNEL_HASHES and vmm.boot:
        table = kernel_hash_table(vmm.boot.kernel, vmm.boot.initrd, vmm.boot.cmdline)
        vmm.write(section.gpa, kernel_hash_page(table, vmm.image.hash_table_base))
        kind = LaunchPage.NORMAL
    elif section.type is SectionType.CPUID:
        vmm.write(section.gpa, cpuid_page(vmm))
    if section.type in (SectionType.SECRETS, SectionType.CPUID):
        size = PAGE_SIZE
    return kind, section.gpa, size


def _update(vmm: Vmm, kind: LaunchPage, gpa: int, size: int) -> None:
    """One range: made private first where the era wants it so, then as many calls as the kernel takes."""
    if not size:
        return
    address = vmm.user(gpa)
    if vmm.kernel.era.launch_by_hva:
        vmm.sev(SevOp.SNP_LAUNCH_UPDATE, uaddr=address, len=size, page_type=kind)
        return
    set_attributes(vmm, gpa, size, private=True)
    left = {"gfn_start": gpa >> PAGE_SHIFT, "uaddr": address, "len": size}
    while left["len"]:
        answer = vmm.sev(SevOp.SNP_LAUNCH_UPDATE, **left, type=kind)
        assert answer is not None
        left = {name: getattr(answer, name) for name in left}


def set_attributes(vmm: Vmm, gpa: int, size: int, *, private: bool) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES, again for what is left where the era may stop half-way."""
    era = vmm.kernel.era
    attributes = MemoryAttribute.PRIVATE if private else MemoryAttribute(0)
    while size:
        given = structs.MEMORY_ATTRIBUTES.pack(address=gpa, size=size, attributes=attributes)
        answer = structs.MEMORY_ATTRIBUTES.unpack(vmm.process.ioctl(vmm.vm_fd, era.set_attributes, given))
        gpa, size = (answer.address, answer.size) if era.attributes_partial else (gpa, 0)


def _launch_sev(vmm: Vmm, policy: int) -> None:
    """The legacy launch; `vmm.measurement` is what the firmware answers."""
    vmm.sev(SevOp.LAUNCH_START, policy=policy)
    for block in vmm.blocks:
        region = structs.ENC_REGION.pack(addr=block.address, size=block.size)
        vmm.process.ioctl(vmm.vm_fd, Ioctl.MEMORY_ENCRYPT_REG_REGION, region)
    vmm.sev(SevOp.LAUNCH_UPDATE_DATA, uaddr=vmm.user(vmm.image.gpa), len=len(vmm.image.data))
    if vmm.boot:
        table = kernel_hash_table(vmm.boot.kernel, vmm.boot.initrd, vmm.boot.cmdline)
        base = vmm.image.hash_table_base
        vmm.write(base, table)
        vmm.sev(SevOp.LAUNCH_UPDATE_DATA, uaddr=vmm.user(base), len=len(table))
    if vmm.kind is GuestKind.SEV_ES:
        vmm.sev(SevOp.LAUNCH_UPDATE_VMSA)
    vmm.measurement = _measurement(vmm)
    vmm.sev(SevOp.LAUNCH_FINISH)


def _measurement(vmm: Vmm) -> bytes:
    """LAUNCH_MEASURE: once to learn the length, once for the measurement and its nonce."""
    asked = vmm.sev(SevOp.LAUNCH_MEASURE, asks_length=True)
    assert asked is not None
    with vmm.scratch.placed(bytes(asked.len)) as address:
        vmm.sev(SevOp.LAUNCH_MEASURE, uaddr=address, len=asked.len)
        return vmm.process.load(address, asked.len)
