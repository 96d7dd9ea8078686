"""The RMP map on paper: every page of a range in the colour of its state, with a legend and the list of runs.

A map of a million pages keeps a bounded size: a cell then stands for a power of two of pages and shows the most
particular state among them (the order of `palette.PAGES`). The live map in `widgets` speaks with this file's words.
"""

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from snpbook.spec.pages import PAGE_SIZE, PageState
from snpbook.spec.sizes import format_size
from snpbook.views.palette import GROUND, LIGHT, PAGES, Swatch
from snpbook.views.static import Static
from snpbook.views.svg import MONO, chip, document, element, image, pattern, words
from snpbook.views.tables import Markup, table

States = NDArray[np.uint8]

LABEL = "{title}, {pages} pages: cursor at pfn {pfn}, {state}"
"""What a screen reader says of the live map; the browser fills the same template while the cursor moves."""

SELECTED = "{count} selected, pfn {from} to {to}"
"""What follows it where more than the page under the cursor is selected."""

CELLS = 1024
"""The largest number of cells in a picture."""

RUNS = 24
"""The largest number of runs in the list below the picture."""

_WIDTH, _GUTTER, _LARGEST = 728, 80, 20
_NUMBER = {"font_family": MONO, "font_size": 10, "text_anchor": "end", "fill": LIGHT.quiet}
_STATES = list(PAGES)
_RANK = np.zeros(len(PageState), np.uint8)
_RANK[_STATES] = np.arange(len(_STATES))


def columns(pages: int) -> int:
    """How many pages a row of the map holds: a power of two, about twice to four times the number of rows."""
    return 1 << max((2 * pages - 1).bit_length() + 1 >> 1, 3)


def swatch(code: int) -> Swatch:
    """The look of a state by its code."""
    return PAGES[PageState(code)]


def census(states: States) -> Mapping[PageState, int]:
    """How many pages are in each state; states that no page is in are left out."""
    counts = np.bincount(states, minlength=len(PageState))
    return {state: int(counts[state]) for state in PAGES if counts[state]}


def runs(states: States) -> Iterator[tuple[int, int, PageState]]:
    """Runs of equal state: (first index, number of pages, state), in order."""
    starts = np.flatnonzero(np.append(True, states[1:] != states[:-1])[: len(states)])
    for start, end in zip(starts, np.append(starts[1:], len(states)), strict=False):
        yield int(start), int(end - start), PageState(int(states[start]))


def label(states: States, first_pfn: int, cursor: int, title: str) -> str:
    """The accessible name of the live map with its cursor on the page frame `cursor`."""
    state = swatch(int(states[cursor - first_pfn])).label
    return LABEL.format(title=title, pages=f"{len(states):,}", pfn=f"{cursor:#x}", state=state)


def selected(first: int, last: int) -> str:
    """The words for a selection, from the page frame `first` to `last`."""
    return SELECTED.format_map({"count": f"{last - first + 1:,}", "from": f"{first:#x}", "to": f"{last:#x}"})


def tally(states: States) -> str:
    """The census in words."""
    return ", ".join(f"{count:,} {PAGES[state].label}" for state, count in census(states).items())


def rmpmap(states: States, first_pfn: int = 0, title: str = "RMP map") -> Static:
    """The map of `states`, one code of `PageState` per page of 4 KB from page frame `first_pfn` on."""
    text = f"{title}, {len(states):,} pages: {tally(states)}"
    if not len(states):
        return Static(text, f"<p>{text}</p>")
    per = 1 << max((-(-len(states) // CELLS) - 1).bit_length(), 0)
    scale = f" One cell stands for {per:,} pages and shows the most particular state among them." if per > 1 else ""
    picture = image(_picture(states, first_pfn, per), f"{text}.{scale}")
    return Static(text, f"{picture}{_legend(states, title, per)}{_list(states, first_pfn)}")


def _legend(states: States, title: str, per: int) -> str:
    rows = []
    for state, count in census(states).items():
        look = PAGES[state]
        mark = Markup(image(chip(look), f"{look.letter}: {look.label}"), look.letter)
        rows.append((mark, look.label, f"{count:,}", format_size(count * PAGE_SIZE)))
    cell = f"one cell is {per:,} pages ({format_size(per * PAGE_SIZE)})" if per > 1 else "one cell is one page of 4 KB"
    return table(f"{title}: {cell}", ["mark", "state", "pages", "size"], rows, mono=["pages", "size"]).html


def _list(states: States, first_pfn: int) -> str:
    total = int(np.count_nonzero(states[1:] != states[:-1])) + 1
    rows = [
        (f"{first_pfn + start:#x}..{first_pfn + start + count - 1:#x}", f"{count:,}", PAGES[state].label)
        for start, count, state in islice(runs(states), RUNS)
    ]
    rest = f"and {total - RUNS:,} runs more" if total > RUNS else ""
    listing = table("Runs of pages", ["pfn", "pages", "state"], rows, mono=["pfn", "pages"], note=rest)
    return f"<details><summary>{total:,} {'runs' if total > 1 else 'run'} of pages</summary>{listing.html}</details>"


def _picture(states: States, first_pfn: int, per: int) -> str:
    ranks = np.maximum.reduceat(_RANK[states], np.arange(0, len(states), per))
    cells = np.array(_STATES, np.uint8)[ranks]
    across = columns(len(cells))
    size = min((_WIDTH - _GUTTER - 8) // across, _LARGEST)
    rows = -(-len(cells) // across)
    paths: dict[PageState, list[str]] = {}
    marks: list[str] = []
    gutter: list[str] = []
    for row in range(rows):
        y = 8 + row * size
        if row % max(rows // 8, 1) == 0:
            pfn = f"{first_pfn + row * across * per:#x}"
            gutter.append(words(pfn, _GUTTER - 8, y + size - 1, **_NUMBER))
        for start, count, state in runs(cells[row * across : (row + 1) * across]):
            x = _GUTTER + start * size
            paths.setdefault(state, []).append(f"M{x} {y}h{count * size}v{size}h-{count * size}z")
            continued = row and cells[(row - 1) * across + start] == state
            if count >= 2 and state is not GROUND and not continued and len(marks) < CELLS // 8:
                marks.append(_mark(PAGES[state], x, y, size))
    fills = [element("path", d="".join(d), fill=f"url(#s{s.value})") for s, d in paths.items()]
    defs = element("defs", *(pattern(f"s{s.value}", PAGES[s]) for s in paths))
    last = len(cells) - (rows - 1) * across
    frame = f"M{_GUTTER} 8h{across * size}v{(rows - 1) * size}h-{(across - last) * size}v{size}h-{last * size}z"
    edge = element("path", d=frame, fill="none", stroke=LIGHT.line)
    return document(_GUTTER + across * size + 8, rows * size + 16, defs, *fills, *marks, edge, *gutter)


def _mark(look: Swatch, x: int, y: int, size: int) -> str:
    plate = element("rect", x=x, y=y, width=size, height=size, fill=look.light)
    style = {"font_size": size * 0.85, "font_weight": 600, "fill": look.ink(LIGHT), "text_anchor": "middle"}
    return plate + words(look.letter, x + size / 2, y + size * 0.82, **style)
