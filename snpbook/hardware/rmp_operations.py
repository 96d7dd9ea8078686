"""PVALIDATE, RMPADJUST and RMPQUERY as a guest program awaits them: runs of pages that go on where they stopped.

Pages already done stay done: after a fault the run goes on with the page that faulted. Sources: those of `core_rmp`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from snpbook.hardware.core import GuestCore
from snpbook.hardware.core_rmp import adjust_rights, query_rights, validate_pages
from snpbook.hardware.operations import Operation
from snpbook.hardware.page_instructions import Outcome
from snpbook.hardware.walker import Fault
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SIZE

LEAST, MOST = 1 << 11, 1 << 16
"""Pages of a run that are translated at once: twice as many as to the last fault, so that faults cost few walks."""


@dataclass(slots=True)
class PageRun(Operation):
    """An RMP instruction on `count` pages from the virtual `address` on; `outcomes` are those of the pages done."""

    address: int
    count: int
    large: bool = False
    outcomes: list[Any] = field(default_factory=list, init=False)
    window: int = field(default=LEAST, init=False)

    def step(self, core: GuestCore) -> Fault | None:
        start = done = sum(len(outcome.codes) for outcome in self.outcomes)
        while True:
            address = self.address + done * (LARGE_PAGE_SIZE if self.large else PAGE_SIZE)
            outcomes, fault = self.execute(core, address, min(self.count - done, self.window))
            self.outcomes.extend(outcomes)
            done += sum(len(outcome.codes) for outcome in outcomes)
            self.window = min(max(LEAST, 2 * (done - start)), MOST)
            if fault is not None or done == self.count:
                return fault

    def execute(self, core: GuestCore, address: int, count: int) -> tuple[list[Any], Fault | None]:
        """Execute on the pages that are left, up to the first fault."""
        raise TypeError(f"{type(self).__name__} names no instruction")

    def column(self, name: str) -> Any:
        """One of the outcomes' arrays, of all pages; one that has the same value everywhere takes no room."""
        found = np.concatenate([getattr(outcome, name) for outcome in self.outcomes])
        return np.broadcast_to(found[0], found.shape) if len(found) and (found == found[0]).all() else found

    @property
    def value(self) -> Any:
        return self.column("codes")


@dataclass(slots=True)
class Pvalidate(PageRun):
    """Its value: return codes and carry flags."""

    validate: bool = True

    def execute(self, core: GuestCore, address: int, count: int) -> tuple[list[Any], Fault | None]:
        return validate_pages(core, address, count, self.validate, self.large)

    @property
    def value(self) -> Any:
        return self.column("codes"), self.column("unchanged")


@dataclass(slots=True)
class Rmpadjust(PageRun):
    """Its value: return codes."""

    target: int = 0
    permissions: int = 0
    vmsa: bool = False

    def execute(self, core: GuestCore, address: int, count: int) -> tuple[list[Outcome], Fault | None]:
        return adjust_rights(core, address, count, self.target, self.permissions, self.vmsa, self.large)


@dataclass(slots=True)
class Rmpquery(PageRun):
    """Its value: return codes, 2 MB entries, permission bytes, VMSA bits."""

    target: int = 0

    def execute(self, core: GuestCore, address: int, count: int) -> tuple[list[Any], Fault | None]:
        return query_rights(core, address, count, self.target)

    @property
    def value(self) -> Any:
        return tuple(map(self.column, ("codes", "large", "permissions", "vmsa")))
