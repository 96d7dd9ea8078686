"""Boxes and straight arrows between them: what every picture of a state machine is drawn with."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from snpbook.views.palette import LIGHT
from snpbook.views.svg import element

LINE = {"stroke": LIGHT.text, "stroke_width": 1.4, "fill": "none"}
HALO = {"stroke": LIGHT.surface, "stroke_width": 4, "paint_order": "stroke", "text_anchor": "middle"}
"""Words on a line: paper around each letter keeps them readable."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A box by its middle and size, in pixels."""

    x: float
    y: float
    width: float
    height: float


def head() -> str:
    """The definition of the arrow head, for `defs`."""
    tip = element("path", d="M0 0L9 4L0 8z", fill=LIGHT.text)
    return element("marker", tip, id="a", markerWidth=9, markerHeight=8, refX=8, refY=4, orient="auto",
                   markerUnits="userSpaceOnUse")  # fmt: skip


def line(path: str, dash: str = "none") -> str:
    """A line along `path` that ends in an arrow head."""
    return element("path", d=path, stroke_dasharray=dash, marker_end="url(#a)", **LINE)


def ends(source: Box, target: Box, shift: float) -> tuple[Point, Point]:
    """Where the line between the middles of two boxes leaves the one and reaches the other.

    `shift` moves it aside by so many pixels, to the same side whichever of the two is the source.
    """
    length = hypot(target.x - source.x, target.y - source.y)
    ux, uy = (target.x - source.x) / length, (target.y - source.y) / length
    sign = 1 if (target.x, target.y) > (source.x, source.y) else -1
    dx, dy = -uy * shift * sign, ux * shift * sign
    return _edge(source, ux, uy, dx, dy), _edge(target, -ux, -uy, dx, dy)


def _edge(box: Box, ux: float, uy: float, dx: float, dy: float) -> Point:
    """Where a line from the middle of a box, moved by (dx, dy), leaves the box in the direction (ux, uy)."""
    wide, high = box.width / 2 + 1.5, box.height / 2 + 1.5
    reach = [(wide - dx * (1 if ux > 0 else -1)) / abs(ux)] if abs(ux) > 1e-6 else []
    reach += [(high - dy * (1 if uy > 0 else -1)) / abs(uy)] if abs(uy) > 1e-6 else []
    far = min(reach)
    return box.x + dx + ux * far, box.y + dy + uy * far
