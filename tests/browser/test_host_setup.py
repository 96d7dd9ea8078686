"""The set-up desk in a real JupyterLab, by keyboard: options chosen, booted, read from the log and the checklist."""

import re
from typing import Any

import pytest

from tests.browser.lab_page import CHROMIUM, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "04_host_setup.ipynb"


def desk(notebook: LabPage) -> Any:
    """The cell that shows the desk, in sight."""
    editor = notebook.page.locator(".jp-InputArea-editor .cm-content", has_text=re.compile(r"lab = Lab\(\)"))
    cell = notebook.page.locator(".jp-Notebook .jp-CodeCell").filter(has=editor)
    cell.scroll_into_view_if_needed()
    return cell


def boot(notebook: LabPage) -> None:
    """Press the button, by keyboard."""
    desk(notebook).get_by_role("button", name="Boot").focus()
    notebook.page.keyboard.press("Enter")


def ready(notebook: LabPage) -> None:
    """A Milan as it should be: what the notebook's last cells have left is put right."""
    form = desk(notebook)
    form.get_by_role("combobox", name="Processor").select_option(label="milan")
    for name in ("SMEE", "SMM Lock", "IOMMU", "NBIO SEV-SNP Support"):
        form.get_by_role("checkbox", name=name, exact=True).check()
    form.get_by_role("combobox", name="SNP Memory Coverage").select_option(label="all memory")
    for name in ("RMP at", "Command line", "options kvm_amd"):
        form.get_by_role("textbox", name=name).fill("")
    boot(notebook)
    form.get_by_text("SEV-SNP enabled (ASIDs 1 - 99)").first.wait_for()


def test_an_option_of_the_bios_is_switched_off_and_its_row_fails(notebook: LabPage) -> None:
    ready(notebook)
    form = desk(notebook)
    box = form.get_by_role("checkbox", name="SMEE", exact=True)
    box.focus()
    notebook.page.keyboard.press("Space")
    boot(notebook)
    form.get_by_text("memory encryption not enabled by BIOS").first.wait_for()
    row = form.get_by_role("table", name="Checklist").get_by_role("row", name=re.compile("^Memory encryption"))
    assert "FAIL" in row.inner_text()
    assert "BIOS: SMEE = Enabled" in row.inner_text()
    assert form.get_by_role("table", name="MSRs").get_by_text("0x0000000000740000").count() == 1


def test_a_command_line_is_typed(notebook: LabPage) -> None:
    ready(notebook)
    form = desk(notebook)
    form.get_by_role("textbox", name="Command line").fill("quiet iommu=pt")
    boot(notebook)
    form.get_by_text("Passthrough (set via kernel command line)").first.wait_for()
    files = form.get_by_role("table", name="Files")
    assert files.get_by_text("quiet iommu=pt").count() == 1
    assert form.get_by_text("kvm_amd: SEV-SNP disabled (ASIDs 1 - 99)").count() == 1


def test_a_limit_of_asids_is_set(notebook: LabPage) -> None:
    ready(notebook)
    form = desk(notebook)
    form.get_by_role("spinbutton", name="SEV-ES ASID Space Limit").fill("33")
    notebook.page.keyboard.press("Enter")
    boot(notebook)
    form.get_by_text("kvm_amd: SEV-SNP enabled (ASIDs 1 - 32)").first.wait_for()
    form.get_by_role("table", name="Files").get_by_text("sev 477, sev_es 32").wait_for()
    form.get_by_role("spinbutton", name="SEV-ES ASID Space Limit").fill("100")
    notebook.page.keyboard.press("Enter")


def test_what_cannot_be_is_told(notebook: LabPage) -> None:
    ready(notebook)
    form = desk(notebook)
    form.get_by_role("textbox", name="RMP at").fill("nowhere")
    boot(notebook)
    form.get_by_text("'nowhere' is no address").wait_for()
    form.get_by_role("textbox", name="RMP at").fill("")
