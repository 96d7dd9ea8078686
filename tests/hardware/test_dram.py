"""DRAM: the mapping and the dictionary are one memory to everybody, and a large one costs nothing."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.dram import Dram

PAGE, LARGE = 0x1000, 0x200000
SIZE = 4 * LARGE
both = pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])

addresses = st.one_of(
    st.sampled_from([0, 1, PAGE - 1, LARGE - 5, LARGE, 2 * LARGE - PAGE, SIZE - 1]), st.integers(0, SIZE - 1)
)
sizes = st.one_of(st.integers(0, 40), st.sampled_from([PAGE, 3 * PAGE + 1, LARGE + 7]))
numbers = st.lists(st.one_of(st.integers(0, SIZE // PAGE - 1), st.sampled_from([0, 511, 512])), max_size=6)
runs = st.tuples(st.integers(0, SIZE // PAGE - 1), st.integers(1, 600), st.sampled_from([1, 1, 512]))


def places(choice: Any) -> Any:
    if isinstance(choice, tuple):
        start, count, step = choice
        return range(start, min(start + count * step, SIZE // PAGE), step)
    return np.array(choice, np.uint64)


@both
@given(data=st.data())
def test_both_back_ends_are_one_memory(mapping: bool, data: st.DataObject) -> None:
    dram, flat = Dram(SIZE, mapping=mapping), np.zeros(SIZE, np.uint8)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["write", "scatter", "zero", "copy", "read", "gather", "words"])):
            case "write":
                spa = data.draw(addresses)
                content = rng.integers(0, 256, min(data.draw(sizes), SIZE - spa), np.uint8)
                flat[spa : spa + content.size] = content
                dram.write(spa, content if spa % 2 else content.tobytes())
            case "copy":  # within memory, from a view that may overlap
                spa, target = data.draw(addresses), data.draw(addresses)
                size = min(data.draw(sizes), SIZE - spa, SIZE - target, LARGE - spa % LARGE)
                for _, view in dram.pieces(spa, size):
                    dram.write(target, view)
                flat[target : target + size] = flat[spa : spa + size].copy()
            case "scatter":
                pages = places(data.draw(st.one_of(numbers, runs)))
                content = rng.integers(0, 256, (len(pages), PAGE), np.uint8)
                dram.scatter(pages, content)
                for page, part in zip(pages, content, strict=True):
                    flat.reshape(-1, PAGE)[int(page)] = part
            case "zero":
                first = data.draw(st.integers(0, SIZE // PAGE))
                count = min(data.draw(st.integers(0, 700)), SIZE // PAGE - first)
                dram.zero(first * PAGE, count * PAGE)
                flat[first * PAGE : (first + count) * PAGE] = 0
            case "read":
                spa = data.draw(addresses)
                size = min(data.draw(sizes), SIZE - spa)
                assert dram.read(spa, size) == flat[spa : spa + size].tobytes()
            case "gather":
                pages = places(data.draw(st.one_of(numbers, runs)))
                index = np.asarray(pages, np.int64)
                assert (dram.gather(pages) == flat.reshape(-1, PAGE)[index]).all()
            case "words":
                where = np.array(data.draw(numbers), np.uint64) * np.uint64(4096) + np.uint64(8)
                assert (dram.words(where) == flat.view("<u8")[where >> np.uint64(3)]).all()
    assert dram.read(0, SIZE) == flat.tobytes()


def test_a_run_is_a_view_that_nobody_can_write() -> None:
    dram = Dram(SIZE)
    assert dram.mapped
    (_, whole), *_ = dram.pieces(0, SIZE)
    for view in (dram.gather(range(3, 600)), whole[: 5 * PAGE]):
        assert np.shares_memory(view, whole)
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1


@both
def test_memory_moved_onto_itself_over_a_2mb_boundary(mapping: bool) -> None:
    dram = Dram(SIZE, mapping=mapping)
    dram.write(LARGE - 16, bytes(range(12)))
    ((_, view),) = dram.pieces(LARGE - 16, 12)
    dram.write(LARGE - 8, view)
    assert dram.read(LARGE - 8, 12) == bytes(range(12))


def test_pieces_of_the_dictionary_end_at_2_mb() -> None:
    dram = Dram(SIZE, mapping=False)
    assert [(at, len(piece)) for at, piece in dram.pieces(LARGE - 4, LARGE + 9)] == [(0, 4), (4, LARGE), (4 + LARGE, 5)]


def test_zeroed_memory_goes_back_to_the_system() -> None:
    dram = Dram(SIZE)
    dram.write(0, bytes(range(256)) * (SIZE // 256))
    dram.zero(PAGE, SIZE - 2 * PAGE)
    assert (dram.read(0, PAGE), dram.read(SIZE - PAGE, PAGE)) == (bytes(range(256)) * 16,) * 2
    assert dram.read(PAGE, SIZE - 2 * PAGE) == bytes(SIZE - 2 * PAGE)


BAD = [
    (lambda d: d.read(-1, 2), ValueError, r"spa = -0x1, size = 0x2: outside DRAM of 0x800000 bytes"),
    (lambda d: d.read(0, -2), ValueError, "size = -0x2: outside"),
    (lambda d: d.read(SIZE - 1, 2), ValueError, "spa = 0x7fffff, size = 0x2: outside"),
    (lambda d: d.read(1.0, 2), TypeError, r"spa = 1\.0: an integer"),
    (lambda d: d.write(SIZE - 1, b"ab"), ValueError, "outside DRAM"),
    (lambda d: d.write("0", b"ab"), TypeError, "spa = '0': an integer"),
    (lambda d: d.zero(1, PAGE), ValueError, "spa = 0x1, size = 0x1000: whole pages are zeroed"),
    (lambda d: d.zero(0, 5), ValueError, "whole pages"),
    (lambda d: d.zero(SIZE, PAGE), ValueError, "outside DRAM"),
    (lambda d: d.gather(range(2047, 2049)), ValueError, "pages: page 0x800 is beyond the last, 0x7ff"),
    (lambda d: d.gather(np.array([2048], np.uint64)), ValueError, "pages: page 0x800 is beyond the last"),
    (lambda d: d.gather(np.array([-1])), ValueError, "pages: -1 is no page number"),
    (lambda d: d.gather(np.array([1.0])), TypeError, "pages = float64"),
    (lambda d: d.gather(range(3, 0, -1)), ValueError, "a run goes upwards"),
    (lambda d: d.scatter(range(2), np.zeros((1, PAGE), np.uint8)), ValueError, r"data = uint8 \(1, 4096\): an array"),
    (lambda d: d.scatter(range(1), np.zeros((1, PAGE))), ValueError, r"data = float64 \(1, 4096\)"),
    (lambda d: d.scatter(range(2047, 2049), np.ones((2, PAGE), np.uint8)), ValueError, "beyond the last"),
]


@both
@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_bad_operands_change_nothing(mapping: bool, call: Any, error: type[Exception], text: str) -> None:
    dram = Dram(SIZE, mapping=mapping)
    dram.write(0, b"\x55" * SIZE)
    with pytest.raises(error, match=text):
        call(dram)
    assert dram.read(0, SIZE) == b"\x55" * SIZE


@pytest.mark.parametrize("size", [0, -LARGE, LARGE + PAGE])
def test_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="DRAM is a positive multiple of 0x200000 bytes"):
        Dram(size)


@pytest.mark.parametrize("mapping", [True, False])
def test_words_outside_are_no_memory(mapping: bool) -> None:
    with pytest.raises(IndexError):
        Dram(SIZE, mapping=mapping).words(np.array([SIZE], np.uint64))


GROWTH = """
import json, re
from pathlib import Path
from snpbook.hardware.dram import Dram
from snpbook.system import System

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

Dram(1 << 21).write(0, b"warm")
System("milan", installed=1 << 30).host.boot()
start = resident()
system = System("milan", installed=1 << 40)
created = resident()
system.host.boot()
print(json.dumps({"created": created - start, "booted": resident() - start, "mapped": system.machine.dram.mapped}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_terabyte_costs_what_is_touched() -> None:
    """At most 10 MB for the machine and 60 MB after SNP_INIT, whose table is 4 GiB."""
    answer = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True).stdout
    growth = json.loads(answer)
    if not growth["mapped"]:
        pytest.skip("the system refuses a mapping of 1 TB")
    assert growth["created"] <= 10
    assert growth["booted"] <= 60
