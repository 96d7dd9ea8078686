"""A play between a guest and its host as a sequence diagram: who says what to whom, time running downwards.

What was tampered with stands out by a mark, a dashed line and its colour; a list of lines says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape

from snpbook.attest.checks import Result
from snpbook.views.checks import mark
from snpbook.views.diagram import HALO, head, line
from snpbook.views.palette import LIGHT, VERDICTS
from snpbook.views.static import Static
from snpbook.views.svg import document, element, image, words
from snpbook.views.tables import Markup, table


class Party(StrEnum):
    """Who takes part, from the inside of the guest outwards."""

    PROGRAM = "program"
    KERNEL = "guest kernel"
    GHCB = "GHCB page"
    KVM = "KVM"
    VMM = "VMM"


@dataclass(frozen=True, slots=True)
class Step:
    """Something said from one party to another, or done by one alone; `tampered` where the reader's hand did it."""

    source: Party
    target: Party
    words: str
    tampered: bool = False


_LANES = dict(zip(Party, (80, 240, 400, 545, 690), strict=True))
_WIDTH, _TOP, _STEP, _LETTER = 780, 52, 34, 6.6
_SIDES = {
    Party.PROGRAM: "in the guest", Party.KERNEL: "#VC handler, drivers", Party.GHCB: "shared memory",
    Party.KVM: "the host", Party.VMM: "the host",
}  # fmt: skip
_FIRST, _LAST = 18, 6
"""How many steps of a long play are shown from its beginning and to its end."""


def ending(result: Result, told: str) -> Static:
    """What became of the guest, in one line."""
    labels = {Result.PASSED: "goes on", Result.FAILED: "stops", Result.SKIPPED: "hangs"}
    sign = mark(result, f"the guest {labels[result]}")
    html = f'<p style="margin:6px 0"><strong>{sign}</strong> {escape(told)}</p>'
    return Static(f"{sign.words}: {told}", html)


def sequence(steps: Sequence[Step], title: str) -> Static:
    """The play as a sequence diagram, time running downwards, and as a list of lines."""
    shown = list(steps)
    if len(shown) > _FIRST + _LAST:
        left_out = len(shown) - _FIRST - _LAST
        pause = Step(Party.KVM, Party.KVM, f"… {left_out} steps more …")
        shown = [*shown[:_FIRST], pause, *shown[-_LAST:]]
    rows = [(str(number), *_said(step)) for number, step in enumerate(shown, 1)]
    listing = table(title, ["step", "from", "to", "what"], rows)
    alt = f"Sequence diagram of {len(shown)} steps between {', '.join(Party)}; the table below says the same."
    folded = f"<details><summary>The {len(shown)} steps as a table</summary>{listing.html}</details>"
    return Static(listing.text, Markup(image(_drawn(shown), alt), alt) + folded)


def _said(step: Step) -> tuple[str, str, str]:
    target = "" if step.source is step.target else step.target.value
    return step.source.value, target, mark(Result.FAILED, step.words) if step.tampered else step.words


def _drawn(steps: Sequence[Step]) -> str:
    height = _TOP + _STEP * len(steps) + 14
    lanes = []
    for party, x in _LANES.items():
        lanes.append(element("line", x1=x, y1=34, x2=x, y2=height - 8, stroke=LIGHT.line, stroke_dasharray="2 4"))
        lanes.append(words(party.value, x, 18, font_weight=600, text_anchor="middle"))
        lanes.append(words(_SIDES[party], x, 31, font_size=10, fill=LIGHT.quiet, text_anchor="middle"))
    drawn = [_arrow(step, _TOP + _STEP * number + 22) for number, step in enumerate(steps)]
    return document(_WIDTH, height, element("defs", head()), *lanes, *drawn)


def _arrow(step: Step, y: float) -> str:
    start, stop = _LANES[step.source], _LANES[step.target]
    ink = VERDICTS[Result.FAILED].light if step.tampered else LIGHT.text
    text = f"✗ {step.words}" if step.tampered else step.words
    half = len(text) * _LETTER / 2
    x = min(max((start + stop) / 2, half + 8), _WIDTH - half - 8)
    style = {"font_size": 11, "fill": ink, "font_weight": 600 if step.tampered else 400, **HALO}
    if start == stop:
        return element("circle", cx=start, cy=y - 4, r=3.5, fill=ink) + words(text, x, y - 10, **style)
    inset = 4 if stop > start else -4
    return line(f"M{start} {y}L{stop - inset} {y}", "6 4" if step.tampered else "none") + words(text, x, y - 5, **style)
