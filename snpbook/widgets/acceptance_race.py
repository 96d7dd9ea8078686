"""Acceptance over time: one guest that accepts all of its memory as it boots, beside one that accepts as it uses it."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as w

from snpbook.exercises.acceptance_course import followed
from snpbook.guest.boot import Acceptance
from snpbook.views.acceptance_course import Course, course
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

_LABEL = {"description_width": "initial"}


class AcceptanceRace(View, w.VBox):
    """Two guests of `memory` MiB, which use `used` per cent of it after the boot."""

    def __init__(self) -> None:
        self.memory = w.Dropdown(options=[16, 32, 64], value=16, description="Memory, MiB", style=_LABEL,
                                 layout=w.Layout(width="180px"))  # fmt: skip
        self.used = w.Dropdown(options=[0, 25, 50, 75, 100], value=25, description="used after the boot, %",
                               style=_LABEL, layout=w.Layout(width="240px"))  # fmt: skip
        self.course: Panel[Sequence[Course]] = Panel(lambda run: course(run, self.memory.value), self._run())
        super().__init__([w.HBox([self.memory, self.used], layout=w.Layout(flex_flow="row wrap")), self.course])
        for choice in (self.memory, self.used):
            choice.observe(lambda _: self.course.show(self._run()), "value")

    def show(self, **choices: int) -> Static:
        """Set `memory` and `used` by their names: both courses."""
        for name, value in choices.items():
            getattr(self, name).value = value
        return self.course.static()

    def static(self) -> Static:
        return self.course.static()

    def _run(self) -> list[Course]:
        return [followed(when, self.memory.value).until(self.used.value) for when in Acceptance]
