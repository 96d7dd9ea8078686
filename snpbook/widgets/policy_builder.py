"""The policy builder: a guest policy put together bit by bit, and what kernel and firmware make of it.

The verdict is not computed from rules: a guest is launched with the policy, on a machine that is kept for it.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as w

from snpbook.host.refusal import KernelError
from snpbook.host.vmm.configuration import VmmError
from snpbook.spec.layout import Layout
from snpbook.spec.policy import DEFAULT_LEGACY_POLICY, DEFAULT_POLICY, LEGACY_POLICY, LEGACY_POLICY_ES, POLICY
from snpbook.system import System
from snpbook.views.policy import policy
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

_SNP, _LEGACY = "SNP", "SEV, SEV-ES"
_FORMS = {_SNP: (POLICY, DEFAULT_POLICY), _LEGACY: (LEGACY_POLICY, DEFAULT_LEGACY_POLICY)}
_INSTALLED = 128 << 20


class PolicyBuilder(View, w.VBox):
    """A form with the fields of a policy. `kind` chooses the form, `fields` are its controls by name."""

    def __init__(self, seed: str = "policy") -> None:
        self._system = System("milan", seed, installed=_INSTALLED)
        self._system.host.boot("mainline")
        self.kind = w.Dropdown(options=list(_FORMS), description="Guest", layout=w.Layout(width="220px"))
        self.fields: dict[str, w.Checkbox | w.BoundedIntText] = {}
        self._form = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.result: Panel[int] = Panel(self._render, self._lay_out())
        self.kind.observe(self._other_form, "value")
        super().__init__([self.kind, self._form, self.result])

    @property
    def value(self) -> int:
        """The policy as a number."""
        given = {name: int(control.value) for name, control in self.fields.items()}
        return int.from_bytes(self._layout.pack(**given), "little")

    def build(self, *, kind: str | None = None, **fields: Any) -> Static:
        """Choose the form and set fields by name: the policy and its verdict."""
        if kind is not None:
            self.kind.value = kind
        for name, value in fields.items():
            self.fields[name].value = value
        return self.result.static()

    def static(self) -> Static:
        return self.result.static()

    @property
    def _layout(self) -> Layout:
        return _FORMS[self.kind.value][0]

    def _lay_out(self) -> int:
        layout, default = _FORMS[self.kind.value]
        values = layout.unpack(default.to_bytes(layout.size, "little"))
        self.fields = {
            name: _control(name, field.limit, getattr(values, name)) for name, field in layout.fields.items()
        }
        for control in self.fields.values():
            control.observe(self._draw, "value")
        self._form.children = list(self.fields.values())
        return default

    def _other_form(self, _: object) -> None:
        self.result.show(self._lay_out())

    def _draw(self, _: object) -> None:
        self.result.show(self.value)

    def _render(self, value: int) -> Static:
        return policy(self._layout, value, self._verdict(value))

    def _verdict(self, value: int) -> str:
        """What becomes of a small guest with this policy."""
        legacy = "sev-es" if value & LEGACY_POLICY_ES else "sev"
        kind = "snp" if self.kind.value == _SNP else legacy
        try:
            guest = self._system.create_vm(kind=kind, memory="10 MiB", policy=value)
        except (KernelError, VmmError) as error:
            who = "the firmware refuses" if getattr(error, "firmware", None) is not None else "KVM refuses"
            return f"{who}: {error}"
        guest.vmm.close()
        self._system.guests.remove(guest)
        return f"accepted: the guest's LAUNCH_START succeeds ({kind})"


def _control(name: str, limit: int, value: int) -> w.Checkbox | w.BoundedIntText:
    if limit == 1:
        return w.Checkbox(bool(value), description=name, indent=False, layout=w.Layout(width="190px"))
    style = {"description_width": "initial"}
    return w.BoundedIntText(value, min=0, max=limit, description=name, style=style, layout=w.Layout(width="190px"))
