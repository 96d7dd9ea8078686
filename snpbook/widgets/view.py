"""The base of every live view: what it shows on the screen it can also say on paper and in words.

A view holds state and a pure renderer. Its mime bundle carries the live widget together with the renderer's HTML and
text, so that a saved notebook stays readable without a kernel, and a change of state is a change of compared text.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import ipywidgets

from snpbook.views.static import Static

State = TypeVar("State")

MARK = "snpbook-view"
"""The HTML class of a live view's static twin, by which the notebook tools know it."""


def scripts(*names: str) -> str:
    """The front end of a view as one module: what every view needs, then its own files beside this one."""
    folder = Path(__file__).parent
    return "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("dom.js", *names))


class View(ipywidgets.DOMWidget):
    """A live view with a static twin; subclasses say how the twin is made."""

    @abstractmethod
    def static(self) -> Static:
        """The twin of what the view shows now."""

    def describe(self) -> str:
        """What the view shows now, in one stable line or a few."""
        return self.static().text

    def __repr__(self) -> str:
        return self.describe()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        live = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        twin = f'<div class="{MARK}">{self.static().html}</div>'
        data = {
            "application/vnd.jupyter.widget-view+json": live,
            "text/html": twin,
            "text/plain": self.describe(),
        }
        return data, {}


class Panel(View, ipywidgets.HTML, Generic[State]):
    """The simplest view: any renderer made live. `show(state)` draws another state."""

    def __init__(self, render: Callable[[State], Static], state: State) -> None:
        super().__init__()
        self._render = render
        self.show(state)

    def show(self, state: State) -> None:
        """Draw `state`."""
        self._static = self._render(state)
        self.value = f'<div style="line-height:1.45">{self._static.html}</div>'

    def static(self) -> Static:
        return self._static
