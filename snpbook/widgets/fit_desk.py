"""The fit desk: guess how many guests fit on a host, then start guests until no more do.

The host of 8 GiB and its guests of 1 GiB are a thirty-second of that unless full size is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import ipywidgets as w

from snpbook.regimes.fit import Fit, filling
from snpbook.regimes.regime import ENCRYPTED, FIRST
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.sizes import parse_size
from snpbook.views.memory_fit import Guess, fits
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

USED = 50
"""Per cent of its memory that each guest uses."""
FULL, SMALL = ("8 GiB", "1 GiB"), ("256 MiB", "32 MiB")
_LABEL = {"description_width": "initial"}
_NAMES: Mapping[str, tuple[str, str]] = {
    f"{kind}, {backend}": (kind, backend) for kind, backend in ENCRYPTED if kind != "sev-es"
}


@cache
def filled(kind: str, backend: str, size: tuple[str, str]) -> Sequence[Fit]:
    """How a host filled up; the same again is not run again."""
    installed, guest = size
    pages = parse_size(guest) >> PAGE_SHIFT
    touched = USED * pages // (pages - FIRST)
    return tuple(filling(kind, backend, touched=touched, guest=guest, installed=installed))


class FitDesk(View, w.VBox):
    """`regime` names kind and back end, `guess` a number of guests; `full` runs the host of 8 GiB, which takes long."""

    def __init__(self) -> None:
        self.guesses: dict[str, Guess] = {}
        self.regime = w.Dropdown(options=list(_NAMES), description="Regime", style=_LABEL, layout=_wide(260))
        self.guess = w.BoundedIntText(0, min=0, max=999, description="Guests, I think", style=_LABEL, layout=_wide(190))
        self.full = w.Checkbox(False, description="full size (slow)", indent=False, layout=_wide(150))
        self.button = w.Button(description="Start guests", layout=_wide(130))
        self.result: Panel[Mapping[str, Guess]] = Panel(fits, self.guesses)
        self.button.on_click(lambda _: self._start())
        row = w.HBox([self.regime, self.guess, self.full, self.button], layout=w.Layout(flex_flow="row wrap"))
        super().__init__([row, self.result])

    def predict(self, regime: str, guess: int) -> Static:
        """Choose a regime, guess, and start guests: the verdict, with those of the guesses before.

        `ValueError` for no such regime.
        """
        if regime not in _NAMES:
            raise ValueError(f"no regime {regime!r}: one of {'; '.join(_NAMES)}")
        self.regime.value, self.guess.value = regime, guess
        self._start()
        return self.result.static()

    def static(self) -> Static:
        return self.result.static()

    def _start(self) -> None:
        """A guess of no guests is none."""
        if not self.guess.value:
            return
        self.button.disabled = True
        try:
            found = filled(*_NAMES[self.regime.value], FULL if self.full.value else SMALL)
        finally:
            self.button.disabled = False
        self.guesses = {**self.guesses, self.regime.value: Guess(self.guess.value, found)}
        self.result.show(self.guesses)


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
