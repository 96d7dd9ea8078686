"""Every refusal has a reason: on random orders the check that is named has the answer's code and really fails."""

import numpy as np
import pytest

from snpbook.hardware.attempts import GUEST_INSTRUCTIONS, Answer, Order, attempt
from snpbook.hardware.exits import InvalidOpcode
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.hardware.workbench import PLAY, Workbench
from snpbook.spec.pages import VmplPermission
from snpbook.trace import Instruction, Recorder
from tests.sampling import sampled

P = PLAY.start
SIZE = 512
TIMES = "\u00d7"
SUBPAGES = 0x1FF << 3


def unlike(answer: Answer) -> int:
    """The bits in which the page's entry, both words, has changed."""
    (low, high), (old_low, old_high) = answer.after, answer.before
    return (low ^ old_low) | (high ^ old_high) << 64


def order(rng: np.random.Generator, instructions: list[str]) -> Order:
    first = P + int(rng.choice([0, 1, 5, 511, SIZE, SIZE + 1]))
    pages = range(first, min(first + int(rng.integers(1, 4)), PLAY.stop))
    new = [
        HYPERVISOR, FIRMWARE, NewState(True, 1), NewState(True, 2, immutable=True), NewState(True, 1, large=True),
        NewState(False, 0, immutable=True), NewState(False, 0, large=True),
    ][rng.integers(7)]  # fmt: skip
    return Order(
        str(rng.choice(instructions)), pages, 0x200 + int(rng.choice([0, 1, 5, 511, SIZE])), new,
        int(rng.integers(1, 3)), int(rng.choice([0, 0, 1])), bool(rng.integers(2)), bool(rng.integers(4)),
        int(rng.integers(5)), VmplPermission(int(rng.integers(16))), bool(rng.integers(2)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", sampled(range(40), 6))
def test_every_refusal_on_random_orders_has_its_reason(seed: int) -> None:
    rng, bench, log = np.random.default_rng(seed), Workbench("turin"), Recorder()
    bench.guest(1), bench.guest(2)
    bench.trace.subscribe(log)
    seen = set()
    for number in range(60):
        if number % 20 == 19:
            bench.machine.in_use = {P + int(rng.integers(4))}
        given = order(rng, ["RMPUPDATE", "RMPUPDATE", "PSMASH", "RMPREAD", *GUEST_INSTRUCTIONS, "PVALIDATE"])
        made = attempt(bench, given)
        assert [answer.page for answer in made.answers] == list(given.steps)
        for answer in made.answers:
            seen.add((given.instruction, answer.code))
            assert (answer.reason is None) == (answer.code in {"SUCCESS", "not reached"}), (given, answer)
            if answer.reason is not None:
                assert unlike(answer) & ~SUBPAGES == 0, "a refusal changes nothing but a count of neighbours"
                assert answer.reason.expected != answer.reason.found, answer.reason
                assert answer.reason.cite
    assert len(seen) > 10, seen
    assert len(log.of(Instruction)) > 20


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (Order("RMPUPDATE", range(P + 1, P + 2), 0, NewState(True, 1, large=True)), "FAIL_INPUT", "multiple of 2 MB"),
        (Order("RMPUPDATE", range(P, P + 1), 0, NewState(False, 0, immutable=True)), "FAIL_INPUT", "has no ASID"),
        (Order("RMPUPDATE", range(P + 7, P + 8), 0, HYPERVISOR), "FAIL_PERMISSION", "only the firmware"),
        (Order("RMPUPDATE", range(P + 5, P + 6), 0, HYPERVISOR), "FAIL_INUSE", "in use"),
        (Order("RMPUPDATE", range(P, P + 1), 0, NewState(True, 1, large=True)), "FAIL_OVERLAP", "no 4 KB page"),
        (Order("RMPUPDATE", range(P + 515, P + 516), 9, NewState(True, 1)), "FAIL_OVERLAP", "inside a 2 MB entry"),
        (Order("PSMASH", range(P, P + 1)), "FAIL_BADADDR", "only an assigned 2 MB entry"),
        (Order("PVALIDATE", range(P + 2, P + 3), 0x12, asid=2), "#NPF", "Guest-Owned"),
        (Order("PVALIDATE", range(P + 2, P + 3), 0x99, asid=1), "#NPF", "Reverse-Map"),
        (Order("PVALIDATE", range(P + 7, P + 8), 0x17, asid=1), "#NPF", "Mutable"),
        (Order("PVALIDATE", range(P + 515, P + 516), 0x203, asid=1), "#NPF", "Page-Size"),
        (Order("PVALIDATE", range(P, P + 1), 0x400, asid=1, large=True), "#NPF", "Guest-Owned"),
        (Order("RMPADJUST", range(P + 2, P + 3), 0x12, asid=1), "#VC", "Validated"),
        (Order("RMPADJUST", range(P + 1, P + 2), 0x11, asid=1, target=0), "FAIL_PERMISSION", "less privileged"),
        (Order("RMPADJUST", range(P + 1, P + 2), 0x11, asid=1, target=4), "FAIL_INPUT", "exists"),
        (Order("RMPADJUST", range(P + 1, P + 2), 0x11, asid=1, vmpl=1, target=2, rights=VmplPermission.WRITE),
         "FAIL_PERMISSION", "does not hold itself"),
        (Order("RMPQUERY", range(P + 1, P + 2), 0x11, asid=1, target=0), "FAIL_PERMISSION", "less privileged"),
        (Order("PVALIDATE", range(P + 1, P + 2), 0x11, asid=1, vmpl=1), "#GP", "VMPL0"),
    ],
)  # fmt: skip
def test_named_refusals(given: Order, code: str, words: str) -> None:
    bench = Workbench("genoa")
    for page, gfn, new in [
        (P + 1, 0x11, NewState(True, 1)), (P + 2, 0x12, NewState(True, 1)), (P + 5, 0x15, NewState(True, 1)),
        (P + 7, 0x17, NewState(True, 1, immutable=True)), (P + SIZE, 0x200, NewState(True, 1, large=True)),
    ]:  # fmt: skip
        assert attempt(bench, Order("RMPUPDATE", range(page, page + 1), gfn, new)).answers[0].ok
    assert attempt(bench, Order("PVALIDATE", range(P + 1, P + 2), 0x11, asid=1)).answers[0].ok
    read = VmplPermission.READ
    assert attempt(bench, Order("RMPADJUST", range(P + 1, P + 2), 0x11, asid=1, rights=read)).answers[0].ok
    if code == "FAIL_INUSE":
        bench.machine.in_use.add(P + 5)
    (answer,) = attempt(bench, given).answers
    assert answer.code == code
    assert answer.reason is not None
    assert words in answer.reason.name


def test_a_fault_stops_the_run() -> None:
    bench = Workbench()
    attempt(bench, Order("RMPUPDATE", range(P, P + 2), 0x10, NewState(True, 1)))
    made = attempt(bench, Order("PVALIDATE", range(P, P + 4), 0x10, asid=1))
    assert [answer.code for answer in made.answers] == ["SUCCESS", "SUCCESS", "#NPF", "not reached"]
    assert repr(made) == f"PVALIDATE by guest 1 at VMPL0: SUCCESS {TIMES} 2, #NPF {TIMES} 1, not reached {TIMES} 1"
    assert made.refused is made.answers[2]
    again = attempt(bench, Order("PVALIDATE", range(P, P + 2), 0x10, asid=1))
    assert [answer.detail for answer in again.answers] == ["CF = 1", "CF = 1"]


def test_an_instruction_that_the_product_lacks() -> None:
    with pytest.raises(InvalidOpcode, match="RMPREAD"):
        attempt(Workbench("milan"), Order("RMPREAD", range(P, P + 1)))


def test_what_rmpread_and_rmpquery_tell() -> None:
    bench = Workbench("turin")
    attempt(bench, Order("RMPUPDATE", range(P, P + 1), 0x10, NewState(True, 1)))
    attempt(bench, Order("PVALIDATE", range(P, P + 1), 0x10, asid=1))
    read = attempt(bench, Order("RMPREAD", range(P, P + 2))).answers
    assert [answer.detail for answer in read] == [
        "4 KB page, assigned to ASID 1, GPA 0x10000", "4 KB page, not assigned, GPA 0x0",
    ]  # fmt: skip
    asked = attempt(bench, Order("RMPQUERY", range(P, P + 1), 0x10, asid=1, target=2)).answers
    assert asked[0].detail == "VMPL2: nothing"
