"""ASIDs and their keys: the life cycle per core complex, as ACTIVATE and DF_FLUSH see it.

dirty -DF_FLUSH after WBINVD-> clean -ACTIVATE-> allocated -LAUNCH_FINISH-> in use -DECOMMISSION-> dirty.
Source: firmware 1.55.25 (SNP ABI, SNP_ACTIVATE and SNP_DF_FLUSH).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from snpbook.hardware.machine import Core
from snpbook.spec.asids import CORES_PER_CCX, AsidState
from snpbook.spec.status import Status, require


class Asids:
    """The state of each ASID on each core complex."""

    def __init__(self, cores: list[Core], limit: int, min_sev_asid: int) -> None:
        self._complexes = [cores[i : i + CORES_PER_CCX] for i in range(0, len(cores), CORES_PER_CCX)]
        self.limit, self.min_sev_asid = limit, min_sev_asid
        self.complexes = len(self._complexes)
        self.states = np.full((self.complexes, limit + 1), AsidState.CLEAN, np.uint8)

    def __repr__(self) -> str:
        used = int((self.states == AsidState.IN_USE).any(0).sum())
        return f"Asids({self.limit} per complex, {used} in use)"

    def all_dirty(self) -> None:
        """After SNP_INIT every ASID may have lines in caches."""
        self.states[:] = AsidState.DIRTY
        for complex_ in self._complexes:
            self._forget(complex_)

    def df_flush(self) -> None:
        """Dirty -> clean on each complex whose cores have all done WBINVD; WBINVD_REQUIRED if one has not."""
        missing = 0
        for complex_, states in zip(self._complexes, self.states, strict=True):
            if all(core.wbinvd_done for core in complex_):
                states[states == AsidState.DIRTY] = AsidState.CLEAN
            else:
                missing += 1
        require(missing == 0, Status.WBINVD_REQUIRED, "every core has done WBINVD", 0, missing)

    def check_activate(self, asid: int, current: int, *, again: bool = False) -> None:
        """The checks of ACTIVATE for an SNP guest that has ASID `current` (0: none), in order.

        `again` is ACTIVATE_EX, by which a guest may take its own ASID on further complexes.
        """
        require(0 < asid <= self.limit, Status.INVALID_ASID, "ASID in range", f"1..{self.limit}", asid)
        own, states = again and asid == current, self.states[:, asid]
        owned = np.isin(states, (AsidState.ALLOCATED, AsidState.IN_USE)).any()
        require(own or not owned, Status.ASID_OWNED, "ASID is free", "free", "owned")
        require(own or current == 0, Status.ACTIVE, "guest has no ASID yet", 0, current)
        dirty = (states == AsidState.DIRTY).any()
        require(not dirty, Status.DF_FLUSH_REQUIRED, "ASID is clean on every complex", "clean", "dirty")
        below = asid < self.min_sev_asid
        require(below, Status.INVALID_ASID, "ASID is one for SEV-ES and SNP", f"below {self.min_sev_asid}", asid)

    def take(self, asid: int, state: AsidState, complexes: Iterable[int]) -> None:
        """The ASID is a guest's on some complexes: allocated while it launches, then in use."""
        self.states[list(complexes), asid] = state

    def finish(self, asid: int) -> None:
        """The launch is over: where the ASID was allocated it is in use."""
        states = self.states[:, asid]
        states[states == AsidState.ALLOCATED] = AsidState.IN_USE

    def release(self, asid: int) -> None:
        """The guest is gone: complexes that used the ASID are dirty, merely allocated ones clean."""
        for complex_, states in zip(self._complexes, self.states, strict=True):
            if states[asid] == AsidState.IN_USE:
                states[asid] = AsidState.DIRTY
                self._forget(complex_)
            elif states[asid] == AsidState.ALLOCATED:
                states[asid] = AsidState.CLEAN

    def _forget(self, complex_: list[Core]) -> None:
        for core in complex_:
            core.wbinvd_done = False
