"""Cases of a firmware command with their answers: valid, each check failing, each two, and every state of the world.

Sources: none but the tables of checks; this file only applies their changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product

from tests.reference.firmware_rows import Change, Row, Spec, first_failing, guest, world
from tests.reference.firmware_world import GCTX, LegacyGuest, Request, World


@dataclass(frozen=True)
class Case:
    """A command about to be issued, the status that the sheet gives it, and the row that says so."""

    name: str
    command: str
    world: World
    request: Request
    row: Row | None

    @property
    def status(self) -> int:
        return 0 if self.row is None else self.row.status

    def __str__(self) -> str:
        return f"{self.command}: {self.name} -> {self.status:02X}"


def case(command: str, spec: Spec, name: str, *changes: Change) -> Case:
    """The valid case, changed."""
    w, r = deepcopy(spec.base())
    for change in changes:
        change.act(w, r)
    return Case(name, command, w, r, first_failing(spec, w, r))


def valid(command: str, spec: Spec) -> Case:
    return case(command, spec, "valid")


def single(command: str, spec: Spec) -> Iterator[tuple[Row, Case]]:
    """Every way to fail every check."""
    for row in spec.rows:
        for change in row.changes:
            yield row, case(command, spec, f"{row.name}: {change.name}", change)


def double(command: str, spec: Spec, first: Row, second: Row) -> Case | None:
    """A case in which both checks fail, the earlier one being the answer; nothing where no two changes go together."""
    both = [order for a, b in product(first.changes, second.changes) for order in ((a, b), (b, a))]
    for changes in [*both, *((one,) for one in first.changes)]:
        name = f"{first.name} before {second.name}: {'; '.join(change.name for change in changes)}"
        found = case(command, spec, name, *changes)
        if found.row is first and second.holds(found.world, found.request):
            return found
    return None


def pairs(command: str, spec: Spec) -> Iterator[Case]:
    """Every two checks that can fail together, in order."""
    for index, first in enumerate(spec.rows):
        for second in spec.rows[index + 1 :]:
            if (found := double(command, spec, first, second)) is not None:
                yield found


def neighbours(spec: Spec) -> Iterator[tuple[Row, Row]]:
    """Checks that stand beside each other and answer differently: their order shows."""
    for index, first in enumerate(spec.rows[:-1]):
        second = spec.rows[index + 1]
        if first.status != second.status and not (first.group and first.group == second.group):
            yield first, second


# The states of the world, whatever the command.


def _no_context(w: World, r: Request) -> None:
    if GCTX in w.pages:
        w.pages[GCTX].state = "FIRMWARE"
        w.pages[GCTX].vmsa = False


PLATFORMS = [world(snp=s, legacy=g) for s, g in product(("UNINIT", "INIT"), ("UNINIT", "INIT", "WORKING"))]
GUESTS = [
    Change("no guest", _no_context),
    *[
        guest(gstate=state, asid=asid, imi_en=imi)
        for state, asid, imi in [
            ("INIT", 0, False), ("LAUNCH", 0, False), ("LAUNCH", 1, False), ("LAUNCH", 1, True), ("RUNNING", 0, False),
            ("RUNNING", 1, False),
        ]
    ],
]  # fmt: skip


def _legacy_guest(state: str, asid: int) -> Change:
    return Change(f"guest {state} ASID {asid}", lambda w, r: w.handles.update({1: LegacyGuest(state, asid)}))


LEGACY_GUESTS = [
    Change("no guest", lambda w, r: w.handles.clear()),
    *[
        _legacy_guest(state, asid)
        for state in ("LUPDATE", "LSECRET", "RUNNING", "SUPDATE", "RUPDATE", "SENT")
        for asid in (0, 200)
    ],
]


def _states(spec: Spec) -> list[Change]:
    """The states of the guest that a command names."""
    start, _ = spec.base()
    if GCTX in start.guests:
        return GUESTS
    return LEGACY_GUESTS if start.handles else [Change("", lambda w, r: None)]


def everywhere(command: str, spec: Spec) -> Iterator[Case]:
    """Platform state x guest state x (valid, each field malformed in turn)."""
    for platform, state in product(PLATFORMS, _states(spec)):
        spoilt = [("valid", None), *((row.name, change) for row in spec.rows for change in row.changes)]
        for name, change in spoilt:
            changes = [platform, state, *([change] if change else [])]
            yield case(command, spec, f"{platform.name}, {state.name}, {name}: {change and change.name}", *changes)
