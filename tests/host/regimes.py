"""The regimes of private memory, with every sample held against a recount of what memory itself holds."""

from __future__ import annotations

from snpbook.host.ledger import Sample
from snpbook.host.recount import recount
from snpbook.regimes import regime
from snpbook.regimes.regime import ENCRYPTED, FIRST, MIB
from snpbook.spec.private_memory import CELLS
from snpbook.trace import Event, Ioctl, SystemCall

__all__ = ["CELLS", "ENCRYPTED", "FIRST", "MIB", "PAGE", "PRIVATE_FILES", "Regime", "Watch"]

PAGE = 4096
PRIVATE_FILES = [each for each in ENCRYPTED if each[1] != "registered"]


class Regime(regime.Regime):
    """A regime whose ledger is never believed."""

    def sample(self, label: str) -> Sample:
        sample = super().sample(label)
        assert sample.pages == self.recount(), label
        return sample


class Watch:
    """Holds the ledger against a recount at the end of every system call of a run; `calls` counts them."""

    def __init__(self, regime: Regime) -> None:
        self.regime, self.calls = regime, 0
        regime.system.trace.subscribe(self)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Ioctl | SystemCall) and event.name != "close":  # a process that ends has no memory left
            self.calls += 1
            for vm in self.regime.host.kvm.vms:
                assert self.regime.ledger.pages(vm) == recount(vm), event
