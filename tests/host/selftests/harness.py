"""A host and a process, and nothing but descriptors and system calls: what the kernel's own selftests have.

Numbers are typed again from the uapi headers, on purpose.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from snpbook.hardware.executor import CoroutineExecutor
from snpbook.host.kvm.vcpu import VcpuFile
from snpbook.host.refusal import KernelError
from snpbook.system import System

PAGE = 4096
MIB = 1 << 20
KEEP_SIZE, PUNCH_HOLE = 1, 2
DEFAULT_VM, SW_PROTECTED_VM, SEV_VM, SEV_ES_VM, SNP_VM = range(5)
GUEST_MEMFD, LOG_DIRTY, READONLY = 4, 1, 2
PRIVATE = 8
EXIT_IO, EXIT_HYPERCALL, EXIT_HLT, EXIT_MMIO, EXIT_SHUTDOWN = 2, 3, 5, 6, 8
EXIT_INTERNAL_ERROR, EXIT_SYSTEM_EVENT = 17, 24
EXIT_MEMORY_FAULT = 39

CREATE_VM, CHECK_EXTENSION, VCPU_MMAP_SIZE = 0xAE01, 0xAE03, 0xAE04
CREATE_VCPU, RUN = 0xAE41, 0xAE80
REGION, REGION2 = 0x4020AE46, 0x40A0AE49
ATTRIBUTES, CREATE_MEMFD, PRE_FAULT = 0x4020AED2, 0xC040AED4, 0xC040AED5
SET_MP_STATE, MP_STATE_RUNNABLE = 0x4004AE99, 0
ENABLE_CAP, ENCRYPT_OP = 0x4068AEA3, 0xC008AEBA
MAP_SHARED = 1


@contextmanager
def fails(number: int | None = None) -> Iterator[None]:
    """The call fails, with this errno where one is named."""
    with pytest.raises(KernelError) as caught:
        yield
    if number is not None:
        assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number], str(caught.value)


class Host:
    """A booted host and one process on it."""

    def __init__(
        self, era: str = "mainline", product: str = "milan", boot: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.system = System(product, "selftests", installed=options.pop("installed", 512 * MIB), **options)
        self.system.host.boot(era, **(boot or {}))
        self.process = self.system.host.process()
        self.kvm = self.process.open("/dev/kvm")

    def vm(self, kind: int = DEFAULT_VM) -> int:
        return int(self.process.ioctl(self.kvm, CREATE_VM, kind))

    def memfd(self, vm: int, size: int, flags: int = 0) -> int:
        return int(self.process.ioctl(vm, CREATE_MEMFD, bytearray(struct.pack("<QQ48x", size, flags))))

    def region(self, vm: int, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        self.process.ioctl(vm, REGION, struct.pack("<IIQQQ", slot, flags, gpa, size, address))

    def region2(
        self, vm: int, slot: int, gpa: int, size: int, address: int, flags: int = 0, fd: int = 0, offset: int = 0
    ) -> None:
        data = struct.pack("<IIQQQQI4x112x", slot, flags, gpa, size, address, offset, fd & 0xFFFFFFFF)
        self.process.ioctl(vm, REGION2, data)

    def attributes(self, vm: int, gpa: int, size: int, attributes: int = PRIVATE, flags: int = 0) -> None:
        self.process.ioctl(vm, ATTRIBUTES, struct.pack("<QQQQ", gpa, size, attributes, flags))

    def vcpu(self, vm: int, number: int = 0) -> Vcpu:
        """A vCPU that runs, the others beside the first as well (vm_arch_vcpu_add)."""
        vcpu = Vcpu(self, int(self.process.ioctl(vm, CREATE_VCPU, number)))
        self.process.ioctl(vcpu.fd, SET_MP_STATE, struct.pack("<I", MP_STATE_RUNNABLE))
        return vcpu

    def mmap(self, size: int) -> int:
        return self.process.mmap(size)


class Vcpu:
    """A vCPU by its descriptor, with `kvm_run` mapped."""

    def __init__(self, host: Host, fd: int) -> None:
        self.host, self.fd = host, fd
        self.size = host.process.ioctl(host.kvm, VCPU_MMAP_SIZE)
        self.shared = host.process.mmap(self.size, flags=MAP_SHARED, fd=fd)

    def free(self) -> None:
        """vm_vcpu_rm: the mapping holds the vCPU as the descriptor does."""
        self.host.process.munmap(self.shared, self.size)
        self.host.process.close(self.fd)

    def program(self, program: Any) -> None:
        """Load a guest program: the code of the guest, which no system call carries."""
        file = self.host.process.file(self.fd)
        assert isinstance(file, VcpuFile)
        assert isinstance(file.vcpu.executor, CoroutineExecutor)
        file.vcpu.executor.start(program)

    @property
    def outcome(self) -> Any:
        file = self.host.process.file(self.fd)
        assert isinstance(file, VcpuFile)
        assert isinstance(file.vcpu.executor, CoroutineExecutor)
        return file.vcpu.executor.outcome

    def run(self) -> int:
        """KVM_RUN: the exit reason. KernelError as the call fails."""
        self.host.process.ioctl(self.fd, RUN)
        return self.reason

    @property
    def reason(self) -> int:
        return int.from_bytes(self.host.process.load(self.shared + 8, 4), "little")

    def exit(self, layout: str) -> tuple[int, ...]:
        """The exit's part of `kvm_run`, at byte 32."""
        return struct.unpack(layout, self.host.process.load(self.shared + 32, struct.calcsize(layout)))

    def answer(self, offset: int, data: bytes) -> None:
        """Write into the exit's part of `kvm_run`."""
        self.host.process.store(self.shared + 32 + offset, data)
