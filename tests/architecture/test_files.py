"""The rules of the tree: sizes of files, docstrings, and words that have no place here."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "snpbook").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 450
SHIPPED_LIMIT = 10_000_000
NOTEBOOK_LIMIT = 200_000
UNWANTED = {
    "a path of one machine": r"(?<![\w.])/(?:work|root|home)/[\w.-]+",
    "an issue number": r"\bissues? #?\d+\b",
    "an unfinished mark": r"\b(?:TOD[O]|FIXM[E]|XX[X]|HAC[K]|NotImplementedErro[r])\b",
}


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=_name)
def test_file_holds_one_idea(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= MAX_LINES, f"{lines} lines: split it by idea"
    assert path.stem not in {"util", "utils", "helper", "helpers", "common", "misc"}, "name it after what it holds"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "begin with two or three sentences: what, and by which rules"


def test_nothing_unwanted_is_written() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".ipynb", ".js", ".css", ".txt", ".cff", ""} and path.is_file():
            text = path.read_text()
            found += [f"{name}: {what}: {m[0]}" for what, rule in UNWANTED.items() for m in re.finditer(rule, text)]
    assert not found


def test_shipped_files_are_small() -> None:
    notebooks = {path: path.stat().st_size for path in (ROOT / "notebooks").glob("*.ipynb")}
    data = {path: path.stat().st_size for path in (ROOT / "data").rglob("*") if path.is_file()}
    assert notebooks
    assert data
    assert {_name(path): size for path, size in notebooks.items() if size > NOTEBOOK_LIMIT} == {}
    assert sum([*notebooks.values(), *data.values()]) <= SHIPPED_LIMIT
