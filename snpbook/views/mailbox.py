"""What the mailbox answered: the status and the check behind it, what the command changed, and the three registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import IntEnum

from snpbook.attest.checks import Result
from snpbook.firmware.bench import Answer
from snpbook.spec.commands import MAILBOX_RESPONSE, Command, MailboxRegister
from snpbook.spec.pages import PageState
from snpbook.views.checks import mark
from snpbook.views.palette import PAGES
from snpbook.views.static import Static
from snpbook.views.tables import table
from snpbook.views.values import show

_ROWS = 8
"""The largest number of changed pages that are listed."""
_REGISTERS = {
    MailboxRegister.COMMAND: "command and response", MailboxRegister.ADDRESS_LOW: "address, low half",
    MailboxRegister.ADDRESS_HIGH: "address, high half",
}  # fmt: skip
_GENERAL = ("SNP", "SEV")
"""Cites of refusals that name a document and no place in it."""
_STANDING = {
    "snp": "SNP platform", "legacy": "legacy platform", "guest": "SNP guest", "legacy_guest": "legacy guest",
}  # fmt: skip


def answer(made: Answer) -> Static:
    """One command: how it ended, what came of it, and what the registers hold now."""
    parts = [_verdict(made), *_effects(made)]
    if made.written is not None:
        rows = [(name, show(value)) for name, value in made.written if value != made.arguments.get(name)]
        parts.append(table("The buffer, written back", [], rows))
    parts.append(registers(made.registers))
    return Static("\n\n".join(part.text for part in parts), "".join(part.html for part in parts))


def registers(values: Mapping[MailboxRegister, int]) -> Static:
    """The registers by their offsets in the processor's BAR, the response taken apart."""
    rows = [(f"{register:#x}", _REGISTERS[register], f"{value:#010x}") for register, value in values.items()]
    response = MAILBOX_RESPONSE.unpack(values[MailboxRegister.COMMAND].to_bytes(MAILBOX_RESPONSE.size, "little"))
    note = f"bit 31, done: {response.response}; bit 30, recovery: {response.recovery}; status: {response.status:#x}"
    return table("Mailbox registers", ["offset", "holds", "value"], rows, mono=["value"], note=note)


def answers(made: Sequence[Answer], first: int = 1) -> Static:
    """Many commands, a row for each, counted from `first` on."""
    rows = [
        (str(number), one.name, _status(one), str(one.refusal.rule) if one.refusal else "", _moved(one))
        for number, one in enumerate(made, first)
    ]
    return table("Commands", ["#", "command", "answer", "the check that failed", "what moved"], rows)


def _status(made: Answer) -> str:
    return mark(Result.PASSED if made.ok else Result.FAILED, f"{made.status.name} ({made.status:#04x})")


def _verdict(made: Answer) -> Static:
    rows = [("status", _status(made))]
    if made.refusal is not None:
        told = made.refusal
        rows += [("the check that failed", told.rule), ("it wants", _value(told.expected)),
                 ("it found", _value(told.found)), ("source", _source(made))]  # fmt: skip
    return table(made.name, [], [row for row in rows if row[1]])


def _source(made: Answer) -> str:
    """Where the rule stands: the refusal's own word, or for a rule of the command the command in its document."""
    assert made.refusal is not None
    if made.refusal.cite not in _GENERAL or made.name not in Command.__members__:
        return made.refusal.cite
    return f"{'SNP' if made.name.startswith('SNP_') else 'SEV'} {made.name}"


def _value(value: object) -> str:
    return value if isinstance(value, str) else show(value)


def _effects(made: Answer) -> list[Static]:
    """States before and after: of the platforms and guests that moved, and of the pages whose entries were written."""
    rows = _moves(made) + [(f"page {one.page:#x}", _page(one.before), _page(one.after)) for one in made.changes[:_ROWS]]
    more = len(made.changes) - _ROWS
    note = f"and {more} more pages" if more > 0 else ""
    return [table("What moved", ["what", "before", "after"], rows, note=note)] if rows else []


def _moves(made: Answer) -> list[tuple[str, str, str]]:
    states = (
        (_STANDING[one.name], getattr(made.before, one.name), getattr(made.after, one.name))
        for one in fields(made.before)
    )
    return [(name, _state(before), _state(after)) for name, before, after in states if before is not after]


def _state(state: IntEnum | None) -> str:
    return "none" if state is None else state.name


def _moved(made: Answer) -> str:
    pages = {(one.before, one.after) for one in made.changes}
    words = [f"{name}: {before} to {after}" for name, before, after in _moves(made)]
    return "; ".join(words + [f"page: {_page(before)} to {_page(after)}" for before, after in sorted(pages)])


def _page(state: PageState) -> str:
    return PAGES[state].label
