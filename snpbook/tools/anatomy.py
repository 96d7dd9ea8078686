"""The anatomy of a chapter, and the linter that refuses a notebook which lacks a part of it.

A chapter's first cell is Markdown: a title `# ...`, then the lines `**Question.** ...`, `**Minutes.** N` and
`**Prerequisites.** ...`. Then come second-level headings, in this order: one or more `## Lab: ...`, each with code,
`## Exercises`, where `check("id", ...)` calls exercises that exist, `## Summary` and `## Sources`. A cell that shows a
live view is followed by one that drives the same view from Python, so that its callbacks are tested with the notebook.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from snpbook.exercises import exercises
from snpbook.widgets.view import MARK

Cell = Any
"""A cell of a notebook in `nbformat`'s own type, which has no annotations."""

_FIELD = re.compile(r"^\*\*(Question|Minutes|Prerequisites)\.\*\*[ \t]+(\S.*)$", re.MULTILINE)
_HEADING = re.compile(r"^## +(.+?) *$", re.MULTILINE)
_CHECK = re.compile(r"""\bcheck\(\s*["']([^"']+)["']""")


@dataclass(frozen=True, slots=True)
class Section:
    """A second-level heading with the cells below it; `text` is their Markdown without the heading."""

    title: str
    text: str
    code: tuple[str, ...]

    @property
    def part(self) -> str:
        """The part of the anatomy that this section is, in lower case."""
        return "labs" if self.title.startswith("Lab: ") else self.title.lower()


def sections(cells: list[Cell]) -> list[Section]:
    """The sections of a notebook, in order; what stands before the first heading belongs to none."""
    found: list[tuple[str, list[str], list[str]]] = []
    for cell in cells:
        if cell.cell_type != "markdown":
            if found:
                found[-1][2].append(cell.source)
            continue
        before, *pairs = _HEADING.split(cell.source)
        if found:
            found[-1][1].append(before)
        found += [(title, [text], []) for title, text in zip(pairs[::2], pairs[1::2], strict=True)]
    return [Section(title, "\n".join(texts).strip(), tuple(code)) for title, texts, code in found]


def faults(cells: list[Cell]) -> list[str]:
    """What the notebook lacks, each beginning with the name of the part."""
    first = cells[0].source if cells and cells[0].cell_type == "markdown" else ""
    fields = dict(_FIELD.findall(first))
    parts = sections(cells)
    result = [] if first.startswith("# ") else ["title: the first cell begins with a line `# Title`"]
    missing = [name for name in ("Question", "Minutes", "Prerequisites") if name not in fields]
    result += [f"{name.lower()}: the first cell has no line `**{name}.** ...`" for name in missing]
    if not fields.get("Minutes", "0").isdecimal():
        result.append(f"minutes: {fields['Minutes']!r} is not a whole number")
    for part in ("labs", "exercises", "summary", "sources"):
        heading = "Lab: ..." if part == "labs" else part.title()
        if part not in {section.part for section in parts}:
            result.append(f"{part}: there is no heading `## {heading}`")
    known = [section.part for section in parts if section.part in {"labs", "exercises", "summary", "sources"}]
    if known != sorted(known, key=["labs", "exercises", "summary", "sources"].index):
        result.append(f"order: labs, exercises, summary, sources, not {', '.join(known)}")
    for section in parts:
        result += _empty(section)
    return result + list(_views(cells))


def _empty(section: Section) -> Iterator[str]:
    """What a section of the anatomy must hold and does not."""
    if section.part == "labs" and not section.code:
        yield f"labs: `## {section.title}` has no code"
    if section.part in {"summary", "sources"} and not section.text:
        yield f"{section.part}: the section says nothing"
    if section.part == "exercises":
        called = [identifier for code in section.code for identifier in _CHECK.findall(code)]
        known = {exercise.id for exercise in exercises()}
        if not called:
            yield 'exercises: no cell calls check("...", ...)'
        yield from (f"exercises: {identifier!r} is not registered" for identifier in called if identifier not in known)


def _views(cells: list[Cell]) -> Iterator[str]:
    """Cells that show a live view which the next code cell does not drive."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    for number, (cell, following) in enumerate(zip_longest(code, code[1:]), 1):
        if any(MARK in output.get("data", {}).get("text/html", "") for output in cell.outputs):
            view = cell.source.rstrip().rpartition("\n")[2]
            if following is None or not re.search(rf"(?<!\w){re.escape(view)}(?!\w)", following.source):
                yield f"views: code cell {number} shows the live view `{view}`, and the next cell does not drive it"
