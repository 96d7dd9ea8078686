"""The life of a page as a picture: its states, and who moves it from one to another.

Arrows and words come from the table in `spec.transitions`; this file only knows where each state is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from snpbook.spec.pages import PageState
from snpbook.spec.transitions import PAGE_TRANSITIONS, Mover, Transition
from snpbook.views.diagram import HALO, LINE, Box, ends, head, line
from snpbook.views.palette import GROUND, LIGHT, PAGES
from snpbook.views.static import Static
from snpbook.views.svg import document, element, image, words
from snpbook.views.tables import Markup, table

_PLACES = {
    PageState.HYPERVISOR: (76, 150), PageState.GUEST_INVALID: (350, 80), PageState.GUEST_VALID: (690, 80),
    PageState.PRE_GUEST: (350, 230), PageState.PRE_SWAP: (690, 230), PageState.RECLAIM: (76, 350),
    PageState.FIRMWARE: (350, 350), PageState.CONTEXT: (690, 350), PageState.HV_FIXED: (76, 480),
    PageState.METADATA: (690, 480),
}  # fmt: skip
_WIDE, _HIGH, _WIDTH, _HEIGHT = 118, 34, 778, 532
_APART, _TOP = 15, 22
_OFF_CENTRE = 0.36
"""Where the label of an arrow stands that may cross another one half-way."""
_LEFT_OUT = (
    "Left out: Firmware-IOMMU and the first HV-Fixed pages, which the firmware makes as it builds the table; and that "
    "after a plain SNP_SHUTDOWN a legacy command lets go of its buffer's page, whatever its state."
)
_DASHES = {Mover.HOST: "none", Mover.GUEST: "7 3", Mover.FIRMWARE: "2 3"}


def page_life(current: PageState | None = None) -> Static:
    """The picture, and every transition as a row; of a page in the state `current` only those that leave it."""
    rows = [
        (PAGES[one.source].label, PAGES[one.target].label, one.mover.value, one.by, one.note)
        for one in PAGE_TRANSITIONS
        if current in (None, one.source)
    ]
    caption = "The life of a page" if current is None else f"A page that is {PAGES[current].label}"
    listing = table(caption, ["from", "to", "moved by", "with", "given"], rows, mono=["with"])
    arrows = _arrows()
    alt = f"The states of a page, and {len(arrows)} arrows between them: the table below lists them."
    if current is not None:
        alt = f"The states of a page, {PAGES[current].label} marked: the table below lists what leads out of it."
    html = f"<p>{escape(_LEFT_OUT)}</p>"
    html += f"<details><summary>{len(rows)} transitions as a table</summary>{listing.html}</details>"
    return Static(f"{listing.text}\n{_LEFT_OUT}", Markup(image(_picture(arrows, current), alt), alt) + html)


def _arrows() -> list[Transition]:
    """The transitions as they are drawn: those of one mover between the same states as one, which names them all."""
    found: dict[tuple[PageState, PageState, Mover], list[str]] = {}
    for one in PAGE_TRANSITIONS:
        labels = found.setdefault((one.source, one.target, one.mover), [])
        label = one.by.removeprefix("SNP_").removeprefix("PAGE_")
        labels += [label] if label not in labels else []
    return [Transition(*way, by=", ".join(labels)) for way, labels in found.items()]


def _picture(transitions: Sequence[Transition], current: PageState | None) -> str:
    drawn = [shape for one in transitions for shape in _arrow(one, transitions)]
    lines, labels = drawn[::2], drawn[1::2]
    nodes = [_node(state, x, y) for state, (x, y) in _PLACES.items()]
    if current in _PLACES:
        x, y = _PLACES[current]
        nodes.append(element("rect", x=x - _WIDE / 2 - 5, y=y - _HIGH / 2 - 5, width=_WIDE + 10, height=_HIGH + 10,
                             rx=9, fill="none", stroke=LIGHT.text, stroke_width=3))  # fmt: skip
    legend = [
        element("path", d=f"M{8 + 120 * at} {_HEIGHT - 10}h34", stroke_dasharray=dash, **LINE)
        + words(mover.value, 48 + 120 * at, _HEIGHT - 6, font_size=11)
        for at, (mover, dash) in enumerate(_DASHES.items())
    ]
    named = element("g", *labels, font_size=10, fill=LIGHT.text, **HALO)
    return document(_WIDTH, _HEIGHT, element("defs", head()), *lines, *nodes, named, *legend)


def _node(state: PageState, x: int, y: int) -> str:
    look = PAGES[state]
    box = element("rect", x=x - _WIDE / 2, y=y - _HIGH / 2, width=_WIDE, height=_HIGH, rx=6, fill=LIGHT.surface,
                  stroke=LIGHT.line if state is GROUND else look.light, stroke_width=2.5)  # fmt: skip
    chip = element("rect", x=x - _WIDE / 2 + 5, y=y - 10, width=20, height=20, rx=4, fill=look.light)
    letter = words(look.letter, x - _WIDE / 2 + 15, y + 4, fill=look.ink(LIGHT), font_weight=600, text_anchor="middle")
    return box + chip + letter + words(look.label, x + 12, y + 4, text_anchor="middle")


def _arrow(one: Transition, all_: Sequence[Transition]) -> tuple[str, str]:
    """A line with its arrow head, and its label: the lines between two states lie side by side."""
    (x0, y0), (x1, y1) = _PLACES[one.source], _PLACES[one.target]
    label, dash = one.by, _DASHES[one.mover]
    if {one.source, one.target} == {PageState.GUEST_VALID, PageState.HYPERVISOR}:  # over the top, past Guest-Invalid
        path = f"M{x0} {y0 - _HIGH / 2:g}V{_TOP}H{x1}V{y1 - _HIGH / 2:g}"
        at = (x0 + x1) / 2, _TOP + 4.0
    else:
        both = {one.source, one.target}
        same = [other for other in all_ if {other.source, other.target} == both]
        shift = (same.index(one) - (len(same) - 1) / 2) * _APART
        start, stop = ends(Box(x0, y0, _WIDE, _HIGH), Box(x1, y1, _WIDE, _HIGH), shift)
        path = f"M{start[0]:.6g} {start[1]:.6g}L{stop[0]:.6g} {stop[1]:.6g}"
        part = 0.5 if y0 == y1 else (same.index(one) + 1) / (len(same) + 1) if len(same) > 1 else _OFF_CENTRE
        part = part if (x1, y1) > (x0, y0) else 1 - part
        at = start[0] + part * (stop[0] - start[0]), start[1] + part * (stop[1] - start[1]) + 4
    return line(path, dash), words(label, round(at[0]), round(at[1]))
