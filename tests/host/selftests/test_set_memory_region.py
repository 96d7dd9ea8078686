"""tools/testing/selftests/kvm/set_memory_region_test.c."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from snpbook.hardware.guest_cpu import GuestCpu
from tests.host.selftests.harness import (
    EXIT_INTERNAL_ERROR,
    EXIT_MMIO,
    EXIT_SHUTDOWN,
    GUEST_MEMFD,
    LOG_DIRTY,
    MIB,
    PAGE,
    READONLY,
    SW_PROTECTED_VM,
    Host,
    fails,
)

GPA = 0xC0000000
SIZE = 2 * MIB
NR_MEMSLOTS = 10
"""KVM_CAP_NR_MEMSLOTS."""


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.fixture
def vm(host: Host) -> Iterator[int]:
    fd = host.vm(SW_PROTECTED_VM)
    yield fd
    host.process.close(fd)


def test_zero_memory_regions(host: Host) -> None:
    vm = host.vm()
    vcpu = host.vcpu(vm)
    assert vcpu.run() == EXIT_INTERNAL_ERROR


@pytest.mark.parametrize("bit", [bit for bit in range(32) if 1 << bit not in (LOG_DIRTY, READONLY)])
def test_invalid_flags_of_the_first_version(host: Host, vm: int, bit: int) -> None:
    with fails(errno.EINVAL):
        host.region(vm, 0, 0, SIZE, 0, flags=1 << bit)


@pytest.mark.parametrize("bit", range(3, 32))
def test_invalid_flags_of_the_second_version(host: Host, vm: int, bit: int) -> None:
    with fails(errno.EINVAL):
        host.region2(vm, 0, 0, SIZE, 0, flags=1 << bit)


@pytest.mark.parametrize("other", [LOG_DIRTY, READONLY])
def test_a_private_slot_is_neither_logged_nor_read_only(host: Host, vm: int, other: int) -> None:
    with fails(errno.EINVAL):
        host.region2(vm, 0, 0, SIZE, 0, flags=GUEST_MEMFD | other, fd=host.memfd(vm, SIZE))


def test_a_vm_without_private_memory_has_no_private_slot(host: Host) -> None:
    vm = host.vm()
    with fails(errno.EINVAL):
        host.region2(vm, 0, 0, SIZE, 0, flags=GUEST_MEMFD, fd=host.memfd(vm, SIZE))


def test_add_max_memory_regions(host: Host, vm: int) -> None:
    most = host.process.ioctl(host.kvm, 0xAE03, NR_MEMSLOTS)
    assert most > 0
    base = host.mmap(PAGE)
    for slot in (*range(50), *range(most - 50, most)):
        host.region2(vm, slot, slot * SIZE, SIZE, base)
    with fails(errno.EINVAL):
        host.region2(vm, most, most * SIZE, SIZE, base)


def test_add_guest_memfd_of_the_wrong_kind(host: Host, vm: int) -> None:
    other = host.memfd(host.vm(SW_PROTECTED_VM), SIZE)
    plain = host.process.memfd_create()
    host.process.ftruncate(plain, SIZE)
    for fd in (host.kvm, vm, plain, other):
        with fails(errno.EINVAL):
            host.region2(vm, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=fd)
    with fails(errno.EBADF):
        host.region2(vm, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=-1)


def test_add_guest_memfd_offsets(host: Host, vm: int) -> None:
    fd = host.memfd(vm, SIZE)
    for offset in (*range(1, 64), *range(64, PAGE, 61), PAGE - 1):
        with fails(errno.EINVAL):
            host.region2(vm, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=fd, offset=offset)
    with fails(errno.EINVAL):
        host.region2(vm, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=fd, offset=PAGE)
    with fails(errno.EINVAL):
        host.region2(vm, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=fd, offset=-PAGE & (1 << 64) - 1)
    host.region2(vm, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=fd)
    other = host.vm(SW_PROTECTED_VM)
    host.region2(other, 10, 0, SIZE, 0, flags=GUEST_MEMFD, fd=host.memfd(other, SIZE))


def test_overlapping_guest_memfd_regions(host: Host, vm: int) -> None:
    fd = host.memfd(vm, 4 * SIZE)
    host.region2(vm, 1, SIZE * 2, SIZE * 2, 0, flags=GUEST_MEMFD, fd=fd)
    host.region2(vm, 2, SIZE * 4, SIZE * 2, 0, flags=GUEST_MEMFD, fd=fd, offset=SIZE * 2)
    host.region2(vm, 1, SIZE * 2, 0, 0, fd=-1)
    for gpa in (SIZE * 3, SIZE * 5):
        with fails(errno.EEXIST):
            host.region2(vm, 1, gpa, SIZE * 2, 0, flags=GUEST_MEMFD, fd=fd)
    with fails(errno.EINVAL):
        host.region2(vm, 1, SIZE * 8, SIZE * 2, 0, flags=GUEST_MEMFD, fd=fd, offset=SIZE)
    host.region2(vm, 1, SIZE * 2, SIZE * 2, 0, flags=GUEST_MEMFD, fd=fd)


def test_a_private_slot_does_not_change(host: Host, vm: int) -> None:
    fd = host.memfd(vm, SIZE)
    host.region2(vm, 1, 0, SIZE, 0, flags=GUEST_MEMFD, fd=fd)
    for gpa, flags in ((0, GUEST_MEMFD), (SIZE, GUEST_MEMFD), (0, 0), (0, LOG_DIRTY)):
        with fails(errno.EINVAL):
            host.region2(vm, 1, gpa, SIZE, 0, flags=flags, fd=fd)
    host.region2(vm, 1, 0, 0, 0)
    with fails(errno.EINVAL):
        host.region2(vm, 1, 0, 0, 0)


@pytest.mark.parametrize(("gpa", "size", "address"), [(1, SIZE, 0), (0, PAGE + 1, 0), (0, SIZE, 1), (0, 1, 0)])
def test_parts_of_pages(host: Host, vm: int, gpa: int, size: int, address: int) -> None:
    with fails(errno.EINVAL):
        host.region2(vm, 0, gpa, size, address)


def test_move_in_use(host: Host) -> None:
    """The guest sees 0, 1 or MMIO in a slot that moves by a page and back, and never 2, which lies a page before."""
    vm = host.vm()
    memory = host.mmap(SIZE + PAGE)
    host.process.store(memory, (2).to_bytes(8, "little"))
    address = memory + PAGE
    host.region(vm, 10, GPA, SIZE, address)
    vcpu = host.vcpu(vm)
    seen = []

    async def program(cpu: GuestCpu) -> None:
        for _ in range(20):
            seen.append(int.from_bytes(await cpu.read(GPA, 8), "little"))
            await cpu.hlt()

    vcpu.program(program)
    for turn in range(10):
        host.process.store(address, (turn % 2).to_bytes(8, "little"))
        host.region(vm, 10, GPA - PAGE, SIZE, address)
        host.region(vm, 10, GPA, SIZE, address)
        vcpu.run()
    assert seen == [turn % 2 for turn in range(10)]


def test_delete_in_use(host: Host) -> None:
    vm = host.vm()
    address = host.mmap(SIZE)
    host.region(vm, 10, GPA, SIZE, address)
    host.region(vm, 0, 0, SIZE, host.mmap(SIZE))
    vcpu = host.vcpu(vm)
    seen: list[Any] = []

    async def program(cpu: GuestCpu) -> None:
        while True:
            seen.append(await cpu.read(GPA, 1))
            await cpu.hlt()

    vcpu.program(program)
    vcpu.run()
    host.region(vm, 10, GPA, 0, 0)
    assert vcpu.run() == EXIT_MMIO
    host.region(vm, 10, GPA, SIZE, address)
    vcpu.run()
    assert seen == [b"\0", b"\0"]
    host.region(vm, 10, GPA, 0, 0)
    assert vcpu.run() == EXIT_MMIO
    host.region(vm, 0, 0, 0, 0)
    assert vcpu.run() in (EXIT_SHUTDOWN, EXIT_INTERNAL_ERROR)
