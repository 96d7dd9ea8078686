"""Acceptance of much memory: the counts against arithmetic, the whole of 64 GiB within its memory."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from snpbook.regimes.acceptance import Acceptance, accept, lists_of, table
from snpbook.spec.private_memory import Backend
from tests.sampling import sampled

CASES = list(product(("restricted", "guest_memfd"), (False, True), (64, 253)))
LISTS = {(False, 64): 262144, (False, 253): 66314, (True, 64): 512, (True, 253): 130}
"""Lists for 64 GiB."""
PAGES = 1 << 24
PROGRAM = """
import resource, sys
from snpbook.regimes.acceptance import accept
print(accept(sys.argv[1], "64 GiB", large=sys.argv[2] == "True", entries=int(sys.argv[3])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


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


@pytest.mark.parametrize(("backend", "large", "entries"), sampled(CASES, 1))
def test_64_gib(backend: str, large: bool, entries: int) -> None:
    """In a process of its own, which holds 600 MB at most."""
    arguments = [sys.executable, "-c", PROGRAM, backend, str(large), str(entries)]
    row, peak = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    assert row == repr(expected(backend, large, entries, PAGES, LISTS[large, entries]))
    assert int(peak) <= 600 * 1024


def test_arithmetic() -> None:
    for (large, entries), lists in LISTS.items():
        assert lists_of(PAGES, entries, large=large) == lists


def test_64_gib_on_huge_pages() -> None:
    """Where the host has pages of 2 MB, nothing is done by 4 KB."""
    row = accept("restricted", "64 GiB", large=True, huge=True)
    assert row == Acceptance(Backend.RESTRICTED, 253, True, 130, 1 << 15, 1 << 15, 1 << 15, 0, PAGES)


@pytest.mark.parametrize("memory", ["1 MiB", (2 << 20) + 4096])
def test_only_whole_2_mb(memory: int | str) -> None:
    with pytest.raises(ValueError, match="a multiple of 2 MB"):
        accept("guest_memfd", memory)
