"""What the oracle expects the event of a command to tell of states beside pages: the difference of two worlds."""

from __future__ import annotations

from typing import Any

from snpbook.trace import FirmwareCommand
from tests.reference.firmware_world import World

Told = dict[tuple[str, Any], tuple[str, str]]


def told(event: FirmwareCommand) -> Told:
    """What an event tells, ASIDs one by one."""
    found: Told = {}
    for one in event.states:
        names = tuple("none" if state is None else state.name for state in (one.before, one.after))
        places = [tuple(pair) for pair in one.where.tolist()] if one.what == "ASIDs" else [one.where]
        found |= {(one.what, place): (names[0], names[1]) for place in places}
    return found


def expected(before: World, after: World) -> Told:
    """The states that differ."""
    old, new = _states(before), _states(after)
    absent = {"guest": "none", "legacy guest": "UNINIT", "ASIDs": "CLEAN"}
    pairs = {
        key: (old.get(key, absent.get(key[0], "")), new.get(key, absent.get(key[0], ""))) for key in {**old, **new}
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _states(w: World) -> dict[tuple[str, Any], str]:
    states: dict[tuple[str, Any], str] = {("SNP platform", None): w.snp, ("legacy platform", None): w.legacy}
    states |= {("guest", at): one.gstate for at, one in w.guests.items() if w.at(at).state == "CONTEXT"}
    states |= {("legacy guest", handle): one.state for handle, one in w.handles.items()}
    for number, asids in enumerate(w.asids):
        states |= {("ASIDs", (number, asid)): state for asid, state in asids.items() if asid}
    return states
