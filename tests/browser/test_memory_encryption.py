"""The DIMM microscope in a real JupyterLab, by keyboard, in light and dark: first as it was saved, then run."""

import re
from typing import Any

import pytest

from snpbook.views.palette import REPEATS, Theme
from tests.browser.lab_page import CHROMIUM, LabPage
from tests.views.reading import read

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "01_memory_encryption.ipynb"
SCOPE = ".snpbook-scope"


@pytest.fixture(scope="module")
def notebook(saved: LabPage) -> LabPage:
    saved.run_all()
    saved.check()
    saved.page.wait_for_selector(SCOPE)
    return saved


class Scope:
    """The microscope under the hands of a reader who has only a keyboard."""

    def __init__(self, notebook: LabPage) -> None:
        self.page = notebook.page
        self.root = notebook.page.locator(SCOPE).first

    def field(self, name: str) -> Any:
        return self.root.get_by_label(name, exact=True)

    def type(self, name: str, text: str) -> None:
        """Go to a field, replace what it holds, and press Enter."""
        self.field(name).focus()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Enter")

    def says(self, role: str, text: str) -> None:
        self.root.get_by_role(role).filter(has_text=text).wait_for()

    def press(self, name: str) -> None:
        self.root.get_by_role("button", name=name).focus()
        self.page.keyboard.press("Enter")


def test_saved_notebook_shows_the_microscope_without_a_kernel(saved: LabPage) -> None:
    shown = saved.page.locator(".jp-OutputArea img")
    shown.first.wait_for()
    loaded = shown.evaluate_all("pictures => pictures.filter(p => p.naturalWidth > 0).map(p => p.alt)")
    assert loaded[0].startswith("Page 0x1 on the DIMM: 256 blocks")


def test_write_move_and_replay_by_keyboard(notebook: LabPage) -> None:
    scope = Scope(notebook)
    scope.field("Machine").focus()
    scope.page.keyboard.type("EPYC 7251")
    scope.type("Plaintext", "first")
    scope.says("status", "#1 guest 1 wrote 'first'")
    scope.type("Address", "0x2000")
    scope.says("status", "#2 guest 1 wrote 'first'. Then this guest (ASID 1) reads: plaintext of #2")
    if scope.field("add T(p) ⊕ T(q)").is_checked():
        scope.field("add T(p) ⊕ T(q)").press("Space")
    scope.type("Move to", "0x2010")
    scope.says(
        "status", "#3 the host copied it from 0x2000. Then this guest (ASID 1) reads: plaintext of #2 ⊕ T(p) ⊕ T(q)"
    )
    scope.type("Plaintext", "second")
    scope.says("status", "#4")
    scope.press("Replay older ciphertext")
    scope.says("status", "#5 the host put back #2. Then this guest (ASID 1) reads: plaintext of #2")
    order = [scope.field("Address"), scope.field("ASID"), scope.field("C-bit"), scope.field("Copies")]
    order[0].focus()
    for field in order[1:]:
        scope.page.keyboard.press("Tab")
        assert field.evaluate("field => field === document.activeElement")


def test_a_mistake_is_told_and_changes_nothing(notebook: LabPage) -> None:
    scope = Scope(notebook)
    before = scope.root.locator("table").all_inner_texts()
    for name, wrong, words, right in [
        ("Address", "0x2004", "Address: 0x2004 is no multiple of 16", "0x2000"),
        ("ASID", "16", "has 1 to 15, and 0 for the host; not 16", "1"),
    ]:
        scope.type(name, wrong)
        scope.says("alert", words)
        assert scope.field(name).get_attribute("aria-invalid") == "true"
        assert scope.field(name).evaluate("field => field === document.activeElement")
        assert scope.root.locator("table").all_inner_texts() == before
        scope.field(name).fill(right)
    scope.press("Write")
    scope.root.get_by_role("alert").filter(has_text="not 16").wait_for(state="hidden")
    assert scope.field("ASID").get_attribute("aria-invalid") == "false"


def test_genoa_offers_no_correction(notebook: LabPage) -> None:
    scope = Scope(notebook)
    corrected = scope.field("add T(p) ⊕ T(q)")
    corrected.check()
    for machine, name, disabled in [("genoa", "EPYC 9004", True), ("milan", "EPYC 7003", False)]:
        scope.field("Machine").select_option(machine)
        scope.press("Write")
        scope.root.get_by_text(re.compile(rf"as written in #\d+: {name}")).first.wait_for()
        assert (corrected.is_disabled(), corrected.is_checked()) == (disabled, False)


def test_heat_map_has_the_colours_of_the_theme(notebook: LabPage, theme: Theme) -> None:
    scope = Scope(notebook)
    if scope.field("C-bit").is_checked():
        scope.field("C-bit").press("Space")
    scope.type("Copies", "20")
    scope.says("status", ", 20 times")
    source = scope.root.locator(".heat img").first.evaluate("image => image.outerHTML")
    fills = {node.get("fill") for node in read(source).pictures[0][1].iter()}
    assert {REPEATS[16].colour(theme), theme.surface} <= fills
