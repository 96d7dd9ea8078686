"""Page walks of many pages where the random guests do not come: tables in any place, both keys, the dictionary."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.checks import AccessKind
from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.paging import NestedWalk, nested_walk, read_words, set_bits
from tests.reference.rmp import ReferenceRmp
from tests.reference.walks import Fault, Vcpu

PAGE, SIZE = 4096, 1 << 30
TABLES = 12
PLACES = (0, 1, 2, 511)
"""Indices in a table that the random tables fill."""
KINDS = {"read": AccessKind.READ, "ad-update": AccessKind.UPDATE, "fetch": AccessKind.FETCH, "walk": AccessKind.WALK}
HOST_KEYS = np.array([0, 1023], np.uint16)


def random_tables(rng: random.Random, c_bit: int) -> dict[int, int]:
    """The words of `TABLES` table pages that point at each other, at pages, and sometimes out of memory."""
    words = {}
    for table in range(TABLES):
        for index in PLACES:
            target = rng.choice((rng.randrange(TABLES), rng.randrange(TABLES), rng.randrange(512), SIZE // PAGE, 2**35))
            flags = rng.choice((7, 7, 7, 7, 0x67, 5, 3, 6, 0)) | rng.choice((0, 0, 0, 0x80))
            words[table * PAGE + 8 * index] = target * PAGE | flags | rng.choice((0, 0, 0, 1 << c_bit, 1 << 63))
    return words


def engine(words: dict[int, int], *, mapping: bool = True) -> MemoryEncryption:
    dram = Dram(SIZE, mapping=mapping)
    for spa, word in words.items():
        dram.write(spa, word.to_bytes(8, "little"))
    return MemoryEncryption(dram, "xex-aes-128", b"")


def walked(memory: MemoryEncryption, root: int, gfns: list[int], kind: AccessKind, c_bit: int = 51) -> NestedWalk:
    numbers = np.array(gfns, np.uint64)
    return nested_walk(memory, None, root, numbers, kind, c_bit=c_bit, host_keys=HOST_KEYS)


@pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])
@given(rng=st.randoms(use_true_random=False), kind=st.sampled_from(tuple(KINDS)), c_bit=st.sampled_from((51, 47)))
def test_nested_walks(mapping: bool, rng: random.Random, kind: str, c_bit: int) -> None:
    compare(rng, kind, c_bit, mapping=mapping)


def compare(rng: random.Random, kind: str, c_bit: int, *, mapping: bool = True) -> None:
    """The C-bit of an entry is no part of its address, wherever it lies; here it does not choose a key."""
    words = random_tables(rng, c_bit)
    root = rng.choice((0, 0, PAGE, 3 * PAGE | 1 << c_bit))
    numbers = [sum(rng.choice(PLACES) << 9 * level for level in range(4)) for _ in range(rng.randrange(40))]
    numbers = [number | rng.choice((0, 0, 0, 0, 1 << 36)) for number in numbers]
    same = np.array([0, 0], np.uint16)
    walk = nested_walk(
        engine(words, mapping=mapping),
        None,
        root,
        np.array(numbers, np.uint64),
        KINDS[kind],
        c_bit=c_bit,
        host_keys=same,
    )
    for i, gfn in enumerate(numbers):
        cpu = Vcpu(dict(words), {}, ReferenceRmp(0), root, 0, actor="guest", c_bit=c_bit, host_width=30)
        wanted = outcome(cpu, gfn, kind)
        if isinstance(wanted, int):
            assert (bool(walk.faults[i]), int(walk.errors[i])) == (True, wanted)
            continue
        assert (bool(walk.faults[i]), int(walk.pages[i]), bool(walk.large[i])) == (False, *wanted)
        changed = dict(words)
        for step in walk.steps:
            mine = step.owners == i
            for spa, bits in zip(step.addresses[mine], step.missing(KINDS[kind].writes_nested)[mine], strict=True):
                changed[int(spa)] |= int(bits)
        assert changed == cpu.host


def outcome(cpu: Vcpu, gfn: int, kind: str) -> tuple[int, bool] | int:
    """The page and whether the leaf is large, or the bits P and RSVD of a fault."""
    try:
        page, mapped = cpu.nested_walk(gfn, kind, False)
    except Fault as fault:
        return fault.result.outcome[1] & 9
    return page, mapped > 1


def test_tables_under_the_hosts_key() -> None:
    """The C-bit of the pointer to a table says how the table lies in memory; the leaf's is told."""
    c = 1 << 51
    memory = engine({})
    for key, spa, word in (
        (1023, 0, PAGE | 7 | c),
        (1023, PAGE, 2 * PAGE | 7),
        (0, 2 * PAGE, 3 * PAGE | 7 | c),
        (1023, 3 * PAGE, 9 * PAGE | 7 | c),
        (1023, 3 * PAGE + 8, 10 * PAGE | 7),
    ):
        memory.write(key, spa, word.to_bytes(8, "little"))
    walk = walked(memory, c, [0, 1], AccessKind.READ)
    assert (walk.pages.tolist(), walk.host_c.tolist(), walk.faults.tolist()) == ([9, 10], [True, False], [False] * 2)
    assert [step.keys.tolist() for step in walk.steps] == [[1023] * 2, [1023] * 2, [0] * 2, [1023] * 2]


def test_words_and_bits_under_several_keys() -> None:
    memory = engine({})
    keys, addresses = np.array([1023, 0, 1023, 0], np.uint16), np.array([8, 8 * 600, 8, 8 * 700], np.uint64)
    memory.write(1023, 0, bytes(PAGE))
    set_bits(memory, keys, addresses, np.array([1, 2, 4, 8], np.uint64))
    assert read_words(memory, keys, addresses).tolist() == [5, 2, 5, 8]
    assert memory.read(0, PAGE, PAGE).count(0) == PAGE - 2
    assert read_words(memory, keys[:0], addresses[:0]).tolist() == []


def test_a_large_leaf_over_the_end_of_memory() -> None:
    """What of it lies out of memory counts as a reserved bit (MODEL)."""
    memory = MemoryEncryption(Dram(0x200000), "xex-aes-128", b"")
    memory.write(0, 0, (PAGE | 7).to_bytes(8, "little"))
    memory.write(0, PAGE, 0x87.to_bytes(8, "little"))
    walk = walked(memory, 0, [511, 512], AccessKind.READ)
    assert (walk.pages.tolist(), walk.faults.tolist(), walk.errors.tolist()) == ([511, 512], [False, True], [0, 9])


def test_a_root_out_of_memory() -> None:
    walk = walked(engine({}), SIZE, [0, 1 << 36], AccessKind.READ)
    assert (walk.faults.tolist(), walk.errors.tolist()) == ([True, True], [9, 0])


@given(rng=st.randoms(use_true_random=False), kind=st.sampled_from(tuple(KINDS)))
def test_neighbours_that_walk_together(rng: random.Random, kind: str) -> None:
    """Runs of pages: the same outcome for each, and the same bits to set, as where each walks by itself."""
    words, starts = random_tables(rng, 51), [rng.choice((0, 1, 511, 512 * 511, 2**27 - 3)) for _ in range(3)]
    numbers = np.array([start + i for start in starts for i in range(rng.randrange(1, 6))], np.uint64)
    memory = engine(words)
    keys = np.array([0, 0], np.uint16)
    alone, together = (
        nested_walk(memory, None, 0, numbers, KINDS[kind], c_bit=51, host_keys=keys, together=flag)
        for flag in (False, True)
    )
    for name in ("pages", "large", "host_c", "faults", "errors"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert updates(alone, kind) == updates(together, kind)


def updates(walk: NestedWalk, kind: str) -> dict[int, int]:
    """The bits to set by address, of walks that come through."""
    found: dict[int, int] = {}
    for step in walk.steps:
        for spa, bits in zip(step.addresses.tolist(), step.missing(KINDS[kind].writes_nested).tolist(), strict=True):
            found[spa] = found.get(spa, 0) | bits
    return found
