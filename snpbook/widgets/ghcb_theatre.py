"""The GHCB theatre: a request of a guest, a hand that changes the host's answer, and what the guest then does.

Every choice plays the scene again, on a guest that has just booted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as w

from snpbook.exercises.theatre import SCENES, Play, Tampering, label, play
from snpbook.views.ghcb_page import ghcb_page
from snpbook.views.sequence import ending, sequence
from snpbook.views.static import Static
from snpbook.widgets.address_field import AddressField
from snpbook.widgets.view import Panel, View

NOTHING = "nothing"
_LABEL = {"description_width": "initial"}


class GhcbTheatre(View, w.VBox):
    """The stage. `scene`, `guest` and `era` choose who asks for what; `field`, `number` and `every` what is changed.

    `made` is the play that is shown.
    """

    def __init__(self) -> None:
        self.scene = w.Dropdown(options=list(SCENES), description="Scene", style=_LABEL, layout=_wide(300))
        self.guest = w.Dropdown(options=["snp", "sev-es"], description="Guest", style=_LABEL, layout=_wide(140))
        self.era = w.Dropdown(options=["mainline", "rfc-v7"], description="Kernel", style=_LABEL, layout=_wide(160))
        self.field = w.Dropdown(options=[NOTHING], description="The hand changes", style=_LABEL, layout=_wide(290))
        self.number = AddressField(value="0x0", description="New value")
        self.every = w.Checkbox(False, description="in every answer", indent=False, layout=_wide(150))
        self._held = False
        self._offer()
        self.made: Play = play(self.scene.value)
        self.ending: Panel[Play] = Panel(lambda made: ending(made.result, made.told), self.made)
        self.sequence: Panel[Play] = Panel(_steps, self.made)
        self.page: Panel[Play] = Panel(lambda made: ghcb_page(made.exchange), self.made)
        super().__init__([
            _row(self.scene, self.guest, self.era), _row(self.field, self.number, self.every),
            self.ending, self.sequence, self.page,
        ])  # fmt: skip
        self.guest.observe(self._other_guest, "value")
        self.scene.observe(self._other_scene, "value")
        for choice in (self.era, self.field, self.number, self.every):
            choice.observe(self._play, "value")

    def show(self, **choices: Any) -> Static:
        """Set `guest`, `scene`, `era`, `field`, `number` (a number or its text) and `every`: how the play ends."""
        with self._holding():
            for name in ("guest", "scene", "era", "field", "number", "every"):
                if name in choices:
                    value = choices[name]
                    getattr(self, name).value = hex(value) if name == "number" and isinstance(value, int) else value
        self._play()
        return self.ending.static()

    def static(self) -> Static:
        parts = [panel.static() for panel in (self.ending, self.sequence, self.page)]
        return Static("\n\n".join(part.text for part in parts), "".join(part.html for part in parts))

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Several choices at once: nothing is played before the last."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _other_guest(self, _: object) -> None:
        held = self._held
        with self._holding():
            self.scene.options = [name for name, one in SCENES.items() if one.es or self.guest.value == "snp"]
            self._offer()
        self._held = held
        self._play()

    def _other_scene(self, _: object) -> None:
        held = self._held
        with self._holding():
            self._offer()
        self._held = held
        self._play()

    def _offer(self) -> None:
        """The fields of the scene's answer, none of them chosen."""
        fields = SCENES[self.scene.value].fields
        self.field.options = [(NOTHING, NOTHING), *((label(name), name) for name in fields)]
        self.field.value = NOTHING

    def _play(self, _: object = None) -> None:
        if self._held:
            return
        self.number.complaint = ""
        try:
            tampering = None
            if self.field.value != NOTHING:
                tampering = Tampering(self.field.value, self.number.number, self.every.value)
            self.made = play(self.scene.value, tampering, self.guest.value, self.era.value)
        except ValueError as error:
            self.number.complaint = str(error)
            return
        for panel in (self.sequence, self.page, self.ending):
            panel.show(self.made)


def _steps(made: Play) -> Static:
    return sequence(made.steps, made.scene.name)


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
