"""The mailbox console: choose a command, fill in its buffer, send it, read what the secure processor answers.

The form knows only layouts; nothing keeps the reader from sending a command in a wrong state, a wrong value, raw bytes
or a number that is no command's. The machine is a `Bench`, the answers are drawn by `snpbook.views`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets as w
import traitlets

from snpbook.firmware.bench import BUFFER, CONTEXT, HANDLE, SPARE, Answer, Bench
from snpbook.firmware.growth import ASID
from snpbook.hardware.exits import HostPageFault, InvalidOpcode
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS, NOT_MODELLED
from snpbook.spec.layout import Field, Layout
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.views import mailbox as views
from snpbook.views.palette import PAGES
from snpbook.views.static import Static
from snpbook.widgets.view import Panel, View

HOST_MOVES: Mapping[PageState, NewState] = {
    PageState.HYPERVISOR: HYPERVISOR,
    PageState.FIRMWARE: FIRMWARE,
    PageState.GUEST_INVALID: NewState(assigned=True, asid=ASID),
    PageState.PRE_GUEST: NewState(assigned=True, asid=ASID, immutable=True),
}
"""What RMPUPDATE makes of a page that is the hypervisor's."""
COMMANDS = tuple(command for command in Command if command not in NOT_MODELLED)
OUTPUT = SPARE + PAGE_SIZE
"""The page into which commands write."""
_DEFAULTS: Mapping[str, int] = {
    "gctx_paddr": CONTEXT, "page_paddr": SPARE, "page": SPARE >> PAGE_SHIFT, "status_paddr": OUTPUT, "asid": ASID,
    "feature_info_paddr": OUTPUT, "policy": DEFAULT_POLICY, "page_type": LaunchPage.NORMAL, "init_rmp": 1,
    "handle": HANDLE, "paddr": SPARE, "len": PAGE_SIZE, "src_paddr": SPARE, "dst_paddr": OUTPUT,
}  # fmt: skip
"""What the form proposes, by the name of a field; other fields are zero, but for the buffer's own length."""
_OWN_DEFAULTS: Mapping[tuple[Command, str], int] = {
    (Command.LAUNCH_START, "handle"): 0, (Command.RECEIVE_START, "handle"): 0, (Command.LAUNCH_START, "policy"): 0,
    (Command.RECEIVE_START, "policy"): 0,
}  # fmt: skip
_NOTHING = Static("no command yet", "<p>No command yet.</p>")


class MailboxConsole(View, w.VBox):
    """A console on a bench. `send()` presses the button: with names of fields it fills in the form first.

    `command`, `number`, `raw` and `at` (the buffer's address) hold what will be sent, `entries` the fields of the form;
    `page`, `becomes` and `gpa` are the operands of the host's RMPUPDATE. `made` is the last answer.
    """

    turn = traitlets.Int()
    """Counts what was done to the machine, so that other widgets can follow."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.made: Answer | None = None
        self.entries: dict[str, w.Widget] = {}
        self.command = w.Dropdown(description="Command", layout=_wide(460))
        self.number = w.Text(description="Number", continuous_update=False, layout=_wide(180))
        self.at = w.Text(f"{BUFFER:#x}", description="Buffer at", continuous_update=False, layout=_wide(220))
        self.raw = w.Text(description="Raw bytes", placeholder="hexadecimal; empty: the fields above",
                          continuous_update=False, layout=_wide(460))  # fmt: skip
        self.button = w.Button(description="Send", tooltip="Write the three registers", layout=_wide(100))
        self.page = w.Text(f"{CONTEXT:#x}", description="Page at", continuous_update=False, layout=_wide(220))
        states = [(PAGES[state].label, state) for state in HOST_MOVES]
        self.becomes = w.Dropdown(options=states, value=PageState.FIRMWARE, description="Becomes", layout=_wide(230))
        self.gpa = w.Text("0x0", description="at GPA", continuous_update=False, layout=_wide(190))
        self.update = w.Button(description="RMPUPDATE", layout=_wide(120))
        self.flush = w.Button(description="WBINVD", tooltip="on every core", layout=_wide(100))
        self.form = w.VBox()
        self.note, self.told = w.Label(), w.HTML()
        self.result: Panel[Answer | None] = Panel(_drawn, None)
        self._offer()
        self._choose()
        self.command.observe(self._choose, "value")
        self.button.on_click(self._pressed)
        self.update.on_click(self._assign)
        self.flush.on_click(self._wbinvd)
        super().__init__([
            _row(self.command, self.number), self.form, _row(self.raw, self.at), _row(self.button, self.note),
            _row(self.page, self.becomes, self.gpa, self.update, self.flush), self.told, self.result,
        ])  # fmt: skip

    def send(self, command: Command | None = None, **fields: Any) -> Static:
        """Choose a command, set fields of its form by their names, and send: what the console then shows.

        A command that is named gets its form afresh; without one the form is sent as it stands.

        `ValueError` for what does not fit the form, `HostPageFault` where the host may not write the buffer.
        """
        if command is not None:
            self.command.value = command
            self._choose()
        for name, value in fields.items():
            if name not in self.entries:
                raise ValueError(
                    f"{self.command.value.name} has no field {name!r}: {', '.join(self.entries) or 'none'}"
                )
            entry = self.entries[name]
            entry.value = _text(value) if isinstance(entry, w.Text) else value
        number = _number("Number", self.number.value)
        made = self.bench.send(number, self._buffer(), address=_number("Buffer at", self.at.value))
        self.told.value = ""
        self.made = made
        self.result.show(made)
        self._offer()
        return self.result.static()

    def assign(self, page: int, becomes: PageState, gpa: int = 0) -> str:
        """The host's RMPUPDATE of the page at that address, for a guest's address: how it ended."""
        new = HOST_MOVES[becomes]
        code = self.bench.assign(page, new, gpa if new.asid else 0)
        self._offer()
        return f"RMPUPDATE of page {page >> PAGE_SHIFT:#x}: {code.name}, it is {PAGES[self.bench.state(page)].label}"

    def static(self) -> Static:
        return Static(self.describe(), self.result.static().html)

    def describe(self) -> str:
        """How the last command ended, and what the states admit now."""
        free = [command.name for command in COMMANDS if not self.bench.obstacle(command)]
        return f"{self.made or _NOTHING.text}\nadmitted now: {len(free)} of {len(COMMANDS)} commands"

    def _offer(self) -> None:
        """The list of commands, each marked by whether the states admit it; and the next turn."""
        chosen = self.command.value or Command.SNP_INIT_EX
        marks = {command: self.bench.obstacle(command) for command in COMMANDS}
        with self.hold_trait_notifications():
            self.command.options = [
                (f"\u2717 {command.name}: {why}" if why else f"\u2713 {command.name}", command)
                for command, why in marks.items()
            ]
            self.command.value = chosen
        self.turn += 1

    def _choose(self, _: object = None) -> None:
        command = self.command.value
        layout = BUFFERS[command]
        self.number.value, self.raw.value = f"{command:#x}", ""
        self.entries = {name: _entry(command, layout, field) for name, field in layout.fields.items()} if layout else {}
        rows = [_row(*list(self.entries.values())[at : at + 3]) for at in range(0, len(self.entries), 3)]
        self.form.children = rows or [w.Label("no buffer: the address registers are zero")]
        self.note.value = str(layout.cite) if layout else ""

    def _buffer(self) -> bytes:
        if self.raw.value.strip():
            try:
                return bytes.fromhex(self.raw.value)
            except ValueError:
                raise ValueError("Raw bytes: pairs of hexadecimal digits, as in 00 10 ff") from None
        layout = BUFFERS[self.command.value]
        return (
            layout.pack(**{name: _read(layout.fields[name], entry) for name, entry in self.entries.items()})
            if layout
            else b""
        )

    def _pressed(self, _: object) -> None:
        try:
            self.send()
        except (ValueError, HostPageFault) as error:
            self.told.value = f"<strong>{error}</strong>"

    def _assign(self, _: object) -> None:
        try:
            page, gpa = _number("Page at", self.page.value), _number("at GPA", self.gpa.value)
            self.told.value = self.assign(page, self.becomes.value, gpa)
        except (ValueError, InvalidOpcode) as error:
            self.told.value = f"<strong>{error}</strong>"

    def _wbinvd(self, _: object) -> None:
        self.bench.host.wbinvd()
        self._offer()
        self.told.value = "WBINVD on every core"


def _entry(command: Command, layout: Layout, field: Field) -> w.Widget:
    """The form's element for a field: a box for a bit, a list for names, else text."""
    value = _OWN_DEFAULTS.get((command, field.name), _DEFAULTS.get(field.name, 0))
    if field.name == "length":
        value = layout.size
    if field.enum is not None:
        names = [(one.name, one) for one in field.enum]
        return w.Dropdown(options=names, value=field.enum(value), description=field.name, layout=_wide(250))
    if field.width == 1:
        return w.Checkbox(bool(value), description=field.name, indent=False, layout=_wide(200))
    text = _text(bytes(field.size) if field.kind == "raw" else value)
    return w.Text(text, description=field.name, continuous_update=False, style={"description_width": "120px"},
                  layout=_wide(300))  # fmt: skip


def _text(value: int | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else f"{value:#x}"


def _read(field: Field, entry: w.Widget) -> int | bytes:
    """What the form's element of a field holds."""
    if not isinstance(entry, w.Text):
        return int(entry.value)
    if field.kind != "raw":
        return _number(field.name, entry.value)
    try:
        return bytes.fromhex(entry.value)
    except ValueError:
        raise ValueError(f"{field.name}: pairs of hexadecimal digits, {field.size} of them") from None


def _number(name: str, text: str) -> int:
    try:
        return int(text.replace("_", ""), 0)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no number; try 0x1000") from None


def _drawn(made: Answer | None) -> Static:
    return views.answer(made) if made else _NOTHING


def _row(*children: w.Widget) -> w.HBox:
    return w.HBox(children, layout=w.Layout(flex_flow="row wrap", align_items="center"))


def _wide(pixels: int) -> w.Layout:
    return w.Layout(width=f"{pixels}px")
