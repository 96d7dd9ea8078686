"""Memory that guests have accepted, as their programs use more and more of it: a staircase for each, and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from snpbook.spec.pages import PageState
from snpbook.views.palette import LIGHT, PAGES
from snpbook.views.static import Static
from snpbook.views.svg import document, element, image, words
from snpbook.views.tables import Markup, table

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 24, 44
_LOOKS = ((PAGES[PageState.GUEST_VALID].light, "none", -3), (PAGES[PageState.FIRMWARE].light, "7 4", 13))
"""Colour and dashes of each line, and how far below its end its name stands: lines may end in one point."""


@dataclass(frozen=True, slots=True)
class Point:
    """When programs use `used` MiB: how many MiB are accepted, and the guest's exits so far; VMGEXITs are requests."""

    used: float
    accepted: float
    exits: int
    requests: int


@dataclass(frozen=True, slots=True)
class Course:
    """One guest from the end of its boot to the end of its work."""

    name: str
    points: tuple[Point, ...]

    def until(self, share: int) -> Course:
        """The same guest, whose programs use `share` per cent of what they use here."""
        return Course(self.name, self.points[: 1 + (len(self.points) - 1) * share // 100])


def course(courses: Sequence[Course], memory: int) -> Static:
    """The lines of all guests, which have `memory` MiB each, and their numbers."""
    rows = [
        (f"{one.name}, {when}", f"{point.accepted:.1f}", f"{point.exits:,}", f"{point.requests:,}")
        for one in courses
        for when, point in (("after the boot", one.points[0]), ("at the end", one.points[-1]))
    ]
    head = ["acceptance", "MiB accepted", "exits", "requests"]
    used = courses[0].points[-1].used
    note = (
        f"At the end programs use {used:g} MiB. Exits: each page counts that the host had to back. Requests: VMGEXITs."
    )
    listing = table(f"Acceptance of {memory} MiB", head, rows, mono=head[1:], note=note)
    alt = (
        f"MiB accepted while programs use more, {' and '.join(one.name for one in courses)}; the table has the numbers."
    )
    return Static(listing.text, Markup(image(_chart(courses, memory), alt), alt) + listing.html)


def _chart(courses: Sequence[Course], memory: int) -> str:
    most = max(one.points[-1].used for one in courses) or 1

    def x(used: float) -> float:
        return _LEFT + used / most * (_WIDTH - _LEFT - _RIGHT)

    def y(accepted: float) -> float:
        return _HEIGHT - _BOTTOM - accepted / memory * (_HEIGHT - _TOP - _BOTTOM)

    quiet = {"font_size": 10, "fill": LIGHT.quiet}
    shapes = []
    for quarter in range(5):
        value, used = memory * quarter / 4, most * quarter / 4
        grid = {"x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": y(value), "y2": y(value)}
        shapes.append(element("line", **grid, stroke=LIGHT.line, stroke_width=0.5))
        shapes.append(words(f"{value:g} MiB", _LEFT - 6, y(value) + 4, text_anchor="end", **quiet))
        shapes.append(words(f"{used:g} MiB", x(used), _HEIGHT - _BOTTOM + 16, text_anchor="middle", **quiet))
    shapes.append(words("accepted", 8, 14, font_size=11))
    shapes.append(words("used by programs, from the end of the boot on", x(most / 2), _HEIGHT - 8, font_size=11,
                        text_anchor="middle"))  # fmt: skip
    for one, (colour, dash, below) in zip(courses, _LOOKS, strict=False):
        first, last = one.points[0], one.points[-1]
        path = f"M{x(first.used):.6g} {y(first.accepted):.6g}"
        for point in one.points[1:]:
            path += f"V{y(point.accepted):.6g}H{x(point.used):.6g}"
        shapes.append(element("path", d=path, fill="none", stroke=colour, stroke_width=2.5, stroke_dasharray=dash))
        shapes.append(words(one.name, x(last.used) + 8, y(last.accepted) + below, font_size=12, font_weight=600))
    return document(_WIDTH, _HEIGHT, *shapes)
