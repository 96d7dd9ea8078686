"""The Python half of the live map: what it sends, says and costs. The other half is in tests/browser."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traitlets

from snpbook.spec.pages import PageState
from snpbook.spec.rmp import RMP_ENTRY
from snpbook.views.page import entry_fields
from snpbook.widgets import rmpmap as module
from snpbook.widgets.rmpmap import RmpMap
from tests.views.reading import read

STATES = np.repeat(np.array([2, 12, 11], np.uint8), [40, 20, 4])
PAGES = 1 << 20


class Wire:
    """A connection to no browser: keeps what was sent, and hands on what a browser would say."""

    comm_id = "wire"
    kernel = object()

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.bytes = 0

    def on_msg(self, callback: Any) -> None:
        self.browser = callback

    def send(self, data: dict[str, Any], buffers: list[Any] | None = None) -> None:
        self.sent.append(data)
        self.bytes += len(json.dumps(data)) + sum(memoryview(b).nbytes for b in buffers or [])

    def close(self) -> None: ...


def wired(widget: RmpMap) -> Wire:
    wire = Wire()
    widget.comm = wire
    wire.sent.clear()
    return wire


def test_describe_is_one_stable_line() -> None:
    expected = "RMP map, 64 pages: cursor at pfn 0x0, Hypervisor; 40 Hypervisor, 20 Guest-Valid, 4 Guest-Invalid"
    assert RmpMap(STATES).describe() == repr(RmpMap(STATES)) == expected


def test_bundle_holds_the_live_view_and_its_twins() -> None:
    shown = RmpMap(STATES)
    data, _ = shown._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.model_id
    assert data["text/plain"] == shown.describe()
    page = read(data["text/html"])
    assert page.pictures[0][0].startswith("RMP map, 64 pages: 40 Hypervisor")
    assert "snpbook-view" in data["text/html"]


def test_cursor_moves_from_python_and_fetches_the_page() -> None:
    asked: list[int] = []

    def lookup(pfn: int) -> dict[str, object]:
        asked.append(pfn)
        return dict(entry_fields(RMP_ENTRY.record(assigned=1, asid=7, gfn=pfn)))

    shown = RmpMap(STATES, first_pfn=0x100, lookup=lookup)
    told = shown.select(0x100 + 45)
    assert shown.cursor == 0x12D
    assert asked[0] == 0x100
    assert asked[-1] == 0x12D
    assert "cursor at pfn 0x12d, Guest-Valid" in shown.describe()
    assert shown._page["pfn"] == 0x12D
    rows = dict(shown._page["rows"])
    assert (rows["state"], rows["spa"], rows["asid"]) == ("V  Guest-Valid", "0x12_d000", "7")
    assert all(name in told.text and value in told.text for name, value in rows.items())


def test_cursor_moved_in_the_browser_fetches_the_page() -> None:
    shown = RmpMap(STATES)
    wire = wired(shown)
    wire.browser(
        {"content": {"data": {"method": "update", "state": {"cursor": 41}, "buffer_paths": []}}, "buffers": []}
    )
    assert shown.cursor == 41
    answers = [message["state"]["_page"] for message in wire.sent if "_page" in message.get("state", {})]
    assert answers[-1]["pfn"] == 41
    assert ["state", "V  Guest-Valid"] in answers[-1]["rows"]


@pytest.mark.parametrize("pfn", [0xFF, 0x140, -1])
def test_a_page_outside_the_map_is_refused(pfn: int) -> None:
    shown = RmpMap(STATES, first_pfn=0x100)
    with pytest.raises(traitlets.TraitError, match="not on the map, which shows 0x100 to 0x13f"):
        shown.select(pfn)
    assert shown.cursor == 0x100


def test_update_sends_the_bytes_and_nothing_else() -> None:
    shown = RmpMap(STATES)
    wire = wired(shown)
    shown.update(STATES[::-1].copy())
    assert np.array_equal(shown.states, STATES[::-1])
    assert [set(message["state"]) for message in wire.sent] == [set(), {"_page"}]
    assert wire.bytes < len(STATES) + 500
    wire.sent.clear()
    shown.update(STATES[::-1].copy())
    assert wire.sent == []


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        (np.zeros(64, np.int64), TypeError, "uint8 array of one dimension, not int64"),
        (np.zeros((8, 8), np.uint8), TypeError, "not uint8 of 2"),
        (np.full(64, len(PageState), np.uint8), ValueError, "13 is no state"),
        (np.zeros(63, np.uint8), ValueError, "shows 64 pages, not 63"),
    ],
)
def test_what_is_no_table_is_refused(states: Any, error: type[Exception], message: str) -> None:
    shown = RmpMap(STATES)
    with pytest.raises(error, match=message):
        shown.update(states)
    assert np.array_equal(shown.states, STATES)


def test_a_map_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        RmpMap(np.empty(0, np.uint8))


def test_palette_goes_by_code() -> None:
    palette = RmpMap(STATES)._palette
    assert [look["label"] for look in palette["looks"]][int(PageState.GUEST_VALID)] == "Guest-Valid"
    assert sorted(look["rank"] for look in palette["looks"]) == list(range(len(PageState)))


def test_front_end_is_small_and_asks_nobody() -> None:
    folder = Path(module.__file__).parent
    for path in [*folder.glob("*.js"), *folder.glob("*.css")]:
        content = path.read_text(encoding="utf-8")
        assert len(content.encode()) < 20_000, path.name
        assert "://" not in content, path.name
        assert "import " not in content, path.name


def test_update_costs_little_more_than_a_copy() -> None:
    rng = np.random.default_rng(3)
    tables = [rng.integers(0, len(PageState), PAGES).astype(np.uint8) for _ in range(2)]
    shown, ratios = RmpMap(tables[0]), []
    wired(shown)
    for turn in range(24):
        table = tables[1 - turn % 2]
        start = time.perf_counter()
        for _ in range(8):
            bytes(memoryview(table))
        middle = time.perf_counter()
        shown.update(table)
        ratios.append((time.perf_counter() - middle) / ((middle - start) / 8))
    assert statistics.median(ratios[4:]) <= 10, sorted(ratios)


def test_leaving_the_map_tells_where_it_stands_at_once() -> None:
    """States are throttled and may come late; what is sent on leaving is not, so that the next button finds it."""
    shown = RmpMap(np.zeros(64, np.uint8), first_pfn=0x100, selects=True)
    shown._handle_custom_msg({"cursor": 0x112, "selection": [0x110, 0x112]}, [])
    assert shown.chosen == range(0x110, 0x113)
    assert shown.cursor == 0x112
