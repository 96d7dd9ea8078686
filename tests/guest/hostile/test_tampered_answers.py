"""A hostile host tampers with KVM's answers."""

from __future__ import annotations

import pytest

from snpbook.attacks import tamper_answers
from tests.guest.hostile.classes import family, is_right_or_stops


@pytest.mark.parametrize("name", family(tamper_answers))
def test_the_guest_is_right_or_stops(name: str) -> None:
    is_right_or_stops(name)
