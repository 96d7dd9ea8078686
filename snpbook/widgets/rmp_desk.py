"""The RMP desk: a map on which pages are selected, and the six instructions with their operands as a form below it.

The form only collects an order; the workbench carries it out, and the answers are drawn by `snpbook.views`. What the
product or the operands rule out is shown and disabled, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import ipywidgets as w

from snpbook.hardware.attempts import GUEST_INSTRUCTIONS, HOST_INSTRUCTIONS, Attempt, Order, attempt
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.hardware.reasons import rights
from snpbook.hardware.workbench import PLAY, Workbench
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, VmplPermission
from snpbook.spec.rmp import GFN_LIMIT
from snpbook.views import attempt as views
from snpbook.views.page import entry_fields
from snpbook.views.static import Static
from snpbook.widgets.address_field import AddressField
from snpbook.widgets.rmpmap import RmpMap
from snpbook.widgets.view import Panel, View

SIZES = {"4 KB": False, "2 MB": True}
ASIDS = (1, 2)
"""The guests of the desk."""
_TO_HOST, _TO_FIRMWARE = "hypervisor", "firmware"
_NOTHING = Static("no instruction executed", "<p>No instruction executed.</p>")


class RmpDesk(View, w.VBox):
    """The desk on a workbench. `map` selects; each instruction is a button named like it, `execute(name)` presses it.

    The operands are the traits of `gpa`, `size`, `owner`, `immutable`, `asid`, `vmpl`, `validate`, `target`, `rights`
    and `vmsa`. `made` is the last attempt, None where nothing was executed, as for an address that cannot be used.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.made: Attempt | None = None
        title = f"RMP of {bench.machine.product.name}"
        self.map = RmpMap(self._states(), first_pfn=PLAY.start, lookup=self._fields, title=title, selects=True)
        self.gpa = AddressField(value="0x10000", description="First GPA")
        self.size = w.Dropdown(options=list(SIZES.items()), description="Size", layout=_wide(150))
        self.owner = w.Dropdown(options=list(_owners().items()), description="Becomes", layout=_wide(230))
        self.immutable = _box("immutable")
        self.asid = w.Dropdown(options=ASIDS, description="Guest ASID", layout=_wide(150))
        self.vmpl = w.Dropdown(options=range(bench.machine.product.vmpls), description="at VMPL", layout=_wide(140))
        doings = [("validate", True), ("rescind", False)]
        self.validate = w.Dropdown(options=doings, description="Do", layout=_wide(180))
        self.target = w.Dropdown(options=range(4), value=1, description="Target VMPL", layout=_wide(150))
        self.rights = {right: _box(rights(right)) for right in VmplPermission}
        self.vmsa = _box("VMSA")
        self.buttons = {name: _button(name) for name in (*HOST_INSTRUCTIONS, *GUEST_INSTRUCTIONS)}
        self.result: Panel[Attempt | None] = Panel(_drawn, None)
        self.entry: Panel[tuple[Attempt | None, int]] = Panel(_changed, (None, 0))
        for name, button in self.buttons.items():
            button.on_click(partial(self._pressed, name))
        self.map.observe(self._point, "cursor")
        super().__init__([self.map, *self._form(), self.result, self.entry])

    def order(self, instruction: str) -> Order:
        """The order that the form holds; `ValueError` for an address that is no page's. Pages of no guest have none."""
        gfn, new = self._page_number(), self._new()
        if instruction in HOST_INSTRUCTIONS and not new.asid:
            gfn = 0
        order = Order(
            instruction, self.map.chosen, gfn, new, self.asid.value, self.vmpl.value, self.size.value,
            self.validate.value, self.target.value, self._rights(), self.vmsa.value,
        )  # fmt: skip
        if order.gfns[-1] >= GFN_LIMIT:
            name, first, last = self.gpa.description, gfn << PAGE_SHIFT, GFN_LIMIT - 1 << PAGE_SHIFT
            what = f"{first:#x} is" if gfn >= GFN_LIMIT else f"{first:#x} is, for {len(order.gfns)} pages,"
            raise ValueError(f"{name}: {what} too large; the last page is at {last:#x}")
        return order

    def execute(self, instruction: str, **operands: Any) -> Static:
        """Set operands by their names, carry out the order on the selected pages: what the desk then shows.

        `rights` is a `VmplPermission`; `owner` an ASID as text, "firmware" or "hypervisor".
        """
        granted = operands.pop("rights", self._rights())
        for right, box in self.rights.items():
            box.value = bool(granted & right)
        for name, value in operands.items():
            getattr(self, name).value = value
        self.made = attempt(self.bench, self.order(instruction))
        self.map.update(self._states())
        self.gpa.complaint = ""
        self.result.show(self.made)
        refused = self.made.refused
        self.entry.show((self.made, refused.page if refused else self.map.cursor))
        return self.result.static()

    def static(self) -> Static:
        shown = [self.map.static(), self.result.static(), self.entry.static()]
        return Static(self.describe(), "".join(part.html for part in shown))

    def describe(self) -> str:
        """The map in words, and how the last instruction ended."""
        return f"{self.map.describe()}\n{self.made or _NOTHING.text}"

    def _pressed(self, instruction: str, _: w.Button) -> None:
        try:
            self.execute(instruction)
        except ValueError as error:
            self.gpa.complaint = str(error)
            self.made = None
            self.result.show(None)
            self._point()

    def _page_number(self) -> int:
        """The guest page number of the address as typed."""
        address = self.gpa.number
        if address % PAGE_SIZE or address < 0:
            wanted = f"no page's address, which is a multiple of {PAGE_SIZE:#x}"
            raise ValueError(f"{self.gpa.description}: {address:#x} is {wanted}")
        return address >> PAGE_SHIFT

    def _new(self) -> NewState:
        """RMPUPDATE's operand."""
        if self.owner.value in (_TO_HOST, _TO_FIRMWARE):
            plain = HYPERVISOR if self.owner.value == _TO_HOST else FIRMWARE
            return NewState(plain.assigned, 0, self.immutable.value, self.size.value)
        return NewState(True, int(self.owner.value), self.immutable.value, self.size.value)

    def _rights(self) -> VmplPermission:
        return VmplPermission(sum(right for right, box in self.rights.items() if box.value))

    def _states(self) -> Any:
        return self.bench.machine.rmp.states(PLAY)

    def _fields(self, pfn: int) -> Mapping[str, object]:
        return entry_fields(self.bench.machine.rmp.entry(pfn))

    def _point(self, _: object = None) -> None:
        self.entry.show((self.made, self.map.cursor))

    def _form(self) -> list[w.Widget]:
        press = {name: w.HBox([button], layout=_wide(130)) for name, button in self.buttons.items()}
        for name, button in self.buttons.items():
            button.disabled = name not in self.bench.machine.product.instructions
        host = [
            _row(press["RMPUPDATE"], self.owner, self.immutable),
            _row(press["PSMASH"], _note("makes 512 entries of 4 KB of one of 2 MB")),
            _row(press["RMPREAD"], _note(self._lack("RMPREAD") or "reads the entry in its architectural form")),
        ]
        guest = [
            _row(self.asid, self.vmpl, self.target),
            _row(press["PVALIDATE"], self.validate),
            _row(press["RMPADJUST"], *self.rights.values(), self.vmsa),
            _row(press["RMPQUERY"], _note(self._lack("RMPQUERY") or "tells the rights of the target VMPL")),
        ]
        common = _row(self.gpa, self.size, _note("of the selected pages, for the host and for the guest"))
        return [common, _group("The host", host), _group("A guest", guest)]

    def _lack(self, name: str) -> str:
        product = self.bench.machine.product
        return "" if name in product.instructions else f"not on {product.title}: CPUID does not list it"


def _owners() -> Mapping[str, str]:
    """What RMPUPDATE can make of pages, in words."""
    guests = {f"guest, ASID {asid}": str(asid) for asid in ASIDS}
    return {**guests, "firmware, ASID 0": _TO_FIRMWARE, "hypervisor, not assigned": _TO_HOST}


def _drawn(made: Attempt | None) -> Static:
    return views.attempt(made) if made else _NOTHING


def _changed(shown: tuple[Attempt | None, int]) -> Static:
    made, page = shown
    return views.change(made, page) if made else Static("", "")


def _button(name: str) -> w.Button:
    return w.Button(description=name, tooltip=f"Execute {name} on the selected pages", layout=_wide(120))


def _box(name: str) -> w.Checkbox:
    return w.Checkbox(description=name, indent=False, layout=w.Layout(width="auto", margin="0 14px 0 8px"))


def _note(text: str) -> w.Label:
    return w.Label(text)


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _group(title: str, rows: list[w.Widget]) -> w.VBox:
    border = "1px solid var(--jp-border-color2, gray)"
    layout = w.Layout(border_left=border, padding="0 0 0 8px", margin="4px 0")
    return w.VBox([w.HTML(f"<strong>{title}</strong>"), *rows], layout=layout)


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
