"""How a row is measured: reference and candidate in turn, in a fresh process, the median of the rounds' ratios.

A fresh process, because what the heap has seen before changes large temporaries several-fold.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import Enum
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

WARM_UP, ROUNDS = 2, 11
TURN = 0.01
"""Seconds that one turn of either side takes at least, by repeating it."""
STEADY = 1.5
"""A reference whose slowest turn exceeds its fastest by more than this factor shows a noisy machine."""

Work = Callable[[], object]


class NotMeasurableError(Exception):
    """A row cannot be measured here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two pieces of work, and how many units (pages, calls) each of them does."""

    reference: Work
    candidate: Work
    reference_units: int = 1
    candidate_units: int = 1
    rounds: int = ROUNDS
    """How often each side has its turn; those that take long have few, and no turns before."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a row that measures memory has found."""

    megabytes: float


class Kind(Enum):
    """What a gate compares."""

    SPEED = "speed"
    TIME = "time"
    MEMORY = "MB"


@dataclass(frozen=True, slots=True)
class Gate:
    """What must hold: at least `bound` times the reference's speed, at most so many times its time, or megabytes."""

    bound: float
    kind: Kind

    def __str__(self) -> str:
        return f"{'>=' if self.kind is Kind.SPEED else '<='} {self.bound:g} {self.kind.value}"

    def ratio(self, reference: float, candidate: float) -> float:
        """The figure that is held against the bound, from the two times."""
        return reference / candidate if self.kind is Kind.SPEED else candidate / reference

    def holds(self, ratio: float) -> bool:
        return ratio >= self.bound if self.kind is Kind.SPEED else ratio <= self.bound


def at_least(bound: float) -> Gate:
    """A gate on speed."""
    return Gate(bound, Kind.SPEED)


def at_most(bound: float) -> Gate:
    """A gate on time."""
    return Gate(bound, Kind.TIME)


def megabytes_at_most(bound: float) -> Gate:
    """A gate on memory."""
    return Gate(bound, Kind.MEMORY)


@dataclass(frozen=True, slots=True)
class Row:
    """One goal. `prepare` runs in the row's own process, so it is a function of a module (or a `partial` of one).

    A goal that is `only_reported` is too noisy to fail a run, an `optional` one needs what may be missing.
    """

    name: str
    title: str
    gate: Gate
    prepare: Callable[[], Comparison | Usage]
    only_reported: bool = False
    optional: bool = False
    units: str = ""
    """What the candidate's units are, where it is told how many of them a second makes."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The median ratio, the reference's spread (slowest / fastest turn), and both sides' median seconds per unit.

    Of memory the ratio is megabytes, and there is nothing else.
    """

    ratio: float
    spread: float = 1
    reference: float = math.nan
    candidate: float = math.nan

    @property
    def noisy(self) -> bool:
        return self.spread > STEADY


def resident(name: str = "VmRSS") -> float:
    """What this process holds, or another line of its status, in MB; `NotMeasurableError` where there is no /proc."""
    path = Path("/proc/self/status")
    if not path.is_file():
        raise NotMeasurableError("resident memory is read from /proc/self/status: measure it on Linux")
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def measure(row: Row) -> Measurement:
    """Measure a row in a process of its own; a noisy measurement is repeated once and the steadier one counts.

    Raises `NotMeasurableError` where the row's `prepare` does.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measure_here, row).result()


def _measure_here(row: Row) -> Measurement:
    comparison = row.prepare()
    if isinstance(comparison, Usage):
        return Measurement(comparison.megabytes)
    first = compare(comparison, row.gate)
    return min(first, compare(comparison, row.gate), key=lambda found: found.spread) if first.noisy else first


def compare(comparison: Comparison, gate: Gate) -> Measurement:
    """The rounds of one measurement, in this process."""
    reference = _Side(comparison.reference, comparison.reference_units)
    candidate = _Side(comparison.candidate, comparison.candidate_units)
    warm_up = WARM_UP if comparison.rounds == ROUNDS else 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds = [(reference.turn(), candidate.turn()) for _ in range(warm_up + comparison.rounds)][warm_up:]
    finally:
        if collecting:
            gc.enable()
    references, candidates = zip(*rounds, strict=True)
    return Measurement(
        ratio=median(gate.ratio(*times) for times in rounds),
        spread=max(references) / min(references),
        reference=median(references),
        candidate=median(candidates),
    )


class _Side:
    """One side of a comparison, repeated so often that a turn takes `TURN` seconds."""

    def __init__(self, work: Work, units: int) -> None:
        self._work, self._units = work, units
        self._repeats = 1
        work()  # the first call touches memory and fills caches
        self._repeats = math.ceil(TURN / max(self.turn() * units, TURN / 1e6))

    def turn(self) -> float:
        """Seconds per unit."""
        work = self._work
        start = perf_counter()
        for _ in range(self._repeats):
            work()
        return (perf_counter() - start) / (self._repeats * self._units)
