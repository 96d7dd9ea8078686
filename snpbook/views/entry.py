"""A raw RMP entry bit by bit, before and after an instruction: which field each bit belongs to, and which have changed.

Fields and places are those of the layout in `spec`; a bit that has changed is filled, underlined and bold.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from itertools import groupby
from operator import xor

from snpbook.spec.rmp import RMP_ENTRY
from snpbook.views.page import entry_fields
from snpbook.views.palette import LIGHT
from snpbook.views.static import Static
from snpbook.views.svg import MONO, document, element, image, words
from snpbook.views.tables import Markup, table
from snpbook.views.values import show

Raw = tuple[int, int]
"""The two quadwords of an entry."""

_BITS, _UNIT, _LEFT = 64, 10.25, 64
_NAMES, _ROW, _GAP = (76, 32), 20, 14
"""Above the bits of each quadword, whose names are long or short; of a row of bits; between the two."""
_GROUND, _CHANGED = "#E9ECEF", "#F6C9A4"
_NARROW = {"subpage_count": "subpages", "page_size": "size"}


def raw(entry: Raw) -> str:
    """Both quadwords in hexadecimal, the second one behind the first."""
    return " ".join(f"{word:#018x}" for word in entry)


def entry(words_: Raw, title: str) -> Static:
    """One entry: a picture of its bits, and its fields as rows."""
    listing = table(title, [], _rows(words_))
    alt = f"{title}, bit by bit: {raw(words_)}."
    return Static(listing.text, Markup(image(_picture({"": words_}), alt), alt) + listing.html)


def entry_change(before: Raw, after: Raw, title: str) -> Static:
    """The entry before and after: both bit by bit, and as rows the raw words and the fields that have changed."""
    rows = [(name, one, other) for (name, one), (_, other) in zip(_rows(before), _rows(after), strict=True)]
    changed = [name for name, one, other in rows[2:] if one != other]
    shown = [row for row in rows if row[0].startswith("raw") or row[0] in changed]
    note = "" if changed else "Nothing has changed."
    listing = table(title, ["field", "before", "after"], shown, mono=["before", "after"], note=note)
    alt = f"{title}, bit by bit: before {raw(before)}, after {raw(after)}; changed: {', '.join(changed) or 'nothing'}."
    picture = _picture({"before": before, "after": after})
    return Static(listing.text, Markup(image(picture, alt), alt) + listing.html)


def _rows(words_: Raw) -> list[tuple[str, str]]:
    record = RMP_ENTRY.unpack(b"".join(word.to_bytes(8, "little") for word in words_))
    rows = [("raw, first word", f"{words_[0]:#018x}"), ("raw, second word", f"{words_[1]:#018x}")]
    rows += [(name, show(value)) for name, value in entry_fields(record).items()]
    return [*rows, ("subpages assigned", str(record.subpage_count))]


def _picture(entries: Mapping[str, Raw]) -> str:
    shapes, top = [], 4
    for number in range(2 if any(entry_[1] for entry_ in entries.values()) else 1):
        shapes += _word(number, {name: entry_[number] for name, entry_ in entries.items()}, top)
        top += _NAMES[number] + len(entries) * _ROW + _GAP
    return document(_LEFT + _BITS * _UNIT + 8, top - _GAP + 4, *shapes)


def _word(number: int, values: Mapping[str, int], top: int) -> list[str]:
    """One quadword: the names of its fields, and its bits in one row for each of `values`."""
    small, names = {"font_family": MONO, "font_size": 9, "fill": LIGHT.quiet}, top + _NAMES[number]
    changed = reduce(xor, values.values()) if len(values) > 1 else 0
    shapes = [
        words(name, 6, names + row * _ROW + 14, font_size=11, fill=LIGHT.quiet) for row, name in enumerate(values)
    ]
    fields = [(name, first - number * _BITS, last - number * _BITS) for name, first, last, _ in RMP_ENTRY.rows()]
    for at, (name, first, last) in enumerate(field for field in fields if 0 <= field[1] < _BITS):
        x, width, height = _x(last), (last - first + 1) * _UNIT, len(values) * _ROW
        fill = _GROUND if at % 2 else LIGHT.surface
        shapes.append(element("rect", x=x, y=names, width=width, height=height, fill=fill, stroke=LIGHT.line))
        shapes.append(_name(_NARROW.get(name, name), x, width, names))
        if last > first or last in (0, _BITS - 1):
            shapes.append(words(str(last), x + 1, top + 8, **small))
    for row, word in enumerate(values.values()):
        y = names + row * _ROW
        if row:
            shapes += _changes(changed, y)
        groups = {"0": ~word & ~changed, "1": word & ~changed}
        shapes += [
            _digits(digit, mask, y, fill=LIGHT.text if digit == "1" else LIGHT.quiet) for digit, mask in groups.items()
        ]
        shapes += [_digits(digit, mask & changed, y, font_weight=700) for digit, mask in (("0", ~word), ("1", word))]
    return shapes


def _digits(digit: str, mask: int, y: float, **style: object) -> str:
    """One digit at the places of the bits of `mask`: a single element, with a list of places."""
    places = [_x(bit) + _UNIT / 2 for bit in range(_BITS) if mask >> bit & 1]
    at = " ".join(f"{place:.6g}" for place in places)
    look = {"font_family": MONO, "font_size": 11, "text_anchor": "middle", **style}
    return element("text", digit * len(places), x=at, y=y + 14, **look) if places else ""


def _changes(mask: int, y: float) -> list[str]:
    """What lies behind the bits that have changed: a run of them is one box with a line below."""
    boxes = []
    for changed, run in groupby(range(_BITS), key=lambda bit: mask >> bit & 1):
        bits = list(run)
        if changed:
            x, width = _x(bits[-1]), len(bits) * _UNIT
            boxes.append(element("rect", x=x, y=y + 1, width=width, height=_ROW - 2, fill=_CHANGED))
            line = f"M{x:.6g} {y + _ROW - 2:g}h{width:.6g}"
            boxes.append(element("path", d=line, fill="none", stroke=LIGHT.text, stroke_width=2))
    return boxes


def _name(name: str, x: float, width: float, below: float) -> str:
    middle, base = x + width / 2, below - 4
    if len(name) * 6.2 <= width:
        return words(name, middle, base, font_size=11, text_anchor="middle")
    return words(name, middle + 3, base, font_size=10, transform=f"rotate(-90 {middle + 3:.6g} {base:g})")


def _x(bit: int) -> float:
    """The left edge of a bit; bit 0 is on the right."""
    return _LEFT + (_BITS - 1 - bit) * _UNIT
