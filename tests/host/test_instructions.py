"""Instructions that KVM does for guests: intercepted where the registers are in the clear, told by GHCB elsewhere."""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.vmm.configuration import GuestKind
from snpbook.host.vmm.guest import Vmm
from snpbook.spec.msr import Msr
from snpbook.spec.vmcb import ExitCode, intercept_bits
from snpbook.system import System, sample_image
from tests.host.askers import (
    CODE,
    HYPERCALL,
    INFO1,
    INFO2,
    INTERNAL,
    IO,
    MIB,
    PAGE,
    RAX,
    RBX,
    RCX,
    RDX,
    Asker,
    Entered,
    EsAsker,
    Stopped,
    ghcb,
    infos,
    sev_es,
    snp,
    u64,
)

GUESTS = pytest.mark.parametrize("guest", [snp, sev_es])
Get = Callable[[str], Asker | EsAsker]
CPUID2 = 0x4008AE90


class Plain(Entered):
    """A guest without encrypted registers: intercepts reach KVM, and it has no GHCB."""

    def __init__(self, kind: GuestKind = GuestKind.PLAIN, era: str = "mainline") -> None:
        self.system = System("milan", "tests", installed=256 * MIB)
        self.system.host.boot(era)
        signature = self.system.product.vcpu_signature
        image = sample_image()
        super().__init__(Vmm(self.system.host, image, memory=12 * MIB, vcpus=1, vcpu_signature=signature, kind=kind))
        self.vmm.launch()


def set_cpuid(guest: Entered, *entries: tuple[int, int, int, int, int, int, int]) -> None:
    """KVM_SET_CPUID2: function, index, flags, EAX to EDX."""
    body = b"".join(struct.pack("<7I12x", *entry) for entry in entries)
    guest.vmm.process.ioctl(guest.vmm.handles[0].fd, CPUID2, bytearray(struct.pack("<II", len(entries), 0) + body))


@pytest.fixture(scope="module")
def plain_guest() -> Plain:
    return Plain()


@pytest.fixture
def plain(plain_guest: Plain) -> Plain:
    plain_guest.ghcb = 0
    plain_guest.restored()
    return plain_guest


def registers(page: bytes) -> list[int]:
    return [u64(page, offset) for offset in (RAX, RBX, RCX, RDX)]


# CPUID.

LEAVES = (
    (0x1, 0, 0, 0xA20F11, 0x800, 1 << 27 | 1 << 26, 0x178BFBFF),
    (0x7, 0, 1, 1, 2, 1 << 4 | 8, 4),
    (0xB, 0, 1, 1, 2, 0x100, 7),
    (0xB, 1, 1, 7, 64, 0x201, 7),
    (0xD, 0, 1, 0x207, 0x988, 0x988, 0),
    (0xD, 1, 1, 0xF, 0x240, 0x1800, 0),
    (0xD, 2, 1, 256, 576, 0, 0),
    (0xD, 9, 1, 8, 2432, 0, 0),
    (0xD, 11, 1, 16, 0, 1 | 2, 0),
)


def test_cpuid_of_an_intercepted_guest(plain: Plain) -> None:
    set_cpuid(plain, *LEAVES)

    async def program(cpu: GuestCpu) -> list[Any]:
        return [
            tuple(await cpu.cpuid(*leaf)) for leaf in ((1, 0), (7, 0), (7, 1), (0xB, 1), (0xB, 5), (0xD, 2), (2, 0))
        ]

    assert plain.drive(program) == [
        (0xA20F11, 0x800, 1 << 26, 0x178BFBFF),  # OSXSAVE as CR4 has it
        (1, 2, 8, 4),  # and OSPKE
        (0, 0, 0, 0),  # a subleaf that is not there
        (7, 64, 0x201, 7),
        (0, 0, 5, 7),  # the topology goes on
        (256, 576, 0, 0),
        (0, 0, 0, 0),
    ]


@pytest.mark.parametrize(
    ("xcr0", "subleaf", "size"),
    [(1, 0, 0x240), (3, 0, 0x240), (7, 0, 832), (0x207, 0, 2440), (7, 1, 832), (0x207, 1, 840), (0x203, 1, 584)],
)
def test_the_size_of_an_xsave_area(xcr0: int, subleaf: int, size: int) -> None:
    """By the XCR0 that the guest passes; a compacted area has no gaps."""
    asker = sev_es()
    held = asker.vcpu.cpuid
    set_cpuid(asker, *LEAVES)
    answer = asker.event(0x72, rax=0xD, rcx=subleaf, xcr0=xcr0)
    assert infos(answer) == (0, 0)
    assert u64(answer, RBX) == size
    asker.vcpu.cpuid = held


@GUESTS
def test_cpuid_by_ghcb(guest: Get) -> None:
    asker = guest("mainline")
    leaf = next(entry for entry in asker.vcpu.cpuid if entry.function == 0x80000008)
    answer = asker.event(0x72, rax=0x80000008, rcx=0)
    assert registers(answer) == [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    assert registers(asker.event(0x72, rax=0x5FFFFFFF, rcx=0)) == [0, 0, 0, 0]


# Nothing to do.


@GUESTS
@pytest.mark.parametrize("code", [0x27, 0x76, 0x89, 0x8A, 0x8B])
def test_what_changes_nothing(guest: Get, code: int) -> None:
    answer = guest("mainline").event(code, rax=1, rcx=2, rdx=3)
    assert infos(answer) == (0, 0)
    assert registers(answer) == [1, 0, 2, 3]


def test_a_write_of_dr7() -> None:
    assert infos(snp().event(0x37, rax=0x401)) == (0, 0)


def test_intercepts_without_effect(plain: Plain) -> None:
    async def program(cpu: GuestCpu) -> str:
        await cpu.wbinvd()
        await cpu.monitor(0x1000)
        await cpu.mwait()
        return "done"

    assert plain.drive(program) == "done"


# What KVM cannot do.


@pytest.mark.parametrize(("code", "vector"), [(0x87, 6), (0x6F, 13)])
def test_an_exception_comes_with_the_next_entry(code: int, vector: int) -> None:
    """RDTSCP is #UD, a performance counter #GP: nobody intercepts the one, and there are none of the other."""
    asker, taken = snp(), []

    async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
        taken.append((exception.vector, exception.error))
        return False

    async def program(cpu: GuestCpu) -> None:
        cpu.set_handler(vector, handler)
        await _ask(asker, cpu, code)

    asker.drive(program)
    assert taken == [(vector, 0)]


async def _ask(asker: Entered, cpu: GuestCpu, code: int) -> None:
    await cpu.write(asker.ghcb, ghcb({CODE: code, INFO1: 0, INFO2: 0, RCX: 0}))
    await cpu.wrmsr(Msr.GHCB, asker.ghcb)
    await cpu.vmgexit()
    await cpu.look("rip")


@GUESTS
def test_rdtsc_is_an_unexpected_exit(guest: Get) -> None:
    asker = guest("mainline")
    with pytest.raises(Stopped) as caught:
        asker.event(0x6E)
    assert caught.value.reason == INTERNAL
    assert asker.exit("<IIQQ") == (4, 2, 0x6E, 0)


def test_an_intercept_that_kvm_has_not_asked_for(plain: Plain) -> None:
    """Another bit in the VMCB than KVM's own: the exit reaches a kernel that has no handler for it."""
    bits = plain.vcpu.control().intercepts
    plain.kernel.cpu.write(plain.vcpu.vmcb, intercept_bits(ExitCode.INVLPG))
    try:
        with pytest.raises(Stopped) as caught:
            plain.drive(_invlpg)
    finally:
        plain.kernel.cpu.write(plain.vcpu.vmcb, bits)
    assert caught.value.reason == INTERNAL
    assert plain.exit("<IIQQ") == (4, 2, 0x79, 0)


async def _invlpg(cpu: GuestCpu) -> None:
    await cpu.invlpg(0x1000)


# Model-specific registers.

GP = 1 << 31 | 3 << 8 | 13


@pytest.mark.parametrize("msr", [0x277, 0xC0000080, 0xC0000102, 0xC0010010])
@pytest.mark.parametrize("write", [0, 1])
def test_registers_of_an_encrypted_guest(msr: int, write: int) -> None:
    """Those of its state are out of KVM's reach, and it knows no others: #GP, told in the GHCB."""
    answer = snp().event(0x7C, write, rcx=msr, rax=1, rdx=0)
    assert infos(answer) == (1, GP)


@pytest.mark.parametrize(("msr", "result"), [(0xC0000102, (0, 0)), (0xC0010010, (1, GP))])
def test_registers_of_an_encrypted_guest_of_the_default_vm_type(msr: int, result: tuple[int, int]) -> None:
    asker = sev_es("rfc-v7")
    answer = asker.event(0x7C, 0, rcx=msr, rax=5, rdx=6)
    assert infos(answer) == result
    if not result[0]:
        assert registers(answer) == [0, 0, msr, 0]
        assert infos(asker.event(0x7C, 1, rcx=msr, rax=5, rdx=6)) == (0, 0)


# Ports.


@pytest.mark.parametrize(("size", "expected"), [(1, 0x5A), (2, 0x5B5A), (4, 0x5D5C5B5A)])
def test_ports_of_an_intercepted_guest(plain: Plain, size: int, expected: int) -> None:
    seen: list[tuple[int, ...]] = []

    def serve(reason: int) -> None:
        assert reason == IO
        seen.append(plain.exit("<BBHIQ"))
        plain.put(b"\x5a\x5b\x5c\x5d", PAGE - 32)

    async def program(cpu: GuestCpu) -> int:
        await cpu.port_out(0x80, 0x11, size)
        value: int = await cpu.port_in(0x81, size)
        return value

    assert plain.drive(program, serve) == expected
    assert seen == [(1, size, 0x80, 1, PAGE), (0, size, 0x81, 1, PAGE)]


# Hypercalls.

Call = tuple[int, int, int, int]
ENOSYS, EPERM, EINVAL = -1000, -1, -22


def hypercall(call: Call, cpl: int = 0) -> Callable[[GuestCpu], Coroutine[Any, Any, int]]:
    async def program(cpu: GuestCpu) -> int:
        rax, rbx, rcx, rdx = call
        await cpu.load(rax=rax, rbx=rbx, rcx=rcx, rdx=rdx)
        await cpu.vmmcall()
        (value,) = await cpu.look("rax")
        return int(value)

    return program


REFUSED: dict[str, tuple[Call, int]] = {
    "unknown": ((77, 0, 0, 0), ENOSYS),
    "poll": ((1, 0, 0, 0), 0),
    "address": ((12, 0x400001, 1, 0), EINVAL),
    "no pages": ((12, 0x400000, 0, 0), EINVAL),
    "too many pages": ((12, 0x400000, (1 << 64) - 0x400, 0), EINVAL),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_hypercalls_that_kvm_answers(plain: Plain, name: str) -> None:
    call, result = REFUSED[name]
    assert plain.drive(hypercall(call)) == result % (1 << 64)
    number, rbx, rcx, rdx = call
    answer = snp().event(0x81, rax=number, rbx=rbx, rcx=rcx, rdx=rdx, cpl_word=0)
    assert infos(answer) == (0, 0)
    assert u64(answer, RAX) == result % (1 << 64)


def test_a_hypercall_of_the_guests_userspace() -> None:
    answer = snp().event(0x81, rax=1, cpl_word=3 << 24)
    assert u64(answer, RAX) == EPERM % (1 << 64)


def test_a_vmm_that_serves_no_hypercalls(plain: Plain) -> None:
    plain.vm.exit_hypercalls = 0
    assert plain.drive(hypercall((12, 0x400000, 1, 0))) == ENOSYS % (1 << 64)


@pytest.mark.parametrize("ret", [0, EINVAL % (1 << 64)])
def test_map_gpa_range(plain: Plain, ret: int) -> None:
    call = (12, 0x400000, 3, 1 << 4)

    def serve(reason: int) -> None:
        assert reason == HYPERCALL
        assert plain.exit("<Q6QQQ") == (12, 0x400000, 3, 16, 0, 0, 0, 0, 1)
        plain.put(ret.to_bytes(8, "little"), 0x38)

    assert plain.drive(hypercall(call), serve) == ret
    asker = snp()

    def serve_snp(reason: int) -> None:
        assert asker.exit("<Q3Q") == (12, 0x400000, 3, 16)
        asker.put(ret.to_bytes(8, "little"), 0x38)

    answer = asker.event(0x81, serve=serve_snp, rax=12, rbx=0x400000, rcx=3, rdx=16, cpl_word=0)
    assert u64(answer, RAX) == ret


def test_map_gpa_range_in_the_v7_series() -> None:
    """A SEV guest with private memory converts by hypercall; for memory that is never private it is done at once."""
    guest = Plain(GuestKind.SEV, "rfc-v7")
    reasons: list[int] = []

    def serve(reason: int) -> None:
        reasons.append(reason)
        guest.put(bytes(8), 0x38)

    guest.ghcb = 0
    guest.restored()
    assert guest.drive(hypercall((12, 0x400000, 1, 16)), serve) == 0
    assert reasons == [HYPERCALL]
    assert guest.drive(hypercall((12, 1 << 40, 1, 16)), serve) == 0
    assert reasons == [HYPERCALL]


# Registers of a guest in the clear.


def test_registers_live_in_kvm_between_entries(plain: Plain) -> None:
    """What the guest leaves in its registers KVM_GET_REGS shows, and what KVM_SET_REGS sets the guest finds."""

    async def program(cpu: GuestCpu) -> tuple[int, ...]:
        await cpu.load(rbx=0xB, rsi=0x51, r15=0xF, cr2=0xC2, dr1=0xD1)
        await cpu.hlt()
        found: tuple[int, ...] = await cpu.look("rbx", "rsi", "r15", "cr2", "dr1")
        return found

    plain.vcpu.executor.start(program)
    assert plain.enter() == 5
    fd = plain.vmm.handles[0].fd
    regs = bytearray(0x90)
    plain.vmm.process.ioctl(fd, 0x8090AE81, regs)
    values = list(struct.unpack("<18Q", regs))
    assert (values[1], values[4], values[15]) == (0xB, 0x51, 0xF)
    values[1], values[4] = 0xBB, 0x5151
    plain.vmm.process.ioctl(fd, 0x4090AE82, bytearray(struct.pack("<18Q", *values)))
    for core in plain.system.machine.cores:
        core.registers.update(rbx=0, r15=0, dr1=0)
    plain.enter()
    assert plain.vcpu.executor.outcome == (0xBB, 0x5151, 0xF, 0xC2, 0xD1)
