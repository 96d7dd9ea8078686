"""The executor of guest programs written as coroutines: where an `await` may lose the processor.

A program sees a `GuestCpu` only. It must depend on what its awaits returned or raised and on nothing
else: then the list of those results is its whole place, which RIP counts, and a fresh coroutine fed
with the list stands where the old one stood.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import Exit, GuestException, Hlt, NotModelled, Shutdown
from snpbook.hardware.guest_cpu import GuestCpu, Program, ProgramFailure
from snpbook.hardware.intercepts import intercept_exception, is_behind
from snpbook.hardware.operations import Operation

CYCLES_PER_OPERATION = 1000
"""How far the time-stamp counter moves with each operation of a guest (MODEL)."""


@dataclass(frozen=True, slots=True)
class Taken:
    """In the list of results: here a handler took an exception, or an injected event."""

    exception: GuestException
    event: bool = False


@dataclass(slots=True)
class _Frame:
    """A program, or a handler on top of one: what it awaits, or what it is handed next."""

    coroutine: Generator[Operation, Any, Any]
    taken: Taken | None = None
    pending: Operation | None = None
    answer: Any = None
    passed_on: GuestException | None = None
    """What a handler has this program meet in the place of its instruction."""


def _begin(make: Callable[..., Coroutine[Operation, Any, Any]], *arguments: Any) -> Generator[Operation, Any, Any]:
    """A coroutine made when it is first run: one that never runs is none that was never awaited."""
    return (yield from make(*arguments).__await__())


class CoroutineExecutor:
    """Runs one program after the other on one vCPU; `outcome` is the last one's return value or `ProgramFailure`.

    An exception is raised out of the await, or taken by the handler that the program has installed. A second one of
    a vector whose handler still runs is a double fault, which ends the vCPU (MODEL); so does a state that the model
    cannot run, such as paging without long mode.
    """

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.outcome: Any = None
        self._program: Program | None = None
        self._cpu = GuestCpu()
        self._frames: list[_Frame] = []

    def __repr__(self) -> str:
        return f"CoroutineExecutor({'running' if self.busy else 'halted'}, {len(self.results)} results)"

    @property
    def busy(self) -> bool:
        return bool(self._frames)

    def start(self, program: Program, results: Sequence[Any] = ()) -> None:
        """Load a program, at the place to which `results` of an earlier run lead: the machine is not touched.

        An operation that had stopped in the middle begins anew; `restore` keeps its progress. `RuntimeError` while
        another program runs.
        """
        if self._frames:
            raise RuntimeError("the vCPU still runs a program: run it to its end first")
        self._program, self._cpu, self.results, self.outcome = program, GuestCpu(), [], None
        self._frames = [_Frame(_begin(program, self._cpu))]
        for result in results:
            self._await()
            if isinstance(result, Taken):
                self._take(result)
            else:
                self._answer(result)

    def snapshot(self) -> tuple[Any, ...]:
        """Program, results, and how far each operation is that has stopped in the middle: what `restore` takes."""
        pending = tuple(deepcopy(frame.pending) for frame in self._frames)
        return self._program, tuple(self.results), pending, self.outcome

    def restore(self, state: tuple[Any, ...]) -> None:
        """Stand where the executor of a snapshot stood, with a coroutine of its own."""
        program, results, pending, outcome = state
        self._frames = []
        if pending:
            self.start(program, results)
            if pending[-1] is not None:
                self._await()
            for frame, operation in zip(self._frames, pending, strict=True):
                frame.pending = deepcopy(operation)
        self._program, self.results, self.outcome = program, list(results), outcome

    def run(self, core: GuestCore) -> Exit:
        """Run to the next exit, an event of the core first. A finished program leaves the vCPU halted.

        After a nested page fault the same operation goes on. Without SEV-ES the hypervisor that has emulated an
        intercepted instruction moves RIP behind it.
        """
        if not self._frames:
            return Hlt()
        frame = self._frames[-1]
        if frame.pending is not None and core.registers["rip"] == len(self.results) + 1:
            frame.pending.emulated(core)
        exit_ = self._deliver(core) or self._run(core)
        core.registers["rip"] = len(self.results)
        return exit_

    def _deliver(self, core: GuestCore) -> Exit | None:
        """The event that came with the entry, between two instructions."""
        if core.event is None:
            return None
        return self._await(core) or (self._except(Taken(core.event, event=True)) if self._frames else None)

    def _run(self, core: GuestCore) -> Exit:
        while True:
            unhandled = self._await(core)
            if unhandled is not None:
                return unhandled
            if not self._frames:
                return Hlt()
            operation = self._frames[-1].pending
            assert operation is not None
            core.machine.tsc += CYCLES_PER_OPERATION
            try:
                passed_on, self._frames[-1].passed_on = self._frames[-1].passed_on, None
                stop = passed_on or operation.step(core)
            except NotModelled as refused:
                self._frames = []
                return Shutdown(str(refused))
            if isinstance(stop, GuestException):
                stop = intercept_exception(core, stop)
            if isinstance(stop, GuestException):
                stop = self._except(Taken(stop))
            elif stop is None:
                self._answer(operation.value)
            elif is_behind(core, stop):
                operation.emulated(core)
                if operation.finished:
                    self._answer(operation.value)
            if stop is not None:
                return stop

    def _except(self, taken: Taken) -> Shutdown | None:
        """Hand an exception to its handler, or raise it out of the await."""
        exception = taken.exception
        if exception.vector not in self._cpu.handlers:
            self._answer(exception)
            return None
        if any(frame.taken and frame.taken.exception.vector == exception.vector for frame in self._frames):
            self._frames = []
            return Shutdown(f"double fault: {exception} while its handler runs")
        self._take(taken)
        return None

    def _take(self, taken: Taken) -> None:
        handler, below = self._cpu.handlers[taken.exception.vector], self._frames[-1].pending
        taken.exception.instruction = b"" if below is None else below.code
        self._frames.append(_Frame(_begin(handler, self._cpu, taken.exception), taken))
        self.results.append(taken)

    def _answer(self, result: Any) -> None:
        """The result of what the uppermost frame awaits: the next thing that its coroutine is handed."""
        self.results.append(result)
        self._frames[-1].pending, self._frames[-1].answer = None, result

    def _await(self, core: GuestCore | None = None) -> Shutdown | None:
        """Run coroutines until one awaits something or all have ended. Without a core: on the way to an old place."""
        while self._frames and self._frames[-1].pending is None:
            frames, self._frames = self._frames, []
            frame = frames[-1]
            try:
                if isinstance(frame.answer, GuestException):
                    frame.pending = frame.coroutine.throw(frame.answer)
                else:
                    frame.pending = frame.coroutine.send(frame.answer)
            except StopIteration as end:
                frames.pop()
                if not frames:
                    self.outcome = end.value
                elif end.value and frame.taken and not frame.taken.event and core is not None:
                    below = frames[-1]
                    assert below.pending is not None
                    if isinstance(end.value, GuestException):
                        below.passed_on = end.value
                    else:
                        below.pending.emulated(core)
            except ProgramFailure as failure:
                self.outcome, frames = failure, []
            except GuestException as unhandled:
                return Shutdown(f"unhandled exception: {unhandled}")
            self._frames = frames
        return None
