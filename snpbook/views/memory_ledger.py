"""The ledger of guests over time: pages on either side and pages that may not move, step by step, regime by regime.

Counts are drawn as they are. Time is drawn only when asked for, and then the axis says where the estimate comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from snpbook.host.ledger import Sample
from snpbook.spec.costs import costs
from snpbook.views.palette import LIGHT, SIDES, Theme
from snpbook.views.static import Static
from snpbook.views.svg import chip, document, element, image, pattern, words
from snpbook.views.tables import Markup, table

Runs = Mapping[str, Sequence[Sample]]
"""Samples of one workload, by the name of the regime that it ran on."""

WORK: Mapping[str, str] = {
    "rmpupdates": "RMPUPDATE, by entry",
    "psmashes": "PSMASH, by 2 MB entry",
    "wbinvds": "WBINVD on all processors",
    "exits": "exits of the guest",
    "ioctls": "ioctls",
    "firmware_commands": "commands to the secure processor",
    "copied": "bytes copied",
    "encrypted": "bytes encrypted by the firmware",
    "hashed": "bytes hashed by the firmware",
}
"""What is counted of the work done, in words."""

_BAR, _STEP, _HIGH, _GUTTER, _TOP, _FOOT, _GAP = 16, 22, 150, 58, 26, 22, 18
_A_ROW = 3
_LONG = 420


def over_time(runs: Runs, *, theme: Theme = LIGHT) -> Static:
    """One panel for each regime on one scale, the legend, and a table of counts that folds."""
    tables = [steps(name, samples) for name, samples in runs.items()]
    lines = [f"{name}: {_in_words(samples)}" for name, samples in runs.items()]
    picture = image(_panels(runs, theme), "Pages over time. " + " ".join(lines))
    labels = "; ".join(f"{n} {sample.label}" for n, sample in enumerate(next(iter(runs.values())), 1))
    folded = "".join(part.html for part in tables)
    return Static(
        "\n\n".join(part.text for part in tables),
        f"{picture}<p>Steps: {escape(labels)}.</p>{_legend(theme)}"
        f"<details><summary>The counts as tables</summary>{folded}</details>",
    )


def steps(name: str, samples: Sequence[Sample]) -> Static:
    """The counts of one run, step by step; what is never counted has no column."""
    columns = {
        "shared": [sample.pages.shared for sample in samples],
        "private": [sample.pages.private for sample in samples],
        "both": [sample.pages.doubled for sample in samples],
        "pinned": [sample.pages.pinned for sample in samples],
        "2 MB entries": [sample.pages.large for sample in samples],
        "RMPUPDATE": [sample.work.rmpupdates for sample in samples],
        "PSMASH": [sample.work.psmashes for sample in samples],
        "exits": [sample.work.exits for sample in samples],
    }
    shown = {head: counts for head, counts in columns.items() if any(counts)}
    rows = [
        (str(number), sample.label, *(f"{counts[number - 1]:,}" for counts in shown.values()))
        for number, sample in enumerate(samples, 1)
    ]
    return table(name, ["step", "what", *shown], rows)


def work(runs: Runs, name: str, *, time: bool = False, theme: Theme = LIGHT) -> Static:
    """How much of one kind of work each regime had done at its end; with `time`, the estimate for it."""
    done = {regime: getattr(samples[-1].work, name) for regime, samples in runs.items()}
    cost = costs()[name]
    title = cost.axis if time else WORK[name]
    values = {regime: cost.seconds(count) if time else count for regime, count in done.items()}
    shown = {regime: f"{value:.3g} s" if time else f"{value:,}" for regime, value in values.items()}
    twin = table(title, ["regime", "time" if time else "count"], list(shown.items()))
    alt = f"{title}: " + ", ".join(f"{regime} {value}" for regime, value in shown.items()) + "."
    return Static(twin.text, image(_bars(title, values, shown, theme), alt))


def _in_words(samples: Sequence[Sample]) -> str:
    pages = [sample.pages for sample in samples]
    first = pages[0].pinned
    most = {name: max(getattr(each, name) for each in pages) for name in ("pinned", "shared", "private", "doubled")}
    return (
        f"pinned {first:,} at first and {most['pinned']:,} at most; at most {most['shared']:,} shared, "
        f"{most['private']:,} private, {most['doubled']:,} on both sides."
    )


def _legend(theme: Theme) -> str:
    where = {"shared": "pages of the VMM's own memory", "private": "pages of a private file"}
    rows = [
        (Markup(image(chip(swatch, theme), swatch.label), swatch.letter), where[side]) for side, swatch in SIDES.items()
    ]
    tick = document(36, 18, element("path", d="M4 9H32", stroke=theme.text, stroke_width=3), theme=theme)
    rows.append((Markup(image(tick, "line"), "line"), "pages that may not move: pinned, or in a private file"))
    return table("One bar is one step", ["mark", "counts"], rows).html


def _panels(runs: Runs, theme: Theme) -> str:
    steps = max(len(samples) for samples in runs.values())
    top = max(max(s.pages.shared + s.pages.private, s.pages.pinned) for each in runs.values() for s in each) or 1
    wide, high = _GUTTER + steps * _STEP + _GAP, _TOP + _HIGH + _FOOT + _GAP
    drawn = [element("defs", *(pattern(f"m{s.letter}", s, theme) for s in SIDES.values()))]
    for number, (name, samples) in enumerate(runs.items()):
        left, base = number % _A_ROW * wide + _GUTTER, number // _A_ROW * high + _TOP + _HIGH
        drawn += [words(name, left, base - _HIGH - 10, font_weight=600), *_scale(left, base, steps, top, theme)]
        drawn += _columns(left + 3, base, samples, top, theme)
    across, down = min(len(runs), _A_ROW), -(-len(runs) // _A_ROW)
    return document(across * wide, down * high, *drawn, theme=theme)


def _scale(left: float, base: float, steps: int, top: int, theme: Theme) -> list[str]:
    """Lines at nothing, half and all of the largest count."""
    found = [words("pages", left - 6, base - _HIGH - 10, text_anchor="end", font_size=10, fill=theme.quiet)]
    for share in (0.0, 0.5, 1.0):
        y = base - share * _HIGH
        found.append(element("path", d=f"M{left:g} {y:g}h{steps * _STEP}", stroke=theme.line, stroke_opacity=0.5))
        count = f"{round(share * top):,}"
        found.append(words(count, left - 6, y + 4, text_anchor="end", font_size=10, fill=theme.quiet))
    return found


def _columns(left: float, base: float, samples: Sequence[Sample], top: int, theme: Theme) -> list[str]:
    """Shared below, private above; across both a line at what may not move. One path for each kind of mark."""
    boxes: dict[str, list[str]] = {side: [] for side in SIDES}
    levels, numbers = [], []
    for step, sample in enumerate(samples):
        x, y = left + step * _STEP, base
        for side, found in boxes.items():
            height = getattr(sample.pages, side) / top * _HIGH
            y -= height
            found += [f"M{x:g} {y:.1f}h{_BAR}v{height:.1f}h-{_BAR}z"] * (height > 0)
        levels.append(f"M{x - 3:g} {base - sample.pages.pinned / top * _HIGH:.1f}h{_BAR + 6}")
        numbers.append(words(str(step + 1), x + _BAR / 2, base + 14))
    drawn = [
        element("path", d="".join(boxes[side]), fill=f"url(#m{swatch.letter})", stroke=theme.surface)
        for side, swatch in SIDES.items()
        if boxes[side]
    ]
    line = "".join(levels)
    halo = element("path", d=line, stroke=theme.surface, stroke_width=6)
    style = {"text_anchor": "middle", "font_size": 10, "fill": theme.quiet}
    return [*drawn, halo, element("path", d=line, stroke=theme.text, stroke_width=3), element("g", *numbers, **style)]


def _bars(title: str, values: Mapping[str, float], shown: Mapping[str, str], theme: Theme) -> str:
    left, most = 150, max(values.values()) or 1
    drawn, y = [element("defs", pattern("w", SIDES["private"], theme))], 10
    for regime, value in values.items():
        length = value / most * _LONG
        drawn.append(words(regime, left - 8, y + 13, text_anchor="end"))
        drawn.append(element("rect", x=left, y=y, width=max(length, 1), height=_BAR, fill="url(#w)"))
        drawn.append(words(shown[regime], left + length + 6, y + 13))
        y += _STEP
    drawn.append(element("path", d=f"M{left} {y + 2}h{_LONG}", stroke=theme.line))
    drawn.append(words(title, left, y + 18, fill=theme.quiet))
    return document(left + _LONG + 120, y + 30, *drawn, theme=theme)
