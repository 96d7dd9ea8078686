"""tools/testing/selftests/kvm/guest_memfd_test.c: a file of four pages on a VM of type 0."""

import errno

import pytest

from tests.host.selftests.harness import DEFAULT_VM, KEEP_SIZE, PAGE, PUNCH_HOLE, Host, fails

TOTAL = 4 * PAGE
PUNCH = PUNCH_HOLE | KEEP_SIZE


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.fixture(scope="module")
def vm(host: Host) -> int:
    return host.vm(DEFAULT_VM)


@pytest.fixture
def fd(host: Host, vm: int) -> int:
    return host.memfd(vm, TOTAL)


@pytest.mark.parametrize("size", [*range(1, 16), 511, 512, 2048, 4094, 4095])
def test_create_of_parts_of_pages(host: Host, vm: int, size: int) -> None:
    with fails(errno.EINVAL):
        host.memfd(vm, size)


def test_create_of_every_part_of_a_page(host: Host, vm: int) -> None:
    for size in range(1, PAGE):
        with fails(errno.EINVAL):
            host.memfd(vm, size)


@pytest.mark.parametrize("bit", range(64))
def test_create_with_each_flag(host: Host, vm: int, bit: int) -> None:
    with fails(errno.EINVAL):
        host.memfd(vm, PAGE, flags=1 << bit)


def test_create_of_nothing(host: Host, vm: int) -> None:
    with fails(errno.EINVAL):
        host.memfd(vm, 0)


def test_two_files_have_their_own_size_and_inode(host: Host, vm: int) -> None:
    first, second = host.memfd(vm, PAGE), host.memfd(vm, 2 * PAGE)
    one, two = host.process.fstat(first), host.process.fstat(second)
    assert (one.size, two.size) == (PAGE, 2 * PAGE)
    assert one.inode != two.inode
    assert host.process.fstat(first) == one


def test_file_read_write(host: Host, fd: int) -> None:
    with fails(errno.EINVAL):
        host.process.read(fd, 1)
    with fails(errno.EINVAL):
        host.process.write(fd, b"x")
    with fails(errno.ESPIPE):
        host.process.pread(fd, 1, 0)
    with fails(errno.ESPIPE):
        host.process.pwrite(fd, b"x", 0)


def test_mmap(host: Host, fd: int) -> None:
    with fails(errno.ENODEV):
        host.process.mmap(PAGE, flags=1, fd=fd)


def test_ftruncate(host: Host, fd: int) -> None:
    with fails(errno.EINVAL):
        host.process.ftruncate(fd, 2 * TOTAL)


def test_file_size(host: Host, fd: int) -> None:
    stat = host.process.fstat(fd)
    assert (stat.size, stat.block_size) == (TOTAL, PAGE)


def test_fallocate(host: Host, fd: int) -> None:
    allocate, call = KEEP_SIZE, host.process.fallocate
    call(fd, allocate, 0, TOTAL)
    with fails(errno.EINVAL):
        call(fd, allocate, TOTAL, PAGE)
    with fails(errno.EINVAL):
        call(fd, allocate, TOTAL + PAGE, PAGE)
    call(fd, PUNCH, TOTAL, PAGE)
    call(fd, PUNCH, TOTAL + PAGE, PAGE)
    with fails(errno.EINVAL):
        call(fd, PUNCH, PAGE - 1, PAGE)
    with fails(errno.EINVAL):
        call(fd, PUNCH, PAGE, PAGE - 1)
    call(fd, PUNCH, PAGE, PAGE)
    call(fd, allocate, PAGE, PAGE)
    for mode in (0, PUNCH_HOLE, KEEP_SIZE | 8, KEEP_SIZE | 16):
        with fails(errno.EOPNOTSUPP):
            call(fd, mode, 0, PAGE)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 1), (0, PAGE - 1), (0, PAGE + 1), (1, 1), (1, PAGE - 1), (1, PAGE), (1, PAGE + 1), (PAGE, 1),
        (PAGE, PAGE - 1), (PAGE, PAGE + 1),
    ],
)  # fmt: skip
def test_invalid_punch_hole(host: Host, fd: int, offset: int, size: int) -> None:
    with fails(errno.EINVAL):
        host.process.fallocate(fd, PUNCH, offset, size)
