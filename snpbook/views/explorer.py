"""An access explained: both walks entry by entry, the checks on each page in order, the fault bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from snpbook.attest.checks import Result
from snpbook.hardware.exits import GuestException, HostPageFault, Npf
from snpbook.hardware.explorer import NAMES, Explanation, Level, Visit
from snpbook.hardware.reasons import Step
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.vmcb import ExitCode, FaultError, Vector
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import Markup, table

_MEANINGS = {
    FaultError.PRESENT: "the tables map it; what failed is a right, a reserved bit or the RMP",
    FaultError.WRITE: "the access writes",
    FaultError.USER: "a user's access, as every nested access is",
    FaultError.RESERVED: "a reserved bit is set in an entry",
    FaultError.FETCH: "an instruction fetch",
    FaultError.SHADOW_STACK: "an access to a shadow stack (not modelled)",
    FaultError.RMP: "an RMP check failed",
    FaultError.FINAL_GPA: "on the way to the final guest address",
    FaultError.PAGE_TABLE_WALK: "on the way to a page of the guest's tables",
    FaultError.ENCRYPTED: "private: the effective C-bit is 1",
    FaultError.SIZE_MISMATCH: "PVALIDATE or RMPADJUST named a smaller size than the entry has",
    FaultError.VMPL: "the rights of the VMPL are not enough",
    FaultError.SUPERVISOR_SHADOW_STACK: "the RMP's check on supervisor shadow stacks (not modelled)",
    FaultError.NOT_RESTARTABLE: "the access cannot be made again (Secure AVIC, not modelled)",
}
_GUEST_BITS = FaultError.PRESENT | FaultError.WRITE | FaultError.USER | FaultError.RESERVED | FaultError.FETCH
_HOST_BITS = _GUEST_BITS | FaultError.RMP
_RESULTS = {True: Result.PASSED, False: Result.FAILED, None: Result.SKIPPED}
_WORDS = {True: "met", False: "failed", None: "not reached"}


def explanation(told: Explanation) -> Static:
    """All of an explanation: how it ended, then how it came to that."""
    parts = [verdict(told)]
    tables = [visit for visit in told.visits if visit.level is not None]
    if tables:
        parts.append(_guest_walk(tables, told.rights))
    last = told.visits[-1]
    if last.gfn is not None:
        parts.append(_levels(f"Nested walk of GPA {last.gfn << PAGE_SHIFT:#x}, {last.what}", last.nested))
    if told.rights and not told.rights.met:
        parts.append(_checks("Checks on the entries of the guest's tables", [told.rights]))
    else:
        where = "" if last.page is None else f", system page {last.page:#x}"
        parts.append(_checks(f"Checks on {last.what}{where}", last.checks))
    parts += _fault(told)
    return Static("\n\n".join(part.text for part in parts), "".join(part.html for part in parts))


def survey(found: Mapping[str, Mapping[str, Explanation]]) -> Static:
    """Many accesses at a glance: a row for each page, a column for each kind of access, in it the check that failed."""
    head = list(next(iter(found.values())))
    rows = [(page, *(_cell(told) for told in accesses.values())) for page, accesses in found.items()]
    return table("Who may do what", ["page", *head], rows)


def _cell(told: Explanation) -> Markup:
    """The verdict's mark, and beside it, where it may be broken into lines, the check that failed."""
    result, words = (Result.FAILED, told.failed.name) if told.failed else (Result.PASSED, "yes")
    sign = mark(result, "")
    return Markup(f"{sign} {escape(words)}", f"{sign.words} {words}")


def verdict(told: Explanation) -> Static:
    """How the access ended, in one sentence."""
    what = f"{told.kind.name.lower()} at {told.address:#x} by {told.actor}"
    failed = told.failed
    if told.fault is None:
        place = "" if told.page is None else f", system page {told.page:#x}"
        result, words = Result.PASSED, f"let through{place}"
    else:
        result, words = Result.FAILED, _name(told)
    why = f": {failed.name} wants {failed.expected}, found {failed.found}" if failed else ""
    text = f"{what[0].upper()}{what[1:]}: {words}{why}"
    html = f"<p><strong>{escape(what[0].upper() + what[1:])}</strong><br>{mark(result, words)} {escape(why[2:])}</p>"
    return Static(text, html)


def _name(told: Explanation) -> str:
    match told.fault:
        case Npf():
            return "#VMEXIT(NPF): the hypervisor decides"
        case GuestException(vector=Vector.VC):
            return "#VC: the guest itself is told"
        case GuestException(vector=vector):
            return f"#{Vector(vector).name} in the guest"
        case HostPageFault():
            return "#PF in the host"
    return "stopped by the IOMMU"


def _fault(told: Explanation) -> list[Static]:
    """What the fault tells whom, and its error code bit by bit."""
    match told.fault:
        case Npf(gpa=gpa, error=error):
            return [_bits(f"EXITINFO1 = {int(error):#x}, EXITINFO2 = {gpa:#x}", error, ~FaultError(0))]
        case GuestException(vector=Vector.PF, error=code, address=address):
            return [_bits(f"#PF error code {code:#x}, CR2 = {address:#x}", FaultError(code), _GUEST_BITS)]
        case GuestException(vector=Vector.VC, error=code, address=address):
            named = f"{ExitCode(code).name}: CR2 = {address:#x}"
            rows = [("error code", f"{code:#x}"), ("it stands for", named)]
            return [table("#VC, vector 29", [], rows)]
        case HostPageFault(error=error, spa=spa):
            return [_bits(f"#PF error code {int(error):#x}, system address {spa:#x}", error, _HOST_BITS)]
    return []


def _bits(caption: str, error: FaultError, shown: FaultError) -> Static:
    rows = [
        (str(bit.value.bit_length() - 1), "1" if bit & error else "0", bit.name or "", _MEANINGS[bit])
        for bit in FaultError
        if bit & shown
    ]
    return table(caption, ["bit", "value", "name", "where it is 1"], rows, mono=["bit", "value"])


def _guest_walk(visits: Sequence[Visit], rights: Step | None) -> Static:
    """The tables of the guest: each is a private page that has to be found and checked itself; then `rights`."""
    rows = []
    for visit in visits:
        entry = visit.entry
        raw, says = (f"{entry.entry:#018x}", entry.says) if entry else ("", visit.failed.name if visit.failed else "")
        gpa = "" if visit.gfn is None else f"{visit.gfn << PAGE_SHIFT:#x}"
        rows.append((visit.what, gpa, _place(visit), _summary(visit), raw, says))
    if rights:
        sign = mark(_RESULTS[rights.met], rights.name if rights.met is False else "1 met")
        says = f"wanted: {rights.expected}; all grant: {rights.found}"
        rows.append(("all entries together", "", "", _unfolding(sign, [rights]), "", says))
    head = ["table", "at GPA", "found at SPA", "its own checks", "entry", "the entry says"]
    return table("The guest's walk: its own tables", head, rows, mono=["at GPA", "found at SPA", "entry"])


def _place(visit: Visit) -> str:
    """Where a table lies; unfolds to the nested walk that found it."""
    words = "" if visit.page is None else f"{visit.page << PAGE_SHIFT:#x}"
    lines = [escape(f"{NAMES[level.level]}: {level.entry:#x}, {level.says}") for level in visit.nested]
    return Markup(f"<details><summary>{words or 'nowhere'}</summary>{'<br>'.join(lines)}</details>", words)


def _summary(visit: Visit) -> Markup:
    """How the checks on a table ended; unfolds to the checks."""
    if visit.failed:
        return _unfolding(mark(Result.FAILED, visit.failed.name), visit.checks)
    return _unfolding(mark(Result.PASSED, f"{sum(step.met is True for step in visit.checks)} met"), visit.checks)


def _unfolding(sign: Markup, steps: Sequence[Step]) -> Markup:
    lines = [escape(f"{step.name}: {_WORDS[step.met]}" + f", found {step.found}" * bool(step.found)) for step in steps]
    return Markup(f"<details><summary>{sign}</summary>{'<br>'.join(lines)}</details>", sign.words)


def _levels(caption: str, levels: Sequence[Level]) -> Static:
    rows = [(NAMES[level.level], f"{level.spa:#x}", f"{level.entry:#018x}", level.says) for level in levels]
    head = ["nested table", "entry at SPA", "entry", "the entry says"]
    return table(caption, head, rows, mono=["entry at SPA", "entry"])


def _checks(caption: str, steps: Sequence[Step]) -> Static:
    rows = [_check(step) for step in steps]
    return table(caption, ["check", "result", "it wants", "it found", "source"], rows, mono=["it wants", "it found"])


def _check(step: Step) -> tuple[str, str, str, str, str]:
    return step.name, mark(_RESULTS[step.met], _WORDS[step.met]), step.expected, step.found, step.cite
