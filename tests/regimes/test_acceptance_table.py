"""Acceptance of much memory: the counts against arithmetic, the whole of 64 GiB within its memory.

A row of 64 GiB takes half a minute: `make test-all` has them all, `make test` tells from two smaller ones.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from snpbook.regimes.acceptance import Acceptance, accept, lists_of, table
from snpbook.spec.private_memory import Backend
from tests.sampling import ALL

CASES = list(product(("restricted", "guest_memfd"), (False, True), (64, 253)))
LISTS = {(False, 64): 262144, (False, 253): 66314, (True, 64): 512, (True, 253): 130}
"""Lists for 64 GiB."""
PAGES = 1 << 24
MOST = 600 * 1024
"""What a process may hold in memory, in KB."""
PROGRAM = """
import sys
from snpbook.regimes.acceptance import accept
print(accept(sys.argv[1], sys.argv[2], large=sys.argv[3] == "True", entries=int(sys.argv[4])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def of_its_own(backend: str, memory: str, large: bool, entries: int) -> tuple[str, int]:
    """A row made by a process of its own, and the most that this held, in KB (unlike ru_maxrss without its parent)."""
    arguments = [sys.executable, "-c", PROGRAM, backend, memory, str(large), str(entries)]
    row, peak = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    return row, int(peak)


def expected(backend: str, large: bool, entries: int, pages: int, lists: int) -> Acceptance:
    """Every page is faulted in and validated once; on 4 KB pages each PVALIDATE of 2 MB comes on top of 512."""
    heads = pages // 512 * large
    return Acceptance(
        Backend(backend), entries, large, lists=lists, faults=pages, rmpupdates=pages, pvalidates=pages + heads,
        mismatches=heads, pages=pages,
    )  # fmt: skip


def test_the_table_of_a_small_guest() -> None:
    rows = table("62 MiB")
    assert [(str(row.backend), row.large, row.entries) for row in rows] == CASES
    lists = {(False, 64): 248, (False, 253): 63, (True, 64): 1, (True, 253): 1}
    for row, case in zip(rows, CASES, strict=True):
        assert row == expected(*case, 31 * 512, lists[case[1:]])


@pytest.mark.skipif(not ALL, reason="half a minute each: make test-all")
@pytest.mark.parametrize(("backend", "large", "entries"), CASES)
def test_64_gib(backend: str, large: bool, entries: int) -> None:
    row, peak = of_its_own(backend, "64 GiB", large, entries)
    assert row == repr(expected(backend, large, entries, PAGES, LISTS[large, entries]))
    assert peak <= MOST


def test_memory_grows_with_the_pages_alone() -> None:
    """By entries of the RMP and of the nested tables: from 1 and 4 GiB to 64 by a straight line."""
    (_, one), (row, four) = (of_its_own("guest_memfd", f"{size} GiB", False, 253) for size in (1, 4))
    assert row == repr(expected("guest_memfd", False, 253, PAGES // 16, 4145))
    assert four + (four - one) // 3 * 60 <= MOST


def test_arithmetic() -> None:
    for (large, entries), lists in LISTS.items():
        assert lists_of(PAGES, entries, large=large) == lists


@pytest.mark.parametrize(("size", "lists"), [(64, 130) if ALL else (1, 3)])
def test_on_huge_pages(size: int, lists: int) -> None:
    """Where the host has pages of 2 MB, nothing is done by 4 KB."""
    row, entries = accept("restricted", f"{size} GiB", large=True, huge=True), size << 9
    assert row == Acceptance(Backend.RESTRICTED, 253, True, lists, entries, entries, entries, 0, size << 18)


@pytest.mark.parametrize("memory", ["1 MiB", (2 << 20) + 4096])
def test_only_whole_2_mb(memory: int | str) -> None:
    with pytest.raises(ValueError, match="a multiple of 2 MB"):
        accept("guest_memfd", memory)
