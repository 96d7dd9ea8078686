"""The GHCB theatre, the two eyes and the acceptance race in a real JupyterLab, by keyboard."""

from typing import Any

import pytest

from tests.browser.lab_page import CHROMIUM, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "06_inside_the_guest.ipynb"


def write(field: Any, text: str) -> None:
    field.press("ControlOrMeta+a")
    field.press_sequentially(text)
    field.press("Enter")


def test_an_answer_is_tampered_with(notebook: LabPage) -> None:
    cell = notebook.line("lab.theatre")
    cell.get_by_role("combobox", name="Guest").select_option(label="snp")
    cell.get_by_role("combobox", name="Scene").select_option(label="five pages become shared")
    cell.get_by_text("5 pages are shared").first.wait_for()
    cell.get_by_role("combobox", name="The hand changes").select_option(label="cur_entry")
    number = cell.get_by_role("textbox", name="New value")
    write(number, "9")
    cell.get_by_text("the guest stops").wait_for()
    cell.get_by_text("reason set 1, 1: PSC").first.wait_for()
    page = cell.get_by_role("table", name="The GHCB: PAGE_STATE_CHANGE")
    assert "✗ 9" in page.inner_text()
    write(number, "0x10000")
    cell.get_by_role("alert").get_by_text("does not fit 16 bits").wait_for()
    write(number, "5")
    cell.get_by_text("the guest goes on").wait_for()


def test_the_sequence_is_a_picture_and_a_table(notebook: LabPage) -> None:
    cell = notebook.line("lab.theatre")
    pictures = cell.get_by_role("img")
    assert [picture.split(" ")[0] for picture in pictures.evaluate_all("all => all.map(one => one.alt)")] == [
        "Sequence", "The",
    ]  # fmt: skip
    assert cell.get_by_role("table", name="five pages become shared").count() == 0
    cell.locator("summary").press("Enter")
    cell.get_by_role("table", name="five pages become shared").wait_for()


def test_a_page_is_written_shared_and_taken_back(notebook: LabPage) -> None:
    cell = notebook.line("lab.eyes")
    cell.get_by_role("combobox", name="Page").select_option(label="another page of it")
    write(cell.get_by_role("textbox", name="Text"), "seen by keyboard")
    cell.get_by_role("button", name="Guest: write").press("Enter")
    cell.get_by_text("the guest has written the text").wait_for()
    row = cell.get_by_role("row", name="as text")
    assert row.inner_text().count("seen by keyboard") == 1, "by the guest alone"
    cell.get_by_role("button", name="Guest: share").press("Enter")
    cell.get_by_text("the page is shared now").wait_for()
    cell.get_by_role("button", name="Guest: write").press("Space")
    cell.get_by_text("the guest has written the text").wait_for()
    assert row.inner_text().count("seen by keyboard") == 2, "by both"
    cell.get_by_role("button", name="Guest: take back").press("Enter")
    cell.get_by_text("the page is private now").wait_for()
    assert "seen by keyboard" not in row.inner_text()


def test_acceptance_follows_its_choices(notebook: LabPage) -> None:
    cell = notebook.line("lab.race")
    cell.get_by_role("combobox", name="Memory, MiB").select_option(label="16")
    table = cell.get_by_role("table", name="Acceptance of 16 MiB")
    table.wait_for()
    cell.get_by_role("combobox", name="used after the boot, %").select_option(label="0")
    cell.get_by_text("programs use 0 MiB").wait_for()
    lazy = table.get_by_role("row").all_inner_texts()[3:]
    assert [row.split()[-3] for row in lazy] == ["3.9", "3.9"]
