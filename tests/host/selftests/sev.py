"""What the selftests' library has for SEV guests (lib/x86_64/sev.c): sub-commands by number, and a launch."""

from __future__ import annotations

import struct
from typing import Any

from tests.host.selftests.harness import ENABLE_CAP, ENCRYPT_OP, MIB, PAGE, SEV_ES_VM, Host, Vcpu

INIT, ES_INIT, LAUNCH_START, UPDATE_DATA, UPDATE_VMSA, MEASURE, FINISH, GUEST_STATUS, INIT2 = (
    0,
    1,
    2,
    3,
    4,
    6,
    7,
    16,
    22,
)
SET_CPUID2, GET_SUPPORTED_CPUID = 0x4008AE90, 0xC008AE05
REG_REGION = 0x8010AEBB
NO_DBG, ES = 1, 4
EIO_LENGTH = 5
COPY_FROM, MOVE_FROM = 197, 206


class SevHost(Host):
    """A host with /dev/sev open, and a page for structures."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sev = self.process.open("/dev/sev")
        self.scratch = self.mmap(PAGE)

    def op(self, vm: int, number: int, payload: bytes = b"") -> bytes:
        """KVM_MEMORY_ENCRYPT_OP: the structure as it comes back."""
        self.process.store(self.scratch, payload)
        command = struct.pack("<IIQII", number, 0, self.scratch if payload else 0, 0, self.sev)
        self.process.ioctl(vm, ENCRYPT_OP, command)
        return self.process.load(self.scratch, len(payload)) if payload else b""

    def init2(self, vm: int, features: int = 0, flags: int = 0) -> None:
        self.op(vm, INIT2, struct.pack("<QIHH32x", features, flags, 0, 0))

    def start(self, vm: int, policy: int) -> None:
        self.op(vm, LAUNCH_START, struct.pack("<IIQI4xQI4x", 0, policy, 0, 0, 0, 0))

    def state(self, vm: int) -> int:
        """KVM_SEV_GUEST_STATUS: 1 while the launch is going on, 2 when it is measured, 3 when it is finished."""
        return int(struct.unpack("<III", self.op(vm, GUEST_STATUS, bytes(12)))[2])

    def launch(self, vm: int, kind: int, policy: int) -> None:
        """vm_sev_launch: a region of memory encrypted, the registers, the measurement, the end, with its states."""
        self.start(vm, policy)
        assert self.state(vm) == 1
        memory = self.mmap(2 * MIB)
        self.region(vm, 0, 0, 2 * MIB, memory)
        self.process.ioctl(vm, REG_REGION, struct.pack("<QQ", memory, 2 * MIB))
        self.op(vm, UPDATE_DATA, struct.pack("<QI4x", memory, 16 * PAGE))
        if kind == SEV_ES_VM:
            self.op(vm, UPDATE_VMSA)
        blob = self.mmap(PAGE)
        self.op(vm, MEASURE, struct.pack("<QI4x", blob, 256))
        assert self.state(vm) == 2
        self.op(vm, FINISH)
        assert self.state(vm) == 3

    def enable(self, vm: int, cap: int, argument: int) -> None:
        self.process.ioctl(vm, ENABLE_CAP, struct.pack("<IIQ", cap, 0, argument).ljust(0x68, b"\0"))

    def cpuid(self, vcpu: Vcpu) -> None:
        """vcpu_init_cpuid: all that the host supports."""
        table = self.process.ioctl(self.kvm, GET_SUPPORTED_CPUID, struct.pack("<II", 256, 0) + bytes(256 * 40))
        self.process.ioctl(vcpu.fd, SET_CPUID2, table)
