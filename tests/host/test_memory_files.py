"""Files of memory by descriptor: memfd_create, and memfd_restricted with every rule of UPM v10."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.host_instructions import NewState
from snpbook.host.memory_files import RestrictedMemory
from snpbook.host.process import Process
from snpbook.host.refusal import KernelError
from snpbook.spec.pages import PageState
from tests.host.sev_hosts import MIB, PAGE, Host, refused
from tests.host.vms import memory_map

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16
HOLE = KEEP_SIZE | PUNCH_HOLE
CLOEXEC, ALLOW_SEALING, HUGETLB = 1, 2, 4
MAP_SHARED, MAP_PRIVATE = 1, 2


@cache
def host_of_all() -> Host:
    """One host for all tests, each of which leaves it as it was."""
    return Host("rfc-v7")


@pytest.fixture
def host() -> Host:
    return host_of_all()


@pytest.fixture
def process(host: Host) -> Iterator[Process]:
    before = memory_map(host.system)
    process = host.kernel.process()
    yield process
    process.exit()
    assert memory_map(host.system) == before


@pytest.fixture(params=["memfd_create", "memfd_restricted"])
def fd(request: pytest.FixtureRequest, process: Process) -> int:
    """Both kinds of files."""
    return int(getattr(process, request.param)())


def restricted(process: Process, pages: int) -> tuple[int, RestrictedMemory]:
    fd = process.memfd_restricted()
    process.ftruncate(fd, pages * PAGE)
    file = process.file(fd)
    assert isinstance(file, RestrictedMemory)
    return fd, file


# What both do.


def test_a_new_file_is_empty(process: Process, fd: int) -> None:
    stat = process.fstat(fd)
    assert (stat.size, stat.blocks, stat.block_size) == (0, 0, PAGE)
    other = process.memfd_create()
    assert process.fstat(other).inode != stat.inode
    assert process.fstat(process.install(process.file(fd))).inode == stat.inode


@pytest.mark.parametrize("size", [-PAGE, -1, 1, PAGE + 1])
def test_sizes_are_whole_pages(process: Process, fd: int, size: int) -> None:
    with refused(errno.EINVAL):
        process.ftruncate(fd, size)
    assert process.fstat(fd).size == 0


@pytest.mark.parametrize(
    ("mode", "offset", "size", "number"),
    [
        (0, -PAGE, PAGE, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (HOLE, 0, 0, errno.EINVAL),
        (0, 0, -PAGE, errno.EINVAL),
        (PUNCH_HOLE, 0, PAGE, errno.EOPNOTSUPP),
        (COLLAPSE_RANGE, 0, PAGE, errno.EOPNOTSUPP),
        (ZERO_RANGE | KEEP_SIZE, 0, PAGE, errno.EOPNOTSUPP),
        (HOLE, 1, PAGE, errno.EINVAL),
        (HOLE, 0, PAGE - 1, errno.EINVAL),
        (0, 0, PAGE + 1, errno.EINVAL),
        (KEEP_SIZE, PAGE // 2, PAGE // 2, errno.EINVAL),
    ],
)
def test_fallocate_refuses(process: Process, fd: int, mode: int, offset: int, size: int, number: int) -> None:
    process.ftruncate(fd, 4 * PAGE)
    with refused(number):
        process.fallocate(fd, mode, offset, size)
    assert (process.fstat(fd).size, process.fstat(fd).blocks) == (4 * PAGE, 0)


def test_fallocate(process: Process, fd: int) -> None:
    process.ftruncate(fd, 4 * PAGE)
    process.fallocate(fd, KEEP_SIZE, PAGE, 8 * PAGE)
    assert (process.fstat(fd).size, process.fstat(fd).blocks) == (4 * PAGE, 3 * 8)
    process.fallocate(fd, HOLE, 2 * PAGE, PAGE)
    assert process.fstat(fd).blocks == 2 * 8
    process.fallocate(fd, 0, 5 * PAGE, PAGE)
    assert (process.fstat(fd).size, process.fstat(fd).blocks) == (6 * PAGE, 3 * 8)
    process.fallocate(fd, HOLE, 0, 100 * PAGE)
    assert (process.fstat(fd).size, process.fstat(fd).blocks) == (6 * PAGE, 0)
    process.fallocate(fd, HOLE, 50 * PAGE, PAGE)


def test_without_memory_a_file_does_not_grow(host: Host, process: Process, fd: int) -> None:
    process.fallocate(fd, 0, 0, PAGE)
    blocked = host.kernel.memory.take(host.kernel.memory.free - 3).tolist()
    with refused(errno.ENOMEM):
        process.fallocate(fd, 0, PAGE, 4 * PAGE)
    assert (process.fstat(fd).size, process.fstat(fd).blocks) == (PAGE, 8)
    process.fallocate(fd, 0, PAGE, 3 * PAGE)
    for page in blocked:
        host.kernel.memory.release(range(page, page + 1))


def test_files_have_no_position(process: Process, fd: int) -> None:
    """Reading and writing by descriptor: a restricted file has neither, of a memfd it is not modelled."""
    for call in (
        lambda: process.read(fd, 1),
        lambda: process.write(fd, b"x"),
        lambda: process.pread(fd, 1, 0),
        lambda: process.pwrite(fd, b"x", 0),
    ):
        with refused(errno.EINVAL):
            call()


# memfd_create.


def test_flags_of_memfd_create(process: Process) -> None:
    for flags in (0, CLOEXEC, ALLOW_SEALING, CLOEXEC | ALLOW_SEALING):
        process.close(process.memfd_create(flags))
    for flags in (HUGETLB, 1 << 31, 0x40):
        with refused(errno.EINVAL):
            process.memfd_create(flags)


def test_a_memfd_changes_its_size_and_is_mapped(process: Process) -> None:
    fd = process.memfd_create()
    address = process.mmap(2 * PAGE, flags=MAP_SHARED, fd=fd)
    with refused(errno.EFAULT):
        process.load(address, 1)
    for size in (2 * PAGE, PAGE, 3 * PAGE, 0, 2 * PAGE):
        process.ftruncate(fd, size)
        assert process.fstat(fd).size == size
    process.store(address, b"mapped")
    assert process.fstat(fd).blocks == 8
    process.fallocate(fd, HOLE, 0, PAGE)
    assert process.load(address, 6) == bytes(6)


# memfd_restricted.


@pytest.mark.parametrize("era", ["mainline", "svsm-host"])
def test_only_the_series_has_restricted_files(era: str) -> None:
    with refused(errno.ENOSYS):
        Host(era).process.memfd_restricted()


def test_flags_of_memfd_restricted(process: Process) -> None:
    for bit in range(32):
        with refused(errno.EINVAL):
            process.memfd_restricted(1 << bit)


@pytest.mark.parametrize("bit", [46, 55, 62, 63])
def test_a_file_too_large_to_list_leaves_none_behind(process: Process, fd: int, bit: int) -> None:
    with refused(errno.ENOMEM):
        process.ftruncate(fd, 1 << bit)
    with refused(errno.ENOMEM):
        process.fallocate(fd, 0, 1 << bit, PAGE)
    assert process.fstat(fd).size == 0


def test_a_restricted_file_gets_its_size_once(process: Process) -> None:
    fd = process.memfd_restricted()
    process.ftruncate(fd, 0)
    process.ftruncate(fd, 4 * PAGE)
    for size in (0, 2 * PAGE, 4 * PAGE, 8 * PAGE, 5):
        with refused(errno.EPERM):
            process.ftruncate(fd, size)
    assert process.fstat(fd).size == 4 * PAGE


def test_a_restricted_file_is_not_mapped(process: Process) -> None:
    fd, _ = restricted(process, 4)
    for flags in (MAP_SHARED, MAP_PRIVATE):
        with refused(errno.ENODEV):
            process.mmap(PAGE, flags=flags, fd=fd)


def test_its_pages_are_not_zeroed(host: Host, process: Process) -> None:
    address = process.mmap(PAGE)
    process.store(address, b"left behind")
    frame = int(process.space.frames(range(address >> 12, (address >> 12) + 1))[0])
    process.munmap(address, PAGE)
    fd, file = restricted(process, 1)
    process.fallocate(fd, 0, 0, PAGE)
    assert file.pages.peek(range(1)).tolist() == [frame]
    assert host.kernel.cpu.read(frame << 12, 11) == b"left behind"


class Listener:
    """Who has bound a file: what it was told, and how many pages had memory then."""

    def __init__(self, file: RestrictedMemory) -> None:
        self.file, self.told = file, list[tuple[str, int, int, int]]()

    def invalidate_start(self, offsets: range) -> None:
        self.told.append(("start", offsets.start, offsets.stop, self.file.pages.resident))

    def invalidate_end(self, offsets: range) -> None:
        self.told.append(("end", offsets.start, offsets.stop, self.file.pages.resident))


def test_start_hole_end(process: Process) -> None:
    """The range is clipped to the file, and to nothing else: each listener gets all of it."""
    fd, file = restricted(process, 8)
    process.fallocate(fd, 0, 0, 8 * PAGE)
    listeners = [Listener(file), Listener(file)]
    for listener in listeners:
        file.bind(listener)
    process.fallocate(fd, HOLE, 6 * PAGE, 50 * PAGE)
    process.fallocate(fd, HOLE, 0, PAGE)
    for listener in listeners:
        assert listener.told == [("start", 6, 8, 8), ("end", 6, 8, 6), ("start", 0, 1, 6), ("end", 0, 1, 5)]


def test_the_end_is_told_also_where_the_hole_failed(
    host: Host, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, file = restricted(process, 2)
    listener = Listener(file)
    file.bind(listener)

    def failing(*_: object) -> None:
        raise KernelError(errno.EFAULT, "spoilt")

    with monkeypatch.context() as patch:
        patch.setattr(file.pages, "punch", failing)
        with refused(errno.EFAULT):
            process.fallocate(fd, HOLE, 0, PAGE)
    assert [name for name, *_ in listener.told] == ["start", "end"]


def test_unbinding_and_the_end_of_the_file_tell_everybody_everything(process: Process) -> None:
    fd, file = restricted(process, 4)
    process.fallocate(fd, 0, 0, PAGE)
    first, second = Listener(file), Listener(file)
    file.bind(first)
    file.bind(second)
    file.unbind(first)
    assert first.told == second.told == [("start", 0, 4, 1), ("end", 0, 4, 1)]
    process.close(fd)
    assert second.told[2:] == [("start", 0, 4, 1), ("end", 0, 4, 1)]
    assert len(first.told) == 2


def test_private_pages_come_back_as_the_hypervisors(host: Host, process: Process) -> None:
    fd, file = restricted(process, 8)
    process.fallocate(fd, 0, 0, 8 * PAGE)
    frames, rmp = file.pages.peek(range(8)).copy(), host.system.machine.rmp
    codes = host.kernel.cpu.rmpupdate(frames, np.arange(8, dtype=np.uint64), NewState(assigned=True, asid=3))
    assert not codes.any()
    process.fallocate(fd, HOLE, 0, 4 * PAGE)
    states = [int(rmp.states(range(frame, frame + 1))[0]) for frame in frames.tolist()]
    assert states == [PageState.HYPERVISOR] * 4 + [PageState.GUEST_INVALID] * 4
    process.close(fd)
    assert all(rmp.states(range(frame, frame + 1))[0] == PageState.HYPERVISOR for frame in frames.tolist())


@given(st.lists(st.tuples(st.sampled_from([0, KEEP_SIZE, HOLE]), st.integers(0, 12), st.integers(1, 9)), max_size=15))
def test_blocks_are_a_set_of_pages(steps: list[tuple[int, int, int]]) -> None:
    host = host_of_all()
    process, allocated = host.kernel.process(), host.kernel.memory.allocated
    fds = [process.memfd_create(), process.memfd_restricted()]
    size, blocks = 4, set[int]()
    for fd in fds:
        process.ftruncate(fd, size * PAGE)
    for mode, first, count in steps:
        for fd in fds:
            process.fallocate(fd, mode, first * PAGE, count * PAGE)
        size = max(size, first + count) if mode == 0 else size
        part = set(range(first, min(first + count, size)))
        blocks = blocks - part if mode == HOLE else blocks | part
        for fd in fds:
            stat = process.fstat(fd)
            assert (stat.size, stat.blocks) == (size * PAGE, len(blocks) * 8)
        assert host.kernel.memory.allocated == allocated + 2 * len(blocks)
    process.exit()
    assert host.kernel.memory.allocated == allocated


def test_a_large_file_costs_nothing_until_it_is_touched(host: Host, process: Process) -> None:
    free = host.kernel.memory.free
    fd = process.memfd_create()
    process.ftruncate(fd, 1 << 36)
    process.fallocate(fd, KEEP_SIZE, (1 << 36) - MIB, MIB)
    assert host.kernel.memory.free == free - MIB // PAGE
