"""RMPUPDATE and PVALIDATE on the table: one return code per page, all pages at once.

These are the only ways in which software changes an entry. Checks stand in the order of the
processor; the first that fails is the page's code, and other pages of the same call are not
affected. Sources: APM2 15.36.3 to 15.36.7; order of checks as published on the kvm list (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.checks import Access, check_guest, check_guest_one
from snpbook.hardware.dram import Pages, Words, checked_pages, page_numbers, whole
from snpbook.hardware.rmp import CHUNK, LARGE_MASK, U64, Rmp, regions
from snpbook.spec import rmp as spec
from snpbook.spec.pages import PAGES_PER_LARGE, VmplPermission
from snpbook.spec.rmp import RmpCode

Codes = NDArray[np.uint8]

_KEPT = U64(spec.VALIDATED | spec.VMSA)
_COMPARED = U64(spec.ASSIGNED | spec.ASID | spec.GFN | spec.LARGE)
_OTHERS = PAGES_PER_LARGE - 1


@dataclass(frozen=True, slots=True)
class NewState:
    """The operand of RMPUPDATE without the address: what the entries shall become.

    `asid` 0 with `assigned` makes firmware pages; `large` asks for 2 MB entries.
    """

    assigned: bool
    asid: int = 0
    immutable: bool = False
    large: bool = False

    def __post_init__(self) -> None:
        if not 0 <= whole("asid", self.asid) < 1 << 10:
            raise ValueError(f"asid = {self.asid}: an RMP entry holds 10 bits")

    @property
    def word(self) -> int:
        """First quadword without the guest page number."""
        flags = spec.ASSIGNED * self.assigned | spec.LARGE * self.large | spec.IMMUTABLE * self.immutable
        return flags | self.asid << spec.ASID_SHIFT


HYPERVISOR = NewState(assigned=False)
FIRMWARE = NewState(assigned=True, immutable=True)


def rmpupdate(rmp: Rmp, pages: Pages, gfns: Pages, new: NewState, in_use: frozenset[int] = frozenset()) -> Codes:
    """Execute RMPUPDATE for each of `pages` with the guest page number at the same place in `gfns`.

    With `new.large` each page number names a 2 MB page. `in_use` are pages that a running guest's
    VMCB or VMSA occupies. Returns `RmpCode` values (n,). Repeated pages are done in order. `ValueError` or
    `TypeError` where an operand is no page number; a page without an entry is an architectural failure.
    """
    pages, gfns = checked_pages("pages", pages), checked_pages("gfns", gfns, spec.GFN_LIMIT)
    if len(gfns) != len(pages):
        raise ValueError(f"gfns has {len(gfns)} pages, pages has {len(pages)}: they must match")
    if len(pages) == 1 and not new.large and not in_use and rmp.words is not None:
        return np.array([rmpupdate_one(rmp, int(pages[0]), int(gfns[0]), new)], np.uint8)
    codes = np.empty(len(pages), np.uint8)
    step = CHUNK // PAGES_PER_LARGE if new.large else CHUNK
    start = 0
    while start < len(pages):
        part = pages[start : start + step]
        length = len(part) if isinstance(part, range) else _distinct(part)
        update = _update_large if new.large else _update_small
        guest = page_numbers(gfns[start : start + length])
        codes[start : start + length] = update(rmp, part[:length], guest, new, in_use)
        start += length
    return codes


def _distinct(pages: Words) -> int:
    """The length of the longest prefix in which no page number is repeated."""
    if (pages[1:] > pages[:-1]).all():
        return len(pages)
    _, first = np.unique(pages, return_index=True)
    if len(first) == len(pages):
        return len(pages)
    repeated = np.ones(len(pages), bool)
    repeated[first] = False
    return int(np.argmax(repeated))


def _common(rmp: Rmp, pages: Pages, new: NewState, in_use: frozenset[int]) -> tuple[Codes, Words]:
    """The checks that do not depend on neighbours, and the entries (those not covered as zero)."""
    entries, places = rmp.peek(pages), page_numbers(pages)
    codes = np.zeros(len(pages), np.uint8)
    if new.large:
        refuse(codes, (places & LARGE_MASK) != 0, RmpCode.FAIL_INPUT)
    if not new.assigned and (new.immutable or new.asid):
        refuse(codes, np.ones(len(pages), bool), RmpCode.FAIL_INPUT)
    refuse(codes, places >= U64(rmp.entries), RmpCode.FAIL_INPUT)
    if in_use:
        busy, taken = np.array(sorted(in_use), U64), places
        if new.large:
            busy, taken = busy & ~LARGE_MASK, places & ~LARGE_MASK
        refuse(codes, np.isin(taken, busy), RmpCode.FAIL_INUSE)
    refuse(codes, entries[:, 0] & U64(spec.IMMUTABLE) != 0, RmpCode.FAIL_PERMISSION)
    return codes, entries


def refuse(codes: Codes, where: NDArray[np.bool_], code: RmpCode) -> None:
    """Give the pages `where` a check fails its code, unless an earlier check has failed already."""
    if where.any():
        codes[(codes == RmpCode.SUCCESS) & where] = code


def _update_small(rmp: Rmp, pages: Pages, gfns: Words, new: NewState, in_use: frozenset[int]) -> Codes:
    codes, old = _common(rmp, pages, new, in_use)
    bases, member = regions(pages)
    heads = rmp.peek(bases)
    large = heads[:, 0] & U64(spec.ASSIGNED | spec.LARGE) == U64(spec.ASSIGNED | spec.LARGE)
    if large.any():
        refuse(codes, large[member], RmpCode.FAIL_OVERLAP)
    done = codes == RmpCode.SUCCESS

    entries = _changed(old, gfns, new)
    entries[:, 0] |= old[:, 0] & U64(spec.SUBPAGES)
    if done.all():
        rmp.store(pages, entries)
    else:
        rmp.store(page_numbers(pages)[done], entries[done])

    gain = int(new.assigned) - (old[:, 0] & U64(spec.ASSIGNED)).view(np.int64)
    gain *= done & (page_numbers(pages) & LARGE_MASK != 0)
    if gain.any():
        change = np.bincount(member, gain, minlength=len(bases)).astype(np.int64)
        touched = change != 0
        heads = rmp.load(bases[touched]).copy()
        heads[:, 0] += (change[touched] << spec.SUBPAGE_SHIFT).view(U64)
        rmp.store(bases[touched], heads)
    _count(rmp, old[done], new, 1)
    return codes


def _update_large(rmp: Rmp, pages: Pages, gfns: Words, new: NewState, in_use: frozenset[int]) -> Codes:
    codes, old = _common(rmp, pages, new, in_use)
    low = old[:, 0]
    small = (low & U64(spec.ASSIGNED) != 0) & (low & U64(spec.LARGE) == 0)
    refuse(codes, small | (low & U64(spec.SUBPAGES) != 0), RmpCode.FAIL_OVERLAP)
    done = codes == RmpCode.SUCCESS

    rest = np.zeros((_OTHERS, 2), U64)
    rest[:, 0] = U64(spec.ASSIGNED * new.assigned)
    places = page_numbers(pages)[done]
    for page in places:
        rmp.store(range(int(page) + 1, int(page) + PAGES_PER_LARGE), rest)
    rmp.store(places, _changed(old, gfns, new)[done])
    _count(rmp, old[done], new, PAGES_PER_LARGE)
    return codes


def _changed(old: Words, gfns: Words, new: NewState) -> Words:
    """The entries after a successful RMPUPDATE, without subpage counts.

    Validation, the VMSA bit and permissions survive only where owner, GPA and size stay the same.
    """
    entries = np.zeros_like(old)
    if not new.assigned:
        return entries
    entries[:, 0] = U64(new.word) | (gfns << U64(spec.GFN_SHIFT)) & U64(spec.GFN)
    same = (old[:, 0] ^ entries[:, 0]) & _COMPARED == 0
    entries[:, 0] |= np.where(same, old[:, 0] & _KEPT, U64(0))
    entries[:, 1] = np.where(same, old[:, 1], U64(spec.VMPL0_FULL))
    return entries


def _count(rmp: Rmp, old: Words, new: NewState, pages_each: int) -> None:
    """Keep the per-ASID counters of assigned pages."""
    if new.assigned:
        rmp.count(new.asid, pages_each * len(old))
    low = old[:, 0]
    owned = (low & U64(spec.ASSIGNED) != 0) & (low & U64(spec.ASID) != 0)
    if owned.any():
        asids = ((low[owned] & U64(spec.ASID)) >> U64(spec.ASID_SHIFT)).astype(np.int64)
        for asid, pages in zip(*np.unique(asids, return_counts=True), strict=True):
            rmp.count(int(asid), -pages_each * int(pages))


def rmpupdate_one(rmp: Rmp, page: int, gfn: int, new: NewState) -> int:
    """RMPUPDATE of one 4 KB page on plain integers: what a notebook's single step costs.

    Same rules as `rmpupdate`; the property tests hold both equal.
    """
    words, counts = rmp.words, rmp.counts
    assert words is not None
    assert counts is not None
    if (not new.assigned and (new.immutable or new.asid)) or page >= rmp.entries:
        return RmpCode.FAIL_INPUT
    index = 2 * page
    old = words[index]
    if old & spec.IMMUTABLE:
        return RmpCode.FAIL_PERMISSION
    base = index & ~(2 * PAGES_PER_LARGE - 1)
    if words[base] & (spec.ASSIGNED | spec.LARGE) == spec.ASSIGNED | spec.LARGE:
        return RmpCode.FAIL_OVERLAP
    if not new.assigned:
        words[index] = old & spec.SUBPAGES
        words[index + 1] = 0
    else:
        entry = new.word | gfn << spec.GFN_SHIFT & spec.GFN
        if (old ^ entry) & int(_COMPARED) == 0:
            words[index] = entry | old & (spec.SUBPAGES | int(_KEPT))
        else:
            words[index] = entry | old & spec.SUBPAGES
            words[index + 1] = spec.VMPL0_FULL
    gain = new.assigned - (old & spec.ASSIGNED)
    if gain and index != base:
        words[base] += gain << spec.SUBPAGE_SHIFT
    was = (old & spec.ASID) >> spec.ASID_SHIFT
    if was != new.asid:
        if was:
            counts[was] -= 1
        if new.asid:
            counts[new.asid] += 1
    return RmpCode.SUCCESS


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcome of PVALIDATE on a run: `codes` and `unchanged` (CF, false where the code is no success) for the
    pages before the first fault; `checks` are the `Access` values of the page that faults and of those behind it.
    """

    codes: Codes
    unchanged: NDArray[np.bool_]
    checks: NDArray[np.uint8]

    @property
    def fault(self) -> Access | None:
        """The check that failed on page `len(codes)`; None where every page is done."""
        return Access(int(self.checks[0])) if len(self.checks) else None


def pvalidate(rmp: Rmp, pages: Words, gfns: Words, asid: int, validate: bool, large: bool = False) -> Validation:
    """Execute PVALIDATE for the system pages that a guest's addresses translate to, in order.

    Faults stop the run: pages before it are done, it and later ones are untouched.
    """
    if len(pages) == 1 and not large and rmp.words is not None:
        carry = pvalidate_one(rmp, int(pages[0]), int(gfns[0]), asid, validate)
        if isinstance(carry, Access):
            return Validation(np.empty(0, np.uint8), np.empty(0, bool), np.array([carry], np.uint8))
        return Validation(np.zeros(1, np.uint8), np.array([carry]), np.empty(0, np.uint8))
    found = check_guest(rmp, pages, gfns, asid, need=VmplPermission.NONE, large=large)
    settled = (found == Access.GRANTED) | (found == Access.NOT_VALIDATED)
    mismatch = large & (found == Access.PAGE_SIZE)
    faults = ~(settled | mismatch)
    stop = int(np.argmax(faults)) if faults.any() else len(pages)

    settled = settled[:stop]
    unchanged = settled & ((found[:stop] == Access.GRANTED) == validate)
    targets = pages[:stop] & ~LARGE_MASK if large else pages[:stop]
    if not (targets[1:] > targets[:-1]).all():  # a page that comes again finds what its first turn left
        again = np.ones(stop, bool)
        again[np.unique(targets, return_index=True)[1]] = False
        unchanged |= settled & again
    change = targets[settled & ~unchanged]
    entries = rmp.load(change).copy()
    entries[:, 0] ^= U64(spec.VALIDATED)
    rmp.store(change, entries)
    codes = np.where(mismatch[:stop], RmpCode.FAIL_SIZEMISMATCH, RmpCode.SUCCESS).astype(np.uint8)
    return Validation(codes, unchanged, found[stop:])


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
    return False
