"""The overture in a real JupyterLab, as its reader meets it: first as it was saved, then run, then changed by hand."""

import pytest

from snpbook.spec.pages import PageState
from snpbook.views.palette import PAGES, Theme
from tests.browser.lab_page import CHROMIUM, MAP, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "00_first_light.ipynb"
TAMPER = "tampered = bytearray"
SOURCE = """\
tampered = bytearray(report)
tampered[{place:#x}] ^= {mask:#04x}
print(owner.verify(bytes(tampered), b"a fresh nonce"))"""


@pytest.fixture(scope="module")
def twins(saved: LabPage) -> list[str]:
    """The alternative texts of the pictures that the reader sees before anything has run."""
    shown = saved.page.locator(".jp-OutputArea img")
    shown.first.wait_for()
    loaded = "pictures => pictures.filter(p => p.naturalWidth > 0).map(p => p.alt)"
    return list(shown.evaluate_all(loaded))


@pytest.fixture(scope="module")
def notebook(saved: LabPage, twins: list[str]) -> LabPage:
    saved.run_all()
    saved.check()
    saved.page.wait_for_selector(MAP)
    return saved


def test_saved_notebook_shows_the_map_without_a_kernel(twins: list[str]) -> None:
    assert twins[0].startswith("RMP of milan, 65,536 pages: ")


def test_map_shows_the_launched_guest_and_follows_the_keyboard(notebook: LabPage, theme: Theme) -> None:
    drawn = (PageState.HYPERVISOR, PageState.HV_FIXED, PageState.FIRMWARE, PageState.GUEST_VALID, PageState.CONTEXT)
    assert {PAGES[state].colour(theme) for state in drawn} <= notebook.colours()
    assert notebook.label() == "RMP of milan, 65,536 pages: cursor at pfn 0x1024, Guest-Valid"
    notebook.page.locator(MAP).focus()
    notebook.page.keyboard.press("Control+ArrowLeft")
    assert notebook.label() == "RMP of milan, 65,536 pages: cursor at pfn 0x1023, Hypervisor"
    notebook.page.keyboard.press("Control+ArrowLeft")
    assert notebook.label() == "RMP of milan, 65,536 pages: cursor at pfn 0x1022, Guest-Valid"
    notebook.page.keyboard.press("Home")
    notebook.page.keyboard.press("ArrowRight")
    assert notebook.label() == "RMP of milan, 65,536 pages: cursor at pfn 0x1, Hypervisor"


def test_a_byte_flipped_by_hand_changes_the_verdict(notebook: LabPage) -> None:
    assert notebook.output(TAMPER).strip() == "not genuine: report.signature"
    for place, mask, verdict in [(0x90, 0, "accepted"), (0x50, 1, "not genuine: report.signature")]:
        notebook.retype(TAMPER, SOURCE.format(place=place, mask=mask))
        assert notebook.output(TAMPER).strip() == verdict
