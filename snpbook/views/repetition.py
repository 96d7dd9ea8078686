"""The repetition heat map: for each 16-byte block of some pages, how often its value occurs in all of them.

Several pages of one moment show repetition in space, one page at several moments repetition in time. Counting is done
in `hardware.microscope`, colours come from the palette, and the live microscope shows the same picture.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Bytes
from snpbook.hardware.microscope import repetitions
from snpbook.hardware.tweaks import BLOCK_SIZE
from snpbook.views.palette import LIGHT, REPEATS, Swatch, Theme
from snpbook.views.static import Static
from snpbook.views.svg import MONO, chip, document, element, image, pattern, words
from snpbook.views.tables import Markup, table

Counts = NDArray[np.int64]

ACROSS = 16
"""Blocks in a row of a page: a row is 256 bytes."""
LISTED = 5
"""How many of the most frequent values are listed."""

_LARGE, _SMALL, _GUTTER, _TITLE, _GAP = 20, 8, 48, 24, 16
_A_ROW = 4
_LEVELS = list(REPEATS)


def level(count: int) -> int:
    """The level of the palette for a block whose value occurs `count` times."""
    return _LEVELS[bisect_right(_LEVELS, count) - 1]


def repetition(
    pages: Bytes, names: Sequence[str], caption: str, *, marked: range = range(0), theme: Theme = LIGHT
) -> Static:
    """The heat map of pages (n, 4096), each under its name, with a legend; of one page the most frequent values, too.

    `marked` are blocks to outline, by number through all pages.
    """
    counts = repetitions(pages)
    text = summary(counts, caption)
    shown = image(_picture(counts, names, marked, theme), f"{text}.") + _legend(counts, theme)
    if len(pages) > 1:
        return Static(text, shown)
    frequent = _frequent(pages[0], counts[0])
    return Static(f"{text}\n{frequent.text}", shown + frequent.html)


def summary(counts: Counts, caption: str) -> str:
    """The heat map in one line: how many blocks have a value that occurs so often."""
    return f"{caption}: {counts.size:,} blocks; " + ", ".join(f"{label}: {n:,}" for label, n in _census(counts).items())


def _census(counts: Counts) -> dict[str, int]:
    """How many blocks are at each level, by its label; levels without any are left out."""
    ranks = np.searchsorted(_LEVELS, counts.reshape(-1), side="right") - 1
    tally = np.bincount(ranks, minlength=len(_LEVELS)).tolist()
    return {swatch.label: n for swatch, n in zip(REPEATS.values(), tally, strict=True) if n}


def _legend(counts: Counts, theme: Theme) -> str:
    found = _census(counts)
    rows = [
        (Markup(image(chip(swatch, theme), swatch.label), swatch.letter), swatch.label, f"{found[swatch.label]:,}")
        for swatch in REPEATS.values()
        if swatch.label in found
    ]
    return table(
        "One cell is one block of 16 bytes", ["mark", "its value occurs", "blocks"], rows, mono=["blocks"]
    ).html


def _frequent(page: Bytes, counts: Counts) -> Static:
    """The values that occur most often, with the offset at which each is met first."""
    found: dict[bytes, tuple[str, str, str]] = {}
    for block in np.argsort(-counts, kind="stable").tolist():
        value = page[block * BLOCK_SIZE :][:BLOCK_SIZE].tobytes()
        if counts[block] == 1 or len(found) == LISTED:
            break
        found.setdefault(value, (value.hex(" ", 4), f"{counts[block]:,}", f"{block * BLOCK_SIZE:#05x}"))
    if not found:
        return Static("No value occurs twice", "<p>No value occurs twice.</p>")
    head = ["value", "times", "first at"]
    return table("Most frequent values", head, list(found.values()), mono=head)


def _picture(counts: Counts, names: Sequence[str], marked: range, theme: Theme) -> str:
    """The heat map as SVG: pages of 16 x 16 blocks, one page large with numbers in its cells, more of them small."""
    size = _LARGE if len(counts) == 1 else _SMALL
    side = size * ACROSS
    areas: dict[int, list[str]] = {}
    numbers: dict[int, list[str]] = {}
    lines, outlines, texts = [], [], []
    for page, content in enumerate(counts.tolist()):
        left, top = _GUTTER + page % _A_ROW * (side + _GAP), _TITLE + page // _A_ROW * (side + _TITLE + _GAP)
        levels = [level(count) for count in content]
        texts.append(words(names[page], left, top - 6, font_size=12, font_weight=600))
        lines += [f"M{left} {top + n * size}h{side}M{left + n * size} {top}v{side}" for n in range(1, ACROSS)]
        for first in range(0, len(content), ACROSS):
            y, blocks = top + first // ACROSS * size, range(first, first + ACROSS)
            for reached, run in groupby(blocks, key=levels.__getitem__):
                areas.setdefault(reached, []).append(_box(list(run), left, y, size))
            for block in blocks if size == _LARGE else ():
                x, number = left + block % ACROSS * size + size // 2, str(content[block])
                numbers.setdefault(levels[block], []).extend([words(number, x, y + 14)] * (content[block] > 1))
        if mine := [block for block in range(len(content)) if page * len(content) + block in marked]:
            outlines.append(_outline(mine[0], mine[-1], left, top, size))
        if page % _A_ROW == 0:
            texts += _offsets(top, size, theme)
    areas_drawn = [element("path", d="".join(d), fill=f"url(#r{n})") for n, d in sorted(areas.items())]
    numbers_drawn = [_numbers(those, REPEATS[n], theme) for n, those in sorted(numbers.items()) if those]
    grid = element("path", d="".join(lines), fill="none", stroke=theme.surface)
    edge = element("path", d="".join(outlines), fill="none", stroke=theme.text, stroke_width=2)
    defs = element("defs", *(pattern(f"r{n}", REPEATS[n], theme) for n in areas))
    rows, across = -(-len(counts) // _A_ROW), min(len(counts), _A_ROW)
    width, height = _GUTTER + across * (side + _GAP), rows * (side + _TITLE + _GAP)
    return document(width, height, defs, *areas_drawn, grid, *numbers_drawn, edge, *texts, theme=theme)


def _box(blocks: Sequence[int], left: int, y: int, size: int) -> str:
    """The path around some neighbouring blocks of a row."""
    x, width = left + blocks[0] % ACROSS * size, len(blocks) * size
    return f"M{x} {y}h{width}v{size}h-{width}z"


def _outline(first: int, last: int, left: int, top: int, size: int) -> str:
    """The path around a run of blocks of a page, as around selected text."""
    y, end = top + first // ACROSS * size, top + (last // ACROSS + 1) * size
    x, stop, right = left + first % ACROSS * size, left + (last % ACROSS + 1) * size, left + ACROSS * size
    if end - y == size:
        return f"M{x} {y}H{stop}V{end}H{x}z"
    return f"M{x} {y}H{right}V{end - size}H{stop}V{end}H{left}V{y + size}H{x}z"


def _numbers(numbers: Sequence[str], swatch: Swatch, theme: Theme) -> str:
    """Numbers in cells, set off from the pattern by an edge in the cell's own colour."""
    style = {"stroke": swatch.colour(theme), "stroke_width": 4, "stroke_linejoin": "round", "paint_order": "stroke"}
    return element("g", *numbers, font_size=10, font_weight=600, fill=swatch.ink(theme), text_anchor="middle", **style)


def _offsets(top: int, size: int, theme: Theme) -> list[str]:
    """The offset in the page of every fourth row."""
    style = {"font_family": MONO, "font_size": 10, "text_anchor": "end", "fill": theme.quiet}
    rows = range(0, ACROSS, 4)
    return [words(f"{r * ACROSS * BLOCK_SIZE:#05x}", _GUTTER - 8, top + r * size + 9, **style) for r in rows]
