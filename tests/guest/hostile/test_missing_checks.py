"""With each of the guest's checks taken out, the same host gets it to a wrong value; or the check is redundant."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count, islice

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.attacks.tampering import TAMPERINGS
from snpbook.exercises.missing_checks import CHECKS, replaced
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import MsrCode
from tests.guest.hostile.world import attempts, judged
from tests.machines import booted, launched
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
    "save area taken back": ("processors", 27),
    "number counted before the message": ("certificates", 4),
}
"""Attempts that find it, so that they need not be looked for again: class and seed."""
FAILED = ("wrong", "leak", "nonce", "undocumented")
TRIES = 400


def tries(check: str) -> Iterator[tuple[str, int]]:
    """Classes and seeds to try: what is known to find it, then all."""
    if check in KNOWN:
        yield KNOWN[check]
    yield from islice(((name, seed) for seed in count() for name in CHECKS[check].found_by), TRIES)


@pytest.mark.parametrize("check", sampled(FOUND, 7))
def test_its_absence_is_found(check: str) -> None:
    for name, seed in tries(check):
        with CHECKS[check].removed():
            without = judged(name, seed)[0]
        if without.kind in FAILED:
            break
    else:
        pytest.fail(f"nothing found in {TRIES} attempts")
    assert judged(name, seed)[0].good, "with the check it is right"


@pytest.mark.parametrize("check", sampled(REDUNDANT, 2))
def test_its_absence_changes_nothing(check: str) -> None:
    with CHECKS[check].removed():
        for name in TAMPERINGS if ALL else sampled(TAMPERINGS, 2):
            for outcome in islice(attempts(name), 6 if ALL else 1):
                assert outcome.kind not in FAILED, (name, outcome)


PAIRS: dict[tuple[str, str], tuple[str, int]] = {
    ("number, type and version of an answer", "tag of an answer"): ("message replayed", 0),
    ("key wiped after a failure", "number counted before the message"): ("message refused", 0),
}
"""Checks that stop the same lie: with an attempt that is found where neither is there."""


@pytest.mark.parametrize("pair", sampled(PAIRS, 1))
def test_one_check_does_the_work_of_another(pair: tuple[str, str]) -> None:
    first, second = (CHECKS[name].removed() for name in pair)
    with first:
        assert judged(*PAIRS[pair])[0].good, "the second stops it"
        with second:
            assert judged(*PAIRS[pair])[0].kind in FAILED
    with CHECKS[pair[1]].removed():
        assert judged(*PAIRS[pair])[0].good, "the first stops it"


ENCRYPTION = ("CPUID that denies SEV", "the bit that encrypts")


@pytest.mark.parametrize(
    ("missing", "register", "value", "clear"),
    [(ENCRYPTION[:1], 0, 0, False), (ENCRYPTION, 0, 0, False), (ENCRYPTION[:1], 1, 55, False),
     (ENCRYPTION[1:], 1, 55, True)],
)  # fmt: skip
def test_a_guest_with_sev_es_and_its_memory_in_the_clear(
    missing: tuple[str, ...], register: int, value: int, clear: bool
) -> None:
    """Leaf 8000_001F, which no firmware has checked here: EAX denies SEV, or EBX names another bit.

    A guest that believes in no SEV has no GHCB either, and ends at its first #VC.
    """
    guest = launched(booted(era="mainline"), memory="12 MiB", kind="sev-es")

    def lie(m: Moment) -> None:
        asked = m.value >> 32, m.value >> 30 & 3, m.code
        if m.stage is Stage.ENTRY and asked == (0x8000001F, register, MsrCode.CPUID_REQUEST):
            m.answer_msr(value << 32 | register << 30 | 5)

    async def keep(cpu: GuestCpu) -> None:
        await cpu.write(0x300000, b"a secret")

    tamper(guest, lie)
    with ExitStack() as without, suppress(RuntimeError):
        for check in missing:
            without.enter_context(CHECKS[check].removed())
        guest.boot()
        guest.run(keep)
    assert (guest.vmm.read(0x300000, 8) == b"a secret") == clear


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
