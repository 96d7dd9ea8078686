"""ASIDs and their keys: the life cycle per core complex, which SNP and legacy guests share.

dirty -DF_FLUSH after WBINVD-> clean -ACTIVATE-> allocated -LAUNCH_FINISH-> in use -DECOMMISSION-> dirty: the table is
`ASID_TRANSITIONS`. Only this file fires it, and tells the hardware on which complexes VMRUN takes an ASID. Source:
firmware 1.55.25 (SNP ABI, SNP_ACTIVATE and SNP_DF_FLUSH).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.machine import Machine
from snpbook.spec.asids import ASID_TRANSITIONS, CORES_PER_CCX, AsidEvent, AsidState, GuestKind
from snpbook.spec.status import FirmwareRefusal, Status, require

_AFTER: dict[AsidEvent, NDArray[np.uint8]] = {
    event: np.array([ASID_TRANSITIONS.get((state, event), state) for state in AsidState], np.uint8)
    for event in AsidEvent
}


class Asids:
    """The state of each ASID on each core complex."""

    def __init__(self, machine: Machine, limit: int, min_sev_asid: int) -> None:
        self._machine, cores = machine, machine.cores
        self._complexes = [cores[i : i + CORES_PER_CCX] for i in range(0, len(cores), CORES_PER_CCX)]
        self.limit, self.min_sev_asid = limit, min_sev_asid
        self.hidden = 0
        """ASIDs from 1 to this one are SNP guests' alone: ciphertext hiding. 0 where SEV-ES guests share theirs."""
        self.complexes = len(self._complexes)
        self.states = np.full((self.complexes, limit + 1), AsidState.CLEAN, np.uint8)

    def __repr__(self) -> str:
        used = int((self.states == AsidState.IN_USE).any(0).sum())
        return f"Asids({self.limit} per complex, {used} in use)"

    @property
    def all_clean(self) -> bool:
        """Whether no ASID is used or dirty anywhere: what a shutdown of SNP wants."""
        return not (self.states[:, 1:] != AsidState.CLEAN).any()

    def owned_by(self, kind: GuestKind) -> range:
        """The ASIDs that guests of one kind may have."""
        return {
            GuestKind.SNP: range(1, self.hidden + 1 if self.hidden else self.min_sev_asid),
            GuestKind.SEV_ES: range(self.hidden + 1, self.min_sev_asid),
            GuestKind.SEV: range(self.min_sev_asid, self.limit + 1),
        }[kind]

    # Activation.

    def check_activate(
        self,
        asid: int,
        current: int,
        *,
        again: bool = False,
        kind: GuestKind = GuestKind.SNP,
        gone: FirmwareRefusal | None = None,
    ) -> None:
        """The checks of ACTIVATE for a guest that has ASID `current` (0: none), in order.

        `again` is ACTIVATE_EX, by which a guest may take its own ASID on further complexes. `gone` refuses a guest
        that was sent away, between the checks. An ASID that is not clean is dirty or owned: those have answered.
        """
        require(0 < asid <= self.limit, Status.INVALID_ASID, "ASID in range", f"1..{self.limit}", asid)
        own, states = again and asid == current, self.states[:, asid]
        owned = np.isin(states, (AsidState.ALLOCATED, AsidState.IN_USE)).any()
        require(own or not owned, Status.ASID_OWNED, "ASID is free", "free", "owned")
        require(own or current == 0, Status.ACTIVE, "guest has no ASID yet", 0, current)
        if gone is not None:
            raise gone
        dirty = (states == AsidState.DIRTY).any()
        require(not dirty, Status.DF_FLUSH_REQUIRED, "ASID is clean on every complex", "clean", "dirty")
        asids = self.owned_by(kind)
        require(asid in asids, Status.INVALID_ASID, f"ASID of {kind.value}", f"{asids.start}..{asids.stop - 1}", asid)

    def activate(self, asid: int, *, running: bool, complexes: Iterable[int] | None = None) -> None:
        """Give the ASID to a guest, on all complexes or on some; only one that is past its launch may run at once."""
        event = AsidEvent.ACTIVATE_RUNNING if running else AsidEvent.ACTIVATE_LAUNCHING
        self._fire(event, asid, range(self.complexes) if complexes is None else complexes)

    def finish(self, asid: int) -> None:
        """The launch is over: where the ASID was allocated it is in use."""
        self._fire(AsidEvent.FINISH, asid, range(self.complexes))

    def release(self, asid: int) -> None:
        """The guest is gone: complexes that used the ASID are dirty and must do WBINVD, merely allocated ones clean."""
        for number in np.flatnonzero(self.states[:, asid] == AsidState.IN_USE).tolist():
            self._forget(number)
        self._fire(AsidEvent.RELEASE, asid, range(self.complexes))

    # All of them.

    def all_dirty(self) -> None:
        """After initialisation every ASID may have lines in caches."""
        self.states[:] = _AFTER[AsidEvent.INITIALISE][self.states]
        self._machine.runnable.clear()
        for number in range(self.complexes):
            self._forget(number)

    def df_flush(self) -> None:
        """Dirty -> clean on each complex whose cores have all done WBINVD; WBINVD_REQUIRED if one has not."""
        missing = 0
        for complex_, states in zip(self._complexes, self.states, strict=True):
            if all(core.wbinvd_done for core in complex_):
                states[:] = _AFTER[AsidEvent.FLUSH][states]
            else:
                missing += 1
        require(missing == 0, Status.WBINVD_REQUIRED, "every core has done WBINVD", 0, missing)

    def _fire(self, event: AsidEvent, asid: int, complexes: Iterable[int]) -> None:
        numbers = list(complexes)
        self.states[numbers, asid] = _AFTER[event][self.states[numbers, asid]]
        in_use = frozenset(np.flatnonzero(self.states[:, asid] == AsidState.IN_USE).tolist())
        self._machine.runnable.pop(asid, None)
        if in_use:
            self._machine.runnable[asid] = in_use

    def _forget(self, number: int) -> None:
        for core in self._complexes[number]:
            core.wbinvd_done = False
