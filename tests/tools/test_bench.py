"""The benchmark: what counts as holding, missing, noise and refusal; not how fast anything is."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count

import click
import pytest
from click.testing import CliRunner

from snpbook.tools.bench import __main__ as bench
from snpbook.tools.bench import launch, memory
from snpbook.tools.bench import measure as m
from snpbook.tools.bench.measure import Comparison, Measurement, NotMeasurableError, Row, at_least, at_most

STEADY = Measurement(ratio=2.0, spread=1.1, reference=2e-6, candidate=1e-6)
NOISY = Measurement(ratio=2.0, spread=1.6, reference=2e-6, candidate=1e-6)


def nothing() -> Comparison:
    return Comparison(lambda: None, lambda: None)


def refuse() -> Comparison:
    raise NotMeasurableError("there is no clone here: clone the repository")


def sleeper(reference: float, candidate: float, units: int = 1) -> Comparison:
    return Comparison(partial(time.sleep, reference), partial(time.sleep, candidate), 1, units)


@pytest.mark.parametrize(
    ("gate", "reference", "candidate", "ratio", "holds"),
    [
        (at_least(0.5), 1.0, 2.0, 0.5, True),
        (at_least(0.5), 1.0, 2.5, 0.4, False),
        (at_most(4), 1.0, 4.0, 4.0, True),
        (at_most(4), 1.0, 4.5, 4.5, False),
    ],
)
def test_gates(gate: m.Gate, reference: float, candidate: float, ratio: float, holds: bool) -> None:
    assert gate.ratio(reference, candidate) == ratio
    assert gate.holds(ratio) is holds


def test_units_are_divided_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "TURN", 1e-4)
    found = m.compare(sleeper(0.002, 0.004, units=4), at_most(1))
    assert 0.4 < found.ratio < 0.6
    assert 0.0009 < found.candidate < 0.002 <= found.reference


def test_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "TURN", 1e-12)
    turns: list[str] = []
    m.compare(Comparison(partial(turns.append, "r"), partial(turns.append, "c")), at_least(1))
    rounds = turns[-2 * (m.WARM_UP + m.ROUNDS) :]
    assert rounds == ["r", "c"] * (m.WARM_UP + m.ROUNDS)


def test_the_ratio_is_the_median_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down for a few rounds slows both sides, and an outlier does not count."""
    clock = turns()
    monkeypatch.setattr(m, "perf_counter", lambda: next(clock))
    found = m.compare(nothing(), at_most(1))
    assert found.ratio == pytest.approx(3)
    assert found.spread == pytest.approx(10)
    assert found.noisy


def turns() -> Iterator[float]:
    """Start and end of each turn: 1 s and 3 s; but slow warm-up rounds, four ten times slower ones, one outlier."""
    now = 0.0
    for turn in count(-2):  # two calibrating turns come first
        number, candidate = divmod(turn, 2)
        slowdown = 50 if number < m.WARM_UP else 10 if 4 <= number < 8 else 1
        yield now
        now += (3.0 if candidate else 1.0) * slowdown * (100 if number == 9 and candidate else 1)
        yield now


@pytest.mark.parametrize(("spreads", "kept", "calls"), [([1.1], 1.1, 1), ([1.9, 1.2], 1.2, 2), ([1.6, 2.5], 1.6, 2)])
def test_noise_is_measured_again_once(
    monkeypatch: pytest.MonkeyPatch, spreads: list[float], kept: float, calls: int
) -> None:
    done: list[float] = []

    def compare(*_: object) -> Measurement:
        done.append(spreads[len(done)])
        return Measurement(1.0, done[-1], 1.0, 1.0)

    monkeypatch.setattr(m, "compare", compare)
    assert m._measure_here(Row("X1", "x", at_least(1), nothing)).spread == kept
    assert len(done) == calls


@pytest.mark.parametrize(
    ("outcome", "bound", "text", "code"),
    [
        (STEADY, 2, "holds", 0),
        (STEADY, 2.1, "missed", 1),
        (NOISY, 2, "holds, noisy", 0),
        (NOISY, 2.1, "missed, noisy", 1),
        (NotMeasurableError("no clone"), 2, "not measured", 1),
    ],
)
def test_verdicts_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, outcome: bench.Outcome, bound: float, text: str, code: int
) -> None:
    def measure(_: Row) -> Measurement:
        if isinstance(outcome, NotMeasurableError):
            raise outcome
        return outcome

    row = Row("X1", "ours : theirs", at_least(bound), nothing)
    monkeypatch.setattr(bench, "ROWS", [row])
    monkeypatch.setattr(bench, "measure", measure)
    assert bench.verdict(row, outcome) == text
    result = CliRunner().invoke(bench.main, [])
    assert result.exit_code == code
    assert text in result.stdout
    if outcome is not STEADY:
        assert "X1 (ours : theirs) no" in result.stdout


def test_an_optional_row_that_cannot_be_measured_fails_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("X1", "ours : theirs", at_least(1), refuse, optional=True)
    monkeypatch.setattr(bench, "ROWS", [row])
    result = CliRunner().invoke(bench.main, [])
    assert result.exit_code == 0
    assert "X1 (ours : theirs) left out: there is no clone here" in result.stdout
    assert bench.verdict(row, replace(STEADY, ratio=0.9)) == "missed"


def test_rows_of_the_launch() -> None:
    gates = {(row.name, str(row.gate), row.optional) for row in launch.ROWS}
    assert gates == {
        ("L1", "<= 1.4 time", False), ("L1-genoa", "<= 1.9 time", False), ("L2", "<= 1.15 time", True),
        ("L3", "<= 0.9 time", True), ("L3", "<= 0.9 time", False), ("L4", "<= 1.08 time", False),
        ("L5", "<= 4 time", False),
    }  # fmt: skip
    assert len(launch.ROWS) == 7


@pytest.mark.parametrize("row", launch.ROWS, ids=lambda row: f"{row.name} {row.title}")
def test_both_sides_of_the_launch_rows_work(row: Row) -> None:
    try:
        comparison = row.prepare()
    except NotMeasurableError as reason:
        pytest.skip(str(reason))
    comparison.reference()
    comparison.candidate()
    comparison.candidate()


def test_one_missed_row_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", [Row(f"X{n}", "x", at_least(n), nothing) for n in (1, 3, 2)])
    monkeypatch.setattr(bench, "measure", lambda _: STEADY)
    assert CliRunner().invoke(bench.main, []).exit_code == 1
    assert CliRunner().invoke(bench.main, ["--only", "x1, X2"]).exit_code == 0


def test_rows_are_measured_in_a_process_of_their_own() -> None:
    found = m.measure(Row("X1", "x", at_least(1), partial(sleeper, 0.001, 0.001)))
    assert found.reference >= 0.001
    with pytest.raises(NotMeasurableError, match="clone the repository"):
        m.measure(Row("X2", "x", at_least(1), refuse))


def test_choosing_rows() -> None:
    assert bench.chosen("") == bench.ROWS
    assert {row.name for row in bench.chosen("e1,E5")} == {"E1", "E5"}
    assert {row.name[0] for row in bench.chosen("e")} == {"E"}
    with pytest.raises(click.UsageError, match="no row is called 'q'; rows: A1, A2, "):
        bench.chosen("E1,q")


ENCRYPTION = [row for row in bench.ROWS if row.name.startswith("E") and row.name != "E4"]


@pytest.mark.parametrize("row", ENCRYPTION, ids=lambda row: row.title)
def test_both_sides_of_the_encryption_rows_work(row: Row) -> None:
    comparison = row.prepare()
    comparison.reference()
    comparison.candidate()


def noise() -> m.Usage:
    """Fifty megabytes that are held."""
    return memory._growth(partial(b"\1".__mul__, 50 << 20))


def test_memory_is_measured_and_held_against_its_gate() -> None:
    row = Row("X1", "x", m.megabytes_at_most(60), noise)
    found = m.measure(row)
    assert 45 < found.ratio < 60
    assert bench.verdict(row, found) == "holds"
    assert bench.verdict(replace(row, gate=m.megabytes_at_most(40)), found) == "missed"
    assert bench.verdict(replace(row, gate=m.megabytes_at_most(40), only_reported=True), found) == "reported"
    assert str(row.gate) == "<= 60 MB"


def test_gates_of_the_memory_rows() -> None:
    gates = {(row.name, row.gate.kind, row.gate.bound) for row in memory.ROWS}
    assert gates == {
        ("E4", m.Kind.MEMORY, 2),
        ("D1", m.Kind.TIME, 200),
        ("D1", m.Kind.MEMORY, 10),
        ("D1", m.Kind.MEMORY, 60),
        ("D2", m.Kind.MEMORY, 200),
        ("D2", m.Kind.MEMORY, 300),
        ("D3", m.Kind.TIME, 4),
        ("D3", m.Kind.MEMORY, 30),
    }


def test_gates_of_the_encryption_rows() -> None:
    gates = {(row.name, str(row.gate)) for row in ENCRYPTION}
    assert gates == {
        ("E1", ">= 0.38 speed"),
        ("E2", ">= 0.33 speed"),
        ("E5", "<= 9 time"),
        ("E6", ">= 1.3 speed"),
        ("E6", "<= 1.6 time"),
    }
