"""The access explorer as a form: who accesses which page, how and with which C-bit; the answer follows every change.

The form only chooses an access; the verdict and its steps are `hardware.explorer`'s, drawn by `snpbook.views`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets as w

from snpbook.hardware.checks import USER_CPL, AccessKind
from snpbook.hardware.explorer import Explanation, explain_device, explain_guest, explain_host
from snpbook.hardware.workbench import SHARED_WINDOW, BareGuest, Workbench
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.views.explorer import explanation, verdict
from snpbook.views.static import Static
from snpbook.widgets.address_field import AddressField
from snpbook.widgets.view import Panel, View

_HOST, _DEVICE, _PLAIN = "host", "device", "guest without SNP"
_KINDS = {
    "read": AccessKind.READ, "write": AccessKind.WRITE, "fetch": AccessKind.FETCH, "page walk": AccessKind.WALK,
}  # fmt: skip
_LIMIT = 1 << 64
"""Where a guest's virtual addresses end."""
_C_BITS = {"1, private": True, "0, shared": False}


@dataclass(frozen=True, slots=True)
class Specimen:
    """A page worth looking at: where the guests see it, and where it lies."""

    name: str
    gfn: int
    page: int


class AccessExplorer(View, w.VBox):
    """The explorer on a workbench with an SNP guest and one without.

    The choices are the traits of `actor`, `vmpl`, `cpl`, `kind`, `c_bit`, `specimen` and `address`; choosing a specimen
    sets the address, which may also be typed. `told` is the last explanation; while the address cannot
    be used, none is shown.
    """

    def __init__(self, bench: Workbench, guest: BareGuest, plain: BareGuest, specimens: Sequence[Specimen]) -> None:
        self.bench, self.specimens = bench, tuple(specimens)
        self.guests = {f"SNP guest, ASID {guest.asid}": guest, _PLAIN: plain}
        actors = [*list(self.guests)[:1], _PLAIN, _HOST, _DEVICE]
        self.actor = _choice("Actor", {name: name for name in actors})
        self.vmpl = _choice("VMPL", {str(n): n for n in range(bench.machine.product.vmpls)})
        self.cpl = _choice("CPL", {"0, kernel": 0, "3, user": USER_CPL})
        self.kind = _choice("Access", _KINDS)
        self.c_bit = _choice("C-bit", _C_BITS)
        self.specimen = _choice("Page", {one.name: one for one in specimens}, 430)
        self.address = AddressField(description="Address")
        self.note = w.Label()
        self.told = self._ask(specimens[0].gfn << PAGE_SHIFT)
        self.result: Panel[Explanation | None] = Panel(_drawn, self.told)
        super().__init__([
            _row(self.actor, self.vmpl, self.cpl), _row(self.kind, self.c_bit), _row(self.specimen),
            _row(self.address, self.note), self.result,
        ])  # fmt: skip
        for choice in (self.actor, self.c_bit, self.specimen):
            choice.observe(self._place, "value")
        for choice in (self.vmpl, self.cpl, self.kind, self.address):
            choice.observe(self._explain, "value")
        self._place()

    def static(self) -> Static:
        chosen = f"<p>{self.note.value}</p>"
        return Static(self.describe(), f"{chosen}{self.result.static().html}")

    def describe(self) -> str:
        """The verdict, or what is wrong with the address, in one line."""
        return self.address.complaint or verdict(self.told).text

    def show(self, **choices: object) -> Static:
        """Make choices by the names of the traits: what the explorer then shows."""
        for name, value in choices.items():
            getattr(self, name).value = value
        return self.result.static()

    def _place(self, _: object = None) -> None:
        """Set the address by what is chosen, switch off what the actor does not have, and explain."""
        actor, one = self.actor.value, self.specimen.value
        by_address = actor in (_HOST, _DEVICE)
        self.vmpl.disabled = self.c_bit.disabled = by_address or actor == _PLAIN
        self.cpl.disabled = by_address
        number = one.page if by_address else one.gfn
        shared = 0 if by_address or self.c_bit.value or actor == _PLAIN else SHARED_WINDOW
        self.note.value = "a system physical address" if by_address else "a guest virtual address"
        self.note.value += f", which reaches GPA {number << PAGE_SHIFT:#x} without the C-bit" if shared else ""
        kinds = list(_KINDS.items())[:2] if by_address else list(_KINDS.items())
        if len(self.kind.options) != len(kinds):
            chosen, self.kind.options = self.kind.value, kinds
            self.kind.value = chosen if chosen in dict(kinds).values() else AccessKind.READ
        address = f"{(number << PAGE_SHIFT) + shared:#x}"
        if address == self.address.value:
            self._explain()
        self.address.value = address

    def _explain(self, _: object = None) -> None:
        try:
            self.told = self._ask(self._checked())
        except ValueError as mistake:
            self.address.complaint = str(mistake)
            self.result.show(None)
            return
        self.address.complaint = ""
        self.result.show(self.told)

    def _checked(self) -> int:
        """The address, where the actor can form it; `ValueError` names the field."""
        address, memory = self.address.number, self.bench.machine.memory.size
        by_address = self.actor.value in (_HOST, _DEVICE)
        if 0 <= address < (memory if by_address else _LIMIT):
            return address
        wanted = f"outside memory, which ends at {memory - 1:#x}" if by_address else "no address of 64 bits"
        raise ValueError(f"{self.address.description}: {address:#x} is {wanted}")

    def _ask(self, address: int) -> Explanation:
        actor, kind = self.actor.value, self.kind.value
        if actor in (_HOST, _DEVICE):
            return (explain_host if actor == _HOST else explain_device)(self.bench.machine, address, kind)
        vmpl = 0 if actor == _PLAIN else self.vmpl.value
        return explain_guest(self.guests[actor].core(vmpl, self.cpl.value), address, kind)


def _drawn(told: Explanation | None) -> Static:
    return explanation(told) if told else Static("no access", "<p>No access.</p>")


def _choice(name: str, options: Mapping[str, object], width: int = 230) -> w.Dropdown:
    return w.Dropdown(options=list(options.items()), description=name, layout=w.Layout(width=f"{width}px"))


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))
