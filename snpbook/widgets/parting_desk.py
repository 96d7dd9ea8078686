"""The parting desk: two launches that differ in one thing, compared only after a guess where their chains part."""

from __future__ import annotations

from functools import cache

import ipywidgets as w

from snpbook.exercises.launches import CHANGES, Launch, LaunchOptions, parting
from snpbook.views.launch_steps import byte_diff, chain
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

NOWHERE = "nowhere"
ASK = "which link?"
_WAITING = Static(
    "Guess first: at which link do the two chains part?",
    "<p>Guess first: at which link do the two chains part?</p>",
)
_LABEL = {"description_width": "initial"}
Shown = tuple[str, str]


@cache
def launched(change: str) -> Launch:
    """The launch with that change; the one that is meant for an empty name."""
    return Launch(CHANGES[change] if change else LaunchOptions())


class PartingDesk(View, w.VBox):
    """`change` says what differs, `guess` names a link; `compare()` shows both chains once there is a guess."""

    def __init__(self) -> None:
        self.intended = launched("")
        self.change = w.Dropdown(options=list(CHANGES), description="Change", style=_LABEL, layout=_wide(340))
        names = [link.name for link in self.intended.links]
        options = [ASK, *names, f"VMSA of vCPU {self.intended.options.vcpus}", NOWHERE]
        self.guess = w.Dropdown(options=options, description="They part at", style=_LABEL, layout=_wide(300))
        self.button = w.Button(description="Compare", layout=_wide(110))
        self.result: Panel[Shown] = Panel(self._render, ("", ""))
        self.button.on_click(lambda _: self._compare())
        self.change.observe(self._hide, "value")
        row = w.HBox([self.change, self.guess, self.button], layout=w.Layout(flex_flow="row wrap"))
        super().__init__([row, self.result])

    def predict(self, change: str, guess: str) -> Static:
        """Choose a change, guess, and compare: the verdict with both chains and digests."""
        self.change.value = change
        self.guess.value = guess
        self._compare()
        return self.result.static()

    def static(self) -> Static:
        return self.result.static()

    def _hide(self, _: object) -> None:
        """Another change needs another guess."""
        self.guess.value = ASK
        self.result.show(("", ""))

    def _compare(self) -> None:
        self.result.show((self.change.value, self.guess.value) if self.guess.value != ASK else ("", ""))

    def _render(self, shown: Shown) -> Static:
        change, guess = shown
        if not change:
            return _WAITING
        other = launched(change)
        found = parting(self.intended, other)
        words = f"{'Right' if guess == found else 'Not so'}: with {change}, they part at: {found}."
        parts = [
            chain(other.links, self.intended.links, f"The chain with {change}"),
            byte_diff(self.intended.digest, other.digest, ("as meant", f"with {change}")),
        ]
        return Static(
            "\n\n".join([words, *(part.text for part in parts)]),
            f"<p><strong>{words}</strong></p>" + "".join(part.html for part in parts),
        )


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
