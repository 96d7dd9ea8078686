"""The GHCB page before and after a request: its bytes as a picture, its fields as a table.

The picture frames what the valid bitmap marks, and what was changed after the host had answered. Names and places come
from the layouts in `spec`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snpbook.attest.checks import Result
from snpbook.spec.ghcb import GHCB, PSC_HEADER, Nae, is_valid
from snpbook.spec.layout import Record
from snpbook.views.checks import mark
from snpbook.views.palette import LIGHT, VERDICTS
from snpbook.views.static import Static
from snpbook.views.svg import MONO, document, element, image, words
from snpbook.views.tables import Markup, table

_BITMAP = GHCB.offset("valid_bitmap")
MARKABLE = tuple(name for name, field in GHCB.fields.items() if field.offset < _BITMAP)
"""The fields that have a bit in the bitmap."""
_WORDS = {
    "sw_exit_code": "SW_EXITCODE", "sw_exit_info_1": "SW_EXITINFO1", "sw_exit_info_2": "SW_EXITINFO2",
    "sw_scratch": "SW_SCRATCH",
}  # fmt: skip
_ROW, _HALF, _MARGIN = 16, 8, 62
_CELL, _LINE, _COLUMN = 20.5, 22, 352
_SHOWN_BUFFER = 4 * _ROW
"""How much of the shared buffer is shown."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request by the page: as the guest left it, as KVM answered, as the guest found it."""

    asked: Record
    answered: Record
    found: Record


def field_name(name: str) -> str:
    """A field of the GHCB as the documents write it."""
    return _WORDS.get(name, name.upper())


def marked(page: Record) -> list[str]:
    """The fields that the bitmap of a page marks."""
    return [name for name in MARKABLE if is_valid(page.valid_bitmap, name)]


def ghcb_page(made: Exchange) -> Static:
    """The page before and after: its bytes as a picture, its fields as a table."""
    listing = _fields(made)
    rows = _rows(made)
    event = Nae(made.asked.sw_exit_code).name
    changed = [field_name(name) for name, value in made.found if value != getattr(made.answered, name)]
    more = f"; changed after the answer: {', '.join(changed)}" if changed else ""
    alt = f"The bytes of the GHCB page for {event}, as the guest left it and as the guest found it{more}."
    return Static(listing.text, Markup(image(_bytes(made, rows), alt), alt) + listing.html)


def _rows(made: Exchange) -> list[int]:
    """The rows of 16 bytes that hold anything, or are marked, in one of the pages; of the buffer the first alone."""
    raw = [bytes(page) for page in (made.asked, made.answered, made.found)]
    buffer = GHCB.offset("shared_buffer")
    wanted = (*range(0, _BITMAP + _ROW, _ROW), *range(buffer, buffer + _SHOWN_BUFFER, _ROW), GHCB.size - _ROW)
    marks = [GHCB.offset(name) // _ROW * _ROW for page in (made.asked, made.found) for name in marked(page)]
    return [row for row in wanted if row in marks or any(any(page[row : row + _ROW]) for page in raw)]


def _bytes(made: Exchange, rows: Sequence[int]) -> str:
    shapes = []
    for column, (page, title) in enumerate([(made.asked, "as the guest left it"), (made.found, "as it found it")]):
        left = _MARGIN + column * _COLUMN
        shapes.append(words(title, left, 18, font_weight=600))
        raw, before = bytes(page), bytes(made.answered if column else page)
        for number, row in enumerate(rows):
            shapes += _line(raw, before, page.valid_bitmap, row, left, 30 + number * _LINE)
    for number, row in enumerate(rows):
        style = {"font_family": MONO, "font_size": 11, "fill": LIGHT.quiet}
        shapes.append(words(f"{row:#05x}", 8, 45 + number * _LINE, **style))
        if row and row - rows[number - 1] != _ROW and number:
            y = 30 + number * _LINE - 1
            shapes.append(element("line", x1=8, y1=y, x2=_MARGIN + 2 * _COLUMN - 24, y2=y, stroke=LIGHT.line,
                                  stroke_width=0.7))  # fmt: skip
    foot = 30 + len(rows) * _LINE + 16
    legend = (
        "green: marked in the valid bitmap",
        "thick frame: the bitmap itself",
        "dashed: changed after KVM answered",
    )
    shapes += [words(text, 8 + 250 * n, foot, font_size=10.5, fill=LIGHT.quiet) for n, text in enumerate(legend)]
    return document(_MARGIN + 2 * _COLUMN, foot + 10, *shapes)


def _line(raw: bytes, before: bytes, bitmap: bytes, row: int, left: float, top: float) -> list[str]:
    """One row of 16 bytes, its two quadwords framed as they are."""
    shapes = []
    marks = int.from_bytes(bitmap, "little")
    for half in (0, _HALF):
        at, x = row + half, left + half * _CELL - 3
        frame = {"x": x, "y": top + 1, "width": _HALF * _CELL - 2, "height": _LINE - 4, "rx": 3}
        good, bad = (VERDICTS[result].light for result in (Result.PASSED, Result.FAILED))
        if at < _BITMAP and marks >> at // _HALF & 1:
            shapes.append(element("rect", **frame, fill=good, fill_opacity=0.16, stroke=good))
        if at in (_BITMAP, _BITMAP + _HALF):
            shapes.append(element("rect", **frame, fill="none", stroke=LIGHT.text, stroke_width=2))
        if raw[at : at + _HALF] != before[at : at + _HALF]:
            shapes.append(element("rect", **frame, fill=bad, fill_opacity=0.18, stroke=bad, stroke_width=2,
                                  stroke_dasharray="4 3"))  # fmt: skip
    text = [words(f"{byte:02x}", left + number * _CELL, top + 15, fill=LIGHT.text if byte else LIGHT.quiet)
            for number, byte in enumerate(raw[row : row + _ROW])]  # fmt: skip
    return [*shapes, element("g", *text, font_family=MONO, font_size=11.5)]


def _fields(made: Exchange) -> Static:
    rows = []
    for name, field in GHCB.fields.items():
        if name in ("shared_buffer", "valid_bitmap"):
            continue
        values = [getattr(page, name) for page in (made.asked, made.answered, made.found)]
        signs = [name in marked(page) for page in (made.asked, made.answered, made.found)]
        if any(values) or any(signs):
            cells = [_value(value, sign) for value, sign in zip(values, signs, strict=True)]
            rows.append((f"{field.offset:#05x}", field_name(name), *_compared(cells)))
    bitmaps = [_bits(page) for page in (made.asked, made.answered, made.found)]
    rows.append((f"{_BITMAP:#05x}", "valid bitmap", *_compared(bitmaps)))
    if made.asked.sw_exit_code == Nae.PAGE_STATE_CHANGE:
        rows += _list_rows(made)
    head = ["offset", "field", "the guest left", "KVM answered", "the guest found"]
    note = "✓: marked in the valid bitmap, whose bit n stands for the 8 bytes at offset 8 n"
    return table(f"The GHCB: {Nae(made.asked.sw_exit_code).name}", head, rows, mono=["offset", *head[2:]], note=note)


def list_header(page: Record) -> tuple[int, int, int]:
    """`cur_entry`, `end_entry` and the reserved bytes of a list of page state changes."""
    header = PSC_HEADER.unpack(page.shared_buffer)
    reserved = page.shared_buffer[PSC_HEADER.offset("end_entry") + 2 : PSC_HEADER.size]
    return header.cur_entry, header.end_entry, int.from_bytes(reserved, "little")


def _list_rows(made: Exchange) -> list[tuple[str, ...]]:
    offset = GHCB.offset("shared_buffer")
    columns = [list_header(page) for page in (made.asked, made.answered, made.found)]
    names = ("list: cur_entry", "list: end_entry", "list: reserved")
    return [
        (f"{offset + 2 * number:#05x}", name, *_compared([str(column[number]) for column in columns]))
        for number, name in enumerate(names)
    ]


def _bits(page: Record) -> str:
    bitmap = int.from_bytes(page.valid_bitmap, "little")
    found = [str(bit) for bit in range(bitmap.bit_length()) if bitmap >> bit & 1]
    return f"bits {', '.join(found)}" if found else "no bit"


def _value(value: int, sign: bool) -> str:
    return f"{value:#x}{' ✓' * sign}" if value or sign else ""


def _compared(cells: Sequence[str]) -> list[str]:
    """The last cell stands out where it differs from the one before."""
    *rest, answered, found = cells
    return [*rest, answered, mark(Result.FAILED, found or "gone") if found != answered else found]
