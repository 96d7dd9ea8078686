"""CPUID as the VMM has it: what a vCPU answers, and the page of it that an SNP guest is launched with.

Sources: QEMU target/i386/kvm/kvm.c (kvm_x86_build_cpuid), target/i386/sev.c (snp_populate_cpuid_info).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.cpuid import (
    EXTENDED_SIGNATURE_LEAF,
    INITIAL_APIC_ID,
    PROCESSOR_TOPOLOGY_LEAF,
    SIGNATURE_LEAF,
    TOPOLOGY_LEAVES,
    XSAVE_BASIC_SIZE,
    XSAVE_LEAF,
)
from snpbook.spec.launch import CPUID_ENTRY, CPUID_PAGE
from snpbook.spec.layout import Record
from snpbook.spec.uapi_kvm import Ioctl

if TYPE_CHECKING:
    from snpbook.host.vmm.guest import Vmm


def vcpu_entries(vmm: Vmm, number: int) -> list[Record]:
    """What KVM supports, under the signature of the vCPU model and with the vCPU's own APIC id."""
    return [_own(each, vmm.signature, number) for each in _entries(vmm, vmm.kvm_fd, Ioctl.GET_SUPPORTED_CPUID)]


def _own(entry: Record, signature: int, apic_id: int) -> Record:
    if entry.function in (SIGNATURE_LEAF, EXTENDED_SIGNATURE_LEAF):
        entry = entry.replace(eax=signature)
    if entry.function == SIGNATURE_LEAF:
        low = entry.ebx & (1 << INITIAL_APIC_ID) - 1
        entry = entry.replace(ebx=low | (apic_id & (1 << 8) - 1) << INITIAL_APIC_ID)
    if entry.function in TOPOLOGY_LEAVES:
        entry = entry.replace(edx=apic_id)
    return entry.replace(eax=apic_id) if entry.function == PROCESSOR_TOPOLOGY_LEAF else entry


def cpuid_page(vmm: Vmm) -> bytes:
    """The CPUID page as QEMU fills it, from KVM_GET_CPUID2 of the first vCPU."""
    found = [_cpuid_entry(each) for each in _entries(vmm, vmm.handles[0].fd, Ioctl.GET_CPUID2)]
    rest = CPUID_PAGE.fields["entries"].count - len(found)
    return CPUID_PAGE.pack(count=len(found), entries=(*found, *(CPUID_ENTRY.record(),) * rest))


def mismatches(provided: bytes, expected: bytes) -> list[str]:
    """What QEMU prints of a CPUID page that the firmware refused, beside the one that it would take."""
    old, new = CPUID_PAGE.unpack(provided), CPUID_PAGE.unpack(expected)
    if old.count != new.count:
        failed = "SEV-SNP: CPUID validation failed due to count mismatch"
        return [f"{failed}, provided: {old.count}, expected: {new.count}"]
    return [
        f"SEV-SNP: CPUID validation failed for function {one.eax_in:#x}, index: {one.ecx_in:#x}, "
        f"provided: {_words(one)}, expected: {_words(other)}"
        for one, other in zip(old.entries[: old.count], new.entries, strict=False)
        if one != other
    ]


def _words(entry: Record) -> str:
    return f"eax:{entry.eax:#010x}, ebx: {entry.ebx:#010x}, ecx: {entry.ecx:#010x}, edx: {entry.edx:#010x}"


def _cpuid_entry(found: Record) -> Record:
    values = {name: getattr(found, name) for name in ("eax", "ebx", "ecx", "edx")}
    if found.function == XSAVE_LEAF and found.index in (0, 1):
        values |= {"ebx": XSAVE_BASIC_SIZE, "xcr0_in": 1}
    return CPUID_ENTRY.record(eax_in=found.function, ecx_in=found.index, **values)


def _entries(vmm: Vmm, fd: int, call: Ioctl) -> list[Record]:
    """The entries that an ioctl of KVM answers."""
    size, entry, room = structs.CPUID2.size, structs.CPUID_ENTRY2, structs.CPUID_ENTRIES
    buffer = bytearray(structs.CPUID2.pack(nent=room)) + bytes(room * entry.size)
    vmm.process.ioctl(fd, call, buffer)
    count = structs.CPUID2.unpack(buffer).nent
    return [entry.unpack(buffer, size + i * entry.size) for i in range(count)]
