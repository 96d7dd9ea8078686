"""The verifier's desk in a real JupyterLab, by keyboard: a switch is turned on and its light goes out."""

import pytest

from tests.attest.vectors import VECTORS
from tests.browser.lab_page import CHROMIUM, LabPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NAME = "07_attestation.ipynb"


def test_a_switch_is_turned_by_keyboard(notebook: LabPage) -> None:
    form = notebook.line("lab.desk")
    form.get_by_text("Verdict: accepted").wait_for()
    box = form.get_by_role("checkbox", name="a bit of the measurement")
    box.press("Space")
    form.get_by_text("Verdict: not genuine: report.signature").wait_for()
    box.press("Space")
    form.get_by_text("Verdict: accepted").wait_for()


def test_a_real_report_is_dropped_in(notebook: LabPage) -> None:
    if not VECTORS.is_dir():
        pytest.skip("the public vectors are not beside this repository")
    form = notebook.line("lab.desk")
    files = ["reports/genoa_v3.bin", "reports/genoa_v3_vcek.pem", "chains/genoa.pem"]
    with notebook.page.expect_file_chooser() as chooser:
        form.get_by_role("button", name="Your own report and certificates").click()
    chooser.value.set_files([str(VECTORS / name) for name in files])
    roots = form.get_by_role("combobox", name="Roots")
    notebook.page.wait_for_function("() => [...document.querySelectorAll('select')].some(s => s.value === 'amd')")
    assert roots.input_value() == "amd"
    form.get_by_text("Verdict: accepted").wait_for()
