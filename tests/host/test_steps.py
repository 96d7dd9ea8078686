"""Mutexes and steps: who waits, who goes on, and what is told where nobody could."""

from __future__ import annotations

import pytest

from snpbook.host.refusal import KernelError
from snpbook.host.steps import Mutex, Step, Steps, finish
from tests.host.scheduler import DeadlockError, interleavings


def path(log: list[str], name: str, *locks: Mutex) -> Steps[str]:
    """Take locks one inside the other, and let them go again."""
    if not locks:
        log.append(name)
        yield Step("inside")
        return name
    with (yield from locks[0].hold()):
        return (yield from path(log, name, *locks[1:]))


def test_a_path_alone_runs_to_its_end() -> None:
    one, two, log = Mutex("one"), Mutex("two"), list[str]()
    assert finish(path(log, "alone", one, two)) == "alone"
    assert log == ["alone"]
    assert not one.held
    assert not two.held


def test_a_lock_that_is_held_is_a_deadlock_where_nobody_else_runs() -> None:
    lock, log = Mutex("kvm->lock"), list[str]()
    with pytest.raises(RuntimeError, match="deadlock: lock kvm->lock"):
        finish(path(log, "twice", lock, lock))
    assert log == []
    assert not lock.held, "what was held is let go as the path ends"
    other = path(log, "first", lock)
    steps = [next(other).name, next(other).name]
    assert steps == ["lock kvm->lock", "inside"]
    assert lock.held
    with pytest.raises(RuntimeError, match="deadlock"):
        finish(path(log, "second", lock))
    assert finish(other) == "first"
    assert finish(path(log, "second", lock)) == "second"


def test_an_error_and_an_abandoned_path_let_go() -> None:
    lock = Mutex("lock")

    def failing() -> Steps[None]:
        with (yield from lock.hold()):
            yield Step("before")
            raise KernelError(5, "inside")

    with pytest.raises(KernelError):
        finish(failing())
    assert not lock.held
    steps = failing()
    next(steps)
    next(steps)
    assert lock.held
    steps.close()
    assert not lock.held


def test_a_step_is_blocked_while_its_lock_is_held() -> None:
    lock = Mutex("lock")
    step = Step("lock lock", lock)
    assert not Step("free").blocked
    assert not step.blocked
    lock.held = True
    assert step.blocked
    assert repr(lock) == "Mutex(lock, held)"


def test_one_at_a_time_in_every_order() -> None:
    inside: list[str] = []

    def world() -> tuple[list[str], list[Steps[str]]]:
        lock, log = Mutex("lock"), list[str]()

        def critical(name: str) -> Steps[str]:
            with (yield from lock.hold()):
                assert not inside
                inside.append(name)
                yield Step("inside")
                inside.remove(name)
                log.append(name)
            return name

        return log, [critical("a"), critical("b"), critical("c")]

    orders = {tuple(log) for log, _ in interleavings(world)}
    assert len(orders) == 6
    assert not inside


def test_crossed_locks_deadlock_in_some_order() -> None:
    def world() -> tuple[None, list[Steps[str]]]:
        one, two, log = Mutex("one"), Mutex("two"), list[str]()
        return None, [path(log, "a", one, two), path(log, "b", two, one)]

    with pytest.raises(DeadlockError):
        list(interleavings(world))

    def ordered() -> tuple[None, list[Steps[str]]]:
        one, two, log = Mutex("one"), Mutex("two"), list[str]()
        return None, [path(log, "a", one, two), path(log, "b", one, two)]

    assert {run.outcome for _, run in interleavings(ordered)} == {("a", "b")}
