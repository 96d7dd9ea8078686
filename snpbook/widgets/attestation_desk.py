"""The verifier's desk: good evidence, a switch for each thing that can be tampered with, and the verifier's lights.

Files of the reader's own take the place of the evidence: a real report with its certificates is judged by AMD's roots
and today's date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import ipywidgets as w

from snpbook.attest.bundle import Bundle
from snpbook.attest.checks import MalformedEvidence, NotGenuine
from snpbook.attest.roots import ROOT_SETS, named_roots
from snpbook.evidence.kit import Kit
from snpbook.evidence.make import DEFECTS
from snpbook.evidence.maker import Maker, Recipe
from snpbook.views.static import Static
from snpbook.views.verifier_steps import verifier_steps
from snpbook.widgets.view import Panel, View

_YEARS = timedelta(days=10 * 366)
TAMPERS: Mapping[str, str] = {
    "bit": "a bit of the measurement",
    "tcb": "a certificate of another TCB",
    "certificate": "a bit of the certificate's signature",
    "nonce": "the nonce of another request",
    "time": "ten years later",
}
"""What the switches do, by name, in the order in which they are applied."""
_SPOILS = {"bit": "changed-measurement", "tcb": "wrong-tcb", "certificate": "vek-signature", "nonce": "replayed-nonce"}


class AttestationDesk(View, w.VBox):
    """Evidence and its verdict. `switches` are the controls by the names of `TAMPERS`, `roots` says whom to trust.

    The model's evidence is judged at `now`, the reader's own at the time that `clock` tells.
    """

    def __init__(
        self, now: datetime, clock: Callable[[], datetime], product: str = "genoa", seed: str = "attestation"
    ) -> None:
        self._clock = clock
        self._maker = Maker(Recipe(now, product, seed=seed))
        self._good = replace(self._maker.kit(), nonce=self._maker.fields["report_data"])
        self._own: Kit | None = None
        self.switches = {name: w.Checkbox(False, description=tells, indent=False) for name, tells in TAMPERS.items()}
        self.roots = w.Dropdown(options=ROOT_SETS, value="toy", description="Roots")
        self.files = w.FileUpload(multiple=True, description="Your own report and certificates")
        self.files.layout.width = "280px"
        self.result: Panel[Kit | ValueError] = Panel(self._render, self.kit)
        for control in (*self.switches.values(), self.roots):
            control.observe(self._draw, "value")
        self.files.observe(self._uploaded, "value")
        super().__init__([w.VBox(list(self.switches.values())), w.HBox([self.roots, self.files]), self.result])

    @property
    def kit(self) -> Kit:
        """The evidence on the desk, tampered with as the switches say; the reader's own is left as it is."""
        if self._own is not None:
            return self._own
        kit = self._good
        for name, defect in _SPOILS.items():
            if self.switches[name].value:
                kit = DEFECTS[defect].spoil(self._maker, kit)
        return replace(kit, now=kit.now + _YEARS) if self.switches["time"].value else kit

    def tamper(self, **switches: bool) -> Static:
        """Turn all switches off but those that are named: the lights."""
        for name, control in self.switches.items():
            control.value = switches.get(name, False)
        return self.static()

    def load(self, files: Mapping[str, bytes], roots: str = "amd") -> Static:
        """Put other evidence on the desk: a report and certificates, told apart by what they hold; none takes it away.

        `ValueError` where there is no report among the files.
        """
        certificates: dict[str, bytes] = {}
        reports, lists = [], b""
        for name, data in files.items():
            try:
                bundle = Bundle.read(data)
            except (MalformedEvidence, NotGenuine):
                reports.append(data)
            else:
                certificates[name] = data
                lists += data if bundle.crls else b""
        if files and len(reports) != 1:
            raise ValueError(f"{len(reports)} of these files may be a report: give one, and its certificates")
        self._own = Kit(reports[0], certificates, lists, self._clock()) if files else None
        for control in self.switches.values():
            control.disabled = bool(files)
        self.roots.value = roots if files else "toy"
        self._draw(None)
        return self.static()

    def static(self) -> Static:
        return self.result.static()

    def _uploaded(self, _: object) -> None:
        given: tuple[Mapping[str, Any], ...] = self.files.value
        try:
            self.load({file["name"]: bytes(file["content"]) for file in given})
        except ValueError as error:
            self.result.show(error)

    def _draw(self, _: object) -> None:
        self.result.show(self.kit)

    def _render(self, shown: Kit | ValueError) -> Static:
        if isinstance(shown, ValueError):
            return verifier_steps((), f"none, {shown}")
        verdict, checks = shown.checked(named_roots(self.roots.value))
        told = verdict.stage.name.lower().replace("_", " ")
        return verifier_steps(checks, f"{told}: {verdict.check}" if verdict.check else told)
