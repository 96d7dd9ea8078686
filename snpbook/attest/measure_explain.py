"""Why two measurements differ: which pages of two launches are not the same, and what in them.

A page is found again by its guest address; where a launch adds several at one address, as all VMSAs are, by their
order. The order of pages counts too, because the launch digest is a chain (SNP ABI, PAGE_INFO).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum

from snpbook.attest.measure_chain import Run
from snpbook.spec.launch import kernel_hashes_of
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE, LaunchPage
from snpbook.spec.vmsa import VMSA

_Place = tuple[int, int]
"""A guest address, and how many pages the launch added there before."""
_Page = tuple[Run, bytes]
"""What added a page, and its bytes, of which there are none where they are not measured."""


class Kind(Enum):
    """How two launches differ, in words."""

    CHANGED = "changed"
    ONLY_FIRST = "only in the first"
    ONLY_SECOND = "only in the second"
    MOVED = "added at another point of the launch"


@dataclass(frozen=True, slots=True)
class Difference:
    """Neighbouring pages that differ in the same way.

    `name` says what put the first of them at `gpa`, `detail` what changed in pages whose structure is known.
    """

    kind: Kind
    name: str
    gpa: int
    pages: int
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {self.pages} page{'s' * (self.pages > 1)} at {self.gpa:#x} {self.kind.value}{detail}"


def differences(first: Iterable[Run], second: Iterable[Run]) -> list[Difference]:
    """What distinguishes two launches, in their order; nothing exactly where they measure the same."""
    before, after = _pages(first), _pages(second)
    result: list[Difference] = []
    neighbour: _Place | None = None  # of the last page in the last difference
    for place, kind, (run, _), detail in _unequal(before, after):
        gpa, count = place
        last = result[-1] if result and place == neighbour else None
        vmsa = run.type is LaunchPage.VMSA
        if last and (last.kind, last.detail) == (kind, detail) and (vmsa or last.name == run.name):
            result[-1] = Difference(kind, last.name, last.gpa, last.pages + 1, detail)
        else:
            result.append(Difference(kind, run.name, gpa, 1, detail))
        neighbour = (gpa, count + 1) if vmsa else (gpa + PAGE_SIZE, count)
    return result


def _pages(runs: Iterable[Run]) -> dict[_Place, _Page]:
    pages: dict[_Place, _Page] = {}
    added = Counter[int]()
    for run in runs:
        for offset in range(0, len(run.data) or run.blank, PAGE_SIZE):
            gpa = run.gpa + offset
            pages[gpa, added[gpa]] = run, run.data[offset : offset + PAGE_SIZE]
            added[gpa] += 1
    return pages


def _unequal(before: dict[_Place, _Page], after: dict[_Place, _Page]) -> Iterator[tuple[_Place, Kind, _Page, str]]:
    moved = _moved(before, after)
    for place in before | after:
        old, new = before.get(place), after.get(place)
        if old is None or new is None:
            page = old or new
            assert page is not None
            yield place, Kind.ONLY_FIRST if old else Kind.ONLY_SECOND, page, ""
        elif (old[0].type, old[1]) != (new[0].type, new[1]):
            yield place, Kind.CHANGED, new, _detail(old, new)
        elif place in moved:
            yield place, Kind.MOVED, new, ""


def _moved(before: dict[_Place, _Page], after: dict[_Place, _Page]) -> set[_Place]:
    """The fewest of the common pages that must leave their place in the first launch to give the second's order."""
    first = [place for place in before if place in after]
    second = [place for place in after if place in before]
    if first == second:
        return set()
    blocks = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return set(first) - {place for block in blocks for place in first[block.a : block.a + block.size]}


def _detail(old: _Page, new: _Page) -> str:
    (run, data), (new_run, new_data) = old, new
    if run.type is not new_run.type:
        return f"{run.type.name} -> {new_run.type.name}"
    if run.type is LaunchPage.VMSA:
        pairs = zip(_registers(VMSA.unpack(data)), _registers(VMSA.unpack(new_data)), strict=True)
        return ", ".join(f"{name} {_show(a)} -> {_show(b)}" for (name, a), (_, b) in pairs if a != b)
    hashes, new_hashes = kernel_hashes_of(data), kernel_hashes_of(new_data)
    return ", ".join(name for name in hashes if name in new_hashes and hashes[name] != new_hashes[name])


def _registers(record: Record, prefix: str = "") -> Iterator[tuple[str, int | bytes]]:
    for name, value in record:
        if isinstance(value, Record):
            yield from _registers(value, f"{name}.")
        else:
            yield prefix + name, value


def _show(value: int | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else f"{value:#x}"
