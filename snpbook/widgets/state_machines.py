"""The state machines as a panel: where each stands, and a button for each command, pressed where its state admits it.

The panel follows a mailbox console and sends through it, so that both always speak of the same machine.
"""

from __future__ import annotations

from functools import partial

import ipywidgets as w

from snpbook.hardware.exits import HostPageFault
from snpbook.spec.commands import Command
from snpbook.spec.pages import PAGE_SHIFT, PageState
from snpbook.spec.swap import SwapType
from snpbook.spec.transitions import PAGE_TRANSITIONS, Mover
from snpbook.views.palette import PAGES
from snpbook.views.state_machines import MACHINES, state_machine
from snpbook.views.states import page_life
from snpbook.views.static import Static
from snpbook.widgets.mailbox_console import HOST_MOVES, OUTPUT, MailboxConsole
from snpbook.widgets.view import Panel, View

PAGE = "page"
_TITLES = {**{name: machine.title for name, machine in MACHINES.items()}, PAGE: "A page"}
_OPERAND = {
    Command.SNP_GCTX_CREATE: "gctx_paddr", Command.SNP_DECOMMISSION: "gctx_paddr",
    Command.SNP_LAUNCH_UPDATE: "page_paddr", Command.SNP_PAGE_RECLAIM: "page", Command.SNP_PAGE_MD_INIT: "page_paddr",
    Command.SNP_PAGE_SWAP_OUT: "src_paddr", Command.SNP_PAGE_SWAP_IN: "dst_paddr", Command.SNP_PAGE_MOVE: "src_paddr",
    Command.SNP_PAGE_UNSMASH: "page_paddr",
}  # fmt: skip
"""The field by which each command that moves a page names it; the others have it in a list, a message or a buffer."""
_GIVEN = {
    Command.SNP_PAGE_SWAP_OUT: {"root_mdata_en": 1, "dst_paddr": OUTPUT},
    Command.SNP_PAGE_SWAP_IN: {"root_mdata_en": 1, "src_paddr": OUTPUT},
    Command.SNP_PAGE_MOVE: {"dst_paddr": OUTPUT},
}
"""Their other operands: a swapped page goes to one page and comes back from there, its entry is in the context."""
_SWAPS = (Command.SNP_PAGE_SWAP_OUT, Command.SNP_PAGE_SWAP_IN)


class StateMachines(View, w.VBox):
    """The panel of a console. `machine` chooses what is shown, `page` the page by its address; `press(name)` presses.

    `buttons` holds those of the machine that is shown, by the names of commands and, for a page, of host's moves.
    """

    def __init__(self, console: MailboxConsole) -> None:
        self.console = console
        options = [(title, name) for name, title in _TITLES.items()]
        self.machine = w.Dropdown(options=options, description="Machine", layout=w.Layout(width="300px"))
        self.page = w.Text(console.page.value, description="Page at", continuous_update=False)
        self.picture: Panel[None] = Panel(self._picture, None)
        self.buttons: dict[str, w.Button] = {}
        self.board = w.Box(layout=w.Layout(flex_flow="row wrap"))
        self.told = w.HTML()
        super().__init__([w.HBox([self.machine, self.page]), self.picture, self.board, self.told])
        self.machine.observe(self._follow, "value")
        self.page.observe(self._follow, "value")
        console.observe(self._follow, "turn")
        self._follow()

    def press(self, name: str) -> Static:
        """Press a button by its name: what the panel then shows. `ValueError` for one that is off or not there."""
        button = self.buttons.get(name)
        if button is None or button.disabled:
            raise ValueError(f"{name}: {button.tooltip if button else 'no button of this machine'}")
        self._pressed(name, button)
        return self.static()

    def static(self) -> Static:
        free = [name for name, button in self.buttons.items() if not button.disabled]
        words = f"admitted now: {', '.join(free) or 'nothing'}"
        shown = self.picture.static()
        return Static(f"{shown.text}\n{words}", f"{shown.html}<p>{words}</p>")

    @property
    def page_state(self) -> PageState:
        """The state of the page that is named."""
        return self.console.bench.state(self._address())

    def _address(self) -> int:
        return int(self.page.value.replace("_", ""), 0)

    def _picture(self, _: None) -> Static:
        name = self.machine.value
        if name == PAGE:
            return page_life(self.page_state)
        return state_machine(name, getattr(self.console.bench.standing(), name))

    def _follow(self, _: object = None) -> None:
        """Draw again, and make the buttons of the machine that is shown."""
        shown = self.machine.value
        self.page.layout.visibility = "visible" if shown == PAGE else "hidden"
        try:
            self.picture.show(None)
            moves = self._page_moves() if shown == PAGE else self._commands(shown)
        except (ValueError, IndexError) as error:
            self.told.value = f"<strong>Page at: {error}</strong>"
            return
        self.told.value = ""
        self.buttons = {name: self._button(name, why) for name, why in moves.items()}
        self.board.children = tuple(self.buttons.values())

    def _commands(self, shown: str) -> dict[str, str]:
        return {command.name: self.console.bench.obstacle(command) for command in MACHINES[shown].commands}

    def _page_moves(self) -> dict[str, str]:
        """Firmware commands and RMPUPDATEs that move a page, with what keeps them from moving this one."""
        state, bench = self.page_state, self.console.bench
        known = {(one.source, one.by) for one in PAGE_TRANSITIONS if one.mover is Mover.FIRMWARE}
        reached = {(one.source, one.target) for one in PAGE_TRANSITIONS if one.mover is Mover.HOST}
        wrong = f"the page is {PAGES[state].label}"
        moves = {
            command.name: bench.obstacle(command) if (state, command.name) in known else wrong for command in _OPERAND
        }
        return moves | {_update(target): "" if (state, target) in reached else wrong for target in HOST_MOVES}

    def _button(self, name: str, why: str) -> w.Button:
        button = w.Button(description=name, disabled=bool(why), tooltip=why or f"Do {name}")
        button.layout = w.Layout(width="auto")
        button.on_click(partial(self._pressed, name))
        return button

    def _pressed(self, name: str, _: w.Button) -> None:
        told = ""
        try:
            told = self._do(name)
        except (ValueError, HostPageFault) as error:
            told = f"<strong>{error}</strong>"
        self._follow()
        self.told.value = told

    def _do(self, name: str) -> str:
        targets = {_update(target): target for target in HOST_MOVES}
        if name in targets:
            return self.console.assign(self._address(), targets[name])
        command, fields = Command[name], {}
        if self.machine.value == PAGE:
            operand = _OPERAND[command]
            fields = {operand: self._address() >> (PAGE_SHIFT if operand == "page" else 0), **_GIVEN.get(command, {})}
            if command in _SWAPS:
                own = self.page_state in (PageState.METADATA, PageState.FIRMWARE)
                fields["page_type"] = SwapType.METADATA if own else SwapType.DATA
        self.console.send(command, **fields)
        return str(self.console.made)


def _update(target: PageState) -> str:
    return f"RMPUPDATE to {PAGES[target].label}"
