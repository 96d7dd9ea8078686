"""With each of the guest's checks taken out, the same host gets it to a wrong value; or the check is redundant."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import pytest

from snpbook.attacks.tampering import TAMPERINGS
from snpbook.exercises.missing_checks import CHECKS, replaced
from tests.guest.hostile.scenes import SCENES
from tests.guest.hostile.world import ERAS, SCENES_OF, Outcome, attempts, judged
from tests.sampling import ALL, sampled

FOUND = [name for name, check in CHECKS.items() if check.found_by]
REDUNDANT = [name for name, check in CHECKS.items() if not check.found_by]
KNOWN: dict[str, tuple[str, int]] = {
    "instruction of an exit code": ("#VC injected", 132),
    "pages that are not validated": ("pages remapped", 0),
    "MMIO only where memory is shared": ("pages as devices", 26),
    "bits of CPUID that are the hypervisor's": ("registers", 1),
    "DR7 is the guest's own": ("registers", 1),
    "nothing of MONITOR goes out": ("registers", 1),
    "size of a port": ("registers", 1),
    "length of a string": ("counts", 36),
    "exceptions that an answer may raise": ("exception answers", 30),
    "exceptions only for instructions": ("exception answers", 12),
    "where the GHCB is": ("MSR pointed", 3),
    "carry of PVALIDATE": ("validated twice", 0),
    "hash of what is booted": ("shared memory", 68),
    "the copy that is hashed": ("between check and use", 132),
    "length of a mapping": ("shared memory", 49),
    "tag of an answer": ("message bits", 3),
}
"""Attempts that find it, so that they need not be looked for again: class and seed."""
FAILED = ("wrong", "leak", "nonce", "undocumented")
TRIES = 400


def one(name: str, seed: int) -> Outcome:
    scenes = SCENES_OF.get(name, tuple(SCENES))
    return judged(scenes[seed % len(scenes)], ERAS[seed // len(scenes) % 2], name, seed)[0]


def tries(check: str) -> Iterator[tuple[str, int]]:
    """Classes and seeds to try: what is known to find it, then all."""
    if check in KNOWN:
        yield KNOWN[check]
    yield from islice(((name, seed) for seed in count() for name in CHECKS[check].found_by), TRIES)


@pytest.mark.parametrize("check", sampled(FOUND, 8))
def test_its_absence_is_found(check: str) -> None:
    for name, seed in tries(check):
        with CHECKS[check].removed():
            without = one(name, seed)
        if without.kind in FAILED:
            break
    else:
        pytest.fail(f"nothing found in {TRIES} attempts")
    assert one(name, seed).good, "with the check it is right"


@pytest.mark.parametrize("check", sampled(REDUNDANT, 2))
def test_its_absence_changes_nothing(check: str) -> None:
    with CHECKS[check].removed():
        for name in TAMPERINGS if ALL else sampled(TAMPERINGS, 3):
            for outcome in islice(attempts(name), 6 if ALL else 1):
                assert outcome.kind not in FAILED, (name, outcome)


def test_there_are_a_dozen() -> None:
    assert len(FOUND) >= 12
    assert all(set(check.found_by) <= TAMPERINGS.keys() for check in CHECKS.values())


def test_a_place_that_is_none() -> None:
    with pytest.raises(ValueError, match="0 places"), replaced(CHECKS["tag of an answer"].function, "not there", ""):
        pass


def test_the_function_is_as_it_was_afterwards() -> None:
    function = CHECKS["carry of PVALIDATE"].function
    before = function.__code__
    with replaced(function, "(codes != RmpCode.SUCCESS) | unchanged", "mine(codes)", mine=lambda codes: codes != codes):
        assert function.__code__ is not before
    assert function.__code__ is before
    assert "mine" not in function.__globals__
