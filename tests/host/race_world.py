"""A guest of one of four kinds in the middle of its life, and everything that can be done to it by system calls."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import Any

from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm.vcpu import VcpuFile
from snpbook.host.refusal import KernelError
from snpbook.host.steps import Steps, finish
from snpbook.spec.process import Advice
from tests.host import invariants
from tests.host.sev_hosts import (
    ATTRIBUTES,
    ATTRIBUTES_V10,
    DEFAULT,
    PAGE,
    SET_REGION,
    SET_REGION2,
    SEV,
    SEV_ES,
    SNP,
    SW_PROTECTED,
    Host,
)

PAGES = 16
RUN, PRE_FAULT = 0xAE80, 0xC040AED5
PUNCH = 3
KINDS = ["snp", "snp-v7", "protected", "plain"]
SEV_KINDS = {"sev": (SEV, 0), "sev-es": (SEV_ES, 4)}
"""The type of the VM, and the policy of the launch."""


_hosts: dict[str, tuple[Host, int]] = {}


def host_of(era: str) -> tuple[Host, int]:
    """A host with a process of its own on a kernel that is as after boot, and the pages in use before the process."""
    if era not in _hosts or not _idle(*_hosts[era]):
        host = Host(era)
        host.process.exit()
        _hosts[era] = host, invariants.held(host.kernel)
    host, baseline = copy(_hosts[era][0]), _hosts[era][1]
    host.process = process = host.kernel.process()
    host.kernel.step_pages = None
    host.sev_fd, host.kvm_fd = process.open("/dev/sev"), process.open("/dev/kvm")
    host.scratch = process.mmap(16 * PAGE)
    process.store(host.scratch, bytes(16 * PAGE))
    return host, baseline


def _idle(host: Host, baseline: int) -> bool:
    """Whether the last test left nothing."""
    kernel = host.kernel
    return not kernel.kvm.vms and not kernel.ccp.leaks.count and kernel.memory.allocated == baseline


class World:
    """A guest with memory at 0: pages 0 to 7 private where the kind has private pages, page 0 launched.

    Its program reads and writes pages 2 to 4 and, where it can reach shared ones, 8 and 9.
    """

    def __init__(self, kind: str, *, launch: bool = True) -> None:
        self.kind, self.v7 = kind, kind == "snp-v7"
        self.host, self.baseline = host_of("rfc-v7" if self.v7 else "mainline")
        self.kernel, self.process = self.host.kernel, self.host.process
        types = {
            "snp": SNP,
            "snp-v7": DEFAULT,
            "protected": SW_PROTECTED,
            "plain": DEFAULT,
            "sev": SEV,
            "sev-es": SEV_ES,
        }
        self.vm = self.host.vm(types[kind])
        self.private = kind in ("snp", "snp-v7", "protected")
        self.snp = kind.startswith("snp")
        if kind == "snp" or kind in SEV_KINDS:
            self.vm.init2()
        elif self.v7:
            self.vm.op(22, bytes(8))
        self.memfd = -1
        if self.private:
            self.shared, self.memfd = self.vm.add_private_memory(PAGES)
        else:
            self.shared = self.process.mmap(PAGES * PAGE)
            self.region(PAGES)
        self.vcpu = self.vm.create_vcpu()
        self.process.store(self.shared, b"".join(bytes([n + 1]) * PAGE for n in range(PAGES)))
        if self.snp:
            self.vm.snp_start()
            if launch:
                if not self.v7:
                    self.make_private(range(8))
                self.update(range(1))
                self.vm.snp_finish()
                if self.v7:
                    self.make_private(range(1, 8))
        elif self.private:
            self.make_private(range(8))
        elif kind in SEV_KINDS:
            self.vm.op(2, struct.pack("<IIQI4xQI4x", 0, SEV_KINDS[kind][1], 0, 0, 0, 0))
        self.kernel.step_pages = 1

    # System calls, in steps and whole.

    def running(self) -> Steps[int]:
        return self.process.calling(self.vcpu, RUN)

    def changing(self, gfns: range, private: bool) -> Steps[int]:
        request = struct.pack("<QQQQ", gfns.start * PAGE, len(gfns) * PAGE, 8 * private, 0)
        return self.process.calling(self.vm.fd, ATTRIBUTES_V10 if self.v7 else ATTRIBUTES, bytearray(request))

    def make_private(self, gfns: range, private: bool = True) -> None:
        self.vm.make_private(gfns, private)

    def updating(self, gfns: range) -> Steps[int]:
        address, size = self.shared + gfns.start * PAGE, len(gfns) * PAGE
        if self.v7:
            return self.vm.start_op(24, struct.pack("<QQIBBBBB7x", 0, address, size, 0, 1, 0, 0, 0))[1]
        return self.vm.start_op(101, struct.pack("<QQQBBHI32x", gfns.start, address, size, 1, 0, 0, 0))[1]

    def update(self, gfns: range) -> None:
        finish(self.updating(gfns))

    def setting(self, pages: int) -> Steps[int]:
        """KVM_SET_USER_MEMORY_REGION of slot 0, with as many pages; 0 deletes it."""
        flags, fd = (4, self.memfd) if self.private and pages else (0, -1)
        region = struct.pack("<IIQQQQII112x", 0, flags, 0, pages * PAGE, self.shared, 0, fd & 0xFFFFFFFF, 0)
        number = SET_REGION if self.v7 or not self.private else SET_REGION2
        return self.process.calling(self.vm.fd, number, bytearray(region))

    def region(self, pages: int) -> None:
        finish(self.setting(pages))

    def pre_faulting(self, gfns: range) -> Steps[int]:
        request = struct.pack("<QQQ40x", gfns.start * PAGE, len(gfns) * PAGE, 0)
        return self.process.calling(self.vcpu, PRE_FAULT, bytearray(request))

    def punch(self, gfns: range) -> None:
        self.process.fallocate(self.memfd, PUNCH, gfns.start * PAGE, len(gfns) * PAGE)

    def close_memfd(self) -> None:
        self.process.close(self.memfd)

    def close_vm(self) -> None:
        self.process.close(self.vcpu)
        self.process.close(self.vm.fd)

    def close_all(self) -> None:
        self.close_vm()
        if self.private:
            self.close_memfd()

    # The guest.

    def program(self) -> None:
        """Load the guest's program. It goes on after what the machine refuses."""
        snp, offset = self.snp, 0

        async def code(cpu: GuestCpu) -> str:
            for gfn in (2, 3, *(() if snp else (8, 9))):
                with suppress(GuestException):
                    if snp:
                        await cpu.pvalidate(gfn * PAGE, 1)
                    await cpu.write(gfn * PAGE + offset, b"mine")
                    await cpu.read(gfn * PAGE, 8)
            with suppress(GuestException):
                await cpu.read(2 * PAGE, 3 * PAGE)
            return "done"

        self.executor.start(code)

    @property
    def executor(self) -> Any:
        file = self.process.file(self.vcpu)
        assert isinstance(file, VcpuFile)
        return file.vcpu.executor

    # What holds.

    def check(self) -> None:
        invariants.check(self.kernel)

    def end(self) -> None:
        """The process ends: everything is free but for what a leak list names."""
        self.process.exit()
        self.check()
        assert not self.kernel.kvm.vms
        lost = invariants.held(self.kernel) - self.baseline
        assert lost <= 0, f"{lost} pages are lost"
        asids = self.kernel.kvm.asids
        assert not (asids.taken & ~asids.reclaimable).any()


def drive(steps: Steps[Any]) -> int:
    """A call to its end: 0, or the errno that it fails with."""
    try:
        finish(steps)
    except KernelError as error:
        return error.errno or 0
    return 0


Act = Callable[[World], object]

ACTS: dict[str, tuple[str, Act]] = {
    "punch a page": ("private", lambda w: w.punch(range(3, 4))),
    "punch all": ("private", lambda w: w.punch(range(PAGES))),
    "convert to shared": ("private", lambda w: w.make_private(range(2, 5), False)),
    "convert to shared and punch": ("private", lambda w: (w.make_private(range(8), False), w.punch(range(8)))),
    "convert to private": ("private", lambda w: w.make_private(range(PAGES))),
    "to and fro": ("private", lambda w: (w.make_private(range(8), False), w.make_private(range(8)))),
    "delete the slot": ("", lambda w: w.region(0)),
    "delete the slot and make it again": ("", lambda w: (w.region(0), w.region(PAGES))),
    "close the memfd": ("private", World.close_memfd),
    "close the memfd, delete the slot": ("private", lambda w: (w.close_memfd(), w.region(0))),
    "close the VM": ("", World.close_vm),
    "close everything": ("", World.close_all),
    "munmap": ("", lambda w: w.process.munmap(w.shared, PAGES * PAGE)),
    "madvise": ("", lambda w: w.process.madvise(w.shared, PAGES * PAGE, Advice.DONTNEED)),
    "munmap a part": ("", lambda w: w.process.munmap(w.shared + 3 * PAGE, 7 * PAGE)),
}
"""What others do meanwhile, and for which kinds."""


def acts_of(kind: str) -> list[str]:
    return [name for name, (needs, _) in ACTS.items() if kind != "plain" or not needs]
