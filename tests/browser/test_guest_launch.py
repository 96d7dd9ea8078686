"""The launch stepper, the policy builder and the parting desk in a real JupyterLab, by keyboard."""

from typing import Any

import pytest

from tests.browser.lab_page import CHROMIUM, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "05_guest_launch.ipynb"


def press(notebook: LabPage, button: Any) -> None:
    button.focus()
    notebook.page.keyboard.press("Enter")


def test_a_launch_is_stepped_through(notebook: LabPage) -> None:
    cell = notebook.line("lab.stepper")
    cell.get_by_role("combobox", name="Kernel").select_option(label="mainline")
    cell.get_by_role("combobox", name="Guest").select_option(label="snp")
    cell.get_by_text("Call 1 of 46").wait_for()
    press(notebook, cell.get_by_role("button", name="Next", exact=True))
    cell.get_by_text("Call 2 of 46").wait_for()
    press(notebook, cell.get_by_role("button", name="Next measured"))
    cell.get_by_text("Call 31 of 46").wait_for()
    chain = cell.get_by_role("table", name="The chain of the launch digest")
    assert chain.get_by_role("row").count() == 2
    assert cell.get_by_text("PRE_GUEST to GUEST_VALID").count() == 1
    place = cell.get_by_role("spinbutton", name="Call")
    place.fill("46")
    notebook.page.keyboard.press("Enter")
    cell.get_by_text("Call 46 of 46").wait_for()
    chain.get_by_role("row").nth(10).wait_for()
    assert chain.get_by_role("row").count() == 11
    cell.get_by_role("spinbutton", name="vCPUs").fill("1")
    notebook.page.keyboard.press("Enter")
    cell.get_by_text("Call 1 of 39").wait_for()


def test_a_policy_is_built(notebook: LabPage) -> None:
    cell = notebook.line("lab.policy")
    cell.get_by_role("combobox", name="Guest").select_option(label="SNP")
    cell.get_by_role("table", name="Policy 0x30000").wait_for()
    box = cell.get_by_role("checkbox", name="single_socket")
    box.press("Space")
    cell.get_by_role("table", name="Policy 0x130000").wait_for()
    cell.get_by_text("KVM refuses: EINVAL").wait_for()
    box.press("Space")
    cell.get_by_text("accepted: ").wait_for()


def test_a_guess_is_made_before_the_chains_are_shown(notebook: LabPage) -> None:
    cell = notebook.line("lab.parting")
    cell.get_by_role("combobox", name="Change").select_option(label="another command line")
    press(notebook, cell.get_by_role("button", name="Compare"))
    cell.get_by_text("Guess first").wait_for()
    assert cell.get_by_role("table").count() == 0
    cell.get_by_role("combobox", name="They part at").select_option(label="VMSA of vCPU 0")
    press(notebook, cell.get_by_role("button", name="Compare"))
    cell.get_by_text("Not so: with another command line, they part at: kernel hashes.").wait_for()
    rows = cell.get_by_role("table", name="The chain with another command line").get_by_role("row")
    assert [("another" in row) for row in rows.all_inner_texts()[1:]] == [False] * 6 + [True] * 4
