"""The fit desk and the regime desk in a real JupyterLab, by keyboard."""

import pytest

from tests.browser.lab_page import CHROMIUM, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "08_private_memory.ipynb"


def test_a_guess_is_made_before_guests_are_started(notebook: LabPage) -> None:
    cell = notebook.line("lab.fit")
    cell.get_by_role("combobox", name="Regime").select_option(label="snp, registered")
    cell.get_by_role("spinbutton", name="Guests, I think").fill("3")
    cell.get_by_role("button", name="Start guests").press("Enter")
    rows = cell.get_by_role("table", name="Guests on one host").get_by_role("row")
    rows.filter(has_text="snp, registered").get_by_text("✗ 3").wait_for()
    assert rows.count() == 4, "the head, two guesses of the notebook, and this one"
    assert cell.get_by_role("checkbox", name="full size (slow)").count() == 1


def test_the_regimes_are_run_side_by_side(notebook: LabPage) -> None:
    cell = notebook.line("lab.regimes")
    cell.get_by_role("combobox", name="Show").select_option(label="pages over time")
    cell.get_by_role("combobox", name="Guest").select_option(label="sev")
    cell.get_by_role("spinbutton", name="Working set, %").fill("30")
    notebook.page.keyboard.press("Enter")
    cell.locator("[role=slider][aria-valuenow^='30']").first.press("ArrowRight")
    cell.get_by_role("spinbutton", name="Converted of it, %").fill("50")
    notebook.page.keyboard.press("Enter")
    cell.get_by_role("spinbutton", name="Conversions to and fro").fill("2")
    notebook.page.keyboard.press("Enter")
    box = cell.get_by_role("checkbox", name="Free the side that is left")
    if not box.is_checked():
        box.press("Space")
    assert cell.get_by_role("checkbox", name="2 MB pages").count() == 1
    cell.get_by_role("button", name="Run").press("Enter")
    cell.get_by_text("touched 31 %").first.wait_for()
    assert cell.get_by_role("img", name="Pages over time").count() == 1
    fold = cell.locator("summary")
    fold.press("Enter")
    assert cell.get_by_role("table", name="sev, lazy").get_by_role("row").count() == 16


def test_time_is_shown_on_request(notebook: LabPage) -> None:
    cell = notebook.line("lab.regimes")
    cell.get_by_role("combobox", name="Show").select_option(label="exits of the guest")
    timed = cell.get_by_role("checkbox", name="as estimated time")
    if timed.is_checked():
        timed.press("Space")
    cell.get_by_role("img", name="exits of the guest").wait_for()
    timed.press("Space")
    cell.get_by_role("img", name="(illustrative)").wait_for()
    timed.press("Space")
