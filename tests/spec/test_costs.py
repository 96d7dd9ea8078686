"""Costs: every kind of work that the ledger counts has one, with a source or the word that it has none."""

from __future__ import annotations

from dataclasses import fields

import pytest

from snpbook.host.ledger import Work
from snpbook.spec.costs import costs


def test_each_count_of_the_ledger_has_a_cost() -> None:
    assert {field.name for field in fields(Work)} <= set(costs())


def test_what_is_not_published_says_so() -> None:
    assert [name for name, cost in costs().items() if not cost.illustrative] == ["create_vm"]
    assert costs()["psmashes"].axis == "time for psmashes in seconds (illustrative)"


def test_a_time_is_a_count_times_a_cost() -> None:
    assert costs()["rmpupdates"].seconds(3_000_000) == pytest.approx(3)
