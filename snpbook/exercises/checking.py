"""Trying an answer: every case is run, the first that fails is named, with what it expected and which rule it shows.

Whatever a reader's function does, the outcome is a value and never a traceback. Behaviour is compared, not text: a
right answer of another shape passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Number
from typing import TypeGuard

import numpy as np

from snpbook.attest.checks import Result
from snpbook.exercises.registry import Answer, Case, Exercise
from snpbook.views.checks import badge, mark
from snpbook.views.tables import table
from snpbook.views.values import show


@dataclass(frozen=True, slots=True, repr=False)
class Outcome:
    """How an answer did; the texts are those of the first case that failed, and empty where none did.

    An answer that left nothing to judge in any case is not `begun`: it is the stub, or does not return yet.
    """

    exercise: str
    passed: int
    cases: int
    case: str = ""
    expected: str = ""
    found: str = ""
    rule: str = ""
    cite: str = ""
    note: str = ""
    begun: bool = True

    @property
    def score(self) -> float:
        """The share of cases that passed, 0 to 1."""
        return self.passed / self.cases

    def __bool__(self) -> bool:
        return self.passed == self.cases

    def __repr__(self) -> str:
        note = f"\nNote: {self.note}" if self.note else ""
        if self:
            return f"Passed: {self.exercise}, {self.cases} of {self.cases} cases{note}"
        source = f" [{self.cite}]" if self.cite else ""
        return (
            f"Not yet: {self.exercise}, {self.passed} of {self.cases} cases\n"
            f"Case: {self.case}: expected {self.expected}, found {self.found}\nRule: {self.rule}{source}{note}"
        )

    def _repr_html_(self) -> str:
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        if self:
            return f"<p>{badge(Result.PASSED)} {escape(self.exercise)}, {self.cases} of {self.cases} cases</p>{note}"
        rows = [("case", self.case), ("expected", self.expected), ("found", self.found), ("rule", self.rule)]
        caption = f"{self.exercise}: Not yet, {self.passed} of {self.cases} cases"
        shown = table(caption, [], [*rows, ("source", self.cite)] if self.cite else rows)
        verdict = badge(Result.FAILED) if self.begun else mark(Result.SKIPPED, "not begun")
        return f"{verdict} {shown.html}{note}"


@dataclass(frozen=True, slots=True)
class _Failure:
    """A case that did not pass; `nothing` where the answer left nothing to judge."""

    case: Case
    found: str
    rule: str
    cite: str = ""
    nothing: bool = False


def tried(exercise: Exercise, answer: Answer) -> Outcome:
    """The outcome of `answer` on every case of `exercise`."""
    cases = exercise.cases()
    failures = [failure for case in cases if (failure := _failure(case, answer))]
    passed = len(cases) - len(failures)
    if not failures:
        return Outcome(exercise.id, passed, len(cases))
    first, begun = failures[0], passed > 0 or not all(failure.nothing for failure in failures)
    case = first.case
    rule, cite = (first.rule, first.cite) if begun else (f"your function {case.nothing} yet", "")
    expected = _say(case.expected)
    return Outcome(exercise.id, passed, len(cases), case.name, expected, first.found, rule, cite, begun=begun)


def _failure(case: Case, answer: Answer) -> _Failure | None:
    if not callable(answer):
        return _Failure(case, f"{_say(answer)}, which is no function", "check takes your function itself, without ()")
    try:
        found = case.run(answer)
    except Exception as error:  # noqa: BLE001  whatever the reader's function raises is told, not thrown
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _Failure(case, told, "your function raised this error instead of returning a value")
    if found is None or found is Ellipsis:
        rule = f"{case.rule} (your function {case.nothing} here)"
        return _Failure(case, "nothing", rule, case.cite, nothing=True)
    if same(found, case.expected):
        return None
    unlike = _unlike(found, case.expected)
    return _Failure(case, _say(found), unlike or case.rule, "" if unlike else case.cite)


def same(found: object, expected: object) -> bool:
    """Equal in meaning: numbers of any type, arrays and sequences element by element, mappings key by key."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if _is_row(found) and _is_row(expected):
        return len(found) == len(expected) and all(map(same, found, expected))
    try:
        return bool(found == expected)
    except (TypeError, ValueError):
        return False


def _unlike(found: object, expected: object) -> str:
    """What is wrong with the kind of a value, or of a mapping's values; empty where only the value itself differs."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping) and found.keys() == expected.keys():
        return next(filter(None, (_unlike(found[key], expected[key]) for key in expected)), "")
    wanted, got = _kind(expected), _kind(found)
    return "" if wanted == got else f"expected {wanted}, found {got}"


def _kind(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    kinds = {"a number": isinstance(value, Number), "text": isinstance(value, str), "a list": _is_row(value),
             "a dict": isinstance(value, Mapping)}  # fmt: skip
    return next((kind for kind, fits in kinds.items() if fits), f"a value of type {type(value).__name__}")


def _is_row(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _say(value: object) -> str:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    return str(value) if isinstance(value, int) else show(value)
