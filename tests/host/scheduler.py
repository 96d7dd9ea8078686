"""Every interleaving of a few system calls, by execution again and again: depth first, without threads.

A call is a generator whose yields name the step that comes next. A schedule is the list of choices, at each point an
index among the calls that can go on. Generators cannot be copied, so each schedule begins with a world made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from snpbook.host.refusal import KernelError
from snpbook.host.steps import Step, Steps

Tasks = Sequence[Steps[Any]]


class DeadlockError(AssertionError):
    """Every call that is left waits for a lock."""


@dataclass(slots=True)
class Run:
    """One schedule as it was executed: who went on at each point, and how each call ended: a value or its errno."""

    order: list[int] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    results: dict[int, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> tuple[Any, ...]:
        return tuple(result for _, result in sorted(self.results.items()))


def execute(tasks: Tasks, choices: Sequence[int], width: list[int] | None = None) -> Run:
    """Run calls by a schedule; behind its end the first that can goes on. `width` gets how many could at each point."""
    run, waits = Run(), dict.fromkeys(range(len(tasks)), Step("begin"))
    while waits:
        ready = [number for number, step in waits.items() if not step.blocked]
        if not ready:
            raise DeadlockError(f"after {run.steps}: {[step.name for step in waits.values()]}")
        point = len(run.order)
        number = ready[choices[point] if point < len(choices) else 0]
        if width is not None:
            width.append(len(ready))
        run.order.append(number)
        run.steps.append(f"{number}: {waits[number].name}")
        try:
            waits[number] = next(tasks[number])
        except StopIteration as end:
            run.results[number] = end.value
            del waits[number]
        except KernelError as error:
            run.results[number] = -(error.errno or 0)
            del waits[number]
    return run


def interleavings(world: Callable[[], tuple[Any, Tasks]]) -> Iterator[tuple[Any, Run]]:
    """Every schedule once: the world that it left, and the run. `DeadlockError` where one ends in nobody's turn."""
    choices: list[int] | None = []
    while choices is not None:
        made, tasks = world()
        width: list[int] = []
        run = execute(tasks, choices, width)
        choices += [0] * (len(width) - len(choices))
        yield made, run
        choices = _next(choices, width)


def _next(choices: list[int], width: list[int]) -> list[int] | None:
    for point in reversed(range(len(width))):
        if choices[point] + 1 < width[point]:
            return [*choices[:point], choices[point] + 1]
    return None


def until(steps: Steps[Any], number: int) -> bool:
    """Run a call to its yield `number` (the first is 0); False where it ends before."""
    for _ in range(number + 1):
        try:
            next(steps)
        except StopIteration:
            return False
    return True
