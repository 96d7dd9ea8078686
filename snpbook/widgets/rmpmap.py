"""The live RMP map: a canvas that shows a million pages, with zoom, a keyboard cursor and a page inspector.

Python sends one byte per page and the fields of the page under the cursor; the browser draws. Colours, words and the
static twin are those of `snpbook.views`.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from snpbook.spec.pages import PageState
from snpbook.views import rmpmap
from snpbook.views.page import Fields, page, page_rows
from snpbook.views.palette import PAGES, THEMES, Swatch
from snpbook.views.static import Static
from snpbook.widgets.view import View, scripts

Lookup = Callable[[int], Fields]
"""From a page frame number to the decoded fields of that page."""


class RmpMap(View, anywidget.AnyWidget):
    """The states of the pages from `first_pfn` on, one code of `PageState` (uint8) per page.

    `lookup` gives what the inspector shows of a page besides its state and address. `update` draws
    another table of the same length and outlines what changed; `select`, or the trait `cursor`, moves
    the cursor to a page frame. Raises `ValueError` for codes that are no state and `TypeError` for
    arrays of another type.

    A map that `selects` has a run of pages chosen, its ends in the trait `selection`: by dragging, by
    arrow keys with Shift, by typing its ends, or by `choose`. The cursor lies within it.
    """

    _esm = scripts("pagecanvas.js", "rmpmap.js")
    _css = Path(__file__).with_name("rmpmap.css")

    title = traitlets.Unicode("RMP map").tag(sync=True)
    first_pfn = traitlets.Int().tag(sync=True)
    cursor = traitlets.Int(help="the page frame number under the cursor").tag(sync=True)
    selects = traitlets.Bool().tag(sync=True)
    selection = traitlets.Tuple(traitlets.Int(), traitlets.Int(), help="first and last page chosen").tag(sync=True)
    _states = traitlets.Bytes().tag(sync=True)
    _page = traitlets.Dict().tag(sync=True)
    _columns = traitlets.Int().tag(sync=True)
    _label = traitlets.Unicode(rmpmap.LABEL).tag(sync=True)
    _selected = traitlets.Unicode(rmpmap.SELECTED).tag(sync=True)
    _palette = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        states: rmpmap.States,
        *,
        first_pfn: int = 0,
        lookup: Lookup | None = None,
        title: str = "RMP map",
        selects: bool = False,
    ) -> None:
        self._lookup = lookup
        super().__init__(
            title=title, first_pfn=first_pfn, cursor=first_pfn, selects=selects, selection=(first_pfn, first_pfn),
            _states=_checked(states), _page={}, _columns=rmpmap.columns(len(states)), _palette=_palette(),
        )  # fmt: skip
        self._inspect()
        self.on_msg(self._settle)

    @property
    def states(self) -> rmpmap.States:
        """The states shown, read-only."""
        return np.frombuffer(self._states, np.uint8)

    def update(self, states: rmpmap.States) -> None:
        """Draw `states`; what changed since the last update is outlined."""
        fresh = _checked(states)
        if len(fresh) != len(self._states):
            raise ValueError(f"the map shows {len(self._states):,} pages, not {len(fresh):,}: make another map")
        self._states = fresh
        self._inspect()

    def select(self, pfn: int) -> Static:
        """Move the cursor to a page frame; what the inspector says of it."""
        self.cursor = pfn
        self.selection = (pfn, pfn)
        return page(pfn, self._state(pfn), self._fields(pfn))

    def choose(self, first: int, last: int) -> None:
        """Select the page frames from `first` to `last`, with the cursor on the last one."""
        with self.hold_trait_notifications():
            self.cursor, self.selection = last, (first, last)

    @property
    def chosen(self) -> range:
        """The page frames that are selected: that under the cursor, where the map does not select."""
        return range(self.selection[0], self.selection[1] + 1) if self.selects else range(self.cursor, self.cursor + 1)

    def describe(self) -> str:
        """The accessible name of the canvas, then how many pages are in each state."""
        parts = [rmpmap.label(self.states, self.first_pfn, self.cursor, self.title)]
        parts += [rmpmap.selected(*self.selection)] * (self.selects and len(self.chosen) > 1)
        return "; ".join([*parts, rmpmap.tally(self.states)])

    def static(self) -> Static:
        return rmpmap.rmpmap(self.states, self.first_pfn, self.title)

    @traitlets.validate("cursor")
    def _inside(self, proposal: dict[str, Any]) -> int:
        pfn, first, last = proposal["value"], self.first_pfn, self.first_pfn + len(self._states) - 1
        if not first <= pfn <= last:
            raise traitlets.TraitError(f"pfn {pfn:#x} is not on the map, which shows {first:#x} to {last:#x}")
        return int(pfn)

    @traitlets.validate("selection")
    def _ordered(self, proposal: dict[str, Any]) -> tuple[int, int]:
        first, last = proposal["value"]
        for pfn in (first, last):
            self._inside({"value": pfn})
        if first > last:
            raise traitlets.TraitError(f"a selection goes from a page to a later one, not from {first:#x} to {last:#x}")
        return first, last

    @traitlets.observe("cursor")
    def _collapse(self, _: object) -> None:
        if self.cursor not in range(self.selection[0], self.selection[1] + 1):
            self.selection = (self.cursor, self.cursor)

    @traitlets.observe("cursor")
    def _inspect(self, _: object = None) -> None:
        rows = page_rows(self.cursor, self._state(self.cursor), self._fields(self.cursor))
        self._page = {"pfn": self.cursor, "rows": [list(row) for row in rows]}

    def _settle(self, _: object, left: dict[str, Any], __: object) -> None:
        """The reader leaves the map: where it stands then, before what is pressed next is heard of."""
        with self.hold_trait_notifications():
            self.cursor, self.selection = left["cursor"], tuple(left["selection"])

    def _state(self, pfn: int) -> int:
        return self._states[pfn - self.first_pfn]

    def _fields(self, pfn: int) -> Fields:
        return self._lookup(pfn) if self._lookup else {}


def _checked(states: rmpmap.States) -> bytes:
    if states.dtype != np.uint8 or states.ndim != 1:
        raise TypeError(f"states are a uint8 array of one dimension, not {states.dtype} of {states.ndim}")
    if not len(states):
        raise ValueError("a map needs at least one page")
    if int(states.max()) >= len(PageState):
        raise ValueError(f"{int(states.max())} is no state: codes are those of PageState, 0 to {len(PageState) - 1}")
    return states.tobytes()


def _palette() -> dict[str, object]:
    """The palette as the browser takes it: neutral colours by theme, and the look of each state by its code."""
    ranks = {state: rank for rank, state in enumerate(PAGES)}
    themes = {theme.name: asdict(theme) for theme in THEMES}
    return {**themes, "looks": [_look(PAGES[state], ranks[state]) for state in sorted(PAGES)]}


def _look(swatch: Swatch, rank: int) -> dict[str, object]:
    colours = {theme.name: {"fill": swatch.colour(theme), "ink": swatch.ink(theme)} for theme in THEMES}
    return {"label": swatch.label, "letter": swatch.letter, "pattern": swatch.pattern, "rank": rank, **colours}
