"""A VMM's view of KVM_MEMORY_ENCRYPT_OP: descriptors, structures typed out by hand, and the errno of each call."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from snpbook.host.kvm.sev_guest import SevGuest
from snpbook.host.kvm.vm import Vm, VmFile
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError
from snpbook.host.steps import Steps
from snpbook.spec.commands import Command
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.spec.vmcb import VMCB
from snpbook.system import System

MIB, PAGE = 1 << 20, 4096
DEFAULT, SW_PROTECTED, SEV, SEV_ES, SNP = range(5)
CREATE_VM, CREATE_VCPU, ENABLE_CAP = 0xAE01, 0xAE41, 0x4068AEA3
ENCRYPT_OP, SET_REGION, SET_REGION2 = 0xC008AEBA, 0x4020AE46, 0x40A0AE49
ATTRIBUTES, ATTRIBUTES_V10, GUEST_MEMFD = 0x4020AED2, 0xC020AED3, 0xC040AED4
COPY_FROM, MOVE_FROM, UNMAPPED_PRIVATE_MEM = 197, 206, 240
POLICY = 0x30000
STRANGE = 0xDEAD
"""What `error` holds before a call."""


class Host:
    """A booted host, and a process with /dev/sev and /dev/kvm open."""

    def __init__(
        self, era: str = "mainline", *, installed: int = 64 * MIB, seed: str = "sev tests", **options: Any
    ) -> None:
        self.system = System("milan", seed, installed=installed)
        self.kernel = self.system.host
        self.kernel.boot(era, **options)
        self.process: Process = self.kernel.process()
        self.sev_fd, self.kvm_fd = self.process.open("/dev/sev"), self.process.open("/dev/kvm")
        self.scratch = self.process.mmap(16 * PAGE)
        self.process.store(self.scratch, bytes(16 * PAGE))  # has its memory from now on

    def vm(self, kind: int = SNP) -> Handle:
        return Handle(self, self.process.ioctl(self.kvm_fd, CREATE_VM, kind))

    def put(self, data: bytes, page: int = 1) -> int:
        """Bytes in user memory: their address."""
        self.process.store(self.scratch + page * PAGE, data)
        return self.scratch + page * PAGE

    def certificates(self) -> tuple[bytes, bytes]:
        """PDH, and PEK, OCA and CEK, from /dev/sev."""
        pdh, chain = self.put(bytes(2084), 2), self.put(bytes(3 * 2084), 4)
        export = self.put(struct.pack("<QIQI", pdh, 2084, chain, 3 * 2084), 3)
        self.process.ioctl(self.sev_fd, 0xC0105300, bytearray(struct.pack("<IQI", 5, export, 0)))
        return self.process.load(pdh, 2084), self.process.load(chain, 3 * 2084)

    @property
    def free(self) -> int:
        return self.kernel.memory.free

    @property
    def guests(self) -> int:
        """How many guests the firmware has, of both kinds."""
        return self.system.processor.guest_count + len(self.system.processor.legacy.guests)

    def table(self) -> bytes:
        """The whole RMP."""
        rmp = self.system.machine.map.rmp
        return bytes(self.system.machine.dram.read(rmp.base, rmp.end + 1 - rmp.base))

    def spoil(self, patch: pytest.MonkeyPatch, command: Command, status: Status, after: int = 0) -> None:
        """Let the firmware answer `status` to a command, from its call number `after` on; of several, to each."""
        processor, calls = self.system.processor, 0
        handlers = dict(processor._commands)
        layout, handler, run_handler = handlers[command]

        def failing(psp: Any, buffer: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise FirmwareRefusal(status, "spoilt")
            return handler(psp, buffer)

        def failing_run(psp: Any, buffer: Any, pages: range) -> Any:
            nonlocal calls
            room = min(max(after - calls, 0), len(pages))
            calls += min(room + 1, len(pages))
            done, refusal = run_handler(psp, buffer, pages[:room]) if room and run_handler else (0, None)
            if done == room < len(pages):
                refusal = FirmwareRefusal(status, "spoilt")
            return done, refusal

        handlers[command] = (layout, failing, failing_run if run_handler else None)
        patch.setattr(processor, "_commands", handlers)


class Handle:
    """A VM by its descriptor."""

    def __init__(self, host: Host, fd: int) -> None:
        self.host, self.fd = host, fd
        self.error = 0
        """`error` after the last call."""
        self.vcpus: list[int] = []

    @property
    def vm(self) -> Vm:
        file = self.host.process.file(self.fd)
        assert isinstance(file, VmFile)
        return file.vm

    @property
    def sev(self) -> SevGuest:
        """Its SEV side, which must be there."""
        assert self.vm.sev is not None
        return self.vm.sev

    @property
    def private(self) -> Any:
        """What is behind the private pages of slot 0."""
        slot = self.vm.slots.get(0)
        assert slot is not None
        return slot.private

    def start_op(self, number: int, payload: bytes = b"", sev_fd: int | None = None) -> tuple[bytearray, Steps[int]]:
        """A sub-command in steps, and its structure."""
        host = self.host
        data = host.put(payload, page=0) if payload else 0
        command = bytearray(struct.pack("<IIQII", number, 0, data, STRANGE, host.sev_fd if sev_fd is None else sev_fd))
        return command, host.process.calling(self.fd, ENCRYPT_OP, command)

    def op(self, number: int, payload: bytes = b"", sev_fd: int | None = None) -> bytes:
        """A sub-command to its end: its structure as it comes back."""
        host = self.host
        data = host.put(payload, page=0) if payload else 0
        command = bytearray(struct.pack("<IIQII", number, 0, data, STRANGE, host.sev_fd if sev_fd is None else sev_fd))
        try:
            host.process.ioctl(self.fd, ENCRYPT_OP, command)
        finally:
            self.error = struct.unpack_from("<I", command, 16)[0]
        return host.process.load(data, len(payload)) if payload else b""

    def init2(self, features: int = 0, flags: int = 0, version: int = 0) -> None:
        self.op(22, struct.pack("<QIHH32x", features, flags, version, 0))

    def create_vcpu(self, number: int = 0) -> int:
        fd: int = self.host.process.ioctl(self.fd, CREATE_VCPU, number)
        self.vcpus.append(fd)
        return fd

    def enable(self, cap: int, argument: int = 0) -> None:
        self.host.process.ioctl(self.fd, ENABLE_CAP, bytearray(struct.pack("<IIQ80x", cap, 0, argument) + bytes(8)))

    def close(self) -> None:
        """The VM ends, vCPUs first."""
        for fd in self.vcpus:
            self.host.process.close(fd)
        self.host.process.close(self.fd)

    # Memory.

    def add_private_memory(self, pages: int, gfn: int = 0, slot: int = 0) -> tuple[int, int]:
        """A private slot: the address of its shared side, and the descriptor of its private file."""
        process, size = self.host.process, pages * PAGE
        shared = process.mmap(size)
        if self.host.kernel.era.name == "rfc-v7":
            self.enable(UNMAPPED_PRIVATE_MEM)
            fd = process.memfd_restricted()
            process.ftruncate(fd, size)
            number = SET_REGION
        else:
            fd = process.ioctl(self.fd, GUEST_MEMFD, bytearray(struct.pack("<QQ48x", size, 0)))
            number = SET_REGION2
        region = struct.pack("<IIQQQQII112x", slot, 4, gfn * PAGE, size, shared, 0, fd, 0)
        process.ioctl(self.fd, number, bytearray(region))
        return shared, fd

    def make_private(self, gfns: range, private: bool = True) -> None:
        v7 = self.host.kernel.era.name == "rfc-v7"
        request = struct.pack("<QQQQ", gfns.start * PAGE, len(gfns) * PAGE, 8 * private, 0)
        self.host.process.ioctl(self.fd, ATTRIBUTES_V10 if v7 else ATTRIBUTES, bytearray(request))

    # SNP.

    def snp_start(self, policy: int = POLICY, flags: int = 0, sev_fd: int | None = None) -> None:
        if self.host.kernel.era.name == "rfc-v7":
            self.op(23, struct.pack("<QQBB16s6x", policy, 0, 0, 0, bytes(16)), sev_fd)
        else:
            self.op(100, struct.pack("<Q16sH38x", policy, bytes(16), flags), sev_fd)

    def snp_update(
        self, gfn: int, source: int, size: int, kind: int = 1, flags: int = 0, sev_fd: int | None = None
    ) -> tuple[int, int, int]:
        """Linux's: gfn_start, uaddr and len as they come back."""
        payload = struct.pack("<QQQBBHI32x", gfn, source, size, kind, 0, flags, 0)
        return struct.unpack_from("<QQQ", self.op(101, payload, sev_fd))

    def snp_update_v7(self, address: int, size: int, kind: int = 1) -> None:
        self.op(24, struct.pack("<QQIBBBBB7x", 0, address, size, 0, kind, 0, 0, 0))

    def snp_finish(
        self, flags: int = 0, block: int = 0, auth: int = 0, enable: int = 0, host_data: bytes = b""
    ) -> None:
        head = struct.pack("<QQBB", block, auth, enable, 0)
        if self.host.kernel.era.name == "rfc-v7":
            self.op(25, head + struct.pack("<32s6x", host_data))
        else:
            self.op(102, head + struct.pack("<B32s3xH32x", 0, host_data, flags))

    def states(self, gfns: range) -> list[int]:
        """The page states of private pages of slot 0 by guest page, -1 for one without memory."""
        slot = self.vm.slots.get(0)
        assert slot is not None
        file = getattr(self.private, "file", self.private)
        rmp = self.host.system.machine.rmp
        frames = file.pages.peek(slot.offsets(gfns)).tolist()
        return [int(rmp.states(range(frame, frame + 1))[0]) if frame else -1 for frame in frames]

    def vmcb(self, number: int = 0) -> Any:
        """The control area of a vCPU."""
        vcpu = self.vm.vcpus[number]
        return VMCB.unpack(self.vm.kernel.cpu.read(vcpu.vmcb, PAGE))


@contextmanager
def refused(number: int, firmware: Status | None = None) -> Iterator[None]:
    """The block fails with this errno, and this status of the firmware."""
    with pytest.raises(KernelError) as caught:
        yield
    assert (caught.value.errno, caught.value.firmware) == (number, firmware), caught.value
