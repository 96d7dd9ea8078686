"""Private memory in pictures and tables: bars as high as the counts, and times only with their source."""

from __future__ import annotations

import re

import pytest

from snpbook.host.ledger import Sample, Work
from snpbook.host.recount import Pages
from snpbook.regimes.fit import Fit
from snpbook.regimes.host_writes import Damage, Write
from snpbook.spec.costs import costs
from snpbook.spec.private_memory import CELLS, HOOKS
from snpbook.views.memory_fit import Guess, fits
from snpbook.views.memory_ledger import WORK, over_time, steps, work
from snpbook.views.palette import SIDES, THEMES, Theme
from snpbook.views.private_memory import cells, endings, hooks, stray_writes
from tests.views.reading import read
from tests.views.test_palette import faults


def sample(label: str, shared: int, private: int, pinned: int, rmpupdates: int = 0) -> Sample:
    pages = Pages(shared=shared, private=private, doubled=0, pinned=pinned, assigned=0, large=0, mapped=0)
    return Sample(label, pages, Work(**{**dict.fromkeys(Work.__slots__, 0), "rmpupdates": rmpupdates}))


RUNS = {
    "a": [sample("created", 100, 0, 100), sample("used", 100, 0, 100, 7)],
    "b": [sample("created", 10, 0, 0), sample("used <all>", 10, 60, 60, 21)],
}


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_sides_can_be_told_apart_by_everybody(theme: Theme) -> None:
    assert faults(SIDES, None, theme) == []


def test_bars_are_as_high_as_the_counts() -> None:
    """On one scale: 100 pages are 150 pixels in every panel."""
    page = read(over_time(RUNS).html)
    alt, picture = page.pictures[0]
    assert "a: pinned 100 at first and 100 at most" in alt
    assert "b: pinned 0 at first and 60 at most; at most 10 shared, 60 private, 0 on both sides." in alt
    heights = {
        node.get("fill"): re.findall(r" ([\d.]+)h\d+v([\d.]+)h-", node.get("d") or "")
        for node in picture.iter()
        if (node.get("fill") or "").startswith("url(#m")
    }
    last = {"url(#mS)": [("161.0", "15.0")] * 2, "url(#mP)": [("71.0", "90.0")]}
    assert heights == last, "those of the last panel, private above shared"
    assert page.tables == ["One bar is one step", "a", "b"]
    assert "Steps: 1 created; 2 used." in page.words


def test_what_is_never_counted_has_no_column() -> None:
    text = steps("b", RUNS["b"]).text
    assert text.splitlines()[1].split() == ["step", "what", "shared", "private", "pinned", "RMPUPDATE"]
    assert text.splitlines()[-1].split() == ["2", "used", "<all>", "10", "60", "60", "21"]


@pytest.mark.parametrize("name", WORK)
def test_time_is_shown_on_request_alone_and_says_what_it_is_worth(name: str) -> None:
    counted, timed = work(RUNS, name), work(RUNS, name, time=True)
    assert "second" not in counted.text
    assert counted.text.splitlines()[0] == WORK[name]
    source = costs()[name].source
    assert source
    assert source in timed.text.splitlines()[0]
    assert source in read(timed.html).pictures[0][0]
    assert any(source in (node.text or "") for node in read(timed.html).pictures[0][1].iter()), "in the picture itself"


def test_counts_and_estimates() -> None:
    assert [line.split() for line in work(RUNS, "rmpupdates").text.splitlines()[3:]] == [["a", "7"], ["b", "21"]]
    assert "2.1e-05 s" in work(RUNS, "rmpupdates", time=True).text


def test_every_cell_and_every_hook_is_there() -> None:
    text = cells().text
    assert text.count("none: ") == 20 - len(CELLS)
    assert "rfc-v7 [u]" in text
    assert all(hook.name in hooks().text and hook.upstream in hooks().text for hook in HOOKS)
    for view in (cells(), hooks()):
        read(view.html)


def test_guesses_are_judged() -> None:
    assert fits({}).text.startswith("Guess first")
    found = [Fit(1, 4096), Fit(2, 2048), Fit(2, 1000, "ENOMEM: full")]
    text = fits({"right": Guess(2, found), "wrong": Guess(5, found)}).text
    assert "✓ 2" in text
    assert "✗ 5" in text
    assert "8.0 MiB" in text
    assert "ENOMEM: full" in text


def test_endings_and_writes_are_told() -> None:
    view = endings("x", {"one": None, "two": {"the guest": "reads", "private pages": 3, "pages with both sides": 0}})
    assert "the VMM makes no call" in view.text
    assert view.text.splitlines()[-1].split() == ["two", "reads", "3", "0"]
    noise = stray_writes({"VMM": Write(Damage.SILENT, bytes(range(200, 220)))})
    assert "c8c9cacb" in noise.text
    read(noise.html)
