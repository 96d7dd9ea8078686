"""The seat of the VMM: exits as KVM reports them, refusals as the kernel has them, and guests that come to an end."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.exercises import vmm_seat
from snpbook.exercises.private_memory import OMISSIONS, STORIES, meant, on_exit
from snpbook.exercises.vmm_seat import PLACE, Run, Story, told


def seen(story: Story) -> list[str]:
    exits: list[str] = []

    def watching(run: Run) -> None:
        exits.append(repr(run))
        on_exit(run)

    assert told(watching, story)
    return exits


def test_a_fault_and_a_request_say_the_same_in_two_ways() -> None:
    assert seen(Story(vmm_seat.by_use)) == ["MEMORY_FAULT: gpa 0x500000, size 4096, flags 8"]
    assert seen(Story(vmm_seat.on_request)) == ["HYPERCALL: nr 12, args 0x500000, 0x1, 0x10, 0x0, 0x0, 0x0"]
    there, back = seen(Story(vmm_seat.there_and_back))[1:]
    assert there.split(", ")[3:4] == ["0x0"]
    assert back.split(", ")[3:4] == ["0x10"]


def test_the_other_way_has_no_flag() -> None:
    assert seen(Story(vmm_seat.shared_by_use))[-1] == "MEMORY_FAULT: gpa 0x501000, size 4096, flags 0"


def test_one_request_may_be_for_many_pages() -> None:
    there, back = seen(Story(vmm_seat.eight_shared))[-2:]
    assert there == "HYPERCALL: nr 12, args 0x500000, 0x8, 0x10, 0x0, 0x0, 0x0"
    assert back == "HYPERCALL: nr 12, args 0x500000, 0x8, 0x0, 0x0, 0x0, 0x0"


def test_whoever_tries_again_is_refused_again() -> None:
    """A VMM may repeat a call that failed before it tells the guest: it ends as without that."""

    def patient(run: Run) -> None:
        for _ in range(3):
            try:
                return on_exit(run)
            except OSError as error:
                refusal = error
        raise refusal

    for name, (story, _) in STORIES.items():
        assert told(patient, story) == meant(name)


@pytest.mark.parametrize(
    ("forgotten", "stories"), [("the attribute", 6), ("the hole", 3), ("to discard", 5), ("the order", 1)]
)
def test_what_is_forgotten_shows(forgotten: str, stories: int) -> None:
    changed = [name for name, (story, _) in STORIES.items() if told(OMISSIONS[forgotten], story) != meant(name)]
    assert len(changed) == stories


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.set_attributes(PLACE, 100, 8), "is ended by the VMM: EINVAL"),
        (lambda run: run.set_attributes(PLACE, 4096, 3), "is ended by the VMM: EINVAL"),
        (lambda run: run.punch(PLACE + 1, 4096), "is ended by the VMM: EINVAL"),
        (lambda run: run.punch(1 << 40, 4096), "is ended by the VMM: EINVAL"),
    ],
)
def test_the_kernel_refuses_bad_calls(call: Any, words: str) -> None:
    outcome = told(call, Story(vmm_seat.by_use))
    assert outcome
    assert words in str(outcome["the guest"])


def test_whoever_does_nothing_is_not_judged() -> None:
    exits: list[Run] = []
    assert told(exits.append, Story(vmm_seat.by_use)) is None
    assert len(exits) == 8


def test_an_error_of_the_readers_function_comes_through_and_leaves_the_seat_free() -> None:
    def broken(run: Run) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        told(broken, Story(vmm_seat.by_use))
    assert told(on_exit, Story(vmm_seat.by_use))
