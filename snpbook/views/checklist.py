"""The checklist of a host: a result for each row, and for those that failed why it matters and what to do."""

from collections.abc import Sequence

from snpbook.attest.checks import Result
from snpbook.host.checklist import Item, State
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import Markup, table

_RESULTS = {State.PASS: Result.PASSED, State.FAIL: Result.FAILED, State.SKIP: Result.SKIPPED}
_INDENT = "&emsp;"


def checklist(items: Sequence[Item], caption: str = "Checklist") -> Static:
    """The rows as a table; the text is what `snphost ok` prints, with the remedy below a row that failed."""
    rows = [
        (
            Markup(f'<span style="white-space:nowrap">{_INDENT * item.level}{item.name}</span>', item.name),
            mark(_RESULTS[item.state], item.state),
            item.found,
            "; ".join(filter(None, [item.remedy, item.why])),
        )
        for item in items
    ]
    counts = [(state, sum(item.state is state for item in items)) for state in State]
    note = ", ".join(f"{count} {state}" for state, count in counts if count)
    shown = table(caption, ["check", "result", "found", "remedy, and why"], rows, mono=["found"], note=note)
    return Static("\n".join([*_lines(items), note]), shown.html)


def _lines(items: Sequence[Item]) -> list[str]:
    lines = []
    for item in items:
        lines.append(str(item))
        if item.remedy:
            lines.append(f"{' ' * 9}{'  ' * item.level}  remedy: {item.remedy}")
    return lines
