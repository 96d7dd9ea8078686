"""tools/testing/selftests/kvm/x86_64/private_mem_conversions_test.c: the guest converts, the VMM serves, both look.

The hypercall's flags are the test's own: bit 0 sets the attribute, bit 1 makes it shared, bit 2 asks for fallocate.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from tests.host.selftests.harness import (
    ENABLE_CAP,
    EXIT_HLT,
    EXIT_HYPERCALL,
    GUEST_MEMFD,
    KEEP_SIZE,
    MIB,
    PAGE,
    PUNCH_HOLE,
    SW_PROTECTED_VM,
    Host,
    Vcpu,
)
from tests.sampling import sampled

BASE, PER_CPU, STRIDE = 1 << 32, 2 * MIB + PAGE, 4 * MIB
RANGES = [(0, PAGE), (0, 2 * MIB), (PAGE, PAGE), (PAGE, 2 * MIB), (2 * MIB, PAGE)]
ODD_PAGES = (8 * PAGE, 4 * PAGE)
"""No range of the C file reaches its step that makes the odd pages of a range shared; this one does."""
SET_ATTRIBUTES, MAP_SHARED, DO_FALLOCATE = 1, 2, 4
MAP_GPA_RANGE, CAP_EXIT_HYPERCALL = 12, 201
SYNC_SHARED, SYNC_PRIVATE = 0, 1


class Guest:
    """What the guest's code calls: memset, memcmp, the hypercall, and ucalls to the host."""

    def __init__(self, cpu: GuestCpu, tell: list[Any]) -> None:
        self.cpu, self._tell = cpu, tell

    async def fill(self, gpa: int, pattern: int, size: int) -> None:
        await self.cpu.write(gpa, bytes([pattern]) * size)

    async def expect(self, gpa: int, pattern: int, size: int) -> None:
        found = await self.cpu.read(gpa, size)
        if found != bytes([pattern]) * size:
            raise ProgramFailure(f"{gpa:#x}+{size:#x}: expected {pattern:#x}, found {sorted(set(found))}")

    async def sync(self, *words: int) -> None:
        """GUEST_SYNC: the words, for the host to look at while the guest waits."""
        self._tell.append(words)
        await self.cpu.hlt()

    async def map(
        self, gpa: int, size: int, *, private: bool, fallocate: bool = False, attributes: bool = True
    ) -> None:
        """KVM_HC_MAP_GPA_RANGE."""
        flags = (SET_ATTRIBUTES if attributes else 0) | (0 if private else MAP_SHARED)
        flags |= DO_FALLOCATE if fallocate else 0
        await self.cpu.load(rax=MAP_GPA_RANGE, rbx=gpa, rcx=size >> 12, rdx=flags)
        await self.cpu.vmmcall()
        (result,) = await self.cpu.look("rax")
        if result:
            raise ProgramFailure(f"the hypercall answered {result:#x}")

    async def sync_shared(self, gpa: int, size: int, current: int, new: int) -> None:
        """The host sees `current`, writes `new`, and the guest sees that."""
        await self.sync(SYNC_SHARED, gpa, size, current, new)
        await self.expect(gpa, new, size)


async def explicit(guest: Guest, base: int, fallocate: bool) -> None:
    """guest_test_explicit_conversion: the steps and patterns of the C file in its order."""
    default, shared, private, second, last = 0xAA, 0x11, 0x22, 0x33, 0x44
    init = 0xCC
    await guest.fill(base, default, PER_CPU)
    await guest.sync_shared(base, PER_CPU, default, init)
    for offset, size in (*RANGES, ODD_PAGES):
        gpa = base + offset
        await guest.fill(gpa, shared, size)
        await guest.map(gpa, size, private=True, fallocate=fallocate)
        first = PAGE if size == 2 * MIB else size
        await guest.fill(gpa, private, first)
        await guest.sync(SYNC_PRIVATE, gpa, first, shared)
        await guest.expect(gpa, private, first)
        await guest.expect(base, init, offset)
        await guest.expect(gpa + size, init, base + PER_CPU - gpa - size)
        if size < 2 * MIB:
            odd = range(gpa + PAGE, gpa + size, 2 * PAGE)
            for page in odd:
                await guest.map(page, PAGE, private=False, fallocate=fallocate)
                await guest.sync_shared(page, PAGE, shared, second)
            for page in range(gpa, gpa + size, PAGE):
                await guest.expect(page, second if page in odd else private, PAGE)
        await guest.map(gpa, size, private=False, fallocate=fallocate)
        await guest.fill(gpa, second, size)
        await guest.sync_shared(gpa, size, second, last)
        await guest.fill(base, init, PER_CPU)
        await guest.map(base, PER_CPU, private=True, fallocate=True, attributes=False)
        await guest.map(base, PER_CPU, private=False, fallocate=True, attributes=False)


async def punch(guest: Guest, base: int, fallocate: bool) -> None:
    """guest_test_punch_hole: a hole, and no change of the attribute: the guest reads zeros."""
    await guest.map(base, PER_CPU, private=True, fallocate=fallocate)
    for offset, size in RANGES:
        gpa = base + offset
        await guest.map(base, PER_CPU, private=False, fallocate=True, attributes=False)
        whole = not fallocate
        await guest.fill(base if whole else gpa, 0xCC, PER_CPU if whole else size)
        await guest.map(gpa, size, private=False, fallocate=True, attributes=False)
        await guest.expect(gpa, 0, size)
        if whole:
            await guest.expect(base, 0xCC, offset)


Case = Callable[[Guest, int, bool], Awaitable[None]]


class World:
    """__test_mem_conversions: a VM with n vCPUs, its memory in m slots of one guest_memfd."""

    def __init__(self, vcpus: int, slots: int) -> None:
        self.host = Host(installed=512 * MIB)
        self.vm = self.host.vm(SW_PROTECTED_VM)
        size = max(vcpus * STRIDE, STRIDE)
        self.fd, self.address = self.host.memfd(self.vm, size), self.host.mmap(size)
        part = size // slots
        assert part % PAGE == 0
        for slot in range(slots):
            start = slot * part
            self.host.region2(
                self.vm, 10 + slot, BASE + start, part, self.address + start, GUEST_MEMFD, self.fd, offset=start
            )
        cap = struct.pack("<IIQ", CAP_EXIT_HYPERCALL, 0, 1 << MAP_GPA_RANGE).ljust(0x68, b"\0")
        self.host.process.ioctl(self.vm, ENABLE_CAP, cap)
        self.vcpus = [self.host.vcpu(self.vm, number) for number in range(vcpus)]

    def shared(self, gpa: int) -> int:
        return self.address + gpa - BASE

    def run(self, case: Case, fallocate: bool) -> None:
        """Every vCPU in turn, an exit each, so that the vCPUs' steps mix."""
        told: list[list[Any]] = [[] for _ in self.vcpus]

        def program(number: int) -> Callable[[GuestCpu], Any]:
            async def code(cpu: GuestCpu) -> str:
                for one in (False, True) if fallocate else (False,):
                    await case(Guest(cpu, told[number]), BASE + number * STRIDE, one)
                return "done"

            return code

        for number, vcpu in enumerate(self.vcpus):
            vcpu.program(program(number))
        running = set(range(len(self.vcpus)))
        while running:
            for number in sorted(running):
                vcpu = self.vcpus[number]
                if self.serve(vcpu, told[number]):
                    assert vcpu.outcome == "done", vcpu.outcome
                    running.discard(number)

    def serve(self, vcpu: Vcpu, told: list[Any]) -> bool:
        """One KVM_RUN, and what the VMM does then: whether the guest's code has ended."""
        reason = vcpu.run()
        if reason == EXIT_HYPERCALL:
            self.hypercall(vcpu)
            return False
        assert reason == EXIT_HLT
        if not told:
            return True
        kind, gpa, size, *patterns = told.pop()
        address, load = self.shared(gpa), self.host.process.load
        assert load(address, size) == bytes([patterns[0]]) * size, f"{kind} {gpa:#x}"
        if kind == SYNC_SHARED:
            self.host.process.store(address, bytes([patterns[1]]) * size)
        return False

    def hypercall(self, vcpu: Vcpu) -> None:
        """handle_exit_hypercall: fallocate, then the attribute."""
        number, gpa, pages, flags, *_ = vcpu.exit("<QQQQQQQQ")[:4]
        size = pages * PAGE
        assert number == MAP_GPA_RANGE
        private = not flags & MAP_SHARED
        if flags & DO_FALLOCATE:
            mode = KEEP_SIZE if private else PUNCH_HOLE | KEEP_SIZE
            self.host.process.fallocate(self.fd, mode, gpa - BASE, size)
        if flags & SET_ATTRIBUTES:
            self.host.attributes(self.vm, gpa, size, 8 if private else 0)
        vcpu.answer(56, bytes(8))

    def close(self) -> None:
        """The VM's descriptors are closed: the file's memory can still be punched and allocated."""
        process, size = self.host.process, STRIDE * len(self.vcpus)
        for vcpu in self.vcpus:
            process.munmap(vcpu.shared, 3 * PAGE)
            process.close(vcpu.fd)
        process.close(self.vm)
        process.fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, 0, size)
        process.fallocate(self.fd, KEEP_SIZE, 0, size)
        process.close(self.fd)


_SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 8)]


@pytest.mark.parametrize("case", [explicit, punch], ids=["explicit_conversion", "punch_hole"])
@pytest.mark.parametrize(("vcpus", "slots"), sampled(_SHAPES, 3), ids=lambda number: str(number))
def test_private_mem_conversions(vcpus: int, slots: int, case: Case) -> None:
    world = World(vcpus, slots)
    world.run(case, fallocate=True)
    world.close()
    assert not world.host.system.host.kvm.vms
