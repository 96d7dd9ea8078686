"""Console, state machines and launch desk in a real JupyterLab, as the reader of the chapter meets them."""

import pytest

from tests.browser.lab_page import CHROMIUM, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "03_secure_processor.ipynb"
CONSOLE, MACHINES, LAUNCH = "lab.console", "lab.machines", "lab.launch"


def test_a_command_is_filled_in_and_sent(notebook: LabPage) -> None:
    console = notebook.line(CONSOLE)
    choice = console.get_by_role("combobox", name="Command")
    label = next(text for text in choice.get_by_role("option").all_text_contents() if "SNP_ACTIVATE:" in text)
    assert label.replace("\xa0", " ") == "\u2717 SNP_ACTIVATE: there is no guest context"
    choice.select_option(label=label)
    console.get_by_role("textbox", name="asid").fill("0x7")
    console.get_by_role("button", name="Send").focus()
    notebook.page.keyboard.press("Enter")
    console.get_by_role("table", name="SNP_ACTIVATE").get_by_text("INVALID_GUEST (0x10)").wait_for()
    assert console.get_by_role("table", name="Mailbox registers").get_by_text("0x80000010").count() == 1


def test_what_cannot_be_sent_is_told(notebook: LabPage) -> None:
    console = notebook.line(CONSOLE)
    console.get_by_role("textbox", name="Raw bytes").fill("no bytes")
    console.get_by_role("button", name="Send").click()
    console.get_by_text("pairs of hexadecimal digits").wait_for()
    console.get_by_role("textbox", name="Raw bytes").fill("")


def test_only_legal_commands_can_be_pressed(notebook: LabPage) -> None:
    panel = notebook.line(MACHINES)
    panel.scroll_into_view_if_needed()
    panel.get_by_role("combobox", name="Machine").select_option(label="The SNP platform")
    panel.get_by_text("The SNP platform, in INIT").first.wait_for()
    assert panel.get_by_role("button", name="SNP_INIT_EX").is_disabled()
    panel.get_by_role("button", name="SNP_SHUTDOWN_EX").focus()
    notebook.page.keyboard.press("Enter")
    panel.get_by_text("The SNP platform, in UNINIT").first.wait_for()
    panel.get_by_role("button", name="SNP_INIT_EX").click()
    panel.get_by_text("The SNP platform, in INIT").first.wait_for()


def test_a_changed_page_changes_the_digest(notebook: LabPage) -> None:
    desk = notebook.line(LAUNCH)
    desk.scroll_into_view_if_needed()
    desk.get_by_role("spinbutton", name="of page").fill("3")
    notebook.page.keyboard.press("Enter")
    desk.get_by_role("combobox", name="Change").select_option(label="its address")
    desk.get_by_text("0x103000").first.wait_for()
    assert desk.get_by_text("the same").count() == 2
    assert desk.get_by_text("another").count() == 5
