"""The verifier's desk in a real JupyterLab, by keyboard: a switch is turned on and its light goes out."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snpbook.spec.resources import resource
from snpbook.views.palette import Theme
from tests.attest.vectors import VECTORS
from tests.browser.lab_page import CHROMIUM, LabPage, opened

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "07_attestation.ipynb"


@pytest.fixture(scope="module")
def notebook(folder: Path, base: str, chromium: Any, theme: Theme) -> Iterator[LabPage]:
    shutil.copy(Path(str(resource("notebooks"))) / NAME, folder)
    with opened(chromium, base, NAME, theme) as page:
        page.run_all()
        page.check()
        desk(page).scroll_into_view_if_needed()
        yield page
        page.check()


def desk(notebook: LabPage) -> Any:
    """The cell that shows the desk and nothing else."""
    editor = notebook.page.locator(".jp-InputArea-editor .cm-content", has_text=re.compile(r"^lab\.desk$"))
    return notebook.page.locator(".jp-Notebook .jp-CodeCell").filter(has=editor)


def test_a_switch_is_turned_by_keyboard(notebook: LabPage) -> None:
    form = desk(notebook)
    form.get_by_text("Verdict: accepted").wait_for()
    box = form.get_by_role("checkbox", name="a bit of the measurement")
    box.focus()
    notebook.page.keyboard.press("Space")
    form.get_by_text("Verdict: not genuine: report.signature").wait_for()
    notebook.page.keyboard.press("Space")
    form.get_by_text("Verdict: accepted").wait_for()


def test_a_real_report_is_dropped_in(notebook: LabPage) -> None:
    if not VECTORS.is_dir():
        pytest.skip("the public vectors are not beside this repository")
    form = desk(notebook)
    files = ["reports/genoa_v3.bin", "reports/genoa_v3_vcek.pem", "chains/genoa.pem"]
    with notebook.page.expect_file_chooser() as chooser:
        form.get_by_role("button", name="Your own report and certificates").click()
    chooser.value.set_files([str(VECTORS / name) for name in files])
    roots = form.get_by_role("combobox", name="Roots")
    notebook.page.wait_for_function("() => [...document.querySelectorAll('select')].some(s => s.value === 'amd')")
    assert roots.input_value() == "amd"
    form.get_by_text("Verdict: accepted").wait_for()
