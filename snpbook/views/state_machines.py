"""The state machines of platforms and guests as pictures, with the state in which a machine is now marked.

Arrows and commands come from the tables in `spec.states`; this file only knows where each state is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from snpbook.spec.commands import Command
from snpbook.spec.states import (
    AFTER_LAST_GUEST,
    GUEST_IN_ANY_STATE,
    GUEST_TRANSITIONS,
    LEGACY_GUEST_IN_ANY_STATE,
    LEGACY_GUEST_TRANSITIONS,
    LEGACY_PLATFORM_TRANSITIONS,
    PLATFORM_TRANSITIONS,
    GuestState,
    LegacyGuestState,
    LegacyPlatformState,
    PlatformState,
)
from snpbook.views.diagram import HALO, Box, ends, head, line
from snpbook.views.palette import LIGHT
from snpbook.views.static import Static
from snpbook.views.svg import document, element, image, words
from snpbook.views.tables import Markup, table

State = TypeVar("State", bound=IntEnum)
Move = tuple[IntEnum, Command, IntEnum]
_WIDE, _HIGH, _WIDTH, _MARGIN = 108, 44, 760, 56
_APART, _LEADING = 34, 12


@dataclass(frozen=True, slots=True)
class Machine:
    """A state machine: its moves, where its states are drawn, and what its table does not say.

    `others` are commands that begin or end it, or look at it in any state.
    """

    title: str
    moves: Sequence[Move]
    places: Mapping[IntEnum, tuple[int, int]]
    note: str
    others: Sequence[Command] = ()

    @property
    def commands(self) -> list[Command]:
        """All its commands, in the order of their numbers."""
        return sorted({command for _, command, _ in self.moves}.union(self.others))


def _moves(table: Mapping[tuple[State, Command], State]) -> list[Move]:
    return [(source, command, target) for (source, command), target in table.items()]


_P, _G, _L, _H = PlatformState, GuestState, LegacyPlatformState, LegacyGuestState

MACHINES = {
    "snp": Machine(
        "The SNP platform", _moves(PLATFORM_TRANSITIONS), {_P.UNINIT: (180, 64), _P.INIT: (580, 64)},
        "Most other SNP commands want INIT; a few are admitted in both states.",
    ),
    "guest": Machine(
        "An SNP guest", _moves(GUEST_TRANSITIONS),
        {_G.INIT: (90, 48), _G.LAUNCH: (380, 48), _G.RUNNING: (670, 48)},
        "SNP_GCTX_CREATE makes a guest in INIT, SNP_DECOMMISSION ends it in any state; messages of migration are left "
        "out.",
        (Command.SNP_GCTX_CREATE, *GUEST_IN_ANY_STATE),
    ),
    "legacy": Machine(
        "The legacy platform",
        [*_moves(LEGACY_PLATFORM_TRANSITIONS), (_L.WORKING, Command.DECOMMISSION, AFTER_LAST_GUEST)],
        {_L.UNINIT: (90, 48), _L.INIT: (380, 178), _L.WORKING: (670, 48)},
        "DECOMMISSION leads to INIT with the last guest.",
    ),
    "legacy_guest": Machine(
        "A legacy guest", _moves(LEGACY_GUEST_TRANSITIONS),
        {
            _H.UNINIT: (66, 48), _H.LUPDATE: (262, 48), _H.LSECRET: (482, 48), _H.RUNNING: (482, 178),
            _H.RUPDATE: (170, 178), _H.SUPDATE: (694, 178), _H.SENT: (694, 48),
        },
        "DECOMMISSION ends a guest in any state.", tuple(LEGACY_GUEST_IN_ANY_STATE),
    ),
}  # fmt: skip
"""By the names of `Standing`'s fields."""


def state_machine(name: str, current: IntEnum | None) -> Static:
    """The machine of that name with the state `current` marked, and its moves as rows; None: it does not exist yet."""
    machine = MACHINES[name]
    steps = _grouped(machine)
    rows = [
        (f"{source.name}, now" if source is current else source.name, target.name, ", ".join(map(_name, commands)))
        for (source, target), commands in steps.items()
    ]
    where = "not there yet" if current is None else f"in {current.name}"
    note = f"\u21ba counts the commands that leave the state as it is. {machine.note}"
    listing = table(f"{machine.title}, {where}", ["from", "to", "by"], rows, note=note)
    alt = f"{machine.title} is {where}; {len(rows)} arrows between its states, which the table below lists."
    html = f"<details><summary>Its {len(rows)} moves as a table</summary>{listing.html}</details>"
    title = f'<p style="margin:4px 0"><strong>{machine.title}, {where}</strong></p>'
    return Static(listing.text, title + Markup(image(_picture(machine, steps, current), alt), alt) + html)


def _grouped(machine: Machine) -> dict[tuple[IntEnum, IntEnum], list[Command]]:
    found: dict[tuple[IntEnum, IntEnum], list[Command]] = {}
    for source, command, target in machine.moves:
        found.setdefault((source, target), []).append(command)
    return found


def _name(command: Command) -> str:
    return command.name.removeprefix("SNP_")


def _picture(machine: Machine, steps: Mapping[tuple[IntEnum, IntEnum], list[Command]], current: IntEnum | None) -> str:
    boxes = {state: Box(x, y, _WIDE, _HIGH) for state, (x, y) in machine.places.items()}
    lines, labels = [], []
    for (source, target), commands in steps.items():
        if source is target:
            continue
        both = (target, source) in steps
        shift = (_APART if source < target else -_APART) / 2 if both else 0
        start, stop = ends(boxes[source], boxes[target], -shift)
        lines.append(line(f"M{start[0]:.6g} {start[1]:.6g}L{stop[0]:.6g} {stop[1]:.6g}"))
        x, y = (start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2
        names = list(map(_name, commands))
        first = y - 6 - _LEADING * (len(names) - 1) if shift >= 0 else y + 14
        labels += [words(name, x, first + _LEADING * n, font_size=10, fill=LIGHT.text, **HALO)
                   for n, name in enumerate(names)]  # fmt: skip
    nodes = [_node(box, state, len(steps.get((state, state), ())), state is current) for state, box in boxes.items()]
    height = max(box.y for box in boxes.values()) + _MARGIN
    return document(_WIDTH, height, element("defs", head()), *lines, *nodes, *labels)


def _node(box: Box, state: IntEnum, staying: int, now: bool) -> str:
    fill, ink = (LIGHT.text, LIGHT.surface) if now else (LIGHT.surface, LIGHT.text)
    shape = element("rect", x=box.x - box.width / 2, y=box.y - box.height / 2, width=box.width, height=box.height,
                    rx=7, fill=fill, stroke=LIGHT.text, stroke_width=3 if now else 1.5)  # fmt: skip
    name = words(f"\u25cf {state.name}" if now else state.name, box.x, box.y - 1, fill=ink, font_weight=600,
                 text_anchor="middle")  # fmt: skip
    stay = f"\u21ba {staying} command{'s' * (staying > 1)}" if staying else ""
    return shape + name + words(stay, box.x, box.y + 14, fill=ink, font_size=10, text_anchor="middle")
