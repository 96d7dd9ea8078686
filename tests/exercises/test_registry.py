"""Every exercise is proven: its stub is not yet right, its reference is, its wrong answers fail in the words meant."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from snpbook.exercises import exercise, exercises
from snpbook.exercises.checking import tried
from snpbook.exercises.registry import Exercise, UnknownExerciseError, Wrong, register

ALL = exercises()
WRONG = [(one, wrong) for one in ALL for wrong in one.wrong]


def stub(one: Exercise) -> Callable[..., Any]:
    """The function that the reader's cell defines before work begins."""
    names: dict[str, Any] = {}
    exec(one.stub, names)
    function: Callable[..., Any] = names[one.reference.__name__]
    return function


def test_there_are_exercises() -> None:
    assert "first_light.1" in {one.id for one in ALL}


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_stub_is_not_yet_right(one: Exercise) -> None:
    outcome = tried(one, stub(one))
    assert not outcome
    assert outcome.passed == 0
    assert repr(outcome).startswith("Not yet: ")
    assert not outcome.begun
    assert outcome.rule == f"your function {one.cases()[0].nothing} yet"


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_reference_passes(one: Exercise) -> None:
    outcome = tried(one, one.reference)
    assert outcome, outcome
    assert outcome.score == 1
    assert repr(outcome).startswith("Passed: ")


@pytest.mark.parametrize(("one", "wrong"), WRONG, ids=lambda value: getattr(value, "id", "") or value.answer.__name__)
def test_wrong_answers_fail_with_the_words_meant(one: Exercise, wrong: Wrong) -> None:
    outcome = tried(one, wrong.answer)
    assert not outcome
    assert 0 <= outcome.score < 1
    assert wrong.message in repr(outcome)
    assert all((outcome.case, outcome.expected, outcome.found, outcome.rule))


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_wrong_answers_are_told_apart(one: Exercise) -> None:
    assert len({repr(tried(one, wrong.answer)) for wrong in one.wrong}) == len(one.wrong)


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_cases_are_fresh_each_time(one: Exercise) -> None:
    assert repr(tried(one, one.reference)) == repr(tried(one, one.reference))
    assert len({case.name for case in one.cases()}) == len(one.cases())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"difficulty": 4}, "difficulty"),
        ({"minutes": 0}, "no minutes"),
        ({"wrong": ALL[0].wrong[:1]}, "fewer than two wrong answers"),
        ({"hints": ("one", "two")}, "3 hints"),
        ({"stub": "def other(): ..."}, "stub does not begin the reference"),
        ({"solution": ""}, "no solution"),
    ],
)
def test_an_incomplete_exercise_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(ALL[0], id="other", **change)


def test_ids_are_given_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register(ALL[0])


def test_an_unknown_id_lists_those_that_exist() -> None:
    with pytest.raises(UnknownExerciseError, match=r"first_light\.1"):
        exercise("first_light.99")
