"""A verifier's steps as rows: what was checked, how it ended, what was expected, what was found, where it is written.

Whoever checks (the relying party, an exercise, the firmware) hands over anything with these five attributes.
"""

from collections.abc import Iterable
from typing import Protocol

from snpbook.views.palette import VERDICTS, Verdict
from snpbook.views.static import Static
from snpbook.views.tables import Markup, table


class Step(Protocol):
    """One check."""

    @property
    def name(self) -> str:
        """The rule, in words."""

    @property
    def passed(self) -> bool | None:
        """None: not made."""

    @property
    def expected(self) -> object:
        """What the rule wants."""

    @property
    def found(self) -> object:
        """What there was."""

    @property
    def cite(self) -> object:
        """Where the rule stands."""


def badge(verdict: Verdict) -> Markup:
    """A verdict as a word on its colour, with its mark."""
    look = VERDICTS[verdict]
    words = f"{look.letter} {look.label}"
    style = f"background:{look.light};color:#ffffff;border-radius:3px;padding:1px 6px;white-space:nowrap"
    return Markup(f'<span style="{style}">{words}</span>', words)


def checks(steps: Iterable[Step], caption: str = "Checks") -> Static:
    """The list of checks, in the order in which they were made, with a count at its end."""
    ends = {True: Verdict.PASSED, False: Verdict.FAILED, None: Verdict.SKIPPED}
    steps = list(steps)
    rows = [(s.name, badge(ends[s.passed]), _show(s.expected), _show(s.found), str(s.cite)) for s in steps]
    tally = [(end.value, sum(ends[s.passed] is end for s in steps)) for end in Verdict]
    note = ", ".join(f"{count} {word}" for word, count in tally if count)
    head = ["check", "result", "expected", "found", "source"]
    return table(caption, head, rows, mono=["expected", "found"], note=note)


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"{value[:12].hex()}… ({len(value)} bytes)"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value < 10 else f"{value:#x}"
    return "" if value is None else str(value)
