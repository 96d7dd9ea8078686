"""A virtual machine: its memory slots, attributes and vCPUs, and the file behind its descriptor.

The VM belongs to the process that made it, and lives until its last descriptor, vCPU or guest_memfd is gone. After a
"bug" (a page that could not be taken back) every call is EIO. Source: Linux virt/kvm/kvm_main.c, arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING

from snpbook.host.attributes import Flags, PrivatePages
from snpbook.host.files import Argument, Call, File
from snpbook.host.kvm import attributes, capabilities, enc_regions, regions, sev
from snpbook.host.kvm.guest_memfd import GuestMemfd
from snpbook.host.kvm.memslots import Memslots
from snpbook.host.kvm.mmu import Mmu
from snpbook.host.kvm.sev_guest import SevGuest
from snpbook.host.kvm.vcpu import Vcpu, VcpuFile
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Mutex
from snpbook.spec.kvm import MAX_VCPUS
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.uapi_kvm import Ioctl, VmType
from snpbook.spec.uapi_kvm_structs import CREATE_GUEST_MEMFD

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel
    from snpbook.host.kvm.device import Kvm


class Vm:
    """One guest, as KVM keeps it. `sev` is its SEV side once KVM_SEV_INIT and its kin have made it."""

    def __init__(self, kvm: Kvm, process: Process, kind: VmType) -> None:
        self.kvm, self.process, self.type = kvm, process, kind
        self.kernel: Kernel = kvm.kernel
        self.slots = Memslots()
        self.deleting: set[int] = set()
        """Slots that are on their way out: faults on them start again."""
        self.private = PrivatePages()
        self.mmu = Mmu(self.kernel.cpu, self.kernel.memory)
        self.vcpus: dict[int, Vcpu] = {}
        self.sev: SevGuest | None = None
        self.migrating = False
        """Whether a migration or mirroring has the VM as one of its ends."""
        self.unmapped_private_mem = False
        """KVM_CAP_UNMAPPED_PRIVATE_MEM of the v7 series: slots may have restricted files."""
        self.exit_hypercalls = 0
        """Which hypercalls go to userspace (KVM_CAP_EXIT_HYPERCALL)."""
        self.lock, self.slots_lock = Mutex("kvm->lock"), Mutex("kvm->slots_lock")
        self.dead, self.bugged = False, False
        self._holders = 0
        self._unwatch = process.space.watch(self._user_pages_lost)

    def __repr__(self) -> str:
        return f"Vm({self.type.name}, {self.slots!r}, {len(self.vcpus)} vCPUs)"

    # Whose it is.

    def hold(self) -> None:
        self._holders += 1

    def let_go(self) -> None:
        """One holder less; the last one ends the VM."""
        self._holders -= 1
        if not self._holders:
            self._destroy()

    def admit(self, process: Process) -> None:
        """EIO for another process than the one that made the VM, and once it is dead or bugged."""
        check(process is self.process, errno.EIO, "the VM's own process calls", "the process that made it", "another")
        alive = not (self.dead or self.bugged)
        check(alive, errno.EIO, "the VM is alive", "alive", "moved away" if self.dead else "bugged")

    def bug(self, text: str) -> None:
        """KVM_BUG: something that must not happen has; no call works any more."""
        self.bugged = True
        self.kernel.log(f"kvm: {text}")

    # What kind of guest it is.

    @property
    def snp(self) -> bool:
        return self.sev is not None and self.sev.snp

    @property
    def in_place(self) -> bool:
        """Whether the guest's private pages are those that the VMM maps: an SNP guest as series v6 had it."""
        return self.kernel.registered_snp and self.snp and not self.has_private_memory

    @property
    def protected_state(self) -> bool:
        """Whether registers get encrypted: SEV-ES and SNP."""
        return self.sev is not None and self.sev.es

    @property
    def asid(self) -> int:
        """The guest's ASID, or the one of guests without SEV."""
        return self.sev.asid if self.sev else self.kvm.plain_asid

    @property
    def has_private_memory(self) -> bool:
        """Whether pages can have the private attribute, and slots a file for them."""
        return self.unmapped_private_mem or self.type in (VmType.SNP_VM, VmType.SW_PROTECTED_VM)

    # Memory.

    def is_private(self, gfns: range) -> Flags:
        """The private attribute of a run of guest pages."""
        return self.private.of(gfns)

    def read(self, gpa: int, size: int) -> bytes:
        """kvm_read_guest: bytes of the slots' shared memory; EFAULT outside of them."""
        return b"".join(self.process.space.copy_in(address, part) for address, part in self._user_parts(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """kvm_write_guest: into the slots' shared memory."""
        done = 0
        for address, part in self._user_parts(gpa, len(data)):
            self.process.space.copy_out(address, data[done : done + part])
            done += part

    def _user_parts(self, gpa: int, size: int) -> list[tuple[int, int]]:
        """A range of guest addresses as user addresses with sizes, slot by slot."""
        parts = []
        while size > 0:
            slot = self.slots.of(gpa >> PAGE_SHIFT)
            if slot is None:
                raise KernelError(errno.EFAULT, "a memslot holds the guest page", "a slot", hex(gpa))
            part = min(size, (slot.gfns.stop << PAGE_SHIFT) - gpa)
            parts.append(((slot.user << PAGE_SHIFT) + gpa - (slot.gfns.start << PAGE_SHIFT), part))
            gpa, size = gpa + part, size - part
        return parts

    def _user_pages_lost(self, pages: range) -> None:
        """The MMU notifier: what the process no longer has, the guest must not reach."""
        for slot in self.slots:
            gfns = slot.gfns_of_user(pages)
            if gfns:
                self.mmu.unmap(gfns)

    def _destroy(self) -> None:
        """vCPUs first, then the guest's keys, then memory."""
        for vcpu in self.vcpus.values():
            vcpu.free()
        self.vcpus.clear()
        sev.destroy(self)
        self._unwatch()
        for slot in list(self.slots):
            if slot.private is not None:
                slot.private.unbind(slot)
            self.slots.drop(slot.number)
        self.mmu.tables.free()
        self.kvm.vms.remove(self)


class VmFile(File):
    """The descriptor of a VM."""

    device = "kvm-vm"

    def __init__(self, vm: Vm) -> None:
        super().__init__()
        self.vm = vm
        vm.hold()

    def __repr__(self) -> str:
        return f"VmFile({self.vm!r})"

    def admit(self, process: Process) -> None:
        self.vm.admit(process)

    def calls(self) -> Mapping[int, Call]:
        absent = self.vm.kernel.era.absent_ioctls
        return {number: call for number, call in _CALLS.items() if number not in absent}

    def release(self) -> None:
        self.vm.let_go()


def _create_vcpu(file: VmFile, process: Process, argument: Argument) -> int:
    """KVM_CREATE_VCPU: a descriptor. EEXIST for a number in use, EINVAL beyond the limit."""
    vm, number = file.vm, argument.number
    check(0 <= number < MAX_VCPUS, errno.EINVAL, "a vCPU's number", f"below {MAX_VCPUS}", number)
    check(number not in vm.vcpus, errno.EEXIST, "a vCPU is created once", "a new number", number)
    vm.vcpus[number] = Vcpu(vm, number)
    return process.install(VcpuFile(vm.vcpus[number]))


def _create_guest_memfd(file: VmFile, process: Process, argument: Argument) -> int:
    """KVM_CREATE_GUEST_MEMFD: a descriptor. EINVAL for a flag, and for a size that is not pages."""
    wanted = argument.record(CREATE_GUEST_MEMFD)
    check(wanted.flags == 0, errno.EINVAL, "flags of guest_memfd", 0, hex(wanted.flags))
    good = 0 < wanted.size < 1 << 63 and wanted.size % PAGE_SIZE == 0
    check(good, errno.EINVAL, "the size of guest_memfd", "whole pages, at least one", hex(wanted.size))
    return process.install(GuestMemfd(file.vm, wanted.size))


_CALLS: Mapping[int, Call] = {
    Ioctl.CHECK_EXTENSION: Call("KVM_CHECK_EXTENSION", capabilities.check_on_vm),
    Ioctl.ENABLE_CAP: Call("KVM_ENABLE_CAP", capabilities.enable),
    Ioctl.CREATE_VCPU: Call("KVM_CREATE_VCPU", _create_vcpu),
    Ioctl.CREATE_IRQCHIP: Call("KVM_CREATE_IRQCHIP", capabilities.create_irqchip),
    Ioctl.SET_USER_MEMORY_REGION: Call("KVM_SET_USER_MEMORY_REGION", regions.set_region),
    Ioctl.SET_USER_MEMORY_REGION2: Call("KVM_SET_USER_MEMORY_REGION2", regions.set_region2),
    Ioctl.CREATE_GUEST_MEMFD: Call("KVM_CREATE_GUEST_MEMFD", _create_guest_memfd),
    Ioctl.GET_SUPPORTED_MEMORY_ATTRIBUTES_V10: Call("KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES", attributes.supported),
    Ioctl.SET_MEMORY_ATTRIBUTES_V10: Call("KVM_SET_MEMORY_ATTRIBUTES", attributes.set_attributes),
    Ioctl.SET_MEMORY_ATTRIBUTES: Call("KVM_SET_MEMORY_ATTRIBUTES", attributes.set_attributes),
    Ioctl.MEMORY_ENCRYPT_OP: Call("KVM_MEMORY_ENCRYPT_OP", sev.memory_encrypt_op),
    Ioctl.MEMORY_ENCRYPT_REG_REGION: Call("KVM_MEMORY_ENCRYPT_REG_REGION", enc_regions.register),
    Ioctl.MEMORY_ENCRYPT_UNREG_REGION: Call("KVM_MEMORY_ENCRYPT_UNREG_REGION", enc_regions.unregister),
}
