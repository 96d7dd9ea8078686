"""The regime desk: one workload on every back end of a kind of guest, side by side over time.

Whatever is drawn was run: a change of the form waits for the button, then guests are launched on hosts of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import ipywidgets as w

from snpbook.host.ledger import Sample
from snpbook.regimes.regime import ENCRYPTED, Regime
from snpbook.regimes.workload import Plan, workload
from snpbook.views.memory_ledger import WORK, Runs, over_time, work
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

_GUEST, _HOST = "16 MiB", "64 MiB"
_PAGES = "pages over time"
_LABEL = {"description_width": "initial"}


@cache
def ran(kind: str, backend: str, plan: Plan, huge: bool, discard: bool) -> Sequence[Sample]:
    """The samples of one run; the same again is not run again."""
    regime = Regime(kind, backend, memory=_GUEST, installed=_HOST, huge=huge, discard=discard)
    return tuple(workload(regime, plan))


class RegimeDesk(View, w.VBox):
    """`kind` of guest, `working_set` in per cent of its unused memory, `converted` in per cent of that, `rounds`.

    `discard`: the side that a conversion leaves is freed. `huge`: the host has 2 MB pages. `quantity` is what is shown,
    `time` turns counts of work into estimates.
    """

    def __init__(self) -> None:
        kinds = list(dict.fromkeys(kind for kind, _ in ENCRYPTED))
        self.kind = w.Dropdown(options=kinds, description="Guest", layout=_wide(180))
        self.working_set, sizes = _per_cent("Working set, %", 100)
        self.converted, conversions = _per_cent("Converted of it, %", 20)
        self.rounds = w.BoundedIntText(
            1, min=0, max=9, description="Conversions to and fro", style=_LABEL, layout=_wide(220)
        )
        self.discard = w.Checkbox(True, description="Free the side that is left", indent=False, layout=_wide(210))
        self.huge = w.Checkbox(False, description="2 MB pages", indent=False, layout=_wide(120))
        self.button = w.Button(description="Run", layout=_wide(90))
        self.quantity = w.Dropdown(
            options={_PAGES: "", **{words: name for name, words in WORK.items()}}, description="Show",
            layout=_wide(330),
        )  # fmt: skip
        self.time = w.Checkbox(False, description="as estimated time", indent=False, layout=_wide(170))
        self.runs = self._run()
        self.result: Panel[Runs] = Panel(self._render, self.runs)
        self.button.on_click(lambda _: self.run())
        for control in (self.quantity, self.time):
            control.observe(lambda _: self.result.show(self.runs), "value")
        rows = (
            [self.kind, sizes, conversions], [self.rounds, self.discard, self.huge, self.button],
            [self.quantity, self.time],
        )  # fmt: skip
        super().__init__([*(w.HBox(row, layout=w.Layout(flex_flow="row wrap")) for row in rows), self.result])

    def show(self, **choices: object) -> Static:
        """Set controls by their names, run, and what the desk then shows."""
        for name, value in choices.items():
            getattr(self, name).value = value
        self.run()
        return self.result.static()

    def run(self) -> None:
        """Run the workload as the form says, on every back end of the kind of guest."""
        self.button.disabled = True
        try:
            self.runs = self._run()
        finally:
            self.button.disabled = False
        self.result.show(self.runs)

    def static(self) -> Static:
        return self.result.static()

    @property
    def plan(self) -> Plan:
        """The workload that the form describes: the working set in two steps, the conversions, a tenth given up."""
        whole = self.working_set.value
        steps = tuple(sorted({max(whole // 10, 1), whole}))
        converted = max(whole * self.converted.value // 100, 1)
        return Plan(touched=steps, converted=converted, rounds=self.rounds.value, ballooned=max(whole // 10, 1))

    def _run(self) -> Runs:
        kind, plan = self.kind.value, self.plan
        return {
            f"{kind}, {backend}": ran(kind, backend, plan, self.huge.value, self.discard.value)
            for each, backend in ENCRYPTED
            if each == kind
        }

    def _render(self, runs: Runs) -> Static:
        if not self.quantity.value:
            return over_time(runs)
        return work(runs, self.quantity.value, time=self.time.value)


def _per_cent(name: str, value: int) -> tuple[w.BoundedIntText, w.HBox]:
    """A named field, and beside it a slider that moves with it."""
    field = w.BoundedIntText(value, min=1, max=100, description=name, style=_LABEL, layout=_wide(190))
    slider = w.IntSlider(value, min=1, max=100, readout=False, layout=_wide(130))
    w.link((field, "value"), (slider, "value"))
    return field, w.HBox([field, slider])


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
