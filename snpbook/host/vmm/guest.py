"""One guest of the VMM: its VM, memory and vCPUs, made through the descriptors of a process in QEMU's order.

What is wrong with a configuration is told before anything is made; what the kernel refuses ends the process, and with
it everything it held. Sources: QEMU target/i386/sev.c, accel/kvm/kvm-all.c; the v7 series' QEMU (`upm-mode`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from snpbook.host.kernel import Kernel
from snpbook.host.kvm import backends
from snpbook.host.kvm.vcpu import Vcpu, VcpuFile
from snpbook.host.kvm.vm import Vm, VmFile
from snpbook.host.refusal import KernelError
from snpbook.host.vmm import confidential, exits, launch
from snpbook.host.vmm.configuration import DirectBoot, GuestKind, VmmError, check_configuration, check_svsm
from snpbook.host.vmm.cpuid import vcpu_entries
from snpbook.host.vmm.memory import RamBlock, Scratch
from snpbook.host.vmm.properties import SevObject, default_object
from snpbook.host.vmm.registers import set_reset_registers
from snpbook.spec import kvm as spec
from snpbook.spec import uapi_kvm_structs as structs
from snpbook.spec.eras import PrivateFile
from snpbook.spec.image import FOUR_GIB, Image
from snpbook.spec.layout import Record
from snpbook.spec.private_memory import Backend
from snpbook.spec.process import MapFlags, Protection
from snpbook.spec.qemu import FIRMWARE_ERRORS, PROGRAM, UNKNOWN_FIRMWARE_ERROR
from snpbook.spec.status import Status
from snpbook.spec.uapi_kvm import Exit, Ioctl, MemFlag
from snpbook.spec.uapi_sev import CMD, SevOp
from snpbook.trace import Message

__all__ = ["DirectBoot", "GuestKind", "Vmm"]


@dataclass(frozen=True, slots=True)
class VcpuHandle:
    """A vCPU as the VMM has it: its descriptor, and where `kvm_run` is mapped."""

    number: int
    fd: int
    run: int


class Vmm:
    """One guest: `memory` bytes of RAM, `vcpus` processors, a firmware image.

    `sev` are the properties of its sev-guest or sev-snp-guest object; without one, QEMU's defaults, with kernel hashes
    where there is a kernel. `files` are those that the properties name. `discard` says whether the side that a
    conversion leaves is freed, `backend` where private pages are: by default where the era has them. `VmmError` for
    what cannot be, `ImageError` where the image lacks what is asked of it, `KernelError` as the kernel refuses: then
    the process has ended, and the notes of the error are what it printed.
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
        sev: SevObject | None = None,
        files: Mapping[str, bytes] | None = None,
        backend: Backend | None = None,
        svsm: Image | None = None,
    ) -> None:
        hashes = {"kernel_hashes": True} if boot and kind is not GuestKind.PLAIN else {}
        self.object = sev or default_object(kind, **hashes)
        self.kernel, self.image, self.memory, self.boot, self.kind = kernel, image, memory, boot, kind
        if sev and sev.kind is not kind:
            raise VmmError(f"a {kind.value} guest with the properties of a {sev.kind.value} guest")
        check_configuration(image, memory, vcpus, self.measured_boot, kind)
        self.svsm = svsm
        """The software at VMPL0, where there is any below the guest's own."""
        if svsm:
            check_svsm(svsm, image, kernel.era, kind, boot)
        if self.object:
            self.object.check_tree(kernel.era)
            discard = discard if self.object.discard is None else self.object.discard
        self.signature, self.discard = vcpu_signature, discard
        self.backend = backend or self._usual_backend()
        """Where private pages are; None for a guest that has none."""
        self.process, self._files = kernel.process(), files or {}
        self.cmos_index, self.sev_fd = 0, -1
        self.fw_error = 0
        """The firmware's code as the last sub-command told it."""
        self.ready = self.launched = False
        self.handle = 0
        """The firmware's handle of a SEV or SEV-ES guest."""
        self.measurement = b""
        """What LAUNCH_MEASURE answered for a SEV or SEV-ES guest: the HMAC, then the firmware's nonce."""
        with self._fatal():
            self._create(vcpus)

    def __repr__(self) -> str:
        return f"Vmm({self.kind.value}, {self.memory >> 20} MiB, {len(self.handles)} vCPUs, {self.image!r})"

    @property
    def measured_boot(self) -> DirectBoot | None:
        """What the guest boots, where its hashes are measured."""
        return self.boot if self.object and self.object.kernel_hashes else None

    @property
    def private_memory(self) -> bool:
        """Whether its slots have files for private pages."""
        return self.backend not in (None, Backend.REGISTERED)

    def _usual_backend(self) -> Backend | None:
        """What the era has for its kind; registered memory where the VMM is told to do without private slots."""
        era, snp = self.kernel.era, self.kind is GuestKind.SNP
        if self.object is None:
            return None
        private = self.object.upm_mode is not False and self.kind.has_private_memory(era)
        if not private or (snp and self.kernel.registered_snp):
            return Backend.REGISTERED
        if era.private_file is PrivateFile.GUEST_MEMFD:
            return Backend.GUEST_MEMFD
        return Backend.RESTRICTED if snp else Backend.LAZY

    @property
    def svsm_gpa(self) -> int:
        """Where the image of the SVSM lies: right below the firmware."""
        return self.image.gpa - len(self.svsm.data) if self.svsm else self.image.gpa

    def file(self, name: str) -> bytes:
        """A file that a property names; `VmmError` where there is none."""
        if name not in self._files:
            raise VmmError(f"failed to read '{name}' (No such file or directory)")
        return self._files[name]

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

    # What goes wrong, as QEMU tells it.

    def report(self, text: str) -> None:
        """A line on the console, before the process ends."""
        self._printed.append(text)
        self.kernel.cpu.trace.emit(Message(source=PROGRAM, text=text))

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Report a sub-command that fails inside, with the return value and the firmware's code."""
        self.fw_error = 0
        try:
            yield
        except KernelError as error:
            words = FIRMWARE_ERRORS.get(self.fw_error, UNKNOWN_FIRMWARE_ERROR)
            self.report(f"{what} ret=-{error.errno} fw_error={self.fw_error} '{words}'")
            raise

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        """What the kernel refuses inside, or what cannot be, ends the process and with it all that it held."""
        self._printed: list[str] = []
        try:
            yield
        except (KernelError, ValueError) as error:
            for line in self._printed:
                error.add_note(f"{PROGRAM}: {line}")
            self.process.exit()
            raise

    # Building it.

    def _create(self, vcpus: int) -> None:
        process = self.process
        self.scratch = Scratch(process)
        self.kvm_fd = process.open("/dev/kvm")
        self.vm_fd = process.ioctl(self.kvm_fd, Ioctl.CREATE_VM, int(confidential.vm_type(self)))
        if self.object:
            confidential.initialise(self)
        elif self.private_memory:
            confidential.enable_capabilities(self)
        self.blocks = [self._add_block(number, gpa, size) for number, (gpa, size) in enumerate(self._regions())]
        self.write(self.image.gpa, self.image.data)
        if self.svsm:
            self.write(self.svsm_gpa, self.svsm.data)
        self.handles: list[VcpuHandle] = []
        for number in range(vcpus):
            self.handles.append(self._create_vcpu(number))
        if self.kind in (GuestKind.SEV, GuestKind.SEV_ES):
            launch.start_private(self)
            launch.update_data(self)

    def _regions(self) -> list[tuple[int, int]]:
        """RAM below 4 GiB, an SVSM's memory, the firmware, RAM above: guest address and size of each."""
        low = min(self.memory, spec.LOW_RAM_END)
        regions = [(0, low), (self.image.gpa, len(self.image.data))]
        if self.svsm:
            start = min(section.gpa for section in self.svsm.sections)
            regions.append((start, self.image.gpa - start))
        return [*regions, (FOUR_GIB, self.memory - low)] if self.memory > low else regions

    def _add_block(self, slot: int, gpa: int, size: int) -> RamBlock:
        """User memory and, where the guest has private pages, a file for them; then the slot."""
        process, era = self.process, self.kernel.era
        address = process.mmap(size)
        if self.backend is Backend.REGISTERED:
            process.ioctl(self.vm_fd, Ioctl.MEMORY_ENCRYPT_REG_REGION, structs.ENC_REGION.pack(addr=address, size=size))
        fields: dict[str, Any] = {"slot": slot, "guest_phys_addr": gpa, "memory_size": size, "userspace_addr": address}
        if self.backend is None or not self.private_memory:
            layout = structs.USERSPACE_MEMORY_REGION
            process.ioctl(self.vm_fd, Ioctl.SET_USER_MEMORY_REGION, layout.pack(**fields))
            return RamBlock(slot, gpa, size, address)
        fd = backends.create_file(self.backend, process, self.vm_fd, size)
        name = "restricted_fd" if era.private_file is PrivateFile.RESTRICTEDMEM else "guest_memfd"
        region = era.private_region.pack(**fields, flags=MemFlag.GUEST_MEMFD, **{name: fd})
        process.ioctl(self.vm_fd, era.set_private_region, region)
        return RamBlock(slot, gpa, size, address, fd)

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
            command = bytearray(CMD.pack(id=self.kernel.era.op_id(op), data=address, sev_fd=self.sev_fd))
            try:
                self.process.ioctl(self.vm_fd, Ioctl.MEMORY_ENCRYPT_OP, command)
            except KernelError as error:
                self.fw_error = CMD.unpack(command).error
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

    def machine_done(self) -> None:
        """The machine is built and waits, as with `-S`: a SEV guest is measured, and takes a secret until `launch`."""
        with self._fatal():
            for handle in self.handles:
                set_reset_registers(self, handle)
            if self.kind in (GuestKind.SEV, GuestKind.SEV_ES):
                launch.measure(self)
        self.ready = True

    def inject_secret(self, header: bytes, secret: bytes, gpa: int | None = None) -> None:
        """LAUNCH_SECRET: an owner's packet to a guest address, by default the image's area for secrets.

        `VmmError` where the guest does not wait for one, or has no place; a refusal of the firmware ends nothing.
        """
        if not self.ready or self.launched or self.kind not in (GuestKind.SEV, GuestKind.SEV_ES):
            raise VmmError("SEV: Not in correct state. (LSECRET)")
        place = self.image.secret_base if gpa is None else gpa
        if not place:
            raise VmmError("SEV: Failed to find OVMF secret area, gpa must be specified")
        launch.inject_secret(self, header, secret, place)

    def launch(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Launch the guest; `progress(what, pages done, pages in all)` is called between the parts."""
        if self.launched:
            raise VmmError("the guest has been launched")
        if not self.ready:
            self.machine_done()
        with self._fatal():
            if self.kind is GuestKind.SNP:
                launch.launch_snp(self, progress)
            elif self.kind is not GuestKind.PLAIN:
                with self.reporting("sev_launch_finish: LAUNCH_FINISH"):
                    self.sev(SevOp.LAUNCH_FINISH)
        self.launched = True

    def reset(self) -> None:
        """All vCPUs begin again, memory stays. Encrypted registers cannot: SEV-ES and SNP guests end (`VmmError`)."""
        with self._fatal():
            if self.kind in (GuestKind.SEV_ES, GuestKind.SNP):
                self.report("cpus are not resettable, terminating")
                raise VmmError("cpus are not resettable, terminating")
            for handle in self.handles:
                set_reset_registers(self, handle)

    def run(self, vcpu: int = 0) -> Exit:
        """Run a vCPU until it halts or ends, serving its exits; why it stopped.

        `KernelError` ELOOP where converting one page to and fro does not get the guest on.
        """
        return exits.run(self, self.handles[vcpu])
