"""Rows of the specification's tables: checks in their order, how to fail each, and what the firmware answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.status import Status
from tests.machines import Board, World


@dataclass(frozen=True)
class Attempt:
    """A command about to be issued on a board."""

    board: Board
    command: Command
    fields: dict[str, Any] = field(default_factory=dict)
    stray: tuple[int, ...] = ()

    def issue(self) -> Status:
        return self.board.command(self.command, self.stray, **self.fields)


@dataclass(frozen=True)
class Row:
    """One check: the options of a builder that make it fail, and the status."""

    name: str
    status: Status
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} -> {self.status:02X}"


def single(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """Each row alone."""
    return pytest.mark.parametrize("row", rows, ids=str)


def double(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """Two rows at once, the earlier first, wherever they spoil different things and answer differently."""
    pairs = [
        pytest.param(a, b, id=f"{a} before {b}")
        for a, b in combinations(rows, 2)
        if a.options.keys().isdisjoint(b.options) and a.status is not b.status
    ]
    return pytest.mark.parametrize(("first", "second"), pairs)


def assert_refused(attempt: Attempt, status: Status) -> None:
    """The command answers `status` and nothing at all has changed."""
    layout = BUFFERS[attempt.command]
    address = attempt.board.put(layout, attempt.stray, **attempt.fields)
    before = World.of(attempt.board)
    assert attempt.board.send(attempt.command, address) is status, attempt.board.log.events[-1]
    assert World.of(attempt.board) == before


PLACES = {"rmp": 47 << 20, "tseg": 50 << 20, "aseg": 0xA0000, "hole": 1 << 30, "limit": 0x3FFD00000000}
"""Addresses on a board of 64 MiB at which nobody's page lies."""


def lookup_rows(option: str) -> list[Row]:
    """How the look-up of a page's state fails, by its address."""
    return [
        Row(f"{option} in the RMP", Status.INVALID_PARAM, {option: PLACES["rmp"]}),
        Row(f"{option} above the limit", Status.INVALID_ADDRESS, {option: PLACES["limit"]}),
        Row(f"{option} in TSEG", Status.INVALID_ADDRESS, {option: PLACES["tseg"]}),
        Row(f"{option} in ASEG", Status.INVALID_ADDRESS, {option: PLACES["aseg"]}),
        Row(f"{option} in no DRAM", Status.INVALID_CONFIG, {option: PLACES["hole"]}),
    ]
