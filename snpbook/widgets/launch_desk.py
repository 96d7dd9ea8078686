"""The launch desk: a launch that grows page by page, beside the same launch in which the host has changed one page.

Every digest shown is one that the firmware has computed: a change of the form launches the guest again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ipywidgets as w

from snpbook.firmware.bench import Bench
from snpbook.firmware.growth import Link, Page, begin, grow
from snpbook.spec.pages import PAGE_SIZE, LaunchPage, VmplPermission
from snpbook.views.launch_digest import chain, page_info
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

_UNCHANGED = "nothing"
CHANGES: Mapping[str, Callable[[Page], Sequence[Page]]] = {
    _UNCHANGED: lambda page: [page],
    "one bit of its bytes": lambda page: [replace(page, data=bytes([page.data[0] ^ 1]) + page.data[1:])],
    "its address": lambda page: [replace(page, gpa=page.gpa ^ PAGE_SIZE)],
    "its type, to UNMEASURED": lambda page: [replace(page, kind=LaunchPage.UNMEASURED)],
    "VMPL1 may read it": lambda page: [replace(page, rights=(int(VmplPermission.READ), 0, 0))],
    "it is left out": lambda page: [],
}
"""What a host could do to one page of a launch."""
Shown = tuple[Sequence[Link], Sequence[Link]]


class LaunchDesk(View, w.VBox):
    """A desk for launching `pages` on benches that `fresh` makes.

    `change` and `page` say what the host changes, `grown` how many pages are launched so far.
    """

    def __init__(self, fresh: Callable[[], Bench], pages: Sequence[Page]) -> None:
        self._fresh, self.pages = fresh, tuple(pages)
        self.intended = self._launch(self.pages)
        self.launched = self.intended
        count = len(self.pages)
        self.grown = w.BoundedIntText(count, min=0, max=count, description="Pages", layout=_wide(150))
        self.change = w.Dropdown(options=list(CHANGES), description="Change", layout=_wide(270))
        self.page = w.BoundedIntText(1, min=1, max=count, description="of page", layout=_wide(150))
        self.chain: Panel[Shown] = Panel(lambda shown: chain(*shown), (self.launched, ()))
        self.info: Panel[Sequence[Link]] = Panel(_last, self.launched)
        super().__init__([w.HBox([self.grown, self.change, self.page]), self.chain, self.info])
        self.grown.observe(self._draw, "value")
        for choice in (self.change, self.page):
            choice.observe(self._again, "value")

    def show(self, **choices: object) -> Static:
        """Set `grown`, `change` and `page` by their names: what the desk then shows."""
        for name, value in choices.items():
            getattr(self, name).value = value
        return self.chain.static()

    @property
    def digest(self) -> bytes:
        """The launch digest of the pages that are launched so far; empty without any."""
        shown = self.launched[: self.grown.value]
        return shown[-1].digest if shown else b""

    def static(self) -> Static:
        shown = [self.chain.static(), self.info.static()]
        return Static(shown[0].text, "".join(part.html for part in shown))

    def _again(self, _: object = None) -> None:
        at = self.page.value - 1
        changed = CHANGES[self.change.value](self.pages[at])
        self.launched = self._launch([*self.pages[:at], *changed, *self.pages[at + 1 :]])
        self._draw()

    def _draw(self, _: object = None) -> None:
        shown = self.launched[: self.grown.value]
        self.chain.show((shown, () if self.change.value == _UNCHANGED else self.intended))
        self.info.show(shown)

    def _launch(self, pages: Sequence[Page]) -> list[Link]:
        bench = self._fresh().initialise()
        begin(bench)
        return grow(bench, pages)


def _last(links: Sequence[Link]) -> Static:
    return page_info(links[-1], len(links)) if links else Static("", "")


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
