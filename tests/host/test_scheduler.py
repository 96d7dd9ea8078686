"""The scheduler of the tests finds every order once, and deadlocks where there are some."""

from math import comb

import pytest

from snpbook.host.steps import Mutex, Step, Steps
from tests.host.scheduler import DeadlockError, execute, interleavings


def count_to(number: int, log: list[int]) -> Steps[int]:
    for _ in range(number - 1):
        yield Step("count")
        log.append(number)
    return number


@pytest.mark.parametrize(("one", "two"), [(1, 1), (2, 3), (4, 4)])
def test_every_order_once(one: int, two: int) -> None:
    runs = [tuple(run.order) for _, run in interleavings(lambda: (None, [count_to(one, []), count_to(two, [])]))]
    assert len(set(runs)) == len(runs) == comb(one + two, one)


def both(first: Mutex, second: Mutex) -> Steps[int]:
    with (yield from first.hold()), (yield from second.hold()):
        yield Step("inside")
    return 0


def test_two_locks_in_two_orders() -> None:
    def world(crossed: bool) -> tuple[tuple[Mutex, Mutex], list[Steps[int]]]:
        one, two = Mutex("one"), Mutex("two")
        return (one, two), [both(one, two), both(two, one) if crossed else both(one, two)]

    for _, run in interleavings(lambda: world(False)):
        assert run.outcome == (0, 0)
        inside = [step for step in run.steps if step.endswith("inside")]
        assert len(inside) == 2
    with pytest.raises(DeadlockError, match="lock two"):
        list(interleavings(lambda: world(True)))


def test_a_schedule_is_repeated() -> None:
    locks = Mutex("one"), Mutex("two")
    orders = [execute([both(*locks), both(*locks)], [1, 0, 1]).steps for _ in range(2)]
    assert orders[0] == orders[1]
