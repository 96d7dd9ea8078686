"""The desk and the explorer in a real JupyterLab, by keyboard and by mouse, as the reader of the chapter meets them."""

import re

import pytest

from snpbook.spec.pages import PageState
from snpbook.views.palette import PAGES, Theme
from tests.browser.lab_page import CHROMIUM, MAP, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "02_reverse_map_table.ipynb"
DESK, EXPLORER = "lab.desk", "lab.explorer"


@pytest.fixture(scope="module")
def notebook(saved: LabPage) -> LabPage:
    saved.run_all()
    saved.check()
    saved.line(DESK).locator(MAP).wait_for()
    return saved


def test_the_map_shows_what_the_chapter_did(notebook: LabPage, theme: Theme) -> None:
    drawn = (PageState.HYPERVISOR, PageState.GUEST_VALID, PageState.GUEST_INVALID)
    assert {PAGES[state].colour(theme) for state in drawn} <= notebook.colours()
    assert notebook.label() == "RMP of milan, 1,024 pages: cursor at pfn 0x801, Guest-Valid"


def test_pages_are_selected_by_keys_and_an_instruction_is_pressed(notebook: LabPage) -> None:
    desk, keyboard = notebook.line(DESK), notebook.page.keyboard
    figure = desk.locator(".snpbook-map")
    figure.get_by_role("textbox", name="First page frame").fill("0x820")
    figure.get_by_role("textbox", name="last").fill("0x821")
    keyboard.press("Enter")
    notebook.page.wait_for_function(
        "map => document.querySelector(map).ariaLabel.includes('2 selected')", arg=".snpbook-map canvas"
    )
    desk.locator(MAP).focus()
    keyboard.press("Shift+ArrowRight")
    keyboard.press("Shift+ArrowRight")
    assert notebook.label().endswith("cursor at pfn 0x823, Hypervisor; 4 selected, pfn 0x820 to 0x823")
    keyboard.press("Shift+ArrowLeft")
    assert notebook.label().endswith("3 selected, pfn 0x820 to 0x822")
    desk.get_by_role("textbox", name="First GPA").fill("0x30000")
    for name, state in (("RMPUPDATE", "Guest-Invalid"), ("PVALIDATE", "Guest-Valid")):
        desk.get_by_role("button", name=name).focus()
        keyboard.press("Enter")
        desk.get_by_role("table", name=re.compile(name)).get_by_text("SUCCESS (0)").wait_for()
        notebook.page.wait_for_function(
            "words => document.querySelector('.snpbook-map canvas').ariaLabel.endsWith(words)",
            arg=f"cursor at pfn 0x822, {state}; 3 selected, pfn 0x820 to 0x822",
        )
    assert desk.get_by_role("button", name="RMPREAD").is_disabled()
    assert desk.get_by_text("not on EPYC 7003 (Milan)").count() == 2


def test_an_address_that_is_none_is_told_beside_its_field(notebook: LabPage) -> None:
    desk, keyboard = notebook.line(DESK), notebook.page.keyboard
    field, tables = desk.get_by_role("textbox", name="First GPA"), desk.get_by_role("table")
    tables.filter(has_text="SUCCESS (0)").first.wait_for()
    field.fill("0x8000000000000")
    desk.get_by_role("button", name="PVALIDATE").focus()
    keyboard.press("Enter")
    words = "First GPA: 0x8000000000000 is too large; the last page is at 0x7fffffffff000"
    desk.get_by_role("alert").filter(has_text=words).wait_for()
    desk.locator("input[aria-invalid=true]").wait_for()
    assert field.get_attribute("aria-invalid") == "true"
    assert desk.locator(f"#{field.get_attribute('aria-describedby')}").inner_text() == words
    tables.filter(has_text="SUCCESS (0)").first.wait_for(state="detached")
    field.fill("0x30000")
    desk.get_by_role("button", name="PVALIDATE").focus()
    keyboard.press("Enter")
    tables.filter(has_text="SUCCESS (0)").first.wait_for()
    desk.get_by_role("alert").filter(has_text=words).wait_for(state="detached")
    assert desk.get_by_role("alert").inner_text() == ""
    assert field.get_attribute("aria-invalid") == "false"


def test_dragging_selects(notebook: LabPage) -> None:
    page, canvas = notebook.page, notebook.line(DESK).locator(MAP)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    unit = (box["width"] - 79) / 64
    x, y = box["x"] + 72 + unit * 8.5, box["y"] + 7 + unit * 1.5
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + unit * 5, y, steps=4)
    page.mouse.up()
    assert notebook.label().endswith("6 selected, pfn 0x848 to 0x84d")
    page.mouse.click(x, y)
    assert notebook.label().endswith("cursor at pfn 0x848, Hypervisor")


def test_the_explorer_follows_the_choices(notebook: LabPage) -> None:
    shown = notebook.line(EXPLORER)
    shown.scroll_into_view_if_needed()
    for name, choice in [("Page", "VMPL1 may only read it"), ("VMPL", "1"), ("Access", "write")]:
        shown.get_by_role("combobox", name=name, exact=True).select_option(label=choice)
    shown.get_by_text("VMPL1 permissions wants read, write, found read").wait_for()
    assert shown.get_by_role("table", name="The guest's walk").get_by_role("row").count() == 6
    seven = shown.get_by_role("table", name="The guest's walk").locator("details", has_text="7 met").first
    seven.locator("summary").click()
    assert seven.inner_text().count(": met") == 7
    shown.get_by_role("combobox", name="Actor").select_option(label="host")
    shown.get_by_text("#PF in the host").wait_for()
    assert shown.get_by_role("combobox", name="VMPL", exact=True).is_disabled()


def test_an_address_outside_memory_is_told(notebook: LabPage) -> None:
    shown, keyboard = notebook.line(EXPLORER), notebook.page.keyboard
    field = shown.get_by_role("textbox", name="Address")
    for address, words in [
        ("-5", "Address: -0x5 is outside memory, which ends at 0x3ffffff"),
        ("0x4000000", "Address: 0x4000000 is outside memory, which ends at 0x3ffffff"),
    ]:
        field.fill(address)
        keyboard.press("Enter")
        shown.get_by_role("alert").filter(has_text=words).wait_for()
        assert field.get_attribute("aria-invalid") == "true"
        assert shown.get_by_text("#PF in the host").count() == 0
    field.fill("0x3ffffff")
    keyboard.press("Enter")
    shown.get_by_text("let through, system page 0x3fff").wait_for()
    assert shown.get_by_role("alert").inner_text() == ""
    shown.get_by_role("combobox", name="Actor").select_option(label="SNP guest, ASID 1")
    shown.get_by_text("a guest virtual address").wait_for()  # the choice of an actor sets the address, too
    shown.get_by_role("table", name="Checks on the address").wait_for(state="detached")
    field.fill("0x8000000000000000")
    keyboard.press("Enter")
    shown.get_by_role("table", name="Checks on the address").get_by_text("Canonical address").wait_for()


def test_the_legend_has_the_colours_of_the_theme_before_anything_changes(notebook: LabPage, theme: Theme) -> None:
    desk = notebook.line(DESK)
    desk.locator(".cm-content").click()
    before = desk.locator(".snpbook-map").element_handle()
    notebook.page.keyboard.press("ControlOrMeta+Enter")
    before.wait_for_element_state("hidden")
    chips = desk.locator(".snpbook-map .legend canvas")
    chips.first.wait_for()
    notebook.page.wait_for_timeout(500)
    found = chips.evaluate_all(
        "chips => chips.map(chip => Array.from(chip.getContext('2d').getImageData(1, 1, 1, 1).data.slice(0, 3)))"
    )
    drawn = (PageState.HYPERVISOR, PageState.GUEST_VALID, PageState.GUEST_INVALID, PageState.PRE_SWAP)
    assert {f"#{bytes(rgb).hex().upper()}" for rgb in found} == {PAGES[state].colour(theme) for state in drawn}
