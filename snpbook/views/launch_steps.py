"""A launch call by call: who asked whom for what, and how the launch digest grew.

A system call of the VMM stands at the top; inside it the kernel (KVM, or the CCP driver) updates the RMP, and the
driver rings at the secure processor, which may change entries, too. Runs of pages are one row each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from snpbook.attest.checks import Result
from snpbook.spec.legacy_launch import MEASUREMENT
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.status import Status
from snpbook.trace import Event, FirmwareCommand, Instruction, Ioctl, SystemCall
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.views.values import show

_SHORT = 8
"""How many bytes of a digest a row shows."""
_HIDDEN = frozenset({"data", "sev_fd", "error", "page_paddr", "page_size", "flags", "offset"})
"""Arguments that say nothing to a reader."""
_ADDRESSES = ("userspace_addr", "gctx_paddr")
_SUB_COMMANDS = ("KVM_MEMORY_ENCRYPT_OP", "SEV_ISSUE_CMD")
_MOST = 5
_ITEM = "border-left:2px solid currentColor;padding:2px 0 2px 10px;margin:2px 0 2px 6px;list-style:none"


@dataclass(frozen=True, slots=True)
class Call:
    """A system call of the VMM, the events inside it, and the launch digest after it (empty: none yet)."""

    event: Ioctl | SystemCall
    inside: tuple[Event, ...]
    digest: bytes

    @property
    def name(self) -> str:
        """The call, with the sub-command or the path where it has one."""
        if self.event.name == "open":
            return f"open {self.event.arguments['path']}"
        sub = self.event.arguments.get("id", self.event.arguments.get("cmd"))
        return f"{self.event.name}: {sub}" if self.event.name in _SUB_COMMANDS else self.event.name


@dataclass(frozen=True, slots=True)
class Link:
    """Pages that a launch added in one go: what they are, their type, place and number, and the digest after them."""

    name: str
    kind: LaunchPage
    gpa: int
    pages: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the nested log: how deep it lies, whose it is, what was done, the answer."""

    depth: int
    party: str
    what: str
    answer: str


def lines(call: Call) -> list[Line]:
    """The nested log of one call."""
    event = call.event
    answer = f"errno {event.errno}" if event.errno else "0"
    found = [Line(0, "VMM", f"{call.name}({_arguments(event.arguments)})", answer)]
    for inner in call.inside:
        if isinstance(inner, Instruction):
            found.append(Line(1, "kernel", f"{inner.name} {_pages(inner.pages)}", ""))
        elif isinstance(inner, FirmwareCommand):
            found.append(Line(1, "CCP", f"{inner.name} to the mailbox{_times(inner.count)}", ""))
            found.append(Line(2, "AMD-SP", f"{inner.name}({_arguments(inner.arguments)})", Status(inner.status).name))
            found += [Line(3, "RMP", change, "") for change in _changes(inner)]
    return found


def _changes(command: FirmwareCommand) -> list[str]:
    """What the firmware made of the states of pages, run by run of the same change."""
    if command.changed is None or command.before is None or command.after is None:
        return []
    moves = Counter(zip(command.before.tolist(), command.after.tolist(), strict=True))
    return [
        f"{PageState(before).name} to {PageState(after).name}{_times(count)}"
        for (before, after), count in moves.items()
    ]


def tree(call: Call, number: int, total: int) -> Static:
    """The nested log of one call, and the digest after it."""
    found = lines(call)
    head = f"Call {number} of {total}"
    digest = f"launch digest after it: {_short(call.digest)}" if call.digest else ""
    text = [head, *("  " * line.depth + f"{line.party}: {_told(line)}" for line in found), digest]
    html = "".join(
        f'<li style="{_ITEM};margin-left:{6 + 22 * line.depth}px"><strong>{line.party}</strong> '
        f"<code>{escape(_told(line))}</code></li>"
        for line in found
    )
    body = f'<p style="margin:4px 0"><strong>{head}</strong></p><ul style="padding:0;margin:0">{html}</ul>'
    return Static("\n".join(text).rstrip(), f'{body}<p style="margin:4px 0">{escape(digest)}</p>')


def overview(calls: Sequence[Call], at: int = 0, around: int = 0) -> Static:
    """The calls in order, those `around` call `at` (from 1) only, if given."""
    first = max(at - around - 1, 0) if around else 0
    shown = calls[first : at + around] if around else calls
    rows = []
    for number, call in enumerate(shown, first + 1):
        inside = ", ".join(line.what for line in lines(call)[1:] if line.party == "CCP").replace(" to the mailbox", "")
        rows.append((f"{'▶ ' if number == at else ''}{number}", call.name, inside))
    return table("Calls of the VMM", ["call", "what", "commands to the secure processor"], rows, mono=["what"])


def chain(links: Sequence[Link], other: Sequence[Link] = (), caption: str = "The chain of the launch digest") -> Static:
    """What the digest is made of, in order; with `other`, each digest is compared with that of the same row there."""
    rows = []
    for number, link in enumerate(links):
        row = [str(number + 1), link.name, link.kind.name, f"{link.gpa:#x}", str(link.pages), _short(link.digest)]
        if other:
            same = number < len(other) and other[number].digest == link.digest
            words = "another" if number < len(other) else "only here"
            row.append(mark(Result.PASSED, "the same") if same else mark(Result.FAILED, words))
        rows.append(row)
    head = ["link", "what", "type", "GPA", "pages", "digest after it", *["compared"] * bool(other)]
    note = f"launch digest: {links[-1].digest.hex()}" if links else "nothing is measured yet"
    return table(caption, head, rows, mono=["GPA", "digest after it"], note=note)


def measurement(answer: bytes | None) -> Static:
    """What a guest has in place of a chain: the answer of LAUNCH_MEASURE, empty before it; None without SEV."""
    if answer is None:
        words = "No chain: a plain guest is not measured."
        return Static(words, f"<p>{words}</p>")
    words = "No chain: one SHA-256 over all bytes loaded, told by LAUNCH_MEASURE under a key of the owner's."
    if not answer:
        return Static(words, f"<p>{words}</p>")
    size = MEASUREMENT.fields["measure"].size
    rows = [("HMAC", answer[:size].hex()), ("nonce of the firmware", answer[size:].hex())]
    return table("The measurement", [], rows, note=words)


def byte_diff(one: bytes, other: bytes, names: tuple[str, str]) -> Static:
    """Two digests byte by byte: how many of their bytes differ, and both as text."""
    differ = sum(a != b for a, b in zip(one, other, strict=True))
    rows = [(names[0], one.hex()), (names[1], other.hex()), ("bytes that differ", f"{differ} of {len(one)}")]
    return table("The two launch digests", [], rows)


def _told(line: Line) -> str:
    return f"{line.what} = {line.answer}" if line.answer else line.what


def _short(digest: bytes) -> str:
    return f"{digest[:_SHORT].hex()}…"


def _arguments(arguments: Any) -> str:
    given = [
        (name, value)
        for name, value in arguments.items()
        if name not in (*_HIDDEN, "id", "cmd", "path") and _counts(value)
    ]
    parts = [f"{name} {'…' if name in _ADDRESSES else show(value)}" for name, value in given[:_MOST]]
    return ", ".join([*parts, *["…"] * (len(given) > _MOST)])


def _counts(value: object) -> bool:
    return any(value) if isinstance(value, bytes) else bool(value) and not hasattr(value, "layout")


def _pages(pages: Any) -> str:
    first, last = int(pages[0]), int(pages[-1])
    return f"pfn {first:#x}" if first == last else f"pfn {first:#x}..{last:#x}{_times(len(pages))}"


def _times(count: int) -> str:
    return f" \u00d7 {count:,}" if count > 1 else ""
