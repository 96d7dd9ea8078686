"""One guest of the VMM: its VM, memory and vCPUs, made through the descriptors of a process in QEMU's order.

What is wrong with a configuration is told before anything is made; what the kernel refuses ends the process, and with
it everything it held. Sources: QEMU target/i386/sev.c, accel/kvm/kvm-all.c; the v7 series' QEMU (`upm-mode`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snpbook.host.kernel import Kernel
from snpbook.host.kvm.vcpu import Vcpu, VcpuFile
from snpbook.host.kvm.vm import Vm, VmFile
from snpbook.host.refusal import KernelError
from snpbook.host.vmm import exits
from snpbook.host.vmm.configuration import DirectBoot, GuestKind, check_configuration
from snpbook.host.vmm.cpuid import vcpu_entries
from snpbook.host.vmm.launch import launch_guest
from snpbook.host.vmm.memory import RamBlock, Scratch
from snpbook.spec import kvm as spec
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.eras import PrivateFile
from snpbook.spec.image import FOUR_GIB, Image

from snpbook.spec.layout import Record
from snpbook.spec.process import MapFlags, Protection
from snpbook.spec.status import Status
from snpbook.spec.uapi_kvm import Exit, Ioctl, MemFlag, VmType
from snpbook.spec.uapi_sev import CMD, SevOp

__all__ = ["DirectBoot", "GuestKind", "Vmm"]


@dataclass(frozen=True, slots=True)
class VcpuHandle:
    """A vCPU as the VMM has it: its descriptor, and where `kvm_run` is mapped."""

    number: int
    fd: int
    run: int


class Vmm:
    """One guest: `memory` bytes of RAM, `vcpus` processors, a firmware image.

    `discard` says whether the side that a conversion leaves is freed. `VmmError` for a size that cannot be,
    `ImageError` where the image lacks what is asked of it, `KernelError` as the kernel refuses.
    """

    def __init__(
        self,
        kernel: Kernel,
        image: Image,
        *,
        memory: int,
        vcpus: int,
        vcpu_signature: int,
        boot: DirectBoot | None = None,
        kind: GuestKind = GuestKind.SNP,
        discard: bool = True,
    ) -> None:
        check_configuration(image, memory, vcpus, boot, kind)
        self.kernel, self.image, self.memory, self.boot, self.kind = kernel, image, memory, boot, kind
        self.signature, self.discard = vcpu_signature, discard
        self.process = kernel.process()
        self.cmos_index = 0
        self.launched = False
        self.measurement = b""
        """What LAUNCH_MEASURE answered for a SEV or SEV-ES guest: the HMAC, then the firmware's nonce."""
        try:
            self._create(vcpus)
        except KernelError:
            self.process.exit()
            raise

    def __repr__(self) -> str:
        return f"Vmm({self.kind.value}, {self.memory >> 20} MiB, {len(self.handles)} vCPUs, {self.image!r})"

    # What the kernel holds of it, for who looks on from outside.

    @property
    def vm(self) -> Vm:
        """KVM's VM."""
        file = self.process.file(self.vm_fd)
        assert isinstance(file, VmFile)
        return file.vm

    @property
    def vcpus(self) -> list[Vcpu]:
        """KVM's vCPUs, in the order of their numbers."""
        files = [self.process.file(handle.fd) for handle in self.handles]
        return [file.vcpu for file in files if isinstance(file, VcpuFile)]

    def close(self) -> None:
        """End the process: the guest is gone, and its memory is the host's again."""
        self.process.exit()

    # Building it.

    def _create(self, vcpus: int) -> None:
        process, era = self.process, self.kernel.era
        self.scratch = Scratch(process)
        self.kvm_fd = process.open("/dev/kvm")
        typed = VmType.SNP_VM in era.vm_types and self.kind is not GuestKind.PLAIN
        self.vm_fd = process.ioctl(self.kvm_fd, Ioctl.CREATE_VM, int(self.kind.vm_type if typed else VmType.DEFAULT_VM))
        self.sev_fd = process.open("/dev/sev") if self.kind is not GuestKind.PLAIN else -1
        self._initialise(typed)
        self.blocks = [self._add_block(number, gpa, size) for number, (gpa, size) in enumerate(self._regions())]
        self.write(self.image.gpa, self.image.data)
        self.handles: list[VcpuHandle] = []
        for number in range(vcpus):
            self.handles.append(self._create_vcpu(number))

    def _initialise(self, typed: bool) -> None:
        """KVM_SEV_INIT2, or the call that the era has in its place; hypercall exits and private memory on."""
        if self.kind is GuestKind.PLAIN:
            return
        if typed:
            self.sev(SevOp.INIT2)
        elif self.kind is GuestKind.SNP:
            self.sev(SevOp.SNP_INIT)
        else:
            self.sev(SevOp.ES_INIT if self.kind is GuestKind.SEV_ES else SevOp.INIT)
        for cap, value in self.kind.capabilities(self.kernel.era):
            self.process.ioctl(self.vm_fd, Ioctl.ENABLE_CAP, structs.ENABLE_CAP.pack(cap=cap, arg0=value))

    def _regions(self) -> list[tuple[int, int]]:
        """RAM below 4 GiB, the firmware, RAM above: guest address and size of each."""
        low = min(self.memory, spec.LOW_RAM_END)
        regions = [(0, low), (self.image.gpa, len(self.image.data))]
        return [*regions, (FOUR_GIB, self.memory - low)] if self.memory > low else regions

    def _add_block(self, slot: int, gpa: int, size: int) -> RamBlock:
        """User memory and, where the guest has private pages, a file for them; then the slot."""
        process, era = self.process, self.kernel.era
        address = process.mmap(size)
        private = self.kind.has_private_memory(era)
        fields: dict[str, Any] = {"slot": slot, "guest_phys_addr": gpa, "memory_size": size, "userspace_addr": address}
        if not private:
            layout = structs.USERSPACE_MEMORY_REGION
            process.ioctl(self.vm_fd, Ioctl.SET_USER_MEMORY_REGION, layout.pack(**fields))
            return RamBlock(slot, gpa, size, address)
        fd = self._private_file(size)
        name = "restricted_fd" if era.private_file is PrivateFile.RESTRICTEDMEM else "guest_memfd"
        region = era.private_region.pack(**fields, flags=MemFlag.GUEST_MEMFD, **{name: fd})
        process.ioctl(self.vm_fd, era.set_private_region, region)
        return RamBlock(slot, gpa, size, address, fd)

    def _private_file(self, size: int) -> int:
        if self.kernel.era.private_file is PrivateFile.RESTRICTEDMEM:
            fd = self.process.memfd_restricted()
            self.process.ftruncate(fd, size)
            return fd
        wanted = structs.CREATE_GUEST_MEMFD.pack(size=size)
        return int(self.process.ioctl(self.vm_fd, Ioctl.CREATE_GUEST_MEMFD, bytearray(wanted)))

    def _create_vcpu(self, number: int) -> VcpuHandle:
        process = self.process
        fd = process.ioctl(self.vm_fd, Ioctl.CREATE_VCPU, number)
        size = process.ioctl(self.kvm_fd, Ioctl.GET_VCPU_MMAP_SIZE)
        run = process.mmap(size, Protection.READ | Protection.WRITE, MapFlags.SHARED, fd)
        entries = vcpu_entries(self, number)
        head = structs.CPUID2.pack(nent=len(entries))
        process.ioctl(fd, Ioctl.SET_CPUID2, head + b"".join(map(bytes, entries)))
        return VcpuHandle(number, fd, run)

    # Calls that need addresses.

    def sev(self, op: SevOp, *, asks_length: bool = False, **fields: Any) -> Record | None:
        """One sub-command of KVM_MEMORY_ENCRYPT_OP: its structure as it comes back; None for one without.

        With `asks_length` it is given no room, which is EIO, and the structure says how much it takes.
        """
        layout = self.kernel.era.payloads.get(op)
        payload = layout.pack(**fields) if layout else b""
        with self.scratch.placed(payload) as address:
            command = CMD.pack(id=self.kernel.era.op_id(op), data=address, sev_fd=self.sev_fd)
            try:
                self.process.ioctl(self.vm_fd, Ioctl.MEMORY_ENCRYPT_OP, bytearray(command))
            except KernelError as error:
                if not asks_length or error.firmware is not Status.INVALID_LENGTH:
                    raise
            return layout.unpack(self.process.load(address, layout.size)) if layout else None

    def block_of(self, gpa: int) -> RamBlock | None:
        """The RAM block that holds a guest address."""
        return next((block for block in self.blocks if gpa in block), None)

    def user(self, gpa: int) -> int:
        """The process's address of the guest's shared memory at a guest address."""
        block = self.block_of(gpa)
        if block is None:
            raise ValueError(f"gpa = {gpa:#x}: no memory of the guest")
        return block.user(gpa)

    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes in the guest's shared memory, inside one block."""
        self.process.store(self.user(gpa), data)

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of the guest's shared memory, inside one block."""
        return self.process.load(self.user(gpa), size)

    # Its life.

    def launch(
        self, policy: int, host_data: bytes = bytes(32), progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Launch the guest; `progress(what, pages done, pages in all)` is called between the parts."""
        launch_guest(self, policy, host_data, progress)
        self.launched = True

    def run(self, vcpu: int = 0) -> Exit:
        """Run a vCPU until it halts or ends, serving its exits; why it stopped.

        `KernelError` ELOOP where converting one page to and fro does not get the guest on.
        """
        return exits.run(self, self.handles[vcpu])
