"""Every notebook with its exercises solved: where a reader's cell checks an answer, the reference is checked."""

import ast
from pathlib import Path
from typing import Any

import pytest

from snpbook.exercises import exercise
from snpbook.spec.resources import resource
from snpbook.tools.notebooks import executed, load
from tests.sampling import sampled

NOTEBOOKS = sorted(resource("notebooks").glob("*.ipynb"))


def checks(tree: ast.AST) -> list[ast.Call]:
    """The calls of `check` in a cell."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == "check"]


def checking(notebook: Any) -> list[Any]:
    """The cells that check an answer."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and checks(ast.parse(cell.source))]


def solve(cell: Any) -> None:
    tree = ast.parse(cell.source)
    for call in checks(tree):
        call.args[1] = ast.parse(f"exercise({ast.unparse(call.args[0])}).reference", mode="eval").body
    cell.source = f"from snpbook.exercises import exercise\n{ast.unparse(tree)}"


@pytest.mark.parametrize("path", sampled(NOTEBOOKS, 4), ids=lambda path: path.stem)
def test_exercises_of_a_notebook_pass_with_their_references(path: Path) -> None:
    notebook = load(path.read_text(encoding="utf-8"))
    for cell in checking(notebook):
        solve(cell)
    answers = [cell.outputs[-1].data["text/plain"] for cell in checking(executed(notebook, path.parent))]
    assert answers
    assert all(answer.startswith("Passed: ") for answer in answers), answers


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_reader_begins_with_the_stub(path: Path) -> None:
    for cell in checking(load(path.read_text(encoding="utf-8"))):
        (call,) = checks(ast.parse(cell.source))
        stub = exercise(ast.literal_eval(call.args[0])).stub
        assert stub.splitlines()[0] in cell.source.splitlines()
        assert cell.outputs[-1].data["text/plain"].startswith("Not yet: ")
