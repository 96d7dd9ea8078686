"""kvm_amd and /dev/kvm: which guests this host can run, ASIDs for them, and new VMs.

What was possible at load decides the VM types. Sources: Linux arch/x86/kvm/svm/sev.c (sev_hardware_setup),
arch/x86/kvm/x86.c, virt/kvm/kvm_main.c.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from snpbook.host.files import Argument, Call, File
from snpbook.host.kvm import capabilities
from snpbook.host.kvm.asids import AsidPool
from snpbook.host.kvm.sev_init import supported_vmsa_features
from snpbook.host.kvm.vm import Vm, VmFile
from snpbook.host.process import Process
from snpbook.host.refusal import check
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF, Registers, SevCapability
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.uapi_kvm import API_VERSION, VCPU_MMAP_PAGES, CpuidFlag, Ioctl, VmType
from snpbook.spec.uapi_sev import GRP_SEV, SEV_VMSA_FEATURES
from snpbook.spec.vmcb import IOPM_SIZE

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel


class Kvm:
    """The module. `sev`, `sev_es`, `snp` are its parameters as they read once it is loaded."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sev = self.sev_es = self.snp = False
        self.debug_swap = False
        self.loaded = False
        self.vms: list[Vm] = []
        self.asids = AsidPool(kernel)
        self.last_vmcb: dict[tuple[int, int], int] = {}
        """Which VMCB ran last on a core for an ASID: another one means a flush of the ASID."""
        self.iopm = 0
        """The system address of the I/O permission map of all guests: every port is intercepted."""

    def __repr__(self) -> str:
        return f"Kvm({', '.join(kind.name for kind in self.vm_types)}; {len(self.vms)} VMs)"

    def load(self, *, sev: bool, sev_es: bool, snp: bool, debug_swap: bool = False) -> None:
        """The module is loaded, and these kinds of encrypted guests are possible; /dev/kvm appears."""
        self.sev, self.sev_es, self.snp, self.debug_swap = sev, sev_es, snp, debug_swap
        self.loaded = True
        self.iopm = self.kernel.memory.allocate(IOPM_SIZE >> PAGE_SHIFT).start << PAGE_SHIFT
        self.kernel.cpu.write(self.iopm, b"\xff" * IOPM_SIZE)
        self.kernel.devices["/dev/kvm"] = lambda flags: KvmDevice(self, flags)

    @property
    def plain_asid(self) -> int:
        """The ASID of guests without SEV: above all those of encrypted ones (MODEL: one for all, flushed at entry)."""
        return self.kernel.cpu.product.asid_limit + 1

    @property
    def vm_types(self) -> frozenset[VmType]:
        """What KVM_CREATE_VM takes here."""
        there = {VmType.SEV_VM: self.sev, VmType.SEV_ES_VM: self.sev_es, VmType.SNP_VM: self.snp}
        return frozenset(kind for kind in self.kernel.era.vm_types if there.get(kind, True))


class KvmDevice(File):
    """An open /dev/kvm."""

    device = "kvm"

    def __init__(self, kvm: Kvm, flags: int = 0) -> None:
        super().__init__(flags)
        self.kvm = kvm

    def calls(self) -> Mapping[int, Call]:
        return _CALLS

    def unknown(self) -> int:
        return errno.EINVAL


def _get_api_version(file: KvmDevice, process: Process, argument: Argument) -> int:
    check(argument.number == 0, errno.EINVAL, "the argument of KVM_GET_API_VERSION", 0, argument.number)
    return API_VERSION


def _get_vcpu_mmap_size(file: KvmDevice, process: Process, argument: Argument) -> int:
    check(argument.number == 0, errno.EINVAL, "the argument of KVM_GET_VCPU_MMAP_SIZE", 0, argument.number)
    return VCPU_MMAP_PAGES << PAGE_SHIFT


def _check_extension(file: KvmDevice, process: Process, argument: Argument) -> int:
    return capabilities.value(file.kvm.kernel, argument.number, None)


def _create_vm(file: KvmDevice, process: Process, argument: Argument) -> int:
    """KVM_CREATE_VM: a descriptor; EINVAL for a type that this host cannot run."""
    kinds = file.kvm.vm_types
    check(argument.number in kinds, errno.EINVAL, "a VM type of this host", sorted(kinds), argument.number)
    vm = Vm(file.kvm, process, VmType(argument.number))
    file.kvm.vms.append(vm)
    return process.install(VmFile(vm))


def _get_supported_cpuid(file: KvmDevice, process: Process, argument: Argument) -> int:
    """KVM_GET_SUPPORTED_CPUID: E2BIG where there is too little room for what the product has."""
    product, entry = file.kvm.kernel.cpu.product, structs.CPUID_ENTRY2
    rows = []
    for leaf, sub in product.leaves:
        flags = 0 if sub is None else CpuidFlag.SIGNIFCANT_INDEX
        words = product.cpuid(leaf, sub or 0)
        rows.append(entry.record(function=leaf, index=sub or 0, flags=flags, **words._asdict()))
    rows.append(entry.record(function=ENCRYPTED_MEMORY_LEAF, **_encrypted_memory(file.kvm)._asdict()))
    room = argument.record(structs.CPUID2).nent
    check(room >= len(rows), errno.E2BIG, "room for the entries of CPUID", len(rows), room)
    argument.write(bytes(structs.CPUID2.record(nent=len(rows))) + b"".join(map(bytes, rows)))
    return 0


def _encrypted_memory(kvm: Kvm) -> Registers:
    """The leaf of SEV: what the module can, and neither VMPLs nor a reduction of addresses; zeros without SEV."""
    if not kvm.sev:
        return Registers()
    found = kvm.kernel.cpu.product.cpuid(ENCRYPTED_MEMORY_LEAF)
    can = SevCapability.SEV | SevCapability.HW_ENF_CACHE_COH
    can |= SevCapability.SEV_ES if kvm.sev_es else SevCapability(0)
    can |= SevCapability.SEV_SNP if kvm.snp else SevCapability(0)
    record = found.decode(ENCRYPTED_MEMORY)
    return Registers.of(record.replace(capabilities=record.capabilities & can, vmpls=0, address_reduction=0))


def _get_device_attr(file: KvmDevice, process: Process, argument: Argument) -> int:
    """KVM_GET_DEVICE_ATTR: which vmsa_features INIT2 takes. ENXIO for another attribute."""
    wanted = argument.record(structs.DEVICE_ATTR)
    known = not wanted.flags and (wanted.group, wanted.attr) == (GRP_SEV, SEV_VMSA_FEATURES)
    check(known, errno.ENXIO, "an attribute of /dev/kvm", "KVM_X86_GRP_SEV, KVM_X86_SEV_VMSA_FEATURES", f"{wanted!r}")
    process.space.copy_out(wanted.addr, int(supported_vmsa_features(file.kvm)).to_bytes(8, "little"))
    return 0


def _has_device_attr(file: KvmDevice, process: Process, argument: Argument) -> int:
    wanted = argument.record(structs.DEVICE_ATTR)
    known = not wanted.flags and (wanted.group, wanted.attr) == (GRP_SEV, SEV_VMSA_FEATURES)
    check(known, errno.ENXIO, "an attribute of /dev/kvm", "KVM_X86_GRP_SEV, KVM_X86_SEV_VMSA_FEATURES", f"{wanted!r}")
    return 0


_CALLS: Mapping[int, Call] = {
    Ioctl.GET_API_VERSION: Call("KVM_GET_API_VERSION", _get_api_version),
    Ioctl.CREATE_VM: Call("KVM_CREATE_VM", _create_vm),
    Ioctl.CHECK_EXTENSION: Call("KVM_CHECK_EXTENSION", _check_extension),
    Ioctl.GET_VCPU_MMAP_SIZE: Call("KVM_GET_VCPU_MMAP_SIZE", _get_vcpu_mmap_size),
    Ioctl.GET_SUPPORTED_CPUID: Call("KVM_GET_SUPPORTED_CPUID", _get_supported_cpuid),
    Ioctl.GET_DEVICE_ATTR: Call("KVM_GET_DEVICE_ATTR", _get_device_attr),
    Ioctl.HAS_DEVICE_ATTR: Call("KVM_HAS_DEVICE_ATTR", _has_device_attr),
}
