"""What a unit of counted work takes: estimates, each with its source, or marked as illustrative.

Counts are exact and times are not, so a time is only ever shown with `axis`. Source: data/costs.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from snpbook.spec.resources import resource

ILLUSTRATIVE = "illustrative"


@dataclass(frozen=True, slots=True)
class Cost:
    """Nanoseconds for one unit of a kind of work."""

    name: str
    unit: str
    nanoseconds: float
    source: str

    @property
    def illustrative(self) -> bool:
        """Whether nobody has published a figure."""
        return self.source == ILLUSTRATIVE

    def seconds(self, count: int) -> float:
        """The estimate for so much work."""
        return count * self.nanoseconds * 1e-9

    @property
    def axis(self) -> str:
        """The title of an axis that shows it as time."""
        return f"time for {self.name} in seconds ({self.source})"


@cache
def costs() -> Mapping[str, Cost]:
    """All costs by name. `ValueError` for one that is negative or has no source."""
    data = tomllib.loads(resource("data", "costs.toml").read_text())
    found = {name: Cost(name, **fields) for name, fields in data.items()}
    for cost in found.values():
        if cost.nanoseconds < 0 or not cost.source:
            raise ValueError(
                f"data/costs.toml, {cost.name}: a cost is not negative and has a source, or {ILLUSTRATIVE!r}"
            )
    return found
