import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest

from snpbook.views.palette import DARK, LIGHT, REPEATS, THEMES, Theme
from snpbook.views.repetition import level, repetition
from tests.views.reading import read
from tests.views.test_palette import faults

RNG = np.random.default_rng(3)


def page_of(*counts: int) -> np.ndarray:
    """A page in which one value occurs `counts[0]` times, another one `counts[1]` times, and noise."""
    blocks = RNG.integers(0, 256, (256, 16)).astype(np.uint8)
    start = 0
    for number, count in enumerate(counts):
        blocks[start : start + count] = number
        start += count
    return blocks.reshape(1, 4096)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_levels_can_be_told_apart_by_everybody(theme: Theme) -> None:
    assert faults(REPEATS, REPEATS[1], theme) == []


def test_levels_go_by_lower_bounds() -> None:
    assert [level(count) for count in (1, 2, 3, 4, 15, 16, 4096)] == [1, 2, 2, 4, 4, 16, 16]


def test_text_and_picture_count_the_same() -> None:
    view = repetition(page_of(20, 5, 2), ["Page 0x1"], "Page 0x1 on the DIMM")
    first, _, *listed = view.text.splitlines()
    assert first == (
        "Page 0x1 on the DIMM: 256 blocks; once: 229, 2 or 3 times: 2, 4 to 15 times: 5, 16 times or more: 20"
    )
    assert [line.split()[-2:] for line in listed[2:]] == [["20", "0x000"], ["5", "0x140"], ["2", "0x190"]]
    page = read(view.html)
    alt, picture = page.pictures[0]
    assert alt == f"{first}."
    assert page.tables == ["One cell is one block of 16 bytes", "Most frequent values"]
    numbers = Counter(node.text for node in picture.iter() if (node.text or "").isdecimal())
    assert numbers == {"20": 20, "5": 5, "2": 2}
    assert drawn_cells(picture) == {1: 229, 2: 2, 4: 5, 16: 20}


def drawn_cells(picture: ET.Element, size: int = 20) -> dict[int, int]:
    """How many cells are filled at each level, read off the lengths of the runs."""
    result = {}
    for node in picture.iter():
        fill = node.get("fill") or ""
        if fill.startswith("url(#r"):
            runs = [part.split("h")[1].split("v")[0] for part in (node.get("d") or "").split("M")[1:]]
            result[int(fill[6:-1])] = sum(int(run) for run in runs) // size
    return result


def test_several_pages_are_counted_together() -> None:
    page = page_of(1)
    view = repetition(np.concatenate([page, page, page_of()]), ["one", "two", "three"], "Three moments")
    assert view.text == "Three moments: 768 blocks; once: 256, 2 or 3 times: 512"
    names = [node.text for node in read(view.html).pictures[0][1].iter() if node.text in {"one", "two", "three"}]
    assert names == ["one", "two", "three"]
    assert drawn_cells(read(view.html).pictures[0][1], size=8) == {1: 256, 2: 512}


def test_no_value_twice() -> None:
    view = repetition(page_of(1), ["Page 0x0"], "Noise")
    assert view.text == "Noise: 256 blocks; once: 256\nNo value occurs twice"
    read(view.html)


@pytest.mark.parametrize(
    ("marked", "path"),
    [
        (range(2, 4), "M88 24H128V44H88z"),
        (range(14, 18), "M328 24H368V44H88V64H48V44H328z"),
        (range(64), "M48 24H368V84H368V104H48V44H48z"),
    ],
)
def test_marked_blocks_are_outlined(marked: range, path: str) -> None:
    picture = read(repetition(page_of(), ["Page"], "Page", marked=marked).html).pictures[0][1]
    assert [node.get("d") for node in picture.iter() if node.get("stroke") == LIGHT.text] == [path]


def test_theme_reaches_every_picture() -> None:
    dark = read(repetition(page_of(3), ["Page"], "Page", theme=DARK).html)
    colours = {value for _, picture in dark.pictures for node in picture.iter() for value in node.attrib.values()}
    assert {REPEATS[1].dark, REPEATS[2].dark, DARK.surface} <= colours
    assert not {REPEATS[1].light, REPEATS[2].light} & colours


@pytest.mark.parametrize("pages", [1, 8])
def test_size_is_bounded_even_for_noise(pages: int) -> None:
    values = RNG.integers(0, 40, (pages * 256, 1)).astype(np.uint8).repeat(16, axis=1)
    view = repetition(values.reshape(pages, 4096), [str(n) for n in range(pages)], "Noise")
    assert len(view.html) < 70_000
