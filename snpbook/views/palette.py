"""The palette: what each state of a page and each verdict looks like, in every picture of the project.

A look is a colour, a letter and a pattern at once, so that no picture speaks by colour alone. Hues follow Okabe and
Ito; values are tuned so that marks keep 3:1 against their ground and stay apart for colour-blind readers (tests/views).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from snpbook.attest.checks import Result
from snpbook.spec.pages import PageState


@dataclass(frozen=True, slots=True)
class Theme:
    """The neutral colours of one colour scheme: paper, text, quiet text and lines."""

    name: str
    surface: str
    text: str
    quiet: str
    line: str


LIGHT = Theme("light", surface="#FFFFFF", text="#16191D", quiet="#565E68", line="#868E98")
DARK = Theme("dark", surface="#111418", text="#E8EBEF", quiet="#A3ABB5", line="#6E7681")
THEMES = (LIGHT, DARK)


@dataclass(frozen=True, slots=True)
class Swatch:
    """One look: a label in words, a letter, a pattern (SVG path data on an 8 x 8 tile) and two colours."""

    label: str
    letter: str
    pattern: str
    light: str
    dark: str

    def colour(self, theme: Theme) -> str:
        """The fill, as `#RRGGBB`."""
        return self.light if theme is LIGHT else self.dark

    def ink(self, theme: Theme) -> str:
        """Black or white, whichever is easier to read on the colour."""
        return max("#000000", "#FFFFFF", key=lambda ink: contrast(ink, self.colour(theme)))


GROUND = PageState.HYPERVISOR
"""The state that most of memory is in: drawn as ground, against which the other states are marks."""

PAGES: Mapping[PageState, Swatch] = {
    PageState.HYPERVISOR: Swatch("Hypervisor", "H", "M4 3.5V4.5", "#E9ECEF", "#272B31"),
    PageState.DEFAULT: Swatch("Default", "D", "M2 6L6 2", "#848486", "#858B93"),
    PageState.HV_FIXED: Swatch("HV-Fixed", "X", "M0 0H8M0 4H8M2 0V4M6 4V8", "#49525D", "#C9D3DC"),
    PageState.GUEST_VALID: Swatch("Guest-Valid", "V", "", "#018C5F", "#3BC188"),
    PageState.GUEST_INVALID: Swatch("Guest-Invalid", "G", "M0 8L8 0M-2 2L2 -2M6 10L10 6", "#B97A01", "#FCCF52"),
    PageState.PRE_GUEST: Swatch("Pre-Guest", "P", "M0 0L8 8M-2 6L2 10M6 -2L10 2", "#2D8ECD", "#7AC8FA"),
    PageState.PRE_SWAP: Swatch("Pre-Swap", "S", "M2 2H6V6H2Z", "#0E3B76", "#357ED7"),
    PageState.RECLAIM: Swatch("Reclaim", "R", "M0 6L4 2L8 6", "#7C5B34", "#B79660"),
    PageState.FIRMWARE: Swatch("Firmware", "F", "M4 0V8M0 4H8", "#B54400", "#EE7A2F"),
    PageState.FIRMWARE_IOMMU: Swatch("Firmware-IOMMU", "I", "M4 0V8", "#791E09", "#FDB1A5"),
    PageState.METADATA: Swatch("Metadata", "M", "M0 4H8", "#5A339C", "#BC95FF"),
    PageState.CONTEXT: Swatch("Context", "C", "M4 2A2 2 0 1 0 4 6A2 2 0 1 0 4 2Z", "#BE62A2", "#E689B8"),
    PageState.INVALID: Swatch("Invalid", "!", "M1 1L7 7M7 1L1 7", "#100F10", "#FFFFFF"),
}
"""States from the most ordinary to the most particular: a cell of many pages shows the last of those it holds."""

VERDICTS: Mapping[Result, Swatch] = {
    Result.PASSED: Swatch("passed", "\u2713", "", "#0B7F5A", "#0B7F5A"),
    Result.FAILED: Swatch("failed", "\u2717", "M0 8L8 0M-2 2L2 -2M6 10L10 6", "#C74A00", "#C74A00"),
    Result.SKIPPED: Swatch("skipped", "\u2013", "M0 4H8", "#69717C", "#69717C"),
}
"""One value for both schemes: static output cannot know which one it is read in."""

REPEATS: Mapping[int, Swatch] = {
    1: Swatch("once", "1", "", "#E9ECEF", "#272B31"),
    2: Swatch("2 or 3 times", "2", "M0 8L8 0M-2 2L2 -2M6 10L10 6", "#B97A01", "#AE6C30"),
    4: Swatch("4 to 15 times", "4", "M0 4H8", "#A83200", "#EE9A3F"),
    16: Swatch("16 times or more", "16", "M4 0V8M0 4H8", "#5A1A00", "#FFE3A0"),
}
"""How often a value occurs, from each number on: the first is ground."""

SIDES: Mapping[str, Swatch] = {
    "shared": Swatch("shared", "S", "M0 8L8 0M-2 2L2 -2M6 10L10 6", "#2D8ECD", "#7AC8FA"),
    "private": Swatch("private", "P", "", "#018C5F", "#3BC188"),
}
"""The two sides of a guest's memory: as the states of pages that they mostly are."""


def contrast(one: str, other: str) -> float:
    """The WCAG contrast ratio of two `#RRGGBB` colours, 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
