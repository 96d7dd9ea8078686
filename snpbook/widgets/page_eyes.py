"""Two eyes on one page: what the host finds and what the guest reads, side by side, while the guest acts on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from snpbook.attest.checks import Result
from snpbook.exercises.seen_guest import SeenGuest
from snpbook.views.checks import mark
from snpbook.views.page_seen import Seen, page_seen
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

_LABEL = {"description_width": "initial"}


class PageEyes(View, w.VBox):
    """A guest's page. `page` chooses it, `text` is what the guest writes.

    The buttons `write`, `share`, `take_back`, `accept` and `touch` have the guest act.
    """

    def __init__(self) -> None:
        self.seen = SeenGuest()
        self.page = w.Dropdown(options=list(self.seen.places), description="Page", style=_LABEL, layout=_wide(260))
        self.text = w.Text("the key to the cellar", description="Text", style=_LABEL, layout=_wide(300))
        acts: dict[str, Callable[[int], str]] = {
            "write": self._write,
            "share": self._convert(private=False),
            "take back": self._convert(private=True),
            "accept": lambda gpa: f"the guest has accepted {self.seen.accept(gpa)} pages",
            "touch": lambda gpa: self.seen.touch(gpa) or "the guest reads it: nothing special",
        }
        self.write, self.share, self.take_back, self.accept, self.touch = (
            _button(name, self._acting(act)) for name, act in acts.items()
        )
        self.said: Panel[tuple[Result, str]] = Panel(_said, (Result.SKIPPED, "nothing done yet"))
        self.eyes: Panel[Seen] = Panel(page_seen, self.seen.look(self.gpa))
        buttons = (self.write, self.share, self.take_back, self.accept, self.touch)
        super().__init__([_row(self.page, self.text), _row(*buttons), self.said, self.eyes])
        self.page.observe(lambda _: self._draw(Result.SKIPPED, "nothing done yet"), "value")

    @property
    def gpa(self) -> int:
        """The guest address of the page that is looked at."""
        return self.seen.places[self.page.value]

    def show(self, page: str | None = None, text: str | None = None) -> Static:
        """Choose a page and a text: the page as both see it."""
        self.page.value = page or self.page.value
        self.text.value = self.text.value if text is None else text
        return self.eyes.static()

    def static(self) -> Static:
        parts = [self.said.static(), self.eyes.static()]
        return Static("\n\n".join(part.text for part in parts), "".join(part.html for part in parts))

    def _write(self, gpa: int) -> str:
        self.seen.write(gpa, self.text.value.encode()[:32].ljust(32, b"\0"))
        return "the guest has written the text"

    def _convert(self, *, private: bool) -> Callable[[int], str]:
        def convert(gpa: int) -> str:
            self.seen.convert(gpa, private=private)
            return f"the page is {'private' if private else 'shared'} now"

        return convert

    def _acting(self, act: Callable[[int], str]) -> Callable[[Any], None]:
        def press(_: object) -> None:
            try:
                told = act(self.gpa)
            except ValueError as error:
                self._draw(Result.FAILED, str(error))
                return
            self._draw(Result.PASSED, told)

        return press

    def _draw(self, result: Result, told: str) -> None:
        self.eyes.show(self.seen.look(self.gpa))
        self.said.show((result, told))


def _said(told: tuple[Result, str]) -> Static:
    sign = mark(*told)
    return Static(sign.words, f'<p style="margin:4px 0">{sign}</p>')


def _button(name: str, act: Callable[[Any], None]) -> w.Button:
    made = w.Button(description=f"Guest: {name}", layout=_wide(150))
    made.on_click(act)
    return made


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
