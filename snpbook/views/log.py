"""The log of a run: what the parties did, one row per command, a run of pages folded into one row.

Rows are read off the trace's events; parameters of a firmware command that are zero are left out. A vector operation
unfolds to its single steps where the reader asks for it, in a `details` element that needs no script.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from itertools import islice
from typing import Any

import numpy as np

from snpbook.spec.pages import LaunchPage
from snpbook.spec.rmp import RmpCode
from snpbook.spec.status import Status
from snpbook.trace import (
    CachesWrittenBack,
    Event,
    FirmwareCommand,
    Instruction,
    Ioctl,
    Message,
    NestedMapping,
    PagesCopied,
    PagesMoved,
    PagesPinned,
    SystemCall,
    VmExit,
)
from snpbook.views.static import Static
from snpbook.views.tables import Markup, table
from snpbook.views.values import show

STEPS = 16
"""How many single steps of a run an HTML log unfolds."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line: who asked whom, for what, how often, with which arguments, and the answer."""

    source: str
    target: str
    what: str
    count: int
    detail: str
    result: str
    ok: bool
    event: Event


def rows(events: Iterable[Event]) -> list[Row]:
    """One row per event, in order."""
    return [row(event) for event in events]


def row(event: Event) -> Row:
    """The row of one event; `TypeError` for a type of event that the log has no words for."""
    source, target, what, detail, result, ok = _words(event)
    return Row(source, target, what, event.count, detail, result, ok, event)


def _words(event: Event) -> tuple[str, str, str, str, str, bool]:
    match event:
        case Instruction():
            return event.actor, "RMP", event.name, _pages(event.pages), *_codes(event.status)
        case FirmwareCommand():
            detail = _arguments(event.arguments, zeros=False) if event.pages is None else _page_run(event)
            answer = Status(event.status).name + (f": {event.reason}" if event.reason else "")
            return "kernel", "AMD-SP", event.name, detail, answer, event.status == Status.SUCCESS
        case Ioctl():
            answer = f"errno {event.errno}" if event.errno else "ok"
            return "VMM", event.device, event.name, _arguments(event.arguments), answer, event.errno == 0
        case VmExit():
            return f"vCPU {event.vcpu}", "KVM", event.reason, _arguments(event.detail), "exit", True
        case SystemCall():
            answer = f"errno {event.errno}" if event.errno else "ok"
            return "VMM", "kernel", event.name, _arguments(event.arguments), answer, event.errno == 0
        case PagesMoved():
            here = int(np.count_nonzero(event.resident))
            detail = f"{event.file}: {here:,} of {_run('page', event.offsets)} have memory"
            return "kernel", "memory", "pages", detail, "", True
        case PagesPinned():
            return "kernel", "memory", "pin" if event.pinned else "unpin", _pages(event.frames), "", True
        case PagesCopied():
            return "KVM", "memory", "copy", "from the shared to the private side", "", True
        case CachesWrittenBack():
            return "kernel", "caches", "WBINVD", f"{event.cores} cores", "", True
        case NestedMapping():
            what = "map" if event.mapped else "unmap"
            return "KVM", "nested tables", what, _run("gfn", event.gfns), "", True
        case Message():
            return event.source, "console", "message", event.text, "", True
    raise TypeError(f"the log has no words for {type(event).__name__}")


def steps(event: Event) -> Iterator[Row]:
    """The single steps of a vector operation, one row per page; the row itself for any other event."""
    whole = row(event)
    if not isinstance(event, Instruction | FirmwareCommand) or event.pages is None:
        yield whole
        return
    for index, pfn in enumerate(event.pages):
        step = replace(whole, count=1, detail=f"pfn {int(pfn):#x}")
        if isinstance(event, Instruction):
            answer, ok = _codes(event.status[index : index + 1])
            step = replace(step, result=answer, ok=ok)
        yield step


def log(events: Iterable[Event], caption: str = "Log") -> Static:
    """The log of `events` as aligned text and as an HTML table whose runs unfold."""
    found = rows(events)
    body = [(str(n), r.source, r.target, r.what, _times(r), r.detail, _answer(r)) for n, r in enumerate(found, 1)]
    return table(caption, ["#", "from", "to", "what", "times", "detail", "answer"], body, mono=["detail"])


def _answer(row: Row) -> str:
    return row.result if row.ok else f"\u2717 {row.result}"


def _times(row: Row) -> str:
    """The count; in HTML it unfolds to the first single steps."""
    if row.count == 1:
        return ""
    words = f"\u00d7 {row.count:,}"
    if not isinstance(row.event, Instruction | FirmwareCommand):
        return words
    lines = [escape(f"{step.detail}: {_answer(step)}") for step in islice(steps(row.event), STEPS)]
    if row.count > STEPS:
        lines.append(f"and {row.count - STEPS:,} more")
    return Markup(f"<details><summary>{words}</summary>{'<br>'.join(lines)}</details>", words)


def _page_run(event: FirmwareCommand) -> str:
    """The run of pages of a command, with the pages' type where the command names one."""
    kind = event.arguments.get("page_type")
    return " ".join(filter(None, [kind.name if isinstance(kind, LaunchPage) else "", _pages(event.pages)]))


def _run(what: str, pages: range) -> str:
    return f"{what} {pages[0]:#x}..{pages[-1]:#x}" if len(pages) > 1 else f"{what} {pages[0]:#x}"


def _pages(pages: Any) -> str:
    """A run as first and last page frame; scattered pages by their ends and number."""
    if not len(pages):
        return "no page"
    first, last = int(pages[0]), int(pages[-1])
    if first == last:
        return f"pfn {first:#x}"
    scattered = "" if last - first + 1 == len(pages) else f", {len(pages):,} pages"
    return f"pfn {first:#x}..{last:#x}{scattered}"


def _arguments(arguments: Mapping[str, Any], *, zeros: bool = True) -> str:
    given = {name: value for name, value in arguments.items() if zeros or _is_set(value)}
    return ", ".join(f"{name} {show(value)}" for name, value in given.items())


def _is_set(value: object) -> bool:
    return any(value) if isinstance(value, bytes) else bool(value)


def _codes(status: Any) -> tuple[str, bool]:
    codes, counts = np.unique(np.asarray(status), return_counts=True)
    if codes.tolist() in ([], [RmpCode.SUCCESS]):
        return "ok", True
    return ", ".join(f"{RmpCode(int(c)).name} \u00d7 {n:,}" for c, n in zip(codes, counts, strict=True)), False
