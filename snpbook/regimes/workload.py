"""One workload for every back end: launch, boot, use more and more of memory, convert it to and fro, idle, balloon.

It is a generator of samples, so that whoever looks on sees each as soon as it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from snpbook.host.ledger import Sample
from snpbook.regimes.regime import Regime
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of a guest's unused memory the workload uses, in per cent.

    `touched` is used in as many steps, `converted` then goes to shared and back `rounds` times, `ballooned` is given
    up at last. `ValueError` for shares that do not grow, or lie outside of 0 to 100, or of what is touched.
    """

    touched: tuple[int, ...] = (1, 10, 100)
    converted: int = 5
    rounds: int = 1
    ballooned: int = 10

    def __post_init__(self) -> None:
        steps = (0, *self.touched)
        if any(after <= before for before, after in zip(steps, self.touched, strict=False)) or steps[-1] > 100:
            raise ValueError(f"touched = {self.touched}: shares that grow, from 1 to 100 per cent")
        if not 0 < self.converted <= steps[-1]:
            raise ValueError(f"converted = {self.converted}: 1 to {steps[-1]} per cent, of what is touched")
        if not 0 < self.ballooned <= steps[-1]:
            raise ValueError(f"ballooned = {self.ballooned}: 1 to {steps[-1]} per cent, of what is touched")
        if self.rounds < 0:
            raise ValueError(f"rounds = {self.rounds}: 0 or more")


PLAN = Plan()


def workload(regime: Regime, plan: Plan = PLAN) -> Iterator[Sample]:
    """Run it on a guest that has not been launched: a sample after each step, also in `regime.ledger.samples`.

    A conversion to shared is followed by the VMM's writing to each page, as a device would.
    """
    pages = regime.pages
    yield regime.sample("created")
    regime.guest.launch()
    yield regime.sample("launched")
    regime.boot()
    yield regime.sample("booted")
    done = 0
    for percent in plan.touched:
        more = pages[done : share(pages, percent)]
        regime.ask(more, private=True)
        yield regime.sample(f"converted {percent} %")
        regime.touch(more)
        yield regime.sample(f"touched {percent} %")
        done += len(more)
    part = pages[: share(pages, plan.converted)]
    for turn in range(1, plan.rounds + 1):
        regime.ask(part, private=False)
        if regime.cell.upm or regime.vm.in_place:
            regime.vmm.write(part.start << PAGE_SHIFT, b"shared".ljust(PAGE_SIZE, b"\0") * len(part))
        yield regime.sample(f"to shared, {turn}")
        regime.ask(part, private=True)
        yield regime.sample(f"to private, {turn}")
        regime.touch(part)
        yield regime.sample(f"touched again, {turn}")
    yield regime.sample("idle")
    regime.balloon(pages[done - share(pages, plan.ballooned) : done])
    yield regime.sample("ballooned")


def share(pages: range, percent: int) -> int:
    """So many per cent of pages, one at least."""
    return max(len(pages) * percent // 100, 1)
