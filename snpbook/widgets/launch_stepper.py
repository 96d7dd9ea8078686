"""The launch stepper: a launch through VMM, KVM, CCP driver and AMD-SP, one system call of the VMM at a time.

The whole launch has run, on a machine of its own, before the first step is shown; another choice launches again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from snpbook.exercises.launches import Launch, LaunchOptions
from snpbook.host.vmm.configuration import GuestKind
from snpbook.spec.eras import NAMES
from snpbook.views.launch_steps import chain, measurement, overview, tree
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

_AROUND = 4
"""How many calls before and after the present one the overview shows."""
_LABEL = {"description_width": "initial"}


class LaunchStepper(View, w.VBox):
    """A launch and a place in it. `kind`, `era`, `vcpus`, `hashes` choose the launch, `step` (from 1) the call."""

    def __init__(self) -> None:
        self.kind = w.Dropdown(
            options=[kind.value for kind in GuestKind], value="snp", description="Guest", style=_LABEL,
            layout=_wide(140),
        )  # fmt: skip
        kernels = [name for name in NAMES if name != "svsm-host"]
        self.era = w.Dropdown(options=kernels, value="mainline", description="Kernel", style=_LABEL, layout=_wide(170))
        self.vcpus = w.BoundedIntText(2, min=1, max=8, description="vCPUs", style=_LABEL, layout=_wide(120))
        self.hashes = w.Checkbox(True, description="kernel-hashes", indent=False, layout=_wide(150))
        self.step = w.BoundedIntText(1, min=1, max=1, description="Call", style=_LABEL, layout=_wide(120))
        self.back, self.next = _button("Back", self._move(-1)), _button("Next", self._move(1))
        self.measured = _button("Next measured", self._to_measured)
        self.launch = Launch(self._options())
        self.calls: Panel[int] = Panel(lambda at: overview(self.launch.calls, at, _AROUND), 1)
        self.tree: Panel[int] = Panel(self._tree, 1)
        self.chain: Panel[int] = Panel(self._chain, 1)
        for choice in (self.kind, self.era, self.vcpus, self.hashes):
            choice.observe(self._again, "value")
        self.step.observe(self._draw, "value")
        self.step.max = len(self.launch.calls)
        super().__init__([
            _row(self.kind, self.era, self.vcpus, self.hashes), _row(self.step, self.back, self.next, self.measured),
            self.calls, self.tree, self.chain,
        ])  # fmt: skip

    def show(self, **choices: Any) -> Static:
        """Set `kind`, `era`, `vcpus`, `hashes` and `step` by their names: the call where the stepper then stands."""
        for name, value in choices.items():
            getattr(self, name).value = value
        return self.tree.static()

    def find(self, name: str) -> Static:
        """Go to the next call whose name holds `name`, from the present one on. `ValueError` where there is none."""
        places = range(self.step.value, len(self.launch.calls) + 1)
        found = next((n for n in places if name in self.launch.calls[n - 1].name), None)
        if found is None:
            raise ValueError(f"no call {name!r} from here on")
        return self.show(step=found)

    def static(self) -> Static:
        parts = [panel.static() for panel in (self.calls, self.tree, self.chain)]
        return Static("\n\n".join(part.text for part in parts), "".join(part.html for part in parts))

    def _options(self) -> LaunchOptions:
        kind = self.kind.value
        properties = {} if kind == GuestKind.PLAIN.value else {"kernel_hashes": self.hashes.value}
        return LaunchOptions(kind=kind, era=self.era.value, vcpus=self.vcpus.value, properties=properties)

    def _again(self, _: object) -> None:
        self.launch = Launch(self._options())
        self.step.max = len(self.launch.calls)
        self.step.value = 1
        self._draw()

    def _draw(self, _: object = None) -> None:
        for panel in (self.calls, self.tree, self.chain):
            panel.show(self.step.value)

    def _tree(self, at: int) -> Static:
        return tree(self.launch.calls[at - 1], at, len(self.launch.calls))

    def _chain(self, at: int) -> Static:
        if self.kind.value != GuestKind.SNP.value:
            return self._measurement(at)
        reached = self.launch.calls[at - 1].digest
        count = next((n for n, link in enumerate(self.launch.links, 1) if link.digest == reached), 0)
        return chain(self.launch.links[:count])

    def _measurement(self, at: int) -> Static:
        vmm = self.launch.vmm
        if self.kind.value == GuestKind.PLAIN.value:
            return measurement(None)
        asked = [n for n, call in enumerate(self.launch.calls, 1) if call.name.endswith("LAUNCH_MEASURE")]
        return measurement(vmm.measurement if vmm and asked and at >= asked[-1] else b"")

    def _move(self, by: int) -> Callable[[object], None]:
        def move(_: object) -> None:
            self.step.value += by

        return move

    def _to_measured(self, _: object) -> None:
        """To the next call after which the digest is another one, or what the firmware measures is."""
        calls, at = self.launch.calls, self.step.value
        for number in range(at, len(calls)):
            measures = calls[number].digest != calls[number - 1].digest
            if measures or "LAUNCH_UPDATE" in calls[number].name:
                self.step.value = number + 1
                return


def _button(name: str, act: Callable[[object], None]) -> w.Button:
    made = w.Button(description=name, layout=_wide(130))
    made.on_click(act)
    return made


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
