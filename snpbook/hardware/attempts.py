"""One RMP instruction tried on a run of pages of the workbench, and its answer page by page with the reason.

The instructions are the model's; before one of a guest the host maps the pages at the addresses that the guest names,
as a host may at any time. Sources: APM2 15.36.3 to 15.36.10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.checks import Access, check_guest
from snpbook.hardware.core_rmp import adjust_rights, query_rights, validate_pages
from snpbook.hardware.dram import Words
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.reasons import Operands, Page, Step, code_reason, guest_steps, not_canonical, owner, rights, size
from snpbook.hardware.walker import Fault
from snpbook.hardware.workbench import Workbench
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE, VmplPermission
from snpbook.spec.rmp import RMPUPDATE_STATE, RmpCode
from snpbook.spec.vmcb import ExitCode, Vector

HOST_INSTRUCTIONS = ("RMPUPDATE", "PSMASH", "RMPREAD")
GUEST_INSTRUCTIONS = ("PVALIDATE", "RMPADJUST", "RMPQUERY")
SUCCESS = RmpCode.SUCCESS.name


@dataclass(frozen=True, slots=True)
class Order:
    """An instruction on `pages` of the machine. A guest (`asid`, at `vmpl`) calls the first of them `gfn`.

    For RMPUPDATE `gfn` and `new` are what the entries shall become. `large` is the size that a guest's instruction
    names; like RMPUPDATE's it makes one page of every 512. `target`, `rights` and `vmsa` are RMPADJUST's.
    """

    instruction: str
    pages: range
    gfn: int = 0
    new: NewState = HYPERVISOR
    asid: int = 0
    vmpl: int = 0
    large: bool = False
    validate: bool = True
    target: int = 1
    rights: VmplPermission = VmplPermission.NONE
    vmsa: bool = False

    @property
    def by_host(self) -> bool:
        return self.instruction in HOST_INSTRUCTIONS

    @property
    def steps(self) -> range:
        """The pages that the instruction is executed on: of 2 MB pages the first of each."""
        large = self.new.large if self.by_host else self.large
        large = large or self.instruction == "PSMASH"
        return self.pages[::PAGES_PER_LARGE] if large else self.pages

    @property
    def gfns(self) -> range:
        """The guest page numbers at the same places."""
        step = self.steps.step
        return range(self.gfn, self.gfn + len(self.steps) * step, step)


@dataclass(frozen=True, slots=True)
class Answer:
    """One page's answer: a code by its name, a fault or "not reached"; `detail` is what came with it."""

    page: int
    code: str
    detail: str
    reason: Step | None
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def ok(self) -> bool:
        return self.code == SUCCESS


@dataclass(frozen=True, slots=True, repr=False)
class Attempt:
    """An order and its answers, one for each page that it was executed on."""

    order: Order
    answers: Sequence[Answer]

    @property
    def refused(self) -> Answer | None:
        """The first answer that is a refusal."""
        return next((answer for answer in self.answers if answer.reason), None)

    def __repr__(self) -> str:
        names = [answer.code for answer in self.answers]
        told = ", ".join(f"{name} \u00d7 {names.count(name)}" for name in dict.fromkeys(names))
        return f"{self.order.instruction} by {party(self.order)}: {told}"


def party(order: Order) -> str:
    """Who gives the order."""
    return "host" if order.by_host else f"guest {order.asid} at VMPL{order.vmpl}"


def attempt(bench: Workbench, order: Order) -> Attempt:
    """Carry out the order; raises what the host's instruction raises where the product does not have it."""
    machine, rmp = bench.machine, bench.machine.rmp
    step = order.steps.step
    seen = [Page.of(rmp, page, any(used // step == page // step for used in machine.in_use)) for page in order.steps]
    before = rmp.peek(order.steps).copy()
    outcomes = list(_by_host(bench, order, seen) if order.by_host else _by_guest(bench, order, seen))
    after = rmp.peek(order.steps)
    answers = [
        Answer(page, *outcome, _pair(old), _pair(new))
        for page, outcome, old, new in zip(order.steps, outcomes, before, after, strict=True)
    ]
    return Attempt(order, answers)


_Outcome = tuple[str, str, Step | None]


def _by_host(bench: Workbench, order: Order, seen: Sequence[Page]) -> Iterator[_Outcome]:
    details = [""] * len(seen)
    if order.instruction == "RMPREAD":
        codes, found = bench.host.rmpread(order.steps)
        details = [_told(RMPUPDATE_STATE.unpack(stored.tobytes())) for stored in found]
    elif order.instruction == "PSMASH":
        codes = bench.host.psmash(order.steps)
    else:
        codes = bench.host.rmpupdate(order.steps, order.gfns, order.new)
    large = order.new.large or order.instruction == "PSMASH"
    return _coded(order, codes, details, seen, Operands(new=order.new, large=large))


def _told(stored: Record) -> str:
    """What RMPREAD stores, in words."""
    kind = f"{size(stored.page_size)} page{', immutable' if stored.immutable else ''}"
    return f"{kind}, {owner(stored)}, GPA {stored.gpa:#x}"


def _by_guest(bench: Workbench, order: Order, seen: Sequence[Page]) -> Iterator[_Outcome]:
    guest, core = bench.guest(order.asid), bench.guest(order.asid).core(order.vmpl)
    for gfn, page in zip(order.gfns, order.steps, strict=True):
        guest.map(gfn, range(page, page + 1), large=order.large and not (gfn | page) % PAGES_PER_LARGE)
    address, count = order.gfn << PAGE_SHIFT, len(seen)
    given = Operands(None, order.gfn, order.vmpl, order.target, order.rights, order.large, bench.machine.product.vmpls)
    if order.instruction == "PVALIDATE":
        validations, fault = validate_pages(core, address, count, order.validate, order.large)
        codes = [done.codes for done in validations]
        details = [f"CF = {int(carry)}" for done in validations for carry in done.unchanged]
    elif order.instruction == "RMPADJUST":
        adjusted, fault = adjust_rights(core, address, count, order.target, order.rights, order.vmsa, order.large)
        codes = [done.codes for done in adjusted]
        details = [""] * count
    else:
        queries, fault = query_rights(core, address, count, order.target)
        codes = [done.codes for done in queries]
        details = [f"VMPL{order.target}: {rights(int(found))}" for done in queries for found in done.permissions]
    flat = np.concatenate([np.zeros(0, np.uint8), *codes])
    yield from _coded(order, flat, details, seen, given)
    if fault is not None:
        yield _faulted(bench, order, seen[len(flat)], fault, len(flat))
    yield from [("not reached", "the fault before it stopped the run", None)] * (count - len(flat) - 1)


def _coded(
    order: Order, codes: NDArray[np.uint8], details: Sequence[str], seen: Sequence[Page], given: Operands
) -> Iterator[_Outcome]:
    for code, detail, page in zip(map(RmpCode, map(int, codes)), details, seen, strict=False):
        reason = None if code is RmpCode.SUCCESS else code_reason(order.instruction, code, page, given)
        yield code.name, detail if reason is None else "", reason


def _faulted(bench: Workbench, order: Order, page: Page, fault: Fault, index: int) -> _Outcome:
    """The page at which a guest's instruction faulted: what the fault says, and which check it was."""
    gfn = order.gfns[index]
    if isinstance(fault, Npf):
        number, guest = np.array([page.number], np.uint64), np.array([gfn], np.uint64)
        need = VmplPermission.NONE
        found = check_guest(bench.machine.rmp, number, guest, order.asid, need=need, large=order.large)
        verdict, code = Access(int(found[0])), "#NPF"
        detail = f"EXITINFO1 {int(fault.error):#x}, EXITINFO2 {fault.gpa:#x}"
    elif fault.error == ExitCode.PAGE_NOT_VALIDATED:
        verdict, code, detail = Access.NOT_VALIDATED, "#VC", f"error code {fault.error:#x}, CR2 {fault.address:#x}"
    else:
        return f"#{Vector(fault.vector).name}", f"error code {fault.error:#x}", _before_the_rmp(order, fault, gfn)
    steps = guest_steps(page, gfn, order.asid, 0, VmplPermission.NONE, verdict, large=order.large)
    failed = next(step for step in steps if step.met is False)
    if verdict is Access.PAGE_SIZE:  # the instruction's size counts, not the mapping's
        failed = Step(failed.name, f"{size(order.large)}, as the instruction says", failed.found, False, failed.cite)
    return code, detail, failed


def _before_the_rmp(order: Order, fault: GuestException, gfn: int) -> Step:
    """What an instruction checks before it asks the RMP: the level, then the address in the guest's own tables."""
    if fault.vector == Vector.PF:
        return Step("Guest tables: present", "present", f"no page at {gfn << PAGE_SHIFT:#x}", False, "APM2 5.3")
    if order.instruction != "PVALIDATE" or not order.vmpl:
        return not_canonical(gfn << PAGE_SHIFT)
    return Step(f"{order.instruction} is for VMPL0", "VMPL0", f"VMPL{order.vmpl}", False, "APM2 15.36.6")


def _pair(words: Words) -> tuple[int, int]:
    return int(words[0]), int(words[1])
