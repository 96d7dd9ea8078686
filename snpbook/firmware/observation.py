"""What a command moves beside pages: platforms, guests and ASIDs before and after, for the command's event.

Nothing here is part of the secure processor: without listeners nobody looks. Pages are told by `pages.store_entries`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from snpbook.spec.asids import AsidState
from snpbook.spec.states import GuestState, LegacyGuestState, LegacyPlatformState, PlatformState
from snpbook.trace import StateChange

if TYPE_CHECKING:
    from snpbook.firmware.processor import SecureProcessor

_NO_GUEST = LegacyGuestState.UNINIT


@dataclass(slots=True)
class Before:
    """The states as a command finds them. Those of SNP guests are collected when it opens and saves their contexts."""

    snp: PlatformState
    legacy: LegacyPlatformState
    handles: dict[int, LegacyGuestState]
    asids: NDArray[np.uint8]
    guests: dict[int, tuple[GuestState | None, GuestState | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, psp: SecureProcessor) -> Before:
        return cls(psp.state, psp.legacy.state, _handles(psp), psp.asids.states.copy())

    def found(self, gctx: int, state: GuestState) -> None:
        """A guest's context was opened."""
        self.guests.setdefault(gctx, (state, state))

    def left(self, gctx: int, state: GuestState | None) -> None:
        """A guest's context was saved, or is none any more."""
        self.guests[gctx] = self.guests.get(gctx, (None, None))[0], state

    def changes(self, psp: SecureProcessor) -> tuple[StateChange, ...]:
        """What is different now, in the order of platforms, guests, ASIDs."""
        after = _handles(psp)
        pairs = [("SNP platform", None, self.snp, psp.state), ("legacy platform", None, self.legacy, psp.legacy.state)]
        moved = [StateChange(what, where, old, new) for what, where, old, new in pairs if old is not new]
        moved += [StateChange("guest", gctx, *states) for gctx, states in self.guests.items() if states[0] != states[1]]
        for handle in sorted(self.handles | after):
            old, new = self.handles.get(handle, _NO_GUEST), after.get(handle, _NO_GUEST)
            if old is not new:
                moved.append(StateChange("legacy guest", handle, old, new))
        return (*moved, *_asid_changes(self.asids, psp.asids.states))


def _handles(psp: SecureProcessor) -> dict[int, LegacyGuestState]:
    return {handle: guest.state for handle, guest in psp.legacy.guests.items()}


def _asid_changes(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> list[StateChange]:
    """One change for all ASIDs that go the same way; ASID 0 is the host's."""
    where = np.argwhere(before != after)
    where = where[where[:, 1] > 0]
    if not len(where):
        return []
    ways = np.stack([states[where[:, 0], where[:, 1]] for states in (before, after)], axis=1)
    return [
        StateChange("ASIDs", where[(ways == way).all(axis=1)], *(AsidState(int(state)) for state in way))
        for way in np.unique(ways, axis=0)
    ]
