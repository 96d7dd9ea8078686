"""Snapshots: memory against a plain copy of it, and graphs of objects against what they were."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.contents import Contents
from snpbook.hardware.dram import Dram
from snpbook.hardware.snapshot import Snapshot
from snpbook.trace import Recorder, Trace

MIB = 1 << 20
SIZE = 16 * MIB


def scribble(dram: Dram, rng: random.Random) -> None:
    """Some writes of every kind."""
    for _ in range(rng.randrange(1, 8)):
        kind, page = rng.randrange(6), rng.randrange(SIZE >> 12)
        if kind == 0:
            dram.write(page << 12, rng.randbytes(rng.choice((1, 100, 5000)))[: SIZE - (page << 12)])
        elif kind == 1:
            pages = np.array(rng.sample(range(SIZE >> 12), 5), np.uint64)
            dram.scatter(pages, np.frombuffer(rng.randbytes(5 * 4096), np.uint8).reshape(5, 4096))
        elif kind == 2:
            run = range(page, min(page + 700, SIZE >> 12))
            dram.scatter(run, np.full((len(run), 4096), rng.randrange(256), np.uint8))
        elif kind == 3:
            dram.zero(page << 12, min(3 * MIB, SIZE - (page << 12)))
        elif kind == 4:
            for _, piece in dram.edit(page << 12, 4096):
                piece[::7] ^= 1
        else:
            dram.zero(0, SIZE)


def everything(dram: Dram) -> bytes:
    return dram.read(0, SIZE)


@pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])
@pytest.mark.parametrize("seed", range(20))
def test_memory_comes_back_as_it_was_and_compares_as_its_bytes(seed: int, mapping: bool) -> None:
    rng, dram = random.Random(seed), Dram(SIZE, mapping=mapping)
    kept: list[tuple[Contents, bytes]] = [(dram.snapshot(), everything(dram))]
    for _ in range(6):
        scribble(dram, rng)
        if rng.random() < 0.7:
            kept.append((dram.snapshot(), everything(dram)))
        if rng.random() < 0.5:
            contents, raw = rng.choice(kept)
            dram.restore(contents)
            assert everything(dram) == raw
    for mine, my_bytes in kept:
        for theirs, their_bytes in kept:
            assert (mine == theirs) == (my_bytes == their_bytes)
            pages = [
                p for p in range(SIZE >> 12) if my_bytes[p << 12 : p + 1 << 12] != their_bytes[p << 12 : p + 1 << 12]
            ]
            assert mine.differences(theirs).tolist() == pages
        assert b"".join(mine.page(page) for page in range(SIZE >> 12)) == my_bytes


def test_a_snapshot_costs_what_was_written() -> None:
    dram = Dram(SIZE)
    dram.write(0, b"a")
    dram.write(8 * MIB, b"b")
    first = dram.snapshot()
    dram.write(8 * MIB + 5, b"c")
    second = dram.snapshot()
    assert second.regions[0] is first.regions[0]
    assert second.regions[4] is not first.regions[4]
    assert len(second.regions[4].pages) == 1


def test_a_view_kept_by_a_writer_is_told_of_by_mark() -> None:
    dram = Dram(SIZE)
    ((_, piece),) = dram.edit(4096, 4096)
    before = dram.snapshot()
    piece[0] = 1
    dram.mark(4096, 4096)
    assert dram.snapshot().differences(before).tolist() == [1]


@dataclass
class Part:
    name: str
    numbers: Any
    other: "Part | None" = None


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self) -> None:
        self.left: Any = 1


def world() -> dict[str, Any]:
    inner = Part("inner", np.arange(4))
    outer = Part("outer", [1, {"a": {2, 3}}, bytearray(b"xyz")], inner)
    inner.other = outer  # round in a circle
    return {"part": outer, "slotted": Slotted(), "numbers": [outer.numbers[1], (outer, 5)]}


CHANGES: dict[str, Any] = {
    "an attribute": (lambda w: setattr(w["part"], "name", "x"), "part.name"),
    "an array in place": (lambda w: w["part"].other.numbers.__setitem__(2, 9), "part.other.numbers"),
    "an array replaced": (lambda w: setattr(w["part"].other, "numbers", np.arange(5)), "part.other.numbers"),
    "a list": (lambda w: w["part"].numbers.append(4), "part.numbers"),
    "a dictionary": (lambda w: w["part"].numbers[1].update(b=1), "numbers[0]"),
    "a set": (lambda w: w["part"].numbers[1]["a"].add(7), "numbers[0]['a']"),
    "bytes in place": (lambda w: w["part"].numbers[2].__setitem__(0, 0), "part.numbers[2]"),
    "a slot": (lambda w: setattr(w["slotted"], "left", 2), "slotted.left"),
    "a slot that was empty": (lambda w: setattr(w["slotted"], "right", 2), "slotted"),
    "an attribute that was not there": (lambda w: setattr(w["part"], "extra", 2), "part"),
    "a reference": (lambda w: setattr(w["part"], "other", None), "part.other"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_named_and_undone(name: str) -> None:
    change, path = CHANGES[name]
    things = world()
    before = Snapshot(**things)
    assert before == Snapshot(**things)
    shared = things["numbers"][0] is things["part"].numbers[1]
    change(things)
    after = Snapshot(**things)
    assert before != after
    assert path in before.differences(after)
    before.restore()
    assert Snapshot(**things) == before
    assert (things["numbers"][0] is things["part"].numbers[1]) == shared
    after.restore()
    assert Snapshot(**things) == after


def test_two_worlds_made_alike_are_equal() -> None:
    assert Snapshot(**world()) == Snapshot(**world())
    assert Snapshot(**world()) != Snapshot(part=world()["part"])


def test_observers_are_no_part_of_it() -> None:
    trace, recorder = Trace(), Recorder()
    things = {"holder": [trace, recorder]}
    before = Snapshot(**things)
    trace.subscribe(recorder)
    recorder.events.append(None)  # type: ignore[arg-type]
    assert Snapshot(**things) == before
    before.restore()
    assert len(recorder) == 1
