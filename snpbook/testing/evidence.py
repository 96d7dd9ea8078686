"""Evidence for other people's tests, in process: a pytest plugin with one fixture, and the names to parametrise with.

`pytest_plugins = ["snpbook.testing.evidence"]` in a top-level conftest makes `snp_evidence` known; it is not loaded
unasked, so that it costs nobody else's run anything. Verdicts are those of `snpbook.evidence`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Protocol

import pytest

from snpbook.evidence.kit import Kit, Verdict
from snpbook.evidence.make import DEFECTS, make
from snpbook.evidence.maker import Recipe


class MakeEvidence(Protocol):
    """What the fixture is: a function from a defect's name and the values of a `Recipe` to evidence and verdict."""

    def __call__(self, defect: str | None = None, *, now: datetime | None = None, **values: Any) -> tuple[Kit, Verdict]:
        """Good evidence without a defect; `now` is the clock's time unless it is named."""
        ...


def defect_names(signer: str = "vcek") -> list[str]:
    """The defects that evidence signed by a VCEK, or a VLEK, can have: for `pytest.mark.parametrize`."""
    return [defect.name for defect in DEFECTS.values() if signer in defect.signers]


@pytest.fixture
def snp_evidence() -> MakeEvidence:
    """Makes evidence: `kit, verdict = snp_evidence("expired", product="milan")`."""

    def make_evidence(defect: str | None = None, *, now: datetime | None = None, **values: Any) -> tuple[Kit, Verdict]:
        return make(Recipe(now or datetime.now(UTC).replace(microsecond=0), **values), defect)

    return make_evidence
