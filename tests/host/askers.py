"""Guests that put any bytes into their GHCB and any value into its MSR, entered by KVM_RUN with nobody else's loop.

Offsets and numbers are typed again from the documents; `Asker` is an SNP guest that has booted, `EsAsker` a SEV-ES
guest with paging of its own and a shared page.
"""

from __future__ import annotations

import errno as codes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from snpbook.guest.layout import Layout
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.guest_cpu import GuestCpu, Program
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.configuration import GuestKind
from snpbook.host.vmm.exits import convert
from snpbook.host.vmm.guest import Vmm
from snpbook.host.vmm.properties import default_object
from snpbook.spec.msr import Msr
from snpbook.spec.uapi_kvm import MpState
from snpbook.system import System, sample_image
from tests.machines import MIB, PAGE

RUN = 0xAE80
CODE, INFO1, INFO2, SCRATCH, BITMAP, BUFFER, USAGE = 0x390, 0x398, 0x3A0, 0x3A8, 0x3F0, 0x800, 0xFFC
RAX, RCX, RDX, RBX, RSI, XCR0, CPL = 0x1F8, 0x308, 0x310, 0x318, 0x330, 0x3E8, 0x0C8
"""CPL is a byte at 0xCB, the fourth of its quadword."""
BUFFER_SIZE = 2032
IO, HYPERCALL, HLT, MMIO, SHUTDOWN, INTERNAL, SYSTEM_EVENT, AP_HOLD, REQ_CERTS, VMGEXIT = (
    2, 3, 5, 6, 8, 17, 24, 32, 42, 50,
)  # fmt: skip


def ghcb(fields: dict[int, int], *, valid: list[int] | None = None, buffer: bytes = b"", usage: int = 0) -> bytes:
    """A GHCB page by its offsets; `valid` lists the fields marked as filled in, those of `fields` by default."""
    page = bytearray(PAGE)
    bitmap = 0
    for offset, value in fields.items():
        struct.pack_into("<Q", page, offset, value)
    for offset in fields if valid is None else valid:
        bitmap |= 1 << offset // 8
    page[BITMAP : BITMAP + 16] = bitmap.to_bytes(16, "little")
    page[BUFFER : BUFFER + len(buffer)] = buffer
    struct.pack_into("<HI", page, 0xFFA, 2, usage)
    return bytes(page)


def u64(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 8], "little")


def infos(page: bytes) -> tuple[int, int]:
    """SW_EXITINFO1 and 2."""
    return u64(page, INFO1), u64(page, INFO2)


def marked(page: bytes) -> list[int]:
    """The offsets that the bitmap marks."""
    bitmap = int.from_bytes(page[BITMAP : BITMAP + 16], "little")
    return [8 * bit for bit in range(128) if bitmap >> bit & 1]


class Stopped(Exception):
    """KVM_RUN returned for a reason that the test does not serve."""

    def __init__(self, reason: int) -> None:
        super().__init__(reason)
        self.reason = reason


Serve = Callable[[int], None]
"""What a test does with an exit, by its reason."""


class Entered:
    """One guest and its first vCPU; subclasses say how the guest comes to a GHCB at `ghcb`."""

    ghcb: int

    def __init__(self, vmm: Vmm) -> None:
        self.vmm, self.kernel = vmm, vmm.kernel
        self.number = 0

    @property
    def vm(self) -> Any:
        return self.vmm.vm

    @property
    def vcpu(self) -> Any:
        return self.vmm.vcpus[self.number]

    def restored(self) -> Entered:
        """The guest as if no test had stopped it: idle, its GHCB registered, hypercalls for the VMM."""
        self.number, vcpu, vm = 0, self.vmm.vcpus[0], self.vm
        vcpu.executor, vcpu.exchange, vcpu.completion = CoroutineExecutor(), None, None
        vcpu.mp_state, vcpu.ghcb_registered, vm.exit_hypercalls = MpState.RUNNABLE, self.ghcb >> 12, 1 << 12
        vcpu.set_control("event_injection", 0)
        return self

    def enter(self) -> int:
        """KVM_RUN: the exit reason."""
        handle = self.vmm.handles[self.number]
        self.vmm.process.ioctl(handle.fd, RUN)
        return self.reason

    @property
    def reason(self) -> int:
        address = self.vmm.handles[self.number].run + 8
        return int.from_bytes(self.vmm.process.load(address, 4), "little")

    def exit(self, form: str, offset: int = 0) -> tuple[Any, ...]:
        """The exit's part of kvm_run."""
        address = self.vmm.handles[self.number].run + 32 + offset
        return struct.unpack(form, self.vmm.process.load(address, struct.calcsize(form)))

    def put(self, data: bytes, offset: int) -> None:
        """Bytes into the exit's part of kvm_run; from 4064 on into the page of port data."""
        self.vmm.process.store(self.vmm.handles[self.number].run + 32 + offset, data)

    @property
    def port_data(self) -> bytes:
        return self.vmm.process.load(self.vmm.handles[self.number].run + PAGE, PAGE)

    def drive(self, program: Program, serve: Serve | None = None) -> Any:
        """Run a program to its end; `serve` is asked about every other exit."""
        executor = self.vcpu.executor
        executor.start(program)
        while True:
            reason = self.enter()
            if reason == HLT and not executor.busy:
                if isinstance(executor.outcome, Exception):
                    raise executor.outcome
                return executor.outcome
            if serve is None:
                raise Stopped(reason)
            serve(reason)

    def page(self, page: bytes, serve: Serve | None = None) -> bytes:
        """VMGEXIT with these bytes in the GHCB: the page that comes back."""

        async def program(cpu: GuestCpu) -> bytes:
            await cpu.write(self.ghcb, page)
            await cpu.wrmsr(Msr.GHCB, self.ghcb)
            await cpu.vmgexit()
            answer: bytes = await cpu.read(self.ghcb, PAGE)
            return answer

        answer: bytes = self.drive(program, serve)
        return answer

    def event(
        self, code: int, info1: int = 0, info2: int = 0, serve: Serve | None = None, buffer: bytes = b"", **names: int
    ) -> bytes:
        """An event with further fields by name: the page that comes back."""
        more = {_OFFSETS[name]: value for name, value in names.items()}
        return self.page(ghcb({CODE: code, INFO1: info1, INFO2: info2, **more}, buffer=buffer), serve)

    def msr(self, value: int, serve: Serve | None = None) -> int:
        """VMGEXIT with this value in the GHCB MSR: the value that comes back."""

        async def program(cpu: GuestCpu) -> int:
            await cpu.wrmsr(Msr.GHCB, value)
            await cpu.vmgexit()
            answer: int = await cpu.rdmsr(Msr.GHCB)
            return answer

        answer: int = self.drive(program, serve)
        return answer

    def log(self, text: str) -> bool:
        """Whether the kernel has said so."""
        return any(text in line for line in self.kernel.log.lines)


_OFFSETS = {
    "rax": RAX, "rbx": RBX, "rcx": RCX, "rdx": RDX, "rsi": RSI, "xcr0": XCR0, "scratch": SCRATCH, "cpl_word": CPL,
}  # fmt: skip


class Asker(Entered):
    """An SNP guest after its boot, with its GHCB registered."""

    def __init__(self, era: str = "mainline", *, memory: str = "12 MiB", vcpus: int = 1, **options: Any) -> None:
        self.system = System("milan", "tests", installed=256 * MIB)
        self.system.host.boot(era, **options)
        self.guest = self.system.create_vm(memory=memory, vcpus=vcpus)
        self.guest.launch()
        self.guest.boot()
        self.place = Layout.of(self.guest.vmm.image)
        self.ghcb = self.place.ghcb
        super().__init__(self.guest.vmm)


class EsAsker(Entered):
    """A SEV-ES guest that has put page tables into its private memory, by which one page is shared."""

    ghcb = 0x8000
    _TABLES = 0x10000

    def __init__(self, era: str = "mainline") -> None:
        self.system = System("milan", "tests", installed=256 * MIB)
        self.system.host.boot(era)
        signature = self.system.product.vcpu_signature
        image = sample_image()
        kind, pinned = GuestKind.SEV_ES, {"upm_mode": False} if era == "rfc-v7" else {}  # it never tells what it shares
        sev = default_object(kind, **pinned)
        options = {"memory": 12 * MIB, "vcpus": 1, "vcpu_signature": signature, "kind": kind, "sev": sev}
        super().__init__(Vmm(self.system.host, image, **options))
        self.vmm.launch()
        if self.vmm.private_memory:  # its program tells the host of no page that it shares
            convert(self.vmm, 0, 12 * MIB, private=False)
        self.drive(self._paging)

    async def _paging(self, cpu: GuestCpu) -> None:
        c_bit, tables = 1 << 51, self._TABLES
        levels = [tables + PAGE * level for level in range(4)]
        for table, below in pairwise(levels):
            await cpu.write(table, struct.pack("<Q", below | c_bit | 7) + bytes(PAGE - 8))
        leaves = [gfn << 12 | 7 | c_bit * (gfn << 12 != self.ghcb) for gfn in range(512)]
        await cpu.write(levels[3], struct.pack("<512Q", *leaves))
        await cpu.load(cr3=tables | c_bit, cr4=0x20, efer=0x1500, cr0=0x80000011)


@cache
def _shared(kind: type[Asker | EsAsker], era: str) -> Asker | EsAsker:
    return kind(era)


def snp(era: str = "mainline") -> Asker:
    """The SNP guest of that host that tests share: to boot one takes longer than to ask it."""
    guest = _shared(Asker, era).restored()
    assert isinstance(guest, Asker)
    return guest


def sev_es(era: str = "mainline") -> EsAsker:
    """The SEV-ES guest of that host that tests share."""
    guest = _shared(EsAsker, era).restored()
    assert isinstance(guest, EsAsker)
    return guest


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(KernelError) as caught:
        yield
    assert caught.value.errno == number, codes.errorcode[caught.value.errno or 0]
