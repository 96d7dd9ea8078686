"""An address space against a slow, obvious one: what is mapped, what it holds, what it costs, and who is told."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from snpbook.host.process import Process
from snpbook.host.refusal import KernelError
from snpbook.spec.process import Advice
from tests.host.sev_hosts import PAGE, Host, refused

SHARED, PRIVATE, FIXED, ANONYMOUS = 1, 2, 0x10, 0x20
READ, WRITE = 1, 2
DONTNEED, REMOVE, HUGEPAGE = 4, 9, 14
KEEP_SIZE, PUNCH_HOLE = 1, 2
USER_END = 0x7FFFFFFFF000
ROOM, FILES = 6, 2
"""Pages of the part of the address space in which everything happens, and files of memory."""
BASE = 0x500000000000


class Reference:
    """Pages of the window by number: whose they are, at which page of it. Bytes by owner and page, where touched."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[Any, int, bool]] = {}
        self.bytes: dict[tuple[Any, int], bytearray] = {}
        self.sizes = dict.fromkeys(range(FILES), 0)
        self.made = 0

    def map(self, start: int, count: int, file: int | None, offset: int, writable: bool) -> None:
        self.unmap(start, count)
        self.made += 1
        for i in range(count):
            owner = ("anonymous", self.made) if file is None else file
            self.pages[start + i] = owner, (i if file is None else offset + i), writable

    def unmap(self, start: int, count: int) -> set[int]:
        gone = {page for page in range(start, start + count) if page in self.pages}
        for page in gone:
            owner, offset, _ = self.pages.pop(page)
            if owner not in self.sizes:
                self.bytes.pop((owner, offset), None)
        return gone

    def reaches(self, page: int, write: bool) -> bool:
        if page not in self.pages:
            return False
        owner, offset, writable = self.pages[page]
        return (writable or not write) and offset < self.sizes.get(owner, 1 << 40)

    def touch(self, page: int) -> bytearray:
        owner, offset, _ = self.pages[page]
        return self.bytes.setdefault((owner, offset), bytearray(PAGE))

    def drop(self, file: Any, first: int, last: int) -> set[int]:
        """Pages of a file lose their memory: the window's pages that showed them."""
        last = min(last, self.sizes.get(file, last))
        for offset in range(first, last):
            self.bytes.pop((file, offset), None)
        return {page for page, (owner, offset, _) in self.pages.items() if owner == file and first <= offset < last}


@st.composite
def calls(draw: DrawFn) -> list[tuple[Any, ...]]:
    start, count = st.integers(0, ROOM - 1), st.integers(1, 4)
    file, offset, byte = st.integers(0, FILES - 1), st.integers(0, 4), st.integers(0, ROOM * PAGE + 100)
    one = st.one_of(
        st.tuples(st.just("anonymous"), start, count, st.booleans()),
        st.tuples(st.just("map"), start, count, file, offset, st.booleans()),
        st.tuples(st.just("unmap"), start, count),
        st.tuples(st.just("store"), byte, st.binary(min_size=1, max_size=9000)),
        st.tuples(st.just("store"), byte, st.binary(min_size=1, max_size=3)),
        st.tuples(st.just("load"), byte, st.integers(1, 9000)),
        st.tuples(st.just("discard"), start, count),
        st.tuples(st.just("remove"), start, count),
        st.tuples(st.just("truncate"), file, st.integers(0, 8)),
        st.tuples(st.just("punch"), file, offset, count),
        st.tuples(st.just("allocate"), file, offset, count, st.booleans()),
    )
    return draw(st.lists(one, min_size=12, max_size=40))


@cache
def host() -> Host:
    return Host()


@contextmanager
def fails_if(number: int | None) -> Iterator[None]:
    if number is None:
        yield
        return
    with refused(number):
        yield


class Pair:
    """The process and the reference, side by side."""

    def __init__(self) -> None:
        self.process, self.model = host().kernel.process(), Reference()
        self.files = [self.process.memfd_create() for _ in range(FILES)]
        self.before = host().kernel.memory.allocated
        self.told: set[int] = set()
        self.process.space.watch(lambda pages: self.told.update(page - (BASE >> 12) for page in pages))

    def do(self, name: str, *arguments: Any) -> None:
        self.told.clear()
        lost: set[int] = getattr(self, name)(*arguments) or set()
        assert lost <= self.told, "who watches was told of all that went"
        assert host().kernel.memory.allocated - self.before == len(self.model.bytes)

    def anonymous(self, start: int, count: int, writable: bool) -> set[int]:
        lost = set(self.model.pages) & set(range(start, start + count))
        rights = READ | WRITE * writable
        at = self.process.mmap(count * PAGE, rights, PRIVATE | ANONYMOUS | FIXED, address=BASE + start * PAGE)
        assert at == BASE + start * PAGE
        self.model.map(start, count, None, 0, writable)
        return lost

    def map(self, start: int, count: int, file: int, offset: int, writable: bool) -> set[int]:
        lost = set(self.model.pages) & set(range(start, start + count))
        self.process.mmap(
            count * PAGE - 5, READ | WRITE * writable, SHARED | FIXED, self.files[file], offset * PAGE,
            BASE + start * PAGE,
        )  # fmt: skip
        self.model.map(start, count, file, offset, writable)
        return lost

    def unmap(self, start: int, count: int) -> set[int]:
        self.process.munmap(BASE + start * PAGE, count * PAGE - 1)
        return self.model.unmap(start, count)

    def store(self, byte: int, data: bytes) -> None:
        pages = range(byte // PAGE, (byte + len(data) - 1) // PAGE + 1)
        good = all(self.model.reaches(page, write=True) for page in pages)
        with fails_if(None if good else errno.EFAULT):
            self.process.store(BASE + byte, data)
        if good:
            for page in pages:
                self.model.touch(page)
            for at, value in enumerate(data, byte):
                self.model.touch(at // PAGE)[at % PAGE] = value

    def load(self, byte: int, size: int) -> None:
        pages = range(byte // PAGE, (byte + size - 1) // PAGE + 1)
        good = all(self.model.reaches(page, write=False) for page in pages)
        with fails_if(None if good else errno.EFAULT):
            found = self.process.load(BASE + byte, size)
        if good:
            whole = b"".join(self.model.touch(page) for page in pages)
            assert found == whole[byte % PAGE : byte % PAGE + size]

    def discard(self, start: int, count: int) -> set[int]:
        pages = range(start, start + count)
        whole = all(page in self.model.pages for page in pages)
        with fails_if(None if whole else errno.ENOMEM):
            self.process.madvise(BASE + start * PAGE, count * PAGE, Advice.DONTNEED)
        lost = set()
        for page in pages:
            owner, offset, _ = self.model.pages.get(page, (0, 0, False))
            if owner not in self.model.sizes:
                lost |= self.model.drop(owner, offset, offset + 1)
        return lost

    def remove(self, start: int, count: int) -> set[int]:
        lost, number = set[int](), None
        for page in range(start, start + count):
            if page not in self.model.pages:
                number = errno.ENOMEM
                continue
            owner, offset, writable = self.model.pages[page]
            if owner not in self.model.sizes or not writable:
                number = errno.EACCES if owner in self.model.sizes else errno.EINVAL
                break
            lost |= self.model.drop(owner, offset, offset + 1)
        with fails_if(number):
            self.process.madvise(BASE + start * PAGE, count * PAGE, Advice.REMOVE)
        return lost

    def truncate(self, file: int, pages: int) -> set[int]:
        self.process.ftruncate(self.files[file], pages * PAGE)
        lost = self.model.drop(file, pages, self.model.sizes[file])
        self.model.sizes[file] = pages
        return lost

    def punch(self, file: int, offset: int, count: int) -> set[int]:
        self.process.fallocate(self.files[file], KEEP_SIZE | PUNCH_HOLE, offset * PAGE, count * PAGE)
        return self.model.drop(file, offset, min(offset + count, self.model.sizes[file]))

    def allocate(self, file: int, offset: int, count: int, keep: bool) -> None:
        self.process.fallocate(self.files[file], KEEP_SIZE * keep, offset * PAGE, count * PAGE)
        if not keep:
            self.model.sizes[file] = max(self.model.sizes[file], offset + count)
        for page in range(offset, min(offset + count, self.model.sizes[file])):
            self.model.bytes.setdefault((file, page), bytearray(PAGE))
        stat = self.process.fstat(self.files[file])
        mine = sum(owner == file for owner, _ in self.model.bytes)
        assert (stat.size, stat.blocks) == (self.model.sizes[file] * PAGE, mine * 8)

    def end(self) -> None:
        for page in range(ROOM + 8):
            self.load(page * PAGE, PAGE)
        self.process.exit()
        assert host().kernel.memory.allocated == self.before


@given(calls())
def test_it_is_the_slow_one(steps: list[tuple[Any, ...]]) -> None:
    pair = Pair()
    for name, *arguments in steps:
        pair.do(name, *arguments)
    pair.end()


# By hand.


@pytest.fixture
def process() -> Iterator[Process]:
    process = host().kernel.process()
    yield process
    process.exit()


def test_room_is_given_out_from_the_top(process: Process) -> None:
    first, second = process.mmap(PAGE), process.mmap(3 * PAGE - 1)
    assert (first, second) == (USER_END - PAGE, USER_END - 4 * PAGE)
    process.munmap(second, PAGE)
    assert process.mmap(PAGE) == second
    process.munmap(second + PAGE, PAGE)
    assert process.mmap(2 * PAGE) == second - 2 * PAGE
    assert process.mmap(PAGE) == second + PAGE
    assert process.mmap(PAGE, address=BASE) != BASE, "a hint is only a hint"


@pytest.mark.parametrize(
    ("number", "arguments"),
    [
        (errno.EINVAL, {"size": 0}),
        (errno.EINVAL, {"size": PAGE, "offset": 1}),
        (errno.EINVAL, {"size": PAGE, "offset": -PAGE}),
        (errno.EINVAL, {"size": PAGE, "flags": ANONYMOUS}),
        (errno.EINVAL, {"size": PAGE, "flags": ANONYMOUS | PRIVATE | SHARED}),
        (errno.EINVAL, {"size": PAGE, "flags": ANONYMOUS | PRIVATE | FIXED, "address": BASE + 1}),
        (errno.EPERM, {"size": PAGE, "flags": ANONYMOUS | PRIVATE | FIXED, "address": 0}),
        (errno.ENOMEM, {"size": 2 * PAGE, "flags": ANONYMOUS | PRIVATE | FIXED, "address": USER_END - PAGE}),
        (errno.ENOMEM, {"size": 1 << 47}),
        (errno.EBADF, {"size": 0, "flags": SHARED, "fd": 99}),
    ],
)
def test_mmap_refuses(process: Process, number: int, arguments: dict[str, int]) -> None:
    with refused(number):
        process.mmap(**arguments)
    assert repr(process.space) == "AddressSpace(0 mappings, 0 pages)"


def test_a_file_is_mapped_shared_or_not_at_all(process: Process) -> None:
    fd = process.memfd_create()
    with refused(errno.EINVAL):
        process.mmap(PAGE, flags=PRIVATE, fd=fd)


@pytest.mark.parametrize(
    ("address", "size"), [(BASE + 1, PAGE), (BASE, 0), (BASE, -PAGE), (-PAGE, PAGE), (USER_END, PAGE), (0, 1 << 48)]
)
def test_munmap_refuses(process: Process, address: int, size: int) -> None:
    with refused(errno.EINVAL):
        process.munmap(address, size)


def test_munmap_of_nothing_is_nothing(process: Process) -> None:
    process.munmap(BASE, 16 * PAGE)


def test_madvise_refuses(process: Process) -> None:
    address = process.mmap(2 * PAGE)
    for number, arguments in (
        (errno.EINVAL, (address, PAGE, 77)),
        (errno.EINVAL, (address + 1, PAGE, DONTNEED)),
        (errno.EINVAL, (address, -PAGE, DONTNEED)),
        (errno.ENOMEM, (BASE, PAGE, DONTNEED)),
        (errno.ENOMEM, (BASE, PAGE, HUGEPAGE)),
        (errno.EINVAL, (address, PAGE, REMOVE)),
    ):
        with refused(number):
            process.madvise(*arguments)
    process.madvise(address, 0, Advice.DONTNEED)
    process.madvise(BASE, 0, Advice.DONTNEED)


def test_shared_anonymous_memory_is_a_files(process: Process) -> None:
    """MADV_DONTNEED keeps it, MADV_REMOVE does not; a partial munmap frees nothing of it."""
    before = host().kernel.memory.allocated
    address = process.mmap(3 * PAGE, flags=SHARED | ANONYMOUS)
    process.store(address, b"x" * 3 * PAGE)
    process.madvise(address, 3 * PAGE, Advice.DONTNEED)
    assert process.load(address, 1) == b"x"
    process.madvise(address, PAGE, Advice.REMOVE)
    assert process.load(address + PAGE - 1, 2) == b"\0x"
    process.munmap(address, 2 * PAGE)
    assert host().kernel.memory.allocated == before + 3
    process.munmap(address + 2 * PAGE, PAGE)
    assert host().kernel.memory.allocated == before


def test_a_file_that_is_cut_off_under_its_mapping(process: Process) -> None:
    fd = process.memfd_create()
    process.ftruncate(fd, 2 * PAGE)
    address = process.mmap(2 * PAGE, flags=SHARED, fd=fd)
    process.store(address, b"a" * 2 * PAGE)
    process.ftruncate(fd, PAGE)
    assert process.load(address, PAGE) == b"a" * PAGE
    for call in (lambda: process.load(address + PAGE, 1), lambda: process.store(address + PAGE - 1, b"xy")):
        with refused(errno.EFAULT):
            call()
    assert process.load(address + PAGE - 1, 1) == b"a", "nothing was stored where a part could not be"
    process.ftruncate(fd, 2 * PAGE)
    assert process.load(address + PAGE, 1) == b"\0"


def test_a_mapping_holds_its_file(process: Process) -> None:
    before = host().kernel.memory.allocated
    fd = process.memfd_create()
    process.ftruncate(fd, 3 * PAGE)
    address = process.mmap(3 * PAGE, flags=SHARED, fd=fd)
    process.store(address, b"kept" * 3072)
    process.close(fd)
    process.munmap(address + PAGE, PAGE)
    assert process.load(address + 2 * PAGE, 4) == b"kept"
    process.munmap(address, PAGE)
    process.munmap(address + 2 * PAGE, PAGE)
    assert host().kernel.memory.allocated == before


def test_watchers_are_told_while_the_page_is_still_there(process: Process) -> None:
    address = process.mmap(4 * PAGE)
    process.store(address, b"".join(bytes([n]) * PAGE for n in range(4)))
    seen: list[tuple[int, bytes]] = []
    end = process.space.watch(lambda pages: seen.extend((page, process.load(page << 12, 1)) for page in pages))
    process.madvise(address + PAGE, PAGE, Advice.DONTNEED)
    assert seen[0] == ((address >> 12) + 1, b"\1")
    seen.clear()
    process.munmap(address + 3 * PAGE, PAGE)
    assert seen[0] == ((address >> 12) + 3, b"\3")
    end()
    seen.clear()
    process.munmap(address, PAGE)
    assert not seen


def test_watchers_hear_of_holes_in_files_by_every_mapping(process: Process) -> None:
    fd = process.memfd_create()
    process.ftruncate(fd, 4 * PAGE)
    first = process.mmap(4 * PAGE, flags=SHARED, fd=fd)
    second = process.mmap(2 * PAGE, flags=SHARED, fd=fd, offset=2 * PAGE)
    seen: list[range] = []
    process.space.watch(seen.append)
    process.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 3 * PAGE, PAGE)
    told = {page for pages in seen for page in pages}
    assert told == {(first >> 12) + 3, (second >> 12) + 1}


def test_memory_that_is_out_changes_nothing() -> None:
    small = Host()
    process = small.kernel.process()
    address = process.mmap(8 * PAGE)
    process.store(address, b"first")
    blocked = small.kernel.memory.take(small.kernel.memory.free - 2)
    allocated = small.kernel.memory.allocated
    with refused(errno.ENOMEM):
        process.store(address, b"x" * 8 * PAGE)
    assert small.kernel.memory.allocated == allocated
    assert process.load(address, 5) == b"first"
    process.store(address + PAGE, b"y" * 2 * PAGE)
    assert small.kernel.memory.free == 0
    assert len(blocked)


def test_a_page_that_the_rmp_protects_cannot_be_stored_to(process: Process) -> None:
    address = process.mmap(PAGE)
    process.store(address, b"mine")
    frame = int(process.space.frames(range(address >> 12, (address >> 12) + 1))[0])
    pages = range(frame, frame + 1)
    host().kernel.ccp.convert(pages)
    with pytest.raises(KernelError) as fault:
        process.store(address, b"no")
    assert fault.value.errno == errno.EFAULT
    assert process.load(address, 4) == b"mine"
    host().kernel.ccp.reclaim(pages)
