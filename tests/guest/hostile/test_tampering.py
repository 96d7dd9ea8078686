"""A hostile host: whatever it does, the guest is right, ends for a documented reason, or gets no service.

Nothing that the guest alone decides is ever another value than with an honest host; no secret comes out; no number is
used for two messages.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from snpbook.attacks.tampering import TAMPERINGS
from tests.guest.hostile.world import attempts
from tests.sampling import ALL

CASES = 200 if ALL else 1
STOPS = {"0:0", "0:1", "0:2", "1:0", "1:1", "1:2", "1:5", "BootRefused", "ProgramFailure"}
"""Reason set and reason, as the GHCB specification and Linux number them; and what refuses to boot."""
ERRORS = {"EIO", "EBADMSG", "ETIMEDOUT", "ENOTTY"}


@pytest.mark.parametrize("name", list(TAMPERINGS))
def test_the_guest_is_right_or_stops(name: str) -> None:
    found = Counter(islice(attempts(name), CASES))
    bad = [outcome for outcome in found if not outcome.good]
    assert not bad, found
    assert found.total() == CASES
    assert {outcome.detail for outcome in found if outcome.kind == "stop"} <= STOPS
    assert {outcome.detail for outcome in found if outcome.kind == "errno"} <= ERRORS
