"""The encrypted launch, call by call: what is measured, in which order.

SNP: the firmware image as NORMAL pages, the sections of its SEV metadata in file order, then the VMSAs. SEV and SEV-ES:
the image, the table of kernel hashes, the VMSAs, the measurement. Source: QEMU target/i386/sev.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from snpbook.host.refusal import KernelError
from snpbook.host.vmm.configuration import DirectBoot, GuestKind
from snpbook.host.vmm.cpuid import cpuid_page, mismatches
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.image import Section, SectionType
from snpbook.spec.launch import ID_AUTH, kernel_hash_page, kernel_hash_table
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.qemu import HOST_DATA_SIZE
from snpbook.spec.uapi_kvm import MemoryAttribute
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


def launch_snp(vmm: Vmm, progress: Progress | None) -> None:
    """The image, the sections of its metadata, the end: everything is measured at the first start.

    An SVSM comes behind the firmware, and brings the sections of its own metadata.
    """
    parts = [(LaunchPage.NORMAL, vmm.image.gpa, len(vmm.image.data))]
    if vmm.svsm:
        parts.append((LaunchPage.NORMAL, vmm.svsm_gpa, len(vmm.svsm.data)))
    parts += [_section(vmm, section) for section in (vmm.svsm or vmm.image).sections]
    total, done = sum(size >> PAGE_SHIFT for _, _, size in parts), 0
    for kind, gpa, size in parts:
        _update(vmm, kind, gpa, size)
        done += size >> PAGE_SHIFT
        if progress:
            progress(kind.name, done, total)
    _finish(vmm)


def _finish(vmm: Vmm) -> None:
    given = vmm.object
    assert given is not None
    fields: dict[str, Any] = {"id_block_en": bool(given.id_block), "auth_key_en": given.author_key_enabled}
    if given.vcek_disabled:
        fields["vcek_disabled"] = True
    auth = given.id_auth.ljust(ID_AUTH.size, b"\0") if given.id_block else b""
    with (
        vmm.scratch.placed(given.id_block) as fields["id_block_uaddr"],
        vmm.scratch.placed(auth) as fields["id_auth_uaddr"],
        vmm.reporting("sev_snp_launch_finish: SNP_LAUNCH_FINISH"),
    ):
        vmm.sev(SevOp.SNP_LAUNCH_FINISH, host_data=given.host_data.ljust(HOST_DATA_SIZE, b"\0"), **fields)


def _section(vmm: Vmm, section: Section) -> tuple[LaunchPage, int, int]:
    """What a section becomes in the launch, its contents put into RAM first."""
    kind, size = _SECTION_PAGES[section.type], section.size
    if section.type is SectionType.KERNEL_HASHES and vmm.measured_boot:
        vmm.write(section.gpa, kernel_hash_page(_hashes(vmm.measured_boot), vmm.image.hash_table_base))
        kind = LaunchPage.NORMAL
    elif section.type is SectionType.CPUID:
        vmm.write(section.gpa, cpuid_page(vmm))
    if section.type in (SectionType.SECRETS, SectionType.CPUID):
        size = PAGE_SIZE
    return kind, section.gpa, size


def _hashes(boot: DirectBoot) -> bytes:
    return kernel_hash_table(boot.kernel, boot.initrd, boot.cmdline)


def _update(vmm: Vmm, kind: LaunchPage, gpa: int, size: int) -> None:
    """One range: made private first where the era wants it so, then as many calls as the kernel takes."""
    if not size:
        return
    given = vmm.read(gpa, PAGE_SIZE) if kind is LaunchPage.CPUID else b""
    try:
        with vmm.reporting("sev_snp_launch_update: SNP_LAUNCH_UPDATE"):
            _add_pages(vmm, kind, gpa, size)
    except KernelError:
        if given:
            for line in [*mismatches(given, vmm.read(gpa, PAGE_SIZE)), "SEV-SNP: failed update CPUID page"]:
                vmm.report(line)
        raise


def _add_pages(vmm: Vmm, kind: LaunchPage, gpa: int, size: int) -> None:
    address = vmm.user(gpa)
    if vmm.kernel.era.launch_by_hva:
        vmm.sev(SevOp.SNP_LAUNCH_UPDATE, uaddr=address, len=size, page_type=kind)
        return
    set_attributes(vmm, gpa, size, private=True)
    left: dict[str, Any] = {"gfn_start": gpa >> PAGE_SHIFT, "uaddr": address, "len": size}
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


# SEV and SEV-ES.


def start_private(vmm: Vmm) -> None:
    """With private slots all memory begins as private: the guest tells of what it shares (inferred)."""
    for block in vmm.blocks:
        if block.private_fd >= 0:
            set_attributes(vmm, block.gpa, block.size, private=True)


def update_data(vmm: Vmm) -> None:
    """The image, and the table of kernel hashes, as soon as there is memory for them."""
    parts = [(vmm.image.gpa, len(vmm.image.data))]
    if vmm.measured_boot:
        table = _hashes(vmm.measured_boot)
        vmm.write(vmm.image.hash_table_base, table)
        parts.append((vmm.image.hash_table_base, len(table)))
    for gpa, size in parts:
        with vmm.reporting("sev_launch_update_data: LAUNCH_UPDATE"):
            vmm.sev(SevOp.LAUNCH_UPDATE_DATA, uaddr=vmm.user(gpa), len=size)


def measure(vmm: Vmm) -> None:
    """The VMSAs, then LAUNCH_MEASURE: once to learn the length, once for the measurement and its nonce."""
    if vmm.kind is GuestKind.SEV_ES:
        with vmm.reporting("sev_launch_update_vmsa: LAUNCH_UPDATE_VMSA"):
            vmm.sev(SevOp.LAUNCH_UPDATE_VMSA)
    with vmm.reporting("sev_launch_get_measure: LAUNCH_MEASURE"):
        asked = vmm.sev(SevOp.LAUNCH_MEASURE, asks_length=True)
        assert asked is not None
        with vmm.scratch.placed(bytes(asked.len)) as address:
            vmm.sev(SevOp.LAUNCH_MEASURE, uaddr=address, len=asked.len)
            vmm.measurement = vmm.process.load(address, asked.len)


def inject_secret(vmm: Vmm, header: bytes, secret: bytes, gpa: int) -> None:
    """LAUNCH_SECRET: a packet, decrypted by the firmware to where the guest finds it."""
    with vmm.scratch.placed(header) as header_at, vmm.scratch.placed(secret) as secret_at:
        vmm.sev(
            SevOp.LAUNCH_SECRET,
            hdr_uaddr=header_at,
            hdr_len=len(header),
            guest_uaddr=vmm.user(gpa),
            guest_len=len(secret),
            trans_uaddr=secret_at,
            trans_len=len(secret),
        )
