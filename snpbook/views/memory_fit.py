"""How many guests fit on a host: each regime's guess beside what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snpbook.attest.checks import Result
from snpbook.regimes.fit import Fit
from snpbook.spec.pages import PAGE_SIZE
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import table

_WAITING = "Guess first: how many guests fit?"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Guess:
    """What somebody thought, and how the host filled up: at least the last value of `filling`."""

    guests: int
    found: Sequence[Fit]


def fits(guesses: Mapping[str, Guess]) -> Static:
    """One row for each regime that was guessed at; an invitation before the first."""
    if not guesses:
        return Static(_WAITING, f"<p>{_WAITING}</p>")
    head = ["regime", "guess", "guests that fit", "memory for each", "what the next one meets"]
    rows = []
    for regime, guess in guesses.items():
        last = guess.found[-1]
        right = guess.guests == last.guests
        verdict = mark(Result.PASSED, str(guess.guests)) if right else mark(Result.FAILED, str(guess.guests))
        rows.append((regime, verdict, str(last.guests), _each(guess.found), last.refused))
    return table("Guests on one host", head, rows)


def _each(found: Sequence[Fit]) -> str:
    """What one more guest takes of the free memory, on the average; empty for fewer than two."""
    running = [fit for fit in found if not fit.refused]
    if len(running) < 2:
        return ""
    pages = (running[0].free - running[-1].free) / (len(running) - 1)
    return f"{pages * PAGE_SIZE / _MIB:.1f} MiB"
