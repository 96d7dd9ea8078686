"""The bit diagram of a layout: where each field of a structure in memory lies, as a picture and as a table.

Everything shown comes from the declaration in `spec`; this file knows no offset.
"""

from snpbook.spec.layout import Layout
from snpbook.views.palette import GROUND, LIGHT, PAGES
from snpbook.views.static import Static
from snpbook.views.svg import MONO, document, element, image, words
from snpbook.views.tables import Markup, table

_WIDTH, _LEFT, _TOP, _GAP = 728, 52, 24, 10
_LOW, _TALL = 30, 66
"""The height of a row, and of one with names that must be turned to fit."""
_LETTER = 6.6
_LARGEST = 64
"""Structures above this size in bytes are shown as a table alone: a picture of a whole page tells nothing."""


def bits(layout: Layout, word: int = 64) -> Static:
    """The diagram with `word` bits a row, the lowest word on top, bits numbered from right to left."""
    rows = []
    for name, first, last, note in layout.rows():
        field = layout.fields.get(name)
        where = field.where if field else f"{first // 8:#05x}[{last - first // 8 * 8}:{first % 8}]"
        rows.append((name, where, str(last - first + 1), note))
    listing = table(
        f"{layout.name}, {layout.size} bytes", ["field", "place", "bits", "meaning"], rows, mono=["place", "bits"],
        note=f"Source: {layout.cite}",
    )  # fmt: skip
    if layout.size > _LARGEST:
        return listing
    names = ", ".join(name for name, *_ in layout.rows() if name != "reserved")
    alt = f"Bit diagram of {layout.name}: {layout.size} bytes in words of {word} bits, with the fields {names}."
    return Static(listing.text, Markup(image(_picture(layout, word), alt), alt) + listing.html)


def _picture(layout: Layout, word: int) -> str:
    unit = (_WIDTH - _LEFT - 8) / word
    boxes = []
    for name, first, last, _ in layout.rows():
        for line in range(first // word, last // word + 1):
            low, high = max(first - line * word, 0), min(last - line * word, word - 1)
            boxes.append((line, _LEFT + (word - 1 - high) * unit, (high - low + 1) * unit, name))
    turned = {line for line, _, width, name in boxes if len(name) * _LETTER > width}
    tops, y = [], _TOP
    for line in range(-(-layout.size * 8 // word)):
        tops.append(y)
        y += (_TALL if line in turned else _LOW) + _GAP
    bits_named = [bit for bit in range(word) if bit % 8 == 7 or bit == 0]
    style = {"font_family": MONO, "font_size": 10, "fill": LIGHT.quiet, "text_anchor": "middle"}
    shapes = [words(str(bit), _LEFT + (word - bit - 0.5) * unit, 16, **style) for bit in bits_named]
    for line, top in enumerate(tops):
        shapes.append(words(f"{line * word // 8:#05x}", 4, top + 20, font_family=MONO, font_size=11, fill=LIGHT.quiet))
    shapes += [_box(name, x, tops[line], width, _TALL if line in turned else _LOW) for line, x, width, name in boxes]
    return document(_WIDTH, y, *shapes)


def _box(name: str, x: float, y: int, width: float, height: int) -> str:
    fill = PAGES[GROUND].light if name == "reserved" else LIGHT.surface
    box = element("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=LIGHT.line)
    middle, centre = x + width / 2, y + height / 2
    if len(name) * _LETTER <= width:
        return box + words(name, middle, centre + 4, font_size=11, text_anchor="middle")
    turn = f"rotate(-90 {middle:.6g} {centre:g})"
    return box + words(name, middle, centre + 3, font_size=9, text_anchor="middle", transform=turn)
