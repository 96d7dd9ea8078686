"""No rule of an access can be left out unseen: with any one deleted, the walks or the TLB go wrong.

Deleted are single statements (a fault noted, bits set, a flush), single sides of an `|` (an error bit, a right) and
single conditions of an `and` or `or`. The checks themselves: test_mutations.
"""

import ast
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from snpbook.hardware import checks, core, machine, paging, tlb, vmrun, walker
from tests.hardware import guests, test_access_table, test_core, test_paging, test_tlb, test_walks
from tests.reference.access import ACTORS
from tests.sampling import sampled


class _Delete(ast.NodeTransformer):
    """Deletes the n-th rule of a module: numbers count through all of it."""

    def __init__(self, number: int) -> None:
        self.left, self.deleted = number, ""

    def _hit(self, node: ast.AST) -> bool:
        self.left -= 1
        if self.left == -1:
            self.deleted = ast.unparse(node)
        return self.left == -1

    def visit_Expr(self, node: ast.Expr) -> Any:
        if isinstance(node.value, ast.Call) and self._hit(node):
            return ast.Pass()
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        return ast.Pass() if self._hit(node) else self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        kept = not isinstance(node.targets[0], ast.Subscript) or isinstance(node.targets[0].slice, ast.Constant)
        return self.generic_visit(node) if kept or not self._hit(node) else ast.Pass()

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        if isinstance(node.op, ast.BitOr):
            for side, other in ((node.left, node.right), (node.right, node.left)):
                if self._hit(side):
                    self.deleted = f"{ast.unparse(side)} of {ast.unparse(node)}"
                    return other
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        for index, value in enumerate(node.values):
            if self._hit(value):
                self.deleted = f"{ast.unparse(value)} of {ast.unparse(node)}"
                rest = node.values[:index] + node.values[index + 1 :]
                return ast.BoolOp(node.op, rest) if len(rest) > 1 else rest[0]
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.body = [self.visit(statement) for statement in node.body]
        return node


def mutants(module: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """The module without its first rule, without its second, and so on, each with the text of what is gone."""
    for number in itertools.count():
        deletion = _Delete(number)
        tree = ast.fix_missing_locations(deletion.visit(ast.parse(Path(str(module.__file__)).read_text())))
        if not deletion.deleted:
            return
        result = ModuleType(module.__name__)
        exec(compile(tree, str(module.__file__), "exec"), result.__dict__)
        result.__dict__.update({"Access": checks.Access, "AccessKind": checks.AccessKind})
        yield deletion.deleted, result


USERS: dict[ModuleType, list[tuple[Any, str]]] = {
    walker: [(core, "PageWalker")],
    paging: [
        (walker, "walk"),
        (walker, "nested_walk"),
        (walker, "set_bits"),
        (walker, "address_mask"),
        (test_paging, "nested_walk"),
        (test_paging, "set_bits"),
        (test_paging, "read_words"),
        (core, "distinct_keys"),
    ],
    tlb: [(machine, "Tlb"), (test_tlb, "Tlb")],
    core: [(guests, "GuestCore"), (vmrun, "GuestCore")],
}
"""Who uses what of a module."""

_NOT_OWN = "(kind.writes or kind.of_tables) and core.physical.snp_enabled and (not own.all())"
UNSEEN = {
    "Npf of Npf | GuestException": "a type",
    "GuestException of Npf | GuestException": "a type",
    "PAGE_SIZE of -address % PAGE_SIZE or PAGE_SIZE": "an empty piece more",
    "asid << 16 of asid << 16 | tag": "places alone",
    "tag of asid << 16 | tag": "places alone",
    f"not own.all() of {_NOT_OWN}": "nothing is left to check",
}
"""Deletions that change no result, and why."""

FAILED = pytest.fail.Exception
"""What `pytest.raises` in a test says when nothing was raised."""

MUTANTS = [(user, *found) for user in USERS for found in mutants(user) if found[0] not in UNSEEN]


def test_the_originals_pass() -> None:
    assert len(MUTANTS) > 100
    prove()


@pytest.mark.parametrize(
    ("module", "mutant"),
    [
        pytest.param(module, mutant, id=f"{module.__name__.rpartition('.')[2]}: {name}")
        for module, name, mutant in sampled(MUTANTS, 8)
    ],
)
def test_no_rule_can_be_deleted(module: ModuleType, mutant: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for user, attribute in USERS[module]:
        monkeypatch.setattr(user, attribute, getattr(mutant, attribute))
    with pytest.raises(
        (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, FAILED)
    ):
        prove()


together = test_paging.test_neighbours_that_walk_together.hypothesis.inner_test  # type: ignore[attr-defined]


def prove() -> None:
    """A sample of what the tests of walks, checks and the TLB show, the quickest first."""
    for seed in range(4):
        run_guest(seed)
    for seed, kind in enumerate(8 * tuple(test_paging.KINDS)):
        test_paging.compare(random.Random(seed), kind, 51)
        together(random.Random(seed), kind)
    for proof in (*vars(test_tlb).values(), *vars(test_core).values(), *vars(test_paging).values()):
        plain = not hasattr(proof, "pytestmark") and not hasattr(proof, "hypothesis")
        if callable(proof) and getattr(proof, "__name__", "").startswith("test_") and plain:
            proof()
    for registers in ({"efer": 0x1000}, {"cr4": 0x1020}):
        test_core.test_other_paging_is_refused_by_name(registers)
    for name, kept in (("MOV CR3, the same value", True), ("MOV CR4", False)):
        test_tlb.test_global_pages(name, kept)
    for name in test_tlb.FLUSHES:
        test_tlb.test_a_stale_translation_until(name)
    for name in test_tlb.KEEPS:
        test_tlb.test_what_does_not_flush(name)
    for seed in range(10):
        test_tlb.random_operations(random.Random(seed))
    for actor in ACTORS:
        test_access_table.compare(test_access_table.Stage(actor), 30)
    for seed in range(4, 24):
        run_guest(seed)


def run_guest(seed: int) -> None:
    guest = test_walks.RandomGuest(random.Random(seed), odd=(1, 0.3)[seed % 2])
    for _ in range(10):
        test_walks.compare(guest)
