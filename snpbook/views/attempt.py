"""What an RMP instruction answered, page by page, with the check behind each refusal.

Pages that answer alike share a row, which shows the values of the first of them.
"""

from __future__ import annotations

from itertools import groupby

from snpbook.attest.checks import Result
from snpbook.hardware.attempts import Answer, Attempt, party
from snpbook.spec.pages import PAGES_PER_LARGE
from snpbook.spec.rmp import RmpCode
from snpbook.views.checks import mark
from snpbook.views.entry import entry_change
from snpbook.views.static import Static
from snpbook.views.tables import table

ROWS = 16
"""The largest number of rows of a table."""
_HEAD, _ALWAYS = ["pages", "answer", "with it", "the check that failed", "it wants", "it found", "source"], 2
"""The columns, of which the first two are always there and the others where they say something."""


def attempt(made: Attempt) -> Static:
    """The answers as a table."""
    order = made.order
    kinds = [(kind, list(same)) for kind, same in groupby(made.answers, key=_kind)]
    rows = [_row(same, order.steps.step) for _, same in kinds[:ROWS]]
    note = f"and {len(kinds) - ROWS} more rows" if len(kinds) > ROWS else ""
    caption = f"{order.instruction} by {party(order)}"
    used = [at for at in range(len(_HEAD)) if at < _ALWAYS or any(row[at] for row in rows)]
    head, body = [_HEAD[at] for at in used], [[row[at] for at in used] for row in rows]
    return table(caption, head, body, mono=["pages", "with it", "it wants", "it found"], note=note)


def change(made: Attempt, page: int) -> Static:
    """The raw entry of a page before and after; that of the first page where the order left `page` alone."""
    answer = next((answer for answer in made.answers if answer.page == page), made.answers[0])
    return entry_change(answer.before, answer.after, f"RMP entry of page {answer.page:#x}")


def _kind(answer: Answer) -> tuple[str, str, str]:
    """What answers share a row: the code with what came along, and the check. A fault says its own address."""
    check = answer.reason.name if answer.reason else ""
    return answer.code, "" if answer.reason else answer.detail, check


def _row(same: list[Answer], step: int) -> tuple[str, ...]:
    first, last = same[0], same[-1]
    pages = f"{first.page:#x}" + (f"..{last.page:#x} ({len(same)})" if len(same) > 1 else "")
    pages += " (2 MB)" if step == PAGES_PER_LARGE else ""
    result = Result.PASSED if first.ok else Result.SKIPPED if first.code == "not reached" else Result.FAILED
    number = f" ({RmpCode[first.code].value})" if first.code in RmpCode.__members__ else ""
    reason = first.reason
    told = (reason.name, reason.expected, reason.found, reason.cite) if reason else ("", "", "", "")
    return (pages, mark(result, f"{first.code}{number}"), first.detail, *told)
