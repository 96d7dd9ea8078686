"""The notebook tool: one form for what is kept, and refusals by name for what is not in order."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import nbformat
import pytest

from snpbook.tools import anatomy, notebooks
from snpbook.widgets.view import MARK

FIRST = """# The chapter

**Question.** Whose page is it?

**Minutes.** 20

**Prerequisites.** none
"""
VIEW = {"text/html": f'<div class="{MARK}">twin</div>', "text/plain": "twin", notebooks.WIDGET: {"model_id": "x"}}


def markdown(source: str) -> Any:
    return nbformat.v4.new_markdown_cell(source)


def code(source: str, *outputs: Any, **metadata: Any) -> Any:
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), metadata=metadata)


def shown(data: dict[str, Any]) -> Any:
    return nbformat.v4.new_output("execute_result", data=data, execution_count=77)


def error(name: str = "OSError") -> Any:
    frames = ["\x1b[31mfile", "/somewhere/else.py in <module>"]
    return nbformat.v4.new_output("error", ename=name, evalue="EPERM", traceback=frames)


def chapter() -> Any:
    """A chapter in order, as an editor would leave it."""
    cells = [
        markdown(FIRST),
        markdown("## Lab: launch\n\nText."),
        code("rmp_map = show()\nrmp_map", shown(VIEW), collapsed=True),
        code("rmp_map.select(5)", shown({"text/plain": "5"})),
        markdown("## Exercises"),
        code('check("first_light.1", usable_pages)', nbformat.v4.new_output("stream", name="stdout", text="Not yet")),
        markdown("## Summary\n\nBoth must agree."),
        markdown("## Sources\n\nAPM2 15.36"),
    ]
    metadata = {"language_info": {"name": "python", "version": "3.11.2"}, "widgets": {"state": {}}, "zoom": 2}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "01_chapter.ipynb"


def write(path: Path, notebook: Any, *, clean: bool = True) -> Path:
    path.write_text(notebooks.text(notebooks.cleaned(notebook) if clean else notebook))
    return path


def test_a_clean_chapter_is_in_order(path: Path) -> None:
    assert notebooks.check(write(path, chapter())) == []


def test_clean_is_idempotent_and_leaves_its_input_alone() -> None:
    raw = chapter()
    before = deepcopy(raw)
    once = notebooks.cleaned(raw)
    assert raw == before
    assert notebooks.text(notebooks.cleaned(once)) == notebooks.text(once)
    assert notebooks.text(notebooks.load(notebooks.text(once))) == notebooks.text(once)


def test_clean_gives_the_same_bytes_whoever_ran_it() -> None:
    one, other = chapter(), chapter()
    other.metadata["language_info"]["version"] = "3.13.0"
    other.cells[2].outputs[0].data[notebooks.WIDGET] = {"model_id": "another"}
    other.cells[2].execution_count = 40
    assert [cell.id for cell in one.cells] != [cell.id for cell in other.cells]
    assert notebooks.text(notebooks.cleaned(one)) == notebooks.text(notebooks.cleaned(other))


def test_what_clean_keeps_and_drops() -> None:
    raw = chapter()
    raw.cells[3].outputs[0].data["image/png"] = "iVBOR"
    raw.cells.insert(4, code("fails()", error(), tags=["raises-exception"], jupyter={"source_hidden": True}))
    written = notebooks.text(notebooks.cleaned(raw))
    content = json.loads(written)
    assert written.endswith("}\n")
    assert not written.endswith("\n\n")
    assert set(content["metadata"]) == {"kernelspec", "language_info"}
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert "version" not in content["metadata"]["language_info"]
    assert [cell["id"] for cell in content["cells"]] == [
        "the-chapter-1", "lab-launch-1", "lab-launch-2", "lab-launch-3", "lab-launch-4", "exercises-1", "exercises-2",
        "summary-1", "sources-1",
    ]  # fmt: skip
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4]
    assert cells[0]["outputs"][0]["execution_count"] == 1
    assert set(cells[0]["outputs"][0]["data"]) == {"text/html", "text/plain"}
    assert set(cells[1]["outputs"][0]["data"]) == {"text/plain"}
    assert cells[2]["outputs"][0]["traceback"] == ["OSError: EPERM"]
    assert cells[2]["metadata"] == {"tags": ["raises-exception"]}


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("title", "# The chapter\n", "The chapter\n"),
        ("question", "**Question.**", "**Why.**"),
        ("minutes", "**Minutes.** 20", ""),
        ("minutes", "20", "twenty"),
        ("prerequisites", "**Prerequisites.** none", "**Prerequisites.**"),
        ("labs", "## Lab: launch", "## Launch"),
        ("exercises", "## Exercises", "Exercises"),
        ("exercises", "check(", "print("),
        ("exercises", "first_light.1", "first_light.99"),
        ("summary", "## Summary", "### Summary"),
        ("summary", "Both must agree.", ""),
        ("sources", "## Sources", "## Other"),
        ("order", "## Summary\n\nBoth", "## Sources\n\nAPM2\n\n## Summary\n\nBoth"),
        ("views", "rmp_map.select(5)", "print(5)"),
    ],
)
def test_a_chapter_that_lacks_a_part_is_refused_by_name(path: Path, part: str, old: str, new: str) -> None:
    raw = chapter()
    assert sum(old in cell.source for cell in raw.cells) >= 1
    for cell in raw.cells:
        cell.source = cell.source.replace(old, new)
    faults = notebooks.check(write(path, raw))
    assert [fault.split(":")[0] for fault in faults] == [part], faults


def test_a_lab_without_code_is_refused() -> None:
    cells = notebooks.cleaned(chapter()).cells
    faults = anatomy.faults([cells[0], markdown("## Lab: empty"), *cells[1:]])
    assert faults == ["labs: `## Lab: empty` has no code"]


def test_a_notebook_that_is_no_chapter_lacks_every_part() -> None:
    parts = {fault.split(":")[0] for fault in anatomy.faults([])}
    assert parts == {"title", "question", "minutes", "prerequisites", "labs", "exercises", "summary", "sources"}


def test_widget_state_is_refused_by_name(path: Path) -> None:
    for raw in (chapter(), notebooks.cleaned(chapter())):
        raw.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
        assert "widget state" in {fault.split(":")[0] for fault in notebooks.check(write(path, raw, clean=False))}
    raw = notebooks.cleaned(chapter())
    raw.cells[2].outputs[0].data[notebooks.WIDGET] = {"model_id": "x"}
    assert "widget state" in {fault.split(":")[0] for fault in notebooks.check(write(path, raw, clean=False))}


@pytest.mark.parametrize("change", ["count", "spaces", "id", "newline"])
def test_any_other_byte_is_refused(path: Path, change: str) -> None:
    clean = notebooks.cleaned(chapter())
    if change == "count":
        clean.cells[2].execution_count = 9
    elif change == "spaces":
        clean.cells[1].source += "  "
    elif change == "id":
        clean.cells[0].id = "3f2a91bc"
    write(path, clean, clean=False)
    if change == "newline":
        path.write_text(path.read_text() + "\n")
    assert notebooks.check(path) == ["form: `clean` would change it"]


def test_size_and_unexpected_errors_are_refused(path: Path) -> None:
    raw = chapter()
    raw.cells[3].outputs = [shown({"text/plain": "x" * notebooks.LIMIT}), error()]
    faults = notebooks.check(write(path, raw))
    assert [fault.split(":")[0] for fault in faults] == ["size", "error"]
    assert "cell lab-launch-3 ends in OSError" in faults[1]


def test_build_runs_the_cells_and_check_accepts_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = chapter()
    raw.cells[2:4] = [
        code("import numpy as np\nfrom snpbook.widgets.rmpmap import RmpMap\nm = RmpMap(np.full(64, 2, np.uint8))\nm"),
        code("m.select(5)\nm"),
        code("m.describe()"),
    ]
    raw.cells[6].source = 'from snpbook.exercises import check\ncheck("first_light.1", lambda words, asid: ...)'
    write(path, raw)
    assert notebooks.main(["build", str(path)]) == 0
    first = path.read_text()
    assert notebooks.main(["check", str(path)]) == 0
    assert "in order" in capsys.readouterr().out
    built = notebooks.load(first)
    assert "cursor at pfn 0x5, Hypervisor; 64 Hypervisor" in built.cells[4].outputs[0].data["text/plain"]
    assert "Not yet: first_light.1" in built.cells[6].outputs[0].data["text/plain"]
    assert notebooks.main(["build", str(path)]) == 0
    assert path.read_text() == first


def test_build_stops_at_an_error_nobody_expects(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = chapter()
    raw.cells[2:4] = [code("1 / 0")]
    before = write(path, raw).read_text()
    assert notebooks.main(["build", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert path.read_text() == before


def test_check_names_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.main(["check", str(write(path, chapter(), clean=False))]) == 1
    assert "01_chapter.ipynb: widget state: " in capsys.readouterr().out


def test_clean_rewrites_the_file(path: Path) -> None:
    assert notebooks.main(["clean", str(write(path, chapter(), clean=False))]) == 0
    assert notebooks.check(path) == []


def test_every_notebook_of_the_project_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code = notebooks.main(["check"])
    told = capsys.readouterr().out
    assert code == 0, told
    assert "00_first_light.ipynb: in order" in told
