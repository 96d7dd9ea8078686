"""No check can be left out unseen: with any one of them deleted, the comparison with the reference fails."""

import ast
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from snpbook.hardware import checks, core_rmp, host_instructions, opcodes, page_instructions
from snpbook.hardware.checks import Access
from tests.hardware import raw, tables

_REFUSALS = ("RmpCode.", "Access.", "GuestException(", "GeneralProtection(", "refused")
"""What the code of a check mentions: what it answers with. Operands of the Python API are checked elsewhere."""


class _Delete(ast.NodeTransformer):
    """Deletes the n-th check: a call of `refuse` or `require`, an element of a list of checks, an `if` or a conditional
    expression that only refuses.

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
        called = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        return ast.Pass() if called in ("refuse", "cpu.require") and self._hit(node) else node

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        if isinstance(node.value, ast.List) and ast.unparse(node.targets[0]) == "checks":
            node.value.elts = [element for element in node.value.elts if not self._hit(element)]
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        ends = isinstance(node.body[-1], ast.Return | ast.Raise) and not node.orelse
        return ast.Pass() if ends and _refuses(node.body) and self._hit(node) else node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return node.orelse if _refuses([node.body]) and self._hit(node) else node


def _refuses(body: list[Any]) -> bool:
    text = "\n".join(map(ast.unparse, body))
    return any(word in text for word in _REFUSALS)


def mutant(module: ModuleType, number: int, replaced: dict[str, Any]) -> tuple[ModuleType, str]:
    """The module with its n-th check deleted (none, where there are fewer), and the text of that check."""
    deletion = _Delete(number)
    tree = ast.fix_missing_locations(deletion.visit(ast.parse(Path(str(module.__file__)).read_text())))
    result = ModuleType(module.__name__)
    sys.modules[module.__name__], original = result, sys.modules[module.__name__]  # dataclasses look their module up
    try:
        exec(compile(tree, str(module.__file__), "exec"), result.__dict__)
    finally:
        sys.modules[module.__name__] = original
    result.__dict__.update(replaced)
    return result, deletion.deleted


def _deletions(module: ModuleType, kept: dict[str, Any] | None = None) -> Iterator[tuple[ModuleType, str]]:
    for number in itertools.count():
        mine, deleted = mutant(module, number, kept or {})
        if not deleted:
            return
        yield mine, deleted


def _library(base: Any, *modules: ModuleType) -> SimpleNamespace:
    """The operations of `base`, those of them that a module has from there; the last module counts."""
    found = {name: getattr(module, name) for module in modules for name in vars(base) if hasattr(module, name)}
    return SimpleNamespace(**{**vars(base), **found})


def table_mutants() -> Iterator[tuple[str, Any]]:
    for mine, deleted in _deletions(host_instructions):
        yield deleted, _library(tables.LIBRARY, mine)
    for mine, deleted in _deletions(page_instructions, {"Access": Access}):
        names = ("pvalidate", "rmpadjust", "rmpquery")
        yield deleted, SimpleNamespace(**{**vars(tables.LIBRARY), **{name: getattr(mine, name) for name in names}})
    for other, deleted in _deletions(checks, {"Access": Access}):
        inner = {"check_guest": other.check_guest, "check_guest_one": other.check_guest_one}
        mine, _ = mutant(page_instructions, sys.maxsize, inner)
        yield deleted, _library(tables.LIBRARY, mine, other)


def raw_mutants() -> Iterator[tuple[str, Any]]:
    for mine, deleted in _deletions(opcodes):
        yield deleted, _library(raw.LIBRARY, mine)
    for inner, deleted in _deletions(core_rmp):
        names = ("adjust_rights", "query_rights", "validate_pages", "privilege_fault")
        mine, _ = mutant(opcodes, sys.maxsize, {name: getattr(inner, name) for name in names})
        yield deleted, _library(raw.LIBRARY, mine)


def compare_tables(seed: int, library: Any) -> None:
    tables.compare(random.Random(seed), tables.table(), library=library)


def compare_registers(seed: int, library: Any) -> None:
    raw.compare(random.Random(seed), library)


MUTANTS: list[tuple[str, Any, Callable[[int, Any], None]]] = [
    *((deleted, library, compare_tables) for deleted, library in table_mutants()),
    *((deleted, library, compare_registers) for deleted, library in raw_mutants()),
]


def test_there_are_mutants_and_the_originals_pass() -> None:
    assert len(MUTANTS) >= 50
    for seed in range(20):
        compare_tables(seed, tables.LIBRARY)
        compare_registers(seed, raw.LIBRARY)


@pytest.mark.parametrize(("library", "compare"), [mutant[1:] for mutant in MUTANTS], ids=[text for text, *_ in MUTANTS])
def test_no_check_can_be_deleted(library: Any, compare: Callable[[int, Any], None]) -> None:
    with pytest.raises((AssertionError, AttributeError, IndexError, TypeError, ValueError)):
        _compare_many(library, compare)


def _compare_many(library: Any, compare: Callable[[int, Any], None]) -> None:
    for seed in range(2000):
        compare(seed, library)
