"""The live RMP map in a real JupyterLab, by keyboard, in light and dark, on a notebook made for the test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from snpbook.spec.pages import PageState
from snpbook.views.palette import PAGES, Theme
from tests.browser.lab_page import CHROMIUM, MAP, LabPage, opened

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "stand_in.ipynb"
MAKE = """\
import numpy as np
from snpbook.widgets.rmpmap import RmpMap
states = np.full(1 << 20, 2, np.uint8)
states[0x40000:0x44000] = 12
states[0x44000:0x48000] = 9
states[0x777] = 7
rmp_map = RmpMap(states, lookup=lambda pfn: {"asid": pfn % 5})
rmp_map"""
UPDATE = """\
changed = states.copy()
changed[0x44000:0x48000] = 12
rmp_map.update(changed)
rmp_map.select(0x48000)
print(rmp_map.describe())"""


@pytest.fixture(scope="module")
def notebook(folder: Path, base: str, chromium: Any, theme: Theme) -> Iterator[LabPage]:
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3 (ipykernel)"}
    cells = [nbformat.v4.new_code_cell(source) for source in (MAKE, UPDATE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / NAME)
    with opened(chromium, base, NAME, theme) as page:
        page.run_all()
        page.check()
        page.page.wait_for_selector(MAP)
        yield page
        page.check()


@pytest.fixture(autouse=True)
def whole(notebook: LabPage) -> None:
    """Every test begins with the whole map in sight."""
    notebook.page.locator(".snpbook-map").get_by_role("button", name="Fit").click()


def test_map_shows_its_states_and_follows_the_keyboard(notebook: LabPage, theme: Theme) -> None:
    page, canvas = notebook.page, notebook.page.locator(MAP)
    drawn = (PageState.HYPERVISOR, PageState.GUEST_VALID, PageState.CONTEXT)
    page.wait_for_function(
        "document.querySelector('.snpbook-map .change').textContent.startsWith('Changed: 16,384 pages')"
    )
    assert {PAGES[state].colour(theme) for state in drawn} <= notebook.colours()
    assert PAGES[PageState.PRE_GUEST].colour(theme) not in notebook.colours()
    assert notebook.output("rmp_map.update").startswith(notebook.label() + "; ")
    assert "cursor at pfn 0x48000, Hypervisor" in notebook.label()

    canvas.focus()
    for key, pfn, state in [
        ("ArrowLeft", "0x47fff", "Guest-Valid"), ("ArrowRight", "0x48000", "Hypervisor"),
        ("Control+ArrowLeft", "0x47fff", "Guest-Valid"), ("Control+ArrowLeft", "0x3ffff", "Hypervisor"),
        ("ArrowDown", "0x407ff", "Guest-Valid"), ("PageDown", "0x409ff", "Guest-Valid"),
        ("End", "0xfffff", "Hypervisor"), ("ArrowRight", "0xfffff", "Hypervisor"), ("Home", "0x0", "Hypervisor"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert notebook.label() == f"RMP map, 1,048,576 pages: cursor at pfn {pfn}, {state}"
    assert page.locator(".jp-Notebook .jp-Cell").count() == 2, "keys of the map are no commands of the notebook"


def test_controls_have_names_and_work(notebook: LabPage, theme: Theme) -> None:
    page, figure = notebook.page, notebook.page.locator(".snpbook-map")
    assert page.get_by_role("application", name="RMP map, 1,048,576 pages").count() == 1
    figure.get_by_role("textbox", name="Page frame").fill("0x777")
    figure.get_by_role("button", name="Go").click()
    assert notebook.label().endswith("cursor at pfn 0x777, Context")
    inspector = figure.get_by_role("table", name="Page inspector")
    inspector.get_by_text("0x77_7000", exact=True).wait_for()
    assert inspector.get_by_role("row", name="asid").inner_text().split() == ["asid", str(0x777 % 5)]
    before = notebook.colours()
    for _ in range(7):
        figure.get_by_role("button", name="Zoom in").click()
    assert PAGES[PageState.CONTEXT].colour(theme) in notebook.colours()
    assert PAGES[PageState.GUEST_VALID].colour(theme) not in notebook.colours()
    figure.get_by_role("button", name="Fit").click()
    assert notebook.colours() == before
    figure.get_by_role("textbox", name="Page frame").fill("0x100000")
    figure.get_by_role("button", name="Go").click()
    assert notebook.label().endswith("cursor at pfn 0x777, Context"), "a page outside the map is no place to go"


def test_pointer_selects_and_drags(notebook: LabPage) -> None:
    page, canvas = notebook.page, notebook.page.locator(MAP)
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + 300, box["y"] + 50)
    selected = notebook.label()
    assert "pfn 0x48000" not in selected
    for _ in range(8):
        page.keyboard.press("+")
    zoomed = canvas.evaluate("canvas => canvas.toDataURL()")
    page.mouse.move(box["x"] + 300, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 20, steps=3)
    page.mouse.up()
    assert notebook.label() == selected
    assert canvas.evaluate("canvas => canvas.toDataURL()") != zoomed


def test_a_million_pages_are_drawn_fast(notebook: LabPage) -> None:
    press = """canvas => {
        const start = performance.now();
        canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "0"}));
        return performance.now() - start;
    }"""
    times = sorted(notebook.page.locator(MAP).evaluate(press) for _ in range(7))
    assert times[3] < 100, times
