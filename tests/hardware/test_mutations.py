"""No check can be left out unseen: with any one of them deleted, the comparison with the reference fails."""

import ast
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from snpbook.hardware import checks, instructions
from snpbook.hardware.checks import Access
from tests.hardware.tables import LIBRARY, compare


class _Delete(ast.NodeTransformer):
    """Deletes the n-th check: a call of `refuse`, an element of a list of checks, an `if` that only returns a result.

    Numbers count through the whole module.
    """

    def __init__(self, number: int) -> None:
        self.left, self.deleted = number, ""

    def _hit(self, node: ast.AST) -> bool:
        self.left -= 1
        if self.left == -1:
            self.deleted = ast.unparse(node)
        return self.left == -1

    def visit_Expr(self, node: ast.Expr) -> Any:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        return ast.Pass() if isinstance(called, ast.Name) and called.id == "refuse" and self._hit(node) else node

    def visit_Assign(self, node: ast.Assign) -> Any:
        if isinstance(node.value, ast.List) and ast.unparse(node.targets[0]) == "checks":
            node.value.elts = [element for element in node.value.elts if not self._hit(element)]
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        refusal = isinstance(node.body[0], ast.Return) and len(node.body) == 1 and not node.orelse
        mine = refusal and ("RmpCode." in ast.unparse(node.body) or "Access." in ast.unparse(node.body))
        return ast.Pass() if mine and self._hit(node) else node


def mutant(module: ModuleType, number: int, replaced: dict[str, Any]) -> tuple[ModuleType, str]:
    """The module with its n-th check deleted (none, where there are fewer), and the text of that check."""
    deletion = _Delete(number)
    tree = ast.fix_missing_locations(deletion.visit(ast.parse(Path(str(module.__file__)).read_text())))
    result = ModuleType(module.__name__)
    exec(compile(tree, str(module.__file__), "exec"), result.__dict__)
    result.__dict__.update(replaced)
    return result, deletion.deleted


def mutants() -> Iterator[tuple[str, Any]]:
    for number in itertools.count():
        mine, deleted = mutant(instructions, number, {})
        if not deleted:
            break
        yield deleted, SimpleNamespace(**{**vars(LIBRARY), "rmpupdate": mine.rmpupdate, "pvalidate": mine.pvalidate})
    for number in itertools.count():
        other, deleted = mutant(checks, number, {"Access": Access})
        if not deleted:
            break
        inner = {"check_guest": other.check_guest, "check_guest_one": other.check_guest_one}
        mine, _ = mutant(instructions, sys.maxsize, inner)
        own = {"check_guest": other.check_guest, "check_write": other.check_write, "pvalidate": mine.pvalidate}
        yield deleted, SimpleNamespace(**{**vars(LIBRARY), **own})


MUTANTS = list(mutants())


def test_there_are_mutants_and_the_original_passes() -> None:
    assert len(MUTANTS) >= 20
    for seed in range(20):
        compare(random.Random(seed), mapping=True)


@pytest.mark.parametrize("library", [library for _, library in MUTANTS], ids=[text for text, _ in MUTANTS])
def test_no_check_can_be_deleted(library: Any) -> None:
    mutated = SimpleNamespace(**{name: getattr(library, name) for name in vars(LIBRARY)})
    with pytest.raises((AssertionError, IndexError, ValueError)):
        _compare_many(mutated)


def _compare_many(library: Any) -> None:
    for seed in range(400):
        compare(random.Random(seed), mapping=True, library=library)
