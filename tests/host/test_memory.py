"""Host memory: the allocator never loses or doubles a page; files get memory on touch and give it back."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.exits import HostPageFault
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.host.attributes import PrivatePages
from snpbook.host.memory import PageAllocator, RestrictedFile, UserMemory, runs
from snpbook.host.refusal import KernelError
from tests.machines import PAGE, Board

FREE = [range(10, 30), range(50, 60)]


@given(st.lists(st.tuples(st.sampled_from(["allocate", "take", "release"]), st.integers(1, 12)), max_size=40))
def test_no_page_is_lost_or_given_twice(steps: list[tuple[str, int]]) -> None:
    allocator = PageAllocator(FREE)
    free = {page for run in FREE for page in run}
    out: list[set[int]] = []
    for step, count in steps:
        if step == "release":
            if out:
                for _, pages in runs(np.array(sorted(out.pop(count % len(out))), np.uint64)):
                    allocator.release(pages)
                    free |= set(pages)
            continue
        if count > (allocator.largest if step == "allocate" else len(free)):
            with pytest.raises(KernelError, match="ENOMEM"):
                getattr(allocator, step)(count)
            continue
        got = {int(page) for page in getattr(allocator, step)(count)}
        assert len(got) == count
        assert got <= free
        assert step == "take" or max(got) - min(got) == count - 1
        free -= got
        out.append(got)
    assert allocator.free == len(free)
    assert allocator.allocated == 30 - len(free)
    assert sorted(page for run in allocator._free for page in run) == sorted(free)
    ends = [run.stop for run in allocator._free]
    assert all(run.start not in ends for run in allocator._free), "neighbours are one run"


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "pin", "unpin"]), st.integers(0, 11)), max_size=60))
def test_pinned_pages_wait_for_their_last_pin(steps: list[tuple[str, int]]) -> None:
    """By hand: how often each page is pinned, and which were given back meanwhile."""
    allocator = PageAllocator(FREE)
    held: list[list[int]] = []
    pins: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = []
    count, orphans, free = dict.fromkeys(range(60), 0), set[int](), {page for run in FREE for page in run}
    for step, number in steps:
        if step == "take" and number and number <= len(free):
            held.append([int(page) for page in allocator.take(number)])
            free -= set(held[-1])
        elif step == "release" and held:
            for page in held.pop(number % len(held)):
                allocator.release(range(page, page + 1))
                (orphans if count[page] else free).add(page)
        elif step == "pin" and held:
            pages = held[number % len(held)]
            pins.append(np.array([*pages, *pages[: number % 3]], np.uint64))
            allocator.pin(pins[-1])
            for page in pins[-1].tolist():
                count[page] += 1
        elif step == "unpin" and pins:
            frames = pins.pop(number % len(pins))
            allocator.unpin(frames)
            for page in frames.tolist():
                count[page] -= 1
                if not count[page] and page in orphans:
                    orphans.remove(page)
                    free.add(page)
        assert sorted(page for run in allocator._free for page in run) == sorted(free)
        assert allocator.allocated == 30 - len(free)
        assert allocator.pinned == sum(times > 0 for times in count.values())
    for frames in pins:
        allocator.unpin(frames)
    for pages in held:
        for page in pages:
            allocator.release(range(page, page + 1))
    assert allocator._free == FREE


def test_a_small_page_never_begins_2_mb() -> None:
    allocator = PageAllocator([range(510, 514)])
    assert [allocator.allocate_small() for _ in range(3)] == [510, 511, 513]
    assert allocator.free == 1, "page 512 is left for others"
    with pytest.raises(KernelError, match="ENOMEM"):
        allocator.allocate_small()
    assert allocator._free == [range(512, 513)]


def test_lowest_run_that_fits() -> None:
    allocator = PageAllocator(FREE)
    assert allocator.allocate(15) == range(10, 25)
    assert allocator.allocate(10) == range(50, 60)
    assert allocator.take(5).tolist() == [25, 26, 27, 28, 29]
    assert (allocator.free, allocator.largest) == (0, 0)
    allocator.release(range(12, 14))
    allocator.release(range(50, 52))
    assert allocator.take(3).tolist() == [12, 13, 50], "in pieces where it must be"


@pytest.fixture
def board() -> Board:
    return Board().initialise()


def user(board: Board, size: int = 16 * PAGE) -> tuple[UserMemory, PageAllocator]:
    allocator = PageAllocator([range(0x1200, 0x1210)])
    return UserMemory(board.cpu, allocator, size), allocator


@given(writes=st.lists(st.tuples(st.integers(0, 16 * PAGE - 1), st.binary(min_size=1, max_size=3 * PAGE)), max_size=5))
def test_user_memory_is_memory(writes: list[tuple[int, bytes]]) -> None:
    memory, _ = user(Board().initialise())
    model = bytearray(16 * PAGE)
    for offset, data in writes:
        data = data[: 16 * PAGE - offset]
        memory.write(offset, data)
        model[offset : offset + len(data)] = data
    assert memory.read(0, 16 * PAGE) == bytes(model)
    assert memory.read(5, PAGE) == bytes(model[5 : 5 + PAGE])


def test_only_touched_pages_have_memory_and_new_ones_are_zero(board: Board) -> None:
    board.machine.dram.write(0x1200 << 12, b"\xaa" * 16 * PAGE)
    memory, allocator = user(board)
    assert memory.resident == 0
    assert memory.read(3 * PAGE - 1, 2) == bytes(2)
    assert memory.resident == allocator.allocated == 2
    memory.close()
    assert memory.resident == allocator.allocated == 0
    assert allocator.largest == 16


def test_a_restricted_file_is_not_zeroed_and_keeps_its_pages(board: Board) -> None:
    board.machine.dram.write(0x1200 << 12, b"\xaa" * 16 * PAGE)
    allocator = PageAllocator([range(0x1200, 0x1210)])
    file = RestrictedFile(board.cpu, allocator, 16 * PAGE)
    frames = file.get(range(4, 8)).copy()
    assert frames.tolist() == [0x1200, 0x1201, 0x1202, 0x1203]
    assert board.cpu.read(0x1200 << 12, 4) == b"\xaa" * 4
    assert file.get(range(8))[4:].tolist() == frames.tolist()
    assert not hasattr(file, "read")
    assert not hasattr(file, "write")


def test_closing_makes_pages_the_hypervisors(board: Board) -> None:
    allocator = PageAllocator([range(0x1200, 0x1210)])
    file = RestrictedFile(board.cpu, allocator, 16 * PAGE)
    frames = file.get(range(3)).copy()
    before = board.machine.rmp.load(frames).copy()
    assert not board.cpu.rmpupdate(frames, frames, NewState(assigned=True, asid=3)).any()
    file.close()
    assert np.array_equal(board.machine.rmp.load(frames), before)


@pytest.mark.parametrize("size", [-PAGE, 1, PAGE + 1])
def test_sizes_are_whole_pages(board: Board, size: int) -> None:
    with pytest.raises(KernelError) as refused:
        RestrictedFile(board.cpu, PageAllocator(FREE), size)
    assert refused.value.errno == errno.EINVAL


def test_out_of_memory_leaves_the_file_as_it_was(board: Board) -> None:
    memory, allocator = user(board, 32 * PAGE)
    memory.write(0, b"kept")
    with pytest.raises(KernelError) as refused:
        memory.get(range(32))
    assert refused.value.errno == errno.ENOMEM
    assert memory.resident == allocator.allocated == 1
    assert memory.read(0, 4) == b"kept"


def test_the_host_cannot_write_a_page_that_is_not_its_own(board: Board) -> None:
    memory, _ = user(board)
    memory.write(0, b"mine")
    board.assign(0x1200 << 12, FIRMWARE)
    with pytest.raises(HostPageFault, match="FIRMWARE"):
        memory.write(0, b"theirs")
    assert memory.read(0, 4) == b"mine"


# The attribute of guest pages.


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 1500), st.booleans()), max_size=12))
def test_attributes_are_a_set_of_pages(marks: list[tuple[int, int, bool]]) -> None:
    pages, model = PrivatePages(), np.zeros(4000, bool)
    for start, count, private in marks:
        pages.mark(range(start, start + count), private)
        model[start : start + count] = private
    assert np.array_equal(pages.of(range(4000)), model)
    assert np.array_equal(pages.of(range(700, 1300)), model[700:1300])


def test_the_last_page_of_the_address_space_costs_little() -> None:
    pages = PrivatePages()
    last: Any = range((1 << 40) - 1, 1 << 40)
    pages.mark(last, True)
    assert pages.of(last).all()
    assert not pages.of(range((1 << 40) - 3, (1 << 40) - 1)).any()
