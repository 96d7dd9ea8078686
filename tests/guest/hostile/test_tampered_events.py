"""A hostile host tampers with events and intercepts."""

from __future__ import annotations

import pytest

from snpbook.attacks import tamper_answers, tamper_events, tamper_messages, tamper_pages
from snpbook.attacks.tampering import TAMPERINGS
from tests.guest.hostile.classes import family, is_right_or_stops


@pytest.mark.parametrize("name", family(tamper_events))
def test_the_guest_is_right_or_stops(name: str) -> None:
    is_right_or_stops(name)


def test_every_class_has_a_family() -> None:
    families = [tamper_answers, tamper_events, tamper_messages, tamper_pages]
    assert sorted(name for actions in families for name in family(actions)) == sorted(TAMPERINGS)
