"""The palette against published colour science: WCAG contrast, and colour blindness after Machado et al. (2009)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from snpbook.attest.checks import Result
from snpbook.spec.pages import PageState
from snpbook.views.palette import DARK, GROUND, LIGHT, PAGES, THEMES, VERDICTS, Swatch, Theme

TEXT, MARK, APART = 4.5, 3.0, 12.0
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
Vector = NDArray[np.float64]


def linear(colour: str) -> Vector:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def ratio(one: str, other: str) -> float:
    light = sorted(float(linear(colour) @ SRGB_TO_XYZ[1]) + 0.05 for colour in (one, other))
    return light[1] / light[0]


def lab(rgb: Vector) -> Vector:
    """CIE 1976 L*a*b* of a linear colour."""
    parts = SRGB_TO_XYZ @ np.clip(rgb, 0, 1) / SRGB_TO_XYZ.sum(axis=1)
    x, y, z = np.where(parts > 0.008856, np.cbrt(parts), 7.787 * parts + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: str, other: str) -> tuple[float, str]:
    """The smallest difference of two colours over all kinds of vision, and the kind."""
    return min(
        (float(np.linalg.norm(lab(m @ linear(one)) - lab(m @ linear(other)))), name) for name, m in VISION.items()
    )


def faults(looks: Mapping[Any, Swatch], ground: Swatch | None, theme: Theme) -> list[str]:
    """What is wrong with a set of looks in one theme."""
    papers = [theme.surface] + ([ground.colour(theme)] if ground else [])
    marks = [look for look in looks.values() if look is not ground]
    found = []
    for name in ("label", "letter", "pattern"):
        counts = Counter(getattr(look, name) for look in looks.values())
        found += [f"{name} is used twice: {value!r}" for value, count in counts.items() if count > 1]
    readable = {look.label: ratio(look.ink(theme), look.colour(theme)) >= TEXT for look in looks.values()}
    found += [f"the letter of {label} is hard to read" for label, good in readable.items() if not good]
    for look in marks:
        found += [f"{look.label} is lost on {paper}" for paper in papers if ratio(look.colour(theme), paper) < MARK]
    for one, other in combinations(looks.values(), 2):
        apart, vision = distance(one.colour(theme), other.colour(theme))
        if apart < APART:
            found.append(f"{one.label} and {other.label} look alike ({apart:.1f}, {vision})")
    return found


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_page_states_can_be_told_apart_by_everybody(theme: Theme) -> None:
    assert set(PAGES) == set(PageState)
    assert faults(PAGES, PAGES[GROUND], theme) == []


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_verdicts_can_be_told_apart_by_everybody(theme: Theme) -> None:
    assert set(VERDICTS) == set(Result)
    assert faults(VERDICTS, None, theme) == []
    for look in VERDICTS.values():  # badges write white on their colour
        assert ratio("#FFFFFF", look.colour(theme)) >= TEXT


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_words_and_lines_are_legible(theme: Theme) -> None:
    for paper in (theme.surface, PAGES[GROUND].colour(theme)):
        assert ratio(theme.text, paper) >= TEXT
        assert ratio(theme.quiet, paper) >= TEXT
    assert ratio(theme.line, theme.surface) >= MARK


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"light": "#F0E442"}, "Guest-Valid is lost on #FFFFFF"),
        ({"light": "#B97A01"}, "Guest-Valid and Guest-Invalid look alike"),
        ({"light": "#0072B2"}, "look alike"),
        ({"letter": "G"}, "letter is used twice"),
        ({"pattern": "M0 4H8"}, "pattern is used twice"),
    ],
)
def test_a_bad_palette_is_refused(change: dict[str, str], complaint: str) -> None:
    bad = {**PAGES, PageState.GUEST_VALID: replace(PAGES[PageState.GUEST_VALID], **change)}
    assert any(complaint in fault for fault in faults(bad, bad[GROUND], LIGHT)), faults(bad, bad[GROUND], LIGHT)


def test_a_letter_that_cannot_be_read_is_refused() -> None:
    class Faded(Swatch):
        def ink(self, theme: Theme) -> str:
            return self.colour(theme)

    look = PAGES[PageState.GUEST_VALID]
    bad = {**PAGES, PageState.GUEST_VALID: Faded(look.label, look.letter, look.pattern, look.light, look.dark)}
    assert "the letter of Guest-Valid is hard to read" in faults(bad, bad[GROUND], DARK)


def test_ink_is_the_better_of_black_and_white() -> None:
    for look in (*PAGES.values(), *VERDICTS.values()):
        for theme in THEMES:
            best = max(("#000000", "#FFFFFF"), key=lambda ink: ratio(ink, look.colour(theme)))
            assert look.ink(theme) == best
