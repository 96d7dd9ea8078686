"""PVALIDATE, RMPADJUST and RMPQUERY on the table: a guest's instructions on its own pages, all pages at once.

They get the system pages that the guest's addresses translate to. A return code is one page's matter; a fault stops
the run: pages before it are done, it and later ones are untouched. Sources: APM2 15.36.5 to 15.36.9 and 15.36.7;
order of checks as in the published formal model of VeriSMo.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.checks import Access, check_guest, check_guest_one
from snpbook.hardware.dram import Words
from snpbook.hardware.host_instructions import Codes, refuse
from snpbook.hardware.rmp import LARGE_MASK, U64, Rmp
from snpbook.spec import rmp as spec
from snpbook.spec.pages import VmplPermission
from snpbook.spec.rmp import RmpCode

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome on a run: `codes` of the pages before the first fault; `checks` are the `Access` values of the
    page that faults and of those behind it.
    """

    codes: Codes
    checks: NDArray[np.uint8]

    @property
    def fault(self) -> Access | None:
        """The check that failed on page `len(codes)`; None where every page is done."""
        return Access(int(self.checks[0])) if len(self.checks) else None


@dataclass(frozen=True, slots=True)
class Validation(Outcome):
    """What PVALIDATE did; `unchanged` is the carry flag, false where the code is no success."""

    unchanged: Flags


@dataclass(frozen=True, slots=True)
class Query(Outcome):
    """What RMPQUERY found: 2 MB entries, permission bytes and VMSA bits, 0 where the code is no success."""

    large: Flags
    permissions: NDArray[np.uint8]
    vmsa: Flags

    @classmethod
    def refused(cls, code: RmpCode, count: int) -> Query:
        """The same code for each of `count` pages."""
        nothing = np.zeros(count, np.uint8)
        return cls(nothing + np.uint8(code), nothing[:0], nothing > 0, nothing, nothing > 0)


def pvalidate(rmp: Rmp, pages: Words, gfns: Words, asid: int, validate: bool, large: bool = False) -> Validation:
    """Execute PVALIDATE for the system pages that a guest's addresses translate to, in order."""
    if len(pages) == 1 and not large and rmp.words is not None:
        carry = pvalidate_one(rmp, int(pages[0]), int(gfns[0]), asid, validate)
        if isinstance(carry, Access):
            return Validation(np.empty(0, np.uint8), np.array([carry], np.uint8), np.empty(0, bool))
        return Validation(np.zeros(1, np.uint8), np.empty(0, np.uint8), np.array([carry]))
    found = check_guest(rmp, pages, gfns, asid, need=VmplPermission.NONE, large=large)
    settled = (found == Access.GRANTED) | (found == Access.NOT_VALIDATED)
    mismatch = large & (found == Access.PAGE_SIZE)
    stop = _first(~(settled | mismatch))

    settled = settled[:stop]
    unchanged = settled & ((found[:stop] == Access.GRANTED) == validate)
    targets = _entries_of(pages[:stop], large)
    if not (targets[1:] > targets[:-1]).all():  # a page that comes again finds what its first turn left
        again = np.ones(stop, bool)
        again[np.unique(targets, return_index=True)[1]] = False
        unchanged |= settled & again
    change = targets[settled & ~unchanged]
    if len(change):
        entries = rmp.load(change).copy()
        entries[:, 0] ^= U64(spec.VALIDATED)
        rmp.store(change, entries)
    codes = np.where(mismatch[:stop], RmpCode.FAIL_SIZEMISMATCH, RmpCode.SUCCESS).astype(np.uint8)
    return Validation(codes, found[stop:], unchanged)


def pvalidate_one(rmp: Rmp, page: int, gfn: int, asid: int, validate: bool) -> bool | Access:
    """PVALIDATE of one 4 KB page on plain integers: the carry flag, or the check that faults."""
    found = check_guest_one(rmp, page, gfn, asid, 0, 0)
    granted = found == Access.GRANTED
    if not granted and found != Access.NOT_VALIDATED:
        return Access(found)
    if granted == validate:
        return True
    assert rmp.words is not None
    rmp.words[2 * page] ^= spec.VALIDATED
    rmp.changed(page)
    return False


def adjustable(vmpl: int, target: int, vmpls: int) -> RmpCode:
    """Whether software at `vmpl` may adjust the rights of `target` at all: what RMPADJUST answers before it looks at
    a page. That a VMPL that does not exist is FAIL_INPUT is from memory.
    """
    if target <= vmpl:
        return RmpCode.FAIL_PERMISSION
    if target >= vmpls:
        return RmpCode.FAIL_INPUT
    return RmpCode.SUCCESS


def rmpadjust(
    rmp: Rmp,
    pages: Words,
    gfns: Words,
    asid: int,
    vmpl: int,
    target: int,
    permissions: int,
    vmsa: bool,
    large: bool = False,
    vmpls: int = 4,
) -> Outcome:
    """Execute RMPADJUST at `vmpl`: give `target` the `permissions` (a byte of `VmplPermission` bits) on the pages.

    At VMPL0 the entries' VMSA bit becomes `vmsa`; elsewhere it stays. Nobody grants what it does not hold itself.
    """
    refused = adjustable(vmpl, target, vmpls)
    if refused:
        return Outcome(np.full(len(pages), refused, np.uint8), np.empty(0, np.uint8))
    found = check_guest(rmp, pages, gfns, asid, need=VmplPermission.NONE, large=large)
    if large:
        other = found == Access.PAGE_SIZE
        found[other] = np.where(_validated(rmp, pages[other]), Access.PAGE_SIZE, Access.NOT_VALIDATED)
    mismatch = large & (found == Access.PAGE_SIZE)
    stop = _first((found != Access.GRANTED) & ~mismatch)

    codes = np.zeros(stop, np.uint8)
    refuse(codes, mismatch[:stop], RmpCode.FAIL_SIZEMISMATCH)
    targets = _entries_of(pages[:stop], large)
    entries = rmp.load(targets).copy()
    refuse(codes, _rights(entries, vmpl) & U64(permissions) != permissions, RmpCode.FAIL_PERMISSION)
    done = codes == RmpCode.SUCCESS
    if done.any():
        place = U64(target * spec.PERMISSION_BITS)
        entries[:, 1] ^= (_rights(entries, target) ^ U64(permissions)) << place
        if vmpl == 0:
            entries[:, 0] = entries[:, 0] & ~U64(spec.VMSA) | U64(spec.VMSA * vmsa)
        rmp.store(targets[done], entries[done])
    return Outcome(codes, found[stop:])


def rmpquery(rmp: Rmp, pages: Words, gfns: Words, asid: int, vmpl: int, target: int, vmpls: int = 4) -> Query:
    """Execute RMPQUERY at `vmpl`: what the pages' entries grant to `target`.

    Which targets are refused (those that RMPADJUST refuses, with FAIL_PERMISSION alone), the faults and their order
    are inferred from RMPADJUST. A 2 MB entry answers for each of its pages.
    """
    if adjustable(vmpl, target, vmpls):
        return Query.refused(RmpCode.FAIL_PERMISSION, len(pages))
    found = check_guest(rmp, pages, gfns, asid, need=VmplPermission.NONE)
    other = found == Access.PAGE_SIZE
    found[other] = np.where(_validated(rmp, pages[other]), Access.GRANTED, Access.NOT_VALIDATED)
    stop = _first(found != Access.GRANTED)
    entries = rmp.effective(pages[:stop])
    rights, low = _rights(entries, target).astype(np.uint8), entries[:, 0]
    large, vmsa = low & U64(spec.LARGE) != 0, low & U64(spec.VMSA) != 0
    return Query(np.zeros(stop, np.uint8), found[stop:], large, rights, vmsa)


def _first(faults: Flags) -> int:
    """The index of the first page that faults, else their number."""
    return int(np.argmax(faults)) if faults.any() else len(faults)


def _entries_of(pages: Words, large: bool) -> Words:
    """The pages whose entries a run of 4 KB or 2 MB pages concerns."""
    return pages & ~LARGE_MASK if large else pages


def _validated(rmp: Rmp, pages: Words) -> Flags:
    found: Flags = rmp.effective(pages)[:, 0] & U64(spec.VALIDATED) != 0
    return found


def _rights(entries: Words, vmpl: int) -> Words:
    """The permission bytes of one VMPL."""
    return entries[:, 1] >> U64(vmpl * spec.PERMISSION_BITS) & U64((1 << spec.PERMISSION_BITS) - 1)
