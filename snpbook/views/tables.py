"""Tables: one declaration gives HTML with a caption and header scopes, and aligned columns of text.

Cells are escaped here and nowhere else; a cell that is HTML already says so by its type, `Markup`. Colours are left to
the page, so that a table reads well in a light and in a dark scheme.
"""

from collections.abc import Sequence
from html import escape

from snpbook.views.static import Static

_TABLE = "border-collapse:collapse;margin:4px 0;font-size:13px"
_CAPTION = "caption-side:top;text-align:left;font-weight:600;padding:4px 0;white-space:nowrap"
_CELL = "text-align:left;vertical-align:top;padding:3px 12px 3px 0"
_MONO = f"{_CELL};font-family:monospace"


class Markup(str):
    """A cell's HTML, made by a renderer, with the words that stand for it in text."""

    __slots__ = ("words",)
    words: str

    def __new__(cls, html: str, words: str) -> "Markup":
        """The cell `html`; `words` is what it says in text."""
        self = super().__new__(cls, html)
        self.words = words
        return self


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, mono: Sequence[str] = (), note: str = ""
) -> Static:
    """A table whose first column names its rows.

    `mono` names the columns of numbers and code; `note` is a line below. An empty `head` gives a list of
    name and value. Raises `ValueError` where a row is of another length than the head.
    """
    width = len(head) or 2
    for row in rows:
        if len(row) != width:
            raise ValueError(f"{caption}: a row of {len(row)} cells in a table of {width} columns")
    styles = [_MONO if name in mono else _CELL for name in head] or [_CELL, _MONO]
    return Static(_text(caption, head, rows, note), _html(caption, head, rows, styles, note))


def _html(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str], note: str) -> str:
    top = "".join(f'<th scope="col" style="{_CELL}">{escape(name)}</th>' for name in head)
    body = ""
    for row in rows:
        first, *rest = (cell if isinstance(cell, Markup) else escape(cell) for cell in row)
        cells = "".join(f'<td style="{style}">{cell}</td>' for style, cell in zip(styles[1:], rest, strict=True))
        body += f'<tr><th scope="row" style="{styles[0]};font-weight:normal">{first}</th>{cells}</tr>'
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    below = f'<p style="margin:2px 0;font-size:12px">{escape(note)}</p>' if note else ""
    return (
        f'<table style="{_TABLE}"><caption style="{_CAPTION}">{escape(caption)}</caption>'
        f"{header}<tbody>{body}</tbody></table>{below}"
    )


def _text(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    plain = [[cell.words if isinstance(cell, Markup) else cell for cell in row] for row in rows]
    grid = [list(head), *plain] if head else plain
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)] if grid else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    if head:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([caption, *lines, *([note] if note else [])])
