"""What is asked of every class of a host's actions: the guest is right, stops for a documented reason, or waits.

Nothing that the guest alone decides is ever another value than with an honest host; no secret comes out; no number is
used for two messages. Classes are in families, one to a file of tests, by the module that has their actions.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from types import ModuleType

from snpbook.attacks.tampering import TAMPERINGS
from tests.guest.hostile.world import attempts
from tests.sampling import ALL

CASES = 200 if ALL else 1
STOPS = {"0:0", "0:1", "0:2", "1:0", "1:1", "1:2", "1:5", "BootRefused", "ProgramFailure"}
"""Reason set and reason, as the GHCB specification and Linux number them; and what refuses to boot."""
ERRORS = {"EIO", "EBADMSG", "ETIMEDOUT", "ENOTTY"}


def family(actions: ModuleType) -> list[str]:
    """The classes whose actions stand in a module."""
    return [name for name, tampering in TAMPERINGS.items() if tampering.act.__module__ == actions.__name__]


def is_right_or_stops(name: str) -> None:
    """Let the host try a class `CASES` times."""
    found = Counter(islice(attempts(name), CASES))
    bad = [outcome for outcome in found if not outcome.good]
    assert not bad, found
    assert found.total() == CASES
    assert {outcome.detail for outcome in found if outcome.kind == "stop"} <= STOPS
    assert {outcome.detail for outcome in found if outcome.kind == "errno"} <= ERRORS
