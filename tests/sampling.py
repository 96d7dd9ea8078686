"""Long suites and their samples: `make test` runs a fixed sample, `make test-all` every case."""

import os
import random
from collections.abc import Iterable
from typing import TypeVar

ALL = os.environ.get("SNPBOOK_TESTS") == "all"

Case = TypeVar("Case")


def sampled(cases: Iterable[Case], count: int) -> list[Case]:
    """All cases where `SNPBOOK_TESTS=all`, else `count` of them in their order, the same ones in every run."""
    cases = list(cases)
    if ALL or len(cases) <= count:
        return cases
    return [cases[index] for index in sorted(random.Random(len(cases)).sample(range(len(cases)), count))]
