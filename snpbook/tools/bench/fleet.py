"""Row A3: a fleet of 10,000 reports from 100 chips of a toy Milan, judged by two threads and by one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

from snpbook.attest.appraise import DEFAULT_POLICY
from snpbook.attest.fleet import ACCEPTED, FleetItem, verify_fleet
from snpbook.attest.roots import named_roots
from snpbook.evidence.maker import Maker, Recipe
from snpbook.tools.bench.measure import Comparison, NotMeasurableError, Row, at_least

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CHIPS, REPORTS = 100, 10_000


def by_threads() -> Comparison:
    """The whole fleet, each time through a pool of its own."""
    makers = [Maker(Recipe(NOW, "milan", seed=f"chip {number}")) for number in range(CHIPS)]
    files = [tuple(maker.kit().certificates.values()) for maker in makers]
    items = [
        FleetItem(str(number), makers[number % CHIPS].report(guest_svn=number), files[number % CHIPS])
        for number in range(REPORTS)
    ]
    roots = named_roots("toy")

    def judge(workers: int) -> None:
        with ThreadPoolExecutor(workers) as executor:
            verdicts = list(verify_fleet(items, roots, NOW, DEFAULT_POLICY, executor))
        if any(verdict.verdict != ACCEPTED for verdict in verdicts):
            raise NotMeasurableError("a good report was refused: a fault, and no question of speed")

    return Comparison(partial(judge, 1), partial(judge, 2), REPORTS, REPORTS, rounds=3)


ROWS = [
    Row("A3", "10,000 reports by 2 threads : by 1", at_least(1.4), by_threads, only_reported=True, units="reports"),
]
