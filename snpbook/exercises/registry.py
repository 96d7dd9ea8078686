"""The registry of exercises: what each asks, how an answer is tried, and the answers that prove the check.

An exercise is complete only with a stub that is not yet right, a reference that is, and at least two wrong answers that
readers often give, each with the words that its refusal must hold. Whoever adds one adds its proof with it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import dedent
from typing import Any

Answer = Callable[..., Any]

HINTS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One trial of an answer: `run` calls it and returns what is compared with `expected`.

    `run` returns None where there is nothing to judge. `rule` is what a wrong answer has overlooked, `cite` where that
    stands; `nothing` completes "your function ..." where it left nothing to judge.
    """

    name: str
    run: Callable[[Answer], object]
    expected: object
    rule: str
    cite: str = ""
    nothing: str = "does not return a value"


@dataclass(frozen=True, slots=True)
class Wrong:
    """A wrong answer that readers give, and words that its refusal must hold."""

    answer: Answer
    message: str


@dataclass(frozen=True, slots=True, repr=False)
class Exercise:
    """One exercise. `id` is `chapter.number`, `minutes` and `difficulty` (1 to 3) are estimates.

    `cases` makes fresh cases at each call, from the ordinary to the particular. `stub` is the text of the
    function that the reader completes, `reference` that function done; `solution` explains it in words.
    """

    id: str
    title: str
    minutes: int
    difficulty: int
    prerequisites: tuple[str, ...]
    task: str
    stub: str
    reference: Answer
    wrong: tuple[Wrong, ...]
    hints: tuple[str, str, str]
    solution: str
    cases: Callable[[], Sequence[Case]]

    def __post_init__(self) -> None:
        faults = [
            fault
            for fault, there in {
                "its difficulty is not 1, 2 or 3": self.difficulty not in {1, 2, 3},
                "it takes no minutes": self.minutes < 1,
                "it has fewer than two wrong answers": len(self.wrong) < 2,
                f"it has not {HINTS} hints": len(self.hints) != HINTS or not all(self.hints),
                "its stub does not begin the reference": f"def {self.reference.__name__}(" not in self.stub,
                "it has no task or no solution in words": not (self.task and self.solution),
            }.items()
            if there
        ]
        if faults:
            raise ValueError(f"exercise {self.id!r}: {'; '.join(faults)}")

    def __repr__(self) -> str:
        return f"Exercise({self.id!r}, {self.title!r}, {self.minutes} min, difficulty {self.difficulty} of 3)"

    @property
    def reference_source(self) -> str:
        """The reference as a reader would write it."""
        return dedent(inspect.getsource(self.reference))


class UnknownExerciseError(LookupError):
    """No exercise has that id."""


_EXERCISES: dict[str, Exercise] = {}


def register(exercise: Exercise) -> Exercise:
    """Add an exercise; its id must be new."""
    if exercise.id in _EXERCISES:
        raise ValueError(f"exercise {exercise.id!r} is registered twice")
    _EXERCISES[exercise.id] = exercise
    return exercise


def exercises() -> Sequence[Exercise]:
    """All exercises, in the order of the chapters."""
    return tuple(_EXERCISES.values())


def exercise(identifier: str) -> Exercise:
    """The exercise of that id; `UnknownExerciseError` lists those that exist."""
    try:
        return _EXERCISES[identifier]
    except KeyError:
        known = ", ".join(_EXERCISES)
        raise UnknownExerciseError(f"there is no exercise {identifier!r}; there are: {known}") from None
