"""An SNP guest without a kernel under it: the test is its hypervisor, sees the GHCB's bytes and writes any answer.

Offsets and numbers are typed again from the documents.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.page_tables import enable_paging, mark
from snpbook.guest.vc import VcHandler
from snpbook.hardware.exits import Exit, Hlt, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.vmcb import intercept_bits
from tests.hardware.guests import ASID, PAGE, Bench

PLACE = Layout(tables=0x10000, shared=0x20000, secrets=0x18000, cpuid=0x19000, spare_tables=4)
C_BIT = 51
PRIVATE, SHARED, DEVICE = range(0x10, 0x20), range(0x20, 0x23), 0x40
NOWHERE = 1 << 24
"""A page out of DRAM: an entry that leads there has a reserved bit, as those of devices have."""
DATA = 0x1A000
"""Private memory of the program's own."""
OFFSETS = {
    "cpl": 0xC8, "rax": 0x1F8, "rcx": 0x308, "rdx": 0x310, "rbx": 0x318, "rsi": 0x330, "code": 0x390, "info1": 0x398,
    "info2": 0x3A0, "scratch": 0x3A8, "xcr0": 0x3E8,
}  # fmt: skip
ANSWERED = ("info1", "info2", "rax", "rbx", "rcx", "rdx")
"""What KVM marks in every answer."""
Body = Callable[[GuestCpu], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Answer:
    """What the hypervisor leaves: fields by name, those that it marks, bytes of the shared buffer."""

    fields: dict[str, int] = field(default_factory=dict)
    marked: Sequence[str] = ANSWERED
    buffer: bytes = b""


@dataclass(frozen=True)
class Request:
    """What the guest had in its GHCB: the marked fields by name, and the whole page."""

    fields: dict[str, int]
    page: bytes

    @property
    def buffer(self) -> bytes:
        return self.page[0x800:0xFF0]


class Bare:
    """The guest, what it asked by MSR and by page, and how it left."""

    def __init__(self, *codes: int, cpuid: Sequence[tuple[int, ...]] = (), features: int = 1) -> None:
        self.bench = Bench("genoa", mapping=False)
        for gfn in PRIVATE:
            self.bench.give(gfn, 0x900 + gfn)
        for gfn in SHARED:
            self.bench.map(gfn, 0xA00 + gfn)
        self.bench.map(DEVICE, NOWHERE)
        self.bench.vmcb["intercepts"] = intercept_bits(*codes, 0x78, 0x7F, 0x80)
        self.bench.set_vmcb()
        self.bench.set_vmsa(sev_features=features)
        self.put(PLACE.cpuid, cpuid_page(cpuid))
        self.requests: list[Request] = []
        self.values: list[int] = []

    def put(self, gpa: int, data: bytes) -> None:
        """Write the guest's private memory with its key."""
        self.bench.machine.encryption.write(ASID, (0x900 << 12) + gpa, data)

    def get(self, gpa: int, size: int) -> bytes:
        return self.bench.machine.encryption.read(ASID, (0x900 << 12) + gpa, size)

    def start(self, body: Body, *, early: bool = False) -> None:
        async def program(cpu: GuestCpu) -> Any:
            await enable_paging(cpu, PLACE, C_BIT)
            await mark(cpu, PLACE, C_BIT, range(DEVICE, DEVICE + 1), private=False)
            cpu.set_handler(29, VcHandler(PLACE, C_BIT, None if early else Ghcb(cpu, PLACE.ghcb)))
            return await body(cpu)

        self.bench.start(program)

    def run(self, body: Body, *answers: Answer, msr: Callable[[int], int] = lambda _: 0, early: bool = False) -> Any:
        """Run to the end with these answers, the last again and again: what the program returns.

        What it ended with is raised; its exit, where it is not through its end.
        """
        self.start(body, early=early)
        return self.go_on(*answers, msr=msr)

    def go_on(self, *answers: Answer, msr: Callable[[int], int] = lambda _: 0) -> Any:
        left = list(answers) or [Answer()]
        while True:
            exit_ = self.bench.run()
            if isinstance(exit_, Vmgexit):
                self._serve(left, msr)
                continue
            return self._ended(exit_)

    def _serve(self, left: list[Answer], msr: Callable[[int], int]) -> None:
        value = self.bench.read_vmcb().ghcb_gpa
        if value & 0xFFF:
            self.values.append(value)
            self.bench.set_vmcb(ghcb_gpa=msr(value))
            return
        assert value == PLACE.ghcb
        spa = (0xA00 << 12) + PLACE.ghcb
        page = bytearray(self.bench.machine.dram.read(spa, PAGE))
        marks = int.from_bytes(page[0x3F0:0x400], "little")
        named = {name: at for name, at in OFFSETS.items() if marks >> at // 8 & 1}
        assert len(named) == marks.bit_count(), f"bits beyond the table: {marks:x}"
        self.requests.append(Request({name: u64(page, at) for name, at in named.items()}, bytes(page)))
        answer = left[0] if len(left) == 1 else left.pop(0)
        struct.pack_into("<QQ", page, 0x398, 0, 0)
        for name, number in answer.fields.items():
            struct.pack_into("<Q", page, OFFSETS[name], number)
        page[0x3F0:0x400] = sum(1 << OFFSETS[name] // 8 for name in answer.marked).to_bytes(16, "little")
        page[0x800 : 0x800 + len(answer.buffer)] = answer.buffer
        self.bench.machine.dram.write(spa, bytes(page))

    def _ended(self, exit_: Exit) -> Any:
        if not isinstance(exit_, Hlt) or self.bench.executor.busy:
            raise Left(exit_)
        outcome = self.bench.executor.outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @property
    def ended_with(self) -> tuple[int, int]:
        """Reason set and reason of its termination request."""
        value = self.values[-1]
        assert value & 0xFFF == 0x100, hex(value)
        return value >> 12 & 0xF, value >> 16 & 0xFF


class Left(Exception):
    """The guest left otherwise than by its end."""

    def __init__(self, exit_: Exit) -> None:
        super().__init__(exit_)
        self.exit = exit_


def u64(page: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 8], "little")


def cpuid_page(entries: Sequence[tuple[int, ...]], count: int | None = None) -> bytes:
    """Entries (eax_in, ecx_in, xcr0_in, xss_in, eax, ebx, ecx, edx)."""
    packed = b"".join(struct.pack("<IIQQIIIIQ", *entry, 0) for entry in entries)
    return (struct.pack("<IIQ", len(entries) if count is None else count, 0, 0) + packed).ljust(PAGE, b"\0")
