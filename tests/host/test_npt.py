"""Nested tables with leaves of both sizes, read back from memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from snpbook.host.memory import PageAllocator
from snpbook.host.npt import NestedTables
from snpbook.trace import NestedMapping
from tests.machines import Board

Leaves = dict[int, int]
"""Frame by guest page."""


class Tables:
    """Nested tables, what a walk of them finds, and what the trace told."""

    def __init__(self) -> None:
        self.board = Board().initialise()
        self.memory = PageAllocator([range(0x1200, 0x1400)])
        self.tables = NestedTables(self.board.cpu, self.memory)
        self.told: set[int] = set()
        self.board.machine.trace.subscribe(self.listen)

    def listen(self, event: Any) -> None:
        if isinstance(event, NestedMapping):
            change = set(event.gfns) if len(event.gfns) < 1 << 20 else set(self.told)
            self.told = self.told | change if event.mapped else self.told - change

    def walk(self, table: int = 0, level: int = 3, base: int = 0) -> Leaves:
        """All leaves, entry by entry."""
        found: Leaves = {}
        data = self.board.cpu.read(table or self.tables.root, 4096)
        for index in range(512):
            entry = int.from_bytes(data[8 * index : 8 * index + 8], "little")
            gfn = base + index * 512**level
            if not entry & 1:
                continue
            if level and not entry & 0x80:
                found |= self.walk(entry & 0xFFFFFFFFFF000, level - 1, gfn)
            else:
                found |= {gfn + i: (entry >> 12 & 0xFFFFFFFF) + i for i in range(512**level)}
        return found


def frames(start: int, count: int) -> Any:
    return np.arange(start, start + count, dtype=np.uint64)


def large(count: int, *where: range) -> Any:
    flags = np.zeros(count, bool)
    for part in where:
        flags[part.start : part.stop] = True
    return flags


def test_leaves_of_both_sizes_in_one_run() -> None:
    made = Tables()
    made.tables.map(0x1F0, frames(0x3F0, 0x230), large(0x230, range(0x10, 0x210)))
    assert made.walk() == {gfn: gfn + 0x200 for gfn in range(0x1F0, 0x420)}
    assert made.told == set(range(0x1F0, 0x420))
    assert made.tables.mapped(range(0x205, 0x410)) == 0x1FB


def test_a_part_of_a_large_page_maps_all_of_it() -> None:
    made = Tables()
    made.tables.map(0x210, frames(0x410, 3), large(3, range(3)))
    assert made.walk() == {gfn: gfn + 0x200 for gfn in range(0x200, 0x400)}
    assert made.told == set(range(0x200, 0x400))


@pytest.mark.parametrize("first", ["small", "large"])
def test_one_size_replaces_the_other(first: str) -> None:
    made = Tables()
    small, big = frames(0x810, 2), large(512, range(512))
    if first == "small":
        made.tables.map(0x210, small)
        made.tables.map(0x200, frames(0x400, 512), big)
        assert made.walk() == {gfn: gfn + 0x200 for gfn in range(0x200, 0x400)}
    else:
        made.tables.map(0x200, frames(0x400, 512), big)
        made.tables.map(0x210, small)
        assert made.walk() == {0x210: 0x810, 0x211: 0x811}, "a leaf of 2 MB goes as a whole"
    assert made.told == set(made.walk())
    changes = made.tables.changes
    made.tables.zap(0x211, 1)
    assert made.tables.changes > changes
    assert made.walk() == ({} if first == "small" else {0x210: 0x810})
    assert made.told == set(made.walk())


def test_zapping_more_than_there_is() -> None:
    made = Tables()
    made.tables.map(0x200, frames(0x400, 512), large(512, range(512)))
    made.tables.map(0x600, frames(0x800, 3))
    made.tables.zap(0, 1 << 30)
    assert made.walk() == {} == dict.fromkeys(made.told)
    made.tables.map(0x200, frames(0x900, 1))
    assert made.walk() == {0x200: 0x900}, "no old entry comes back"


def test_the_pages_of_the_tables_go_back() -> None:
    made = Tables()
    made.tables.map(0x200, frames(0x400, 512), large(512, range(512)))
    made.tables.free()
    assert (made.memory.allocated, made.told) == (0, set())
