"""A verifier's steps as rows: what was checked, how it ended, what was expected and found, where it is written."""

from collections.abc import Iterable
from html import escape

from snpbook.attest.checks import Check, Result
from snpbook.views.palette import VERDICTS
from snpbook.views.static import Static
from snpbook.views.tables import Markup, table
from snpbook.views.values import show


def badge(result: Result) -> Markup:
    """A verdict as a word on its colour, with its mark."""
    return mark(result, VERDICTS[result].label)


def mark(result: Result, text: str) -> Markup:
    """Any word in the look of a verdict."""
    look = VERDICTS[result]
    words = f"{look.letter} {text}".rstrip()
    style = f"background:{look.light};color:#ffffff;border-radius:3px;padding:1px 6px;white-space:nowrap"
    return Markup(f'<span style="{style}">{escape(words)}</span>', words)


def checks(made: Iterable[Check], caption: str = "Checks") -> Static:
    """The list of checks, in the order in which they were made, with a count at its end."""
    made = list(made)
    rows = [(c.name, badge(c.result), show(c.expected), show(c.found), c.cite) for c in made]
    tally = [(result.value, sum(c.result is result for c in made)) for result in Result]
    note = ", ".join(f"{count} {word}" for word, count in tally if count)
    head = ["check", "result", "expected", "found", "source"]
    return table(caption, head, rows, mono=["expected", "found"], note=note)
