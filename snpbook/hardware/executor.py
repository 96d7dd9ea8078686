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

import numpy as np

from snpbook.hardware.core import GuestCore
from snpbook.hardware.dram import Bytes
from snpbook.hardware.exits import Exit, GuestException, Hlt, NotModelled, Shutdown
from snpbook.hardware.guest_cpu import GuestCpu, Program, ProgramFailure
from snpbook.hardware.intercepts import intercept_exception, is_behind
from snpbook.hardware.operations import Operation
from snpbook.hardware.requests import Requests

CYCLES_PER_OPERATION = 1000
"""How far the time-stamp counter moves with each operation of a guest (MODEL)."""


@dataclass(frozen=True, slots=True)
class Taken:
    """In the list of results: here a handler took an exception, or an injected event."""

    exception: GuestException
    event: bool = False
    cpl: int = 0
    """At which the interrupted code runs; a handler runs at 0."""


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
    a vector whose handler still runs, and was not interrupted by an event, is a double fault, which ends the vCPU
    (MODEL); so does a state that the model cannot run, such as paging without long mode.
    `levels` are executors of VMPLs that have a program of their own; at all others this one's runs.
    """

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.outcome: Any = None
        self.levels: dict[int, CoroutineExecutor] = {}
        self._program: Program | None = None
        self._cpu = GuestCpu()
        self._frames: list[_Frame] = []

    def __repr__(self) -> str:
        return f"CoroutineExecutor({'running' if self.busy else 'halted'}, {len(self.results)} results)"

    @property
    def busy(self) -> bool:
        return bool(self._frames)

    @property
    def following(self) -> Bytes:
        """What comes into the GHCB's shared buffer next (n, size), each as soon as the one before is done."""
        operation = self._frames[-1].pending if self._frames else None
        return operation.requests[1:] if isinstance(operation, Requests) else np.empty((0, 0), np.uint8)

    def answered(self, earlier: Bytes) -> None:
        """One exit has served several requests: the buffers of all but the last, which is in the page.

        `ValueError` for more than were to come.
        """
        operation = self._frames[-1].pending if self._frames else None
        if not isinstance(operation, Requests) or not 0 < len(earlier) < len(operation.requests):
            raise ValueError(f"{len(earlier)} requests answered: the program did not make so many")
        operation.earlier = earlier

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
        levels = {vmpl: level.snapshot() for vmpl, level in self.levels.items()}
        return self._program, tuple(self.results), pending, self.outcome, tuple(sorted(levels.items()))

    def restore(self, state: tuple[Any, ...]) -> None:
        """Stand where the executor of a snapshot stood, with a coroutine of its own."""
        program, results, pending, outcome, levels = state
        self.levels = {vmpl: CoroutineExecutor() for vmpl, _ in levels}
        for vmpl, held in levels:
            self.levels[vmpl].restore(held)
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
        level = self.levels.get(core.registers["vmpl"])
        if level is not None:
            return level.run(core)
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
        taken = Taken(core.event, event=True, cpl=core.registers["cpl"])
        return self._await(core) or (self._except(taken, core) if self._frames else None)

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
                stop = self._except(Taken(stop, cpl=core.registers["cpl"]), core)
            elif stop is None:
                self._answer(operation.value)
            elif is_behind(core, stop):
                operation.emulated(core)
                if operation.finished:
                    self._answer(operation.value)
            if stop is not None:
                return stop

    def _except(self, taken: Taken, core: GuestCore) -> Shutdown | None:
        """Hand an exception to its handler, or raise it out of the await."""
        exception = taken.exception
        if exception.vector not in self._cpu.handlers:
            self._answer(exception)
            return None
        if self._handles(exception.vector):
            self._frames = []
            return Shutdown(f"double fault: {exception} while its handler runs")
        self._take(taken)
        core.registers["cpl"] = 0
        return None

    def _handles(self, vector: int) -> bool:
        """Whether a handler of that vector runs, unless an event interrupted it."""
        for frame in reversed(self._frames):
            if frame.taken is None or frame.taken.exception.vector == vector:
                return frame.taken is not None
            if frame.taken.event:
                break
        return False

    def _take(self, taken: Taken) -> None:
        handler, below = self._cpu.handlers[taken.exception.vector], self._frames[-1].pending
        taken.exception.instruction, taken.exception.cpl = b"" if below is None else below.code, taken.cpl
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
                if frame.taken and core is not None:
                    core.registers["cpl"] = frame.taken.cpl
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
