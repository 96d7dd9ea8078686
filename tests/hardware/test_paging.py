"""Page walks for many pages at once, against a plain walk of one page."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.paging import guest_walk, nested_walk
from tests.reference import paging as reference

PAGE, SIZE = 4096, 0x200000
TABLES = 12
PLACES = (0, 1, 2, 511)
"""Indices in a table that the random tables fill."""
C_BIT = 51


def random_tables(rng: random.Random) -> dict[int, int]:
    """The words of `TABLES` table pages that point at each other, at pages, and sometimes out of memory."""
    words = {}
    for table in range(TABLES):
        for index in PLACES:
            target = rng.choice((rng.randrange(TABLES), rng.randrange(TABLES), rng.randrange(512), SIZE // PAGE, 2**38))
            flags = rng.choice((7, 7, 7, 7, 5, 3, 6, 0)) | rng.choice((0, 0, 0, 0x80))
            words[table * PAGE + 8 * index] = target * PAGE | flags | rng.choice((0, 1 << C_BIT, 1 << 63))
    return words


def memory(words: dict[int, int], mapping: bool) -> Dram:
    dram = Dram(SIZE, mapping=mapping)
    for spa, word in words.items():
        dram.write(spa, word.to_bytes(8, "little"))
    return dram


def random_number(rng: random.Random) -> int:
    return sum(rng.choice(PLACES) << 9 * level for level in range(4)) | rng.choice((0, 0, 0, 0, 1 << 36))


@pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])
@given(rng=st.randoms(use_true_random=False), write=st.booleans())
def test_nested_walks(mapping: bool, rng: random.Random, write: bool) -> None:
    words = random_tables(rng)
    dram, root = memory(words, mapping), rng.choice((0, 0, PAGE, 3 * PAGE | 1 << C_BIT, SIZE))
    gfns = [random_number(rng) for _ in range(rng.randrange(40))]
    walk = nested_walk(MemoryEncryption(dram, "xex-aes-128", b""), root, np.array(gfns, np.uint64), write)
    for i, gfn in enumerate(gfns):
        wanted = reference.nested(lambda spa: words.get(spa, 0), root, gfn, write, SIZE)
        if isinstance(wanted, int):
            assert (walk.faults[i], walk.errors[i]) == (True, wanted)
        else:
            assert (walk.faults[i], walk.pages[i], walk.large[i]) == (False, *wanted)


@given(rng=st.randoms(use_true_random=False))
def test_guest_walks(rng: random.Random) -> None:
    """Tables that cannot be read end the walk at the first page that needs one."""
    words, lost = random_tables(rng), {rng.randrange(TABLES), SIZE // PAGE, 2**38}
    virtual = [random_number(rng) & 2**36 - 1 for _ in range(rng.randrange(30))]

    def table(gfn: int) -> Any:
        if gfn in lost:
            return f"table {gfn}"
        return np.array([words.get(gfn * PAGE + 8 * i, 0) for i in range(512)], np.uint64)

    walk = guest_walk(table, 0, C_BIT, np.array(virtual, np.uint64))
    outcomes = [one_guest_walk(words, lost, number) for number in virtual]
    stop = next((i for i, outcome in enumerate(outcomes) if isinstance(outcome, str)), len(virtual))
    assert walk.stop == stop
    assert walk.fault == (outcomes[stop] if stop < len(virtual) else None)
    for i, outcome in enumerate(outcomes[:stop]):
        found = (int(walk.gfns[i]), bool(walk.private[i]), bool(walk.writable[i])) if walk.present[i] else None
        assert found == outcome


def one_guest_walk(words: dict[int, int], lost: set[int], virtual: int) -> Any:
    table, writable = 0, True
    for level in (3, 2, 1, 0):
        if table in lost:
            return f"table {table}"
        entry = words.get(table * PAGE + 8 * (virtual >> 9 * level & 511), 0)
        if not entry & 1:
            return None
        writable = writable and bool(entry & 2)
        frame = (entry & reference.ADDRESS) >> 12
        if level == 0 or (level < 3 and entry & 0x80):
            inside = (1 << 9 * level) - 1
            return frame & ~inside | virtual & inside, bool(entry >> C_BIT & 1), writable
        table = frame
    raise AssertionError


def test_a_c_bit_inside_the_address_is_no_part_of_it() -> None:
    """Rome's C-bit is 47."""
    table = np.zeros(512, np.uint64)
    table[0] = 7 | 5 << 12 | 1 << 47
    walk = guest_walk(lambda gfn: table, 3 << 12 | 1 << 47, 47, np.array([0], np.uint64))
    assert (walk.gfns.tolist(), walk.private.tolist()) == ([5], [True])
