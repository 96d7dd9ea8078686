"""A hostile host tampers with pages."""

from __future__ import annotations

import pytest

from snpbook.attacks import tamper_pages
from tests.guest.hostile.classes import family, is_right_or_stops


@pytest.mark.parametrize("name", family(tamper_pages))
def test_the_guest_is_right_or_stops(name: str) -> None:
    is_right_or_stops(name)
