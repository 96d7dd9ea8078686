"""A listener on every board of the tests: each page state that a firmware command changes is an edge of the table.

`PAGE_MOVES` is the table; pages that a command writes without changing their state are free.
"""

import numpy as np

from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.transitions import PAGE_MOVES
from snpbook.trace import Event, FirmwareCommand

Edge = tuple[Command, PageState, PageState]


def edges(event: FirmwareCommand) -> set[Edge]:
    """The edges that a command went."""
    if event.changed is None or event.before is None or event.after is None:
        return set()
    moved = event.before != event.after
    pairs = np.unique(np.stack([event.before[moved], event.after[moved]], axis=1), axis=0)
    command = Command[event.name]
    return {(command, PageState(int(before)), PageState(int(after))) for before, after in pairs}


def check_page_moves(event: Event) -> None:
    """AssertionError for a change that the table does not have."""
    if isinstance(event, FirmwareCommand):
        strays = {edge for edge in edges(event) if edge[1:] not in PAGE_MOVES[edge[0]]}
        assert not strays, f"page moves that the table lacks: {sorted(strays)}"
