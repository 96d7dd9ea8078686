"""PVALIDATE, RMPADJUST and RMPQUERY as a running guest executes them on runs of its virtual pages.

Who may execute them, what a run does before, at and behind a fault, and what the fault tells the hypervisor; what
happens to the table is `page_instructions`'. Sources: APM2 15.36.5 to 15.36.10; that a wrong privilege level is #GP(0)
is from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from snpbook.hardware.checks import Access
from snpbook.hardware.core import GuestCore
from snpbook.hardware.dram import Pages, Words, page_numbers
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.page_instructions import (
    Outcome,
    Query,
    Validation,
    adjustable,
    pvalidate,
    rmpadjust,
    rmpquery,
)
from snpbook.hardware.rmp import U64
from snpbook.hardware.walker import Fault, Translation, run_step
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.vmcb import ExitCode, FaultError, Vector
from snpbook.trace import Instruction

T = TypeVar("T", bound=Outcome)

_FAULT = FaultError.PRESENT | FaultError.USER | FaultError.RMP | FaultError.FINAL_GPA | FaultError.ENCRYPTED
"""EXITINFO1 of an RMP check: a nested access counts as a user's, this one works on the private page and reads
(that neither W nor the page's own C-bit counts is unconfirmed).
"""


def validate_pages(
    core: GuestCore, address: int, count: int, validate: bool, large: bool
) -> tuple[list[Validation], Fault | None]:
    """Execute PVALIDATE for `count` pages from the virtual `address` on: the pages done, and the fault behind them."""
    refused = _refusal(core, "PVALIDATE", address)
    if refused is not None:
        return [], refused
    if core.registers["vmpl"]:
        return [], GuestException(Vector.GP, 0, address)
    if _misaligned(address, large):
        codes = np.full(count, RmpCode.FAIL_INPUT, np.uint8)
        return [Validation(codes, codes[:0], np.zeros(count, bool))], None

    def execute(pages: Words, gfns: Words) -> Validation:
        return pvalidate(core.machine.rmp, pages, gfns, core.asid, validate, large)

    return _run(core, "PVALIDATE", address, count, large, execute)


def adjust_rights(
    core: GuestCore, address: int, count: int, target: int, permissions: int, vmsa: bool, large: bool
) -> tuple[list[Outcome], Fault | None]:
    """Execute RMPADJUST for `count` pages from the virtual `address` on: the pages done, and the fault behind them."""
    vmpl, vmpls = core.registers["vmpl"], core.machine.product.vmpls
    refused = _refusal(core, "RMPADJUST", address)
    if refused is not None:
        return [], refused
    code = RmpCode.FAIL_INPUT if _misaligned(address, large) else adjustable(vmpl, target, vmpls)
    if code:
        refused_codes = np.full(count, code, np.uint8)
        return [Outcome(refused_codes, refused_codes[:0])], None

    def execute(pages: Words, gfns: Words) -> Outcome:
        return rmpadjust(core.machine.rmp, pages, gfns, core.asid, vmpl, target, permissions, vmsa, large, vmpls)

    return _run(core, "RMPADJUST", address, count, large, execute)


def query_rights(core: GuestCore, address: int, count: int, target: int) -> tuple[list[Query], Fault | None]:
    """Execute RMPQUERY for `count` pages from the virtual `address` on: the pages done, and the fault behind them."""
    vmpl, vmpls = core.registers["vmpl"], core.machine.product.vmpls
    refused = _refusal(core, "RMPQUERY", address)
    if refused is not None:
        return [], refused
    if adjustable(vmpl, target, vmpls):
        return [Query.refused(RmpCode.FAIL_PERMISSION, count)], None

    def execute(pages: Words, gfns: Words) -> Query:
        return rmpquery(core.machine.rmp, pages, gfns, core.asid, vmpl, target, vmpls)

    return _run(core, "RMPQUERY", address, count, False, execute)


def privilege_fault(core: GuestCore, name: str, address: int) -> GuestException | None:
    """The exception that any RMP instruction raises in a guest before it looks at its operands, if one.

    #UD where the processor lacks it or SNP is off; then #GP(0) outside CPL 0 (both from memory).
    """
    machine = core.machine
    if name not in machine.product.instructions or not machine.snp_enabled:
        return GuestException(Vector.UD, 0, 0)
    return GuestException(Vector.GP, 0, address) if core.registers["cpl"] else None


def _refusal(core: GuestCore, name: str, address: int) -> GuestException | None:
    """The same of the guest's own instructions, which exist for SNP guests alone."""
    if not core.snp:
        return GuestException(Vector.UD, 0, 0)
    return privilege_fault(core, name, address)


def _misaligned(address: int, large: bool) -> bool:
    return large and (address >> PAGE_SHIFT) % PAGES_PER_LARGE != 0


def _run(
    core: GuestCore, name: str, address: int, count: int, large: bool, execute: Callable[[Words, Words], T]
) -> tuple[list[T], Fault | None]:
    """Translate and execute, up to the first fault."""
    step = PAGES_PER_LARGE if large else 1
    found = core.translate_unchecked(U64(address >> PAGE_SHIFT) + np.arange(count, dtype=U64) * U64(step))
    outcome, fault = _execute(core, name, found, step, execute)
    return [outcome], fault


def _execute(
    core: GuestCore, name: str, found: Translation, step: int, execute: Callable[[Words, Words], T]
) -> tuple[T, Fault | None]:
    """Execute on the pages that are translated: what was done, and the fault behind it."""
    rmp, trace = core.machine.rmp, core.machine.trace
    before = rmp.peek(found.pages) if trace else None
    outcome = execute(found.pages, found.gfns)
    stop = len(outcome.codes)
    if before is not None and stop:
        pages = found.pages[:stop]
        after = rmp.peek(pages)
        trace.emit(
            Instruction(
                name=name,
                actor=core.vcpu,
                pages=_as_run(pages, step),
                status=outcome.codes,
                before=before[:stop],
                after=after,
            )
        )
    return outcome, found.fault if outcome.fault is None else _fault(found, outcome, outcome.fault)


def _fault(found: Translation, outcome: Outcome, kind: Access) -> Fault:
    """What a failed check becomes: #VC where the page is not validated, otherwise #NPF."""
    stop = len(outcome.codes)
    if kind is Access.NOT_VALIDATED:
        return GuestException(Vector.VC, ExitCode.PAGE_NOT_VALIDATED, int(found.virtual[stop]) << PAGE_SHIFT)
    gfns = found.gfns[stop:]
    step = run_step(gfns)
    alike = (outcome.checks == kind) & (gfns == gfns[0] + np.arange(len(gfns), dtype=U64) * U64(step))
    error = _FAULT | FaultError.SIZE_MISMATCH if kind is Access.PAGE_SIZE else _FAULT
    return Npf(int(gfns[0]) << PAGE_SHIFT, error, len(gfns) if alike.all() else int(np.argmin(alike)), step)


def _as_run(pages: Words, step: int) -> Pages:
    """System pages as a run where they are one."""
    first = int(pages[0])
    run = range(first, first + len(pages) * step, step)
    return run if np.array_equal(pages, page_numbers(run)) else pages
