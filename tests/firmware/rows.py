"""Rows of the specification's tables: checks in their order, how to fail each, and what the firmware answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from tests.machines import Board, World


@dataclass(frozen=True)
class Attempt:
    """A command about to be issued on a board that is ready for it."""

    board: Board
    command: Command
    fields: dict[str, Any] = field(default_factory=dict)
    stray: tuple[int, ...] = ()

    def issue(self) -> Status:
        return self.board.command(self.command, self.stray, **self.fields)


@dataclass(frozen=True)
class Row:
    """One check: the options of a builder that make it fail, and the status. The name says what is wrong."""

    name: str
    status: Status
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} -> {self.status:02X}"


Builder = Callable[..., Attempt]


def single(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """Each row alone."""
    return pytest.mark.parametrize("row", rows, ids=str)


def ordered(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Two rows at once, the earlier first, wherever they spoil different things and answer differently."""
    return [
        (a, b) for a, b in combinations(rows, 2) if a.options.keys().isdisjoint(b.options) and a.status is not b.status
    ]


def double(pairs: Sequence[tuple[Row, Row]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", pairs, ids=lambda pair: f"{pair[0]}, {pair[1]}")


def assert_refused(attempt: Attempt, status: Status) -> None:
    """The command answers `status` and nothing at all has changed."""
    attempt.board.put(None)
    layout_address = attempt.board.put(_layout(attempt.command), attempt.stray, **attempt.fields)
    before = World.of(attempt.board)
    assert attempt.board.send(attempt.command, layout_address) is status, attempt.board.log.events[-1]
    assert World.of(attempt.board) == before


def _layout(command: Command) -> Any:
    from snpbook.spec import commands as buffers

    return getattr(buffers, command.name, None)
