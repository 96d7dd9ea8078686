"""Where the kernel may lose the processor: system calls as generators, and the mutexes between them.

A path of the kernel that others can cut into is a generator: each `yield` names the step that comes next, and there
another task may run first. Alone, a call runs to its end. A scheduler holds several and picks who goes on, so that
races and lock orders are tried one by one, without threads. Source: the lock and fault order of spec/03.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """What a path does next; with `lock` it goes on only when nobody holds that."""

    name: str
    lock: Mutex | None = None

    @property
    def blocked(self) -> bool:
        return self.lock is not None and self.lock.held


Steps = Generator[Step, None, T]


class Mutex:
    """A sleeping lock of the kernel: `with (yield from lock.hold()): ...`."""

    def __init__(self, name: str) -> None:
        self.name, self.held = name, False

    def __repr__(self) -> str:
        return f"Mutex({self.name}{', held' * self.held})"

    def hold(self) -> Steps[AbstractContextManager[None]]:
        """Wait until nobody holds it, then hold it until the block ends."""
        yield Step(f"lock {self.name}", self)
        while self.held:
            yield Step(f"wait for {self.name}", self)
        self.held = True
        return self._until_left()

    @contextmanager
    def _until_left(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.held = False


def finish(steps: Steps[T]) -> T:
    """Run a path to its end with nobody else running; `RuntimeError` where it would wait for ever."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if step.blocked:
            raise RuntimeError(f"deadlock: {step.name}, and nobody else runs")
