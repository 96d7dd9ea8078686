"""What a workload finds where memory is not what it left there: which page, and what stands in it now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from snpbook.hardware.guest_cpu import ProgramFailure


class Corruption(StrEnum):
    """What has become of a page."""

    STALE = "an older content of the same page"
    SWAPPED = "the content of another page"
    GARBAGE = "bytes that nobody wrote there"


@dataclass(frozen=True, slots=True)
class Finding:
    """One page: its guest address, what has become of it, and what was found."""

    gpa: int
    corruption: Corruption
    found: str

    def __str__(self) -> str:
        return f"page {self.gpa:#x} holds {self.corruption}: {self.found}"


class Corrupted(ProgramFailure):
    """A workload gives up: some of its pages are not what it left. `findings` has all that it looked at."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        super().__init__(f"{findings[0]}{more}")
        self.findings = tuple(findings)
