from itertools import pairwise

import numpy as np
import pytest

from snpbook.spec.pages import PageState
from snpbook.views import rmpmap
from snpbook.views.palette import PAGES
from tests.views.reading import read

RNG = np.random.default_rng(7)


def table_of(*runs: tuple[PageState, int]) -> rmpmap.States:
    return np.repeat(np.array([s for s, _ in runs], np.uint8), [n for _, n in runs])


SMALL = table_of((PageState.HYPERVISOR, 40), (PageState.GUEST_VALID, 20), (PageState.GUEST_INVALID, 3))


def test_text_counts_every_state() -> None:
    assert repr(rmpmap.rmpmap(SMALL)) == "RMP map, 63 pages: 40 Hypervisor, 20 Guest-Valid, 3 Guest-Invalid"


def test_picture_legend_and_runs_say_the_same() -> None:
    page = read(rmpmap.rmpmap(SMALL, first_pfn=0x100).html)
    assert page.pictures[0][0] == "RMP map, 63 pages: 40 Hypervisor, 20 Guest-Valid, 3 Guest-Invalid."
    assert page.tables == ["RMP map: one cell is one page of 4 KB", "Runs of pages"]
    for words in ("Guest-Valid", "80 KiB", "0x128..0x13b", "0x13c..0x13e", "3 runs of pages"):
        assert words in page.words


def test_each_state_is_drawn_in_its_own_colour() -> None:
    every = np.arange(len(PageState), dtype=np.uint8).repeat(4)
    (_, picture), *chips = read(rmpmap.rmpmap(every).html).pictures
    drawn = {node.get("fill") for node in picture.iter()}
    assert {look.light for look in PAGES.values()} <= drawn
    assert {f"url(#s{state.value})" for state in PageState} <= drawn
    assert len(chips) == len(PageState)


@pytest.mark.parametrize("pages", [1, 7, 8, 1023, 1024, 1025, 1 << 16, (1 << 20) + 5])
def test_size_is_bounded_even_for_noise(pages: int) -> None:
    view = rmpmap.rmpmap(RNG.integers(0, len(PageState), pages).astype(np.uint8))
    assert len(view.html) < 70_000
    read(view.html)


def test_a_single_page_among_a_million_is_seen() -> None:
    states = table_of((PageState.HYPERVISOR, 1 << 20))
    states[777_777] = PageState.CONTEXT
    picture = read(rmpmap.rmpmap(states).html).pictures[0][1]
    assert [n for n in picture.iter() if n.get("fill") == f"url(#s{PageState.CONTEXT.value})"]


def test_the_most_particular_state_wins_a_cell() -> None:
    order = list(PAGES)
    assert order[0] is PageState.HYPERVISOR
    states = np.full(rmpmap.CELLS * 2, order[0], np.uint8)
    states[:2] = order[3], order[1]
    picture = read(rmpmap.rmpmap(states).html).pictures[0][1]
    fills = {node.get("fill") for node in picture.iter()}
    assert f"url(#s{order[3].value})" in fills
    assert f"url(#s{order[1].value})" not in fills


def test_runs_join_to_the_table() -> None:
    states = RNG.integers(0, 3, 500).astype(np.uint8)
    found = list(rmpmap.runs(states))
    assert np.array_equal(table_of(*((state, count) for _, count, state in found)), states)
    assert [start for start, _, _ in found] == list(np.cumsum([0] + [count for _, count, _ in found])[:-1])
    assert all(a[2] != b[2] for a, b in pairwise(found))
    assert list(rmpmap.runs(states[:0])) == []


@pytest.mark.parametrize("pages", [1, 8, 63, 64, 1000, 1 << 16, 1 << 20, 1 << 21])
def test_rows_are_a_power_of_two_wide(pages: int) -> None:
    columns = rmpmap.columns(pages)
    assert columns & columns - 1 == 0
    if pages >= 64:
        assert 2 <= columns / (pages / columns) <= 8


def test_an_empty_map_says_so() -> None:
    assert rmpmap.rmpmap(np.empty(0, np.uint8)).text.startswith("RMP map, 0 pages")
