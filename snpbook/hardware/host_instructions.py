"""RMPUPDATE, PSMASH and RMPREAD on the table: one return code per page, all pages at once.

The first two are the only ways in which host software changes an entry. Checks stand in the order of the
processor; the first that fails is the page's code, and other pages of the same call are not
affected. Sources: APM2 15.36.3 to 15.36.7; order of checks as published on the kvm list (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Bytes, Pages, Words, checked_pages, flag, page_numbers, whole
from snpbook.hardware.rmp import CHUNK, LARGE_MASK, U64, Rmp, regions
from snpbook.spec import rmp as spec
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.rmp import RMPUPDATE_STATE, RmpCode

Codes = NDArray[np.uint8]

_KEPT = U64(spec.VALIDATED | spec.VMSA)
_COMPARED = U64(spec.ASSIGNED | spec.ASID | spec.GFN | spec.LARGE)
_LARGE_ENTRY = U64(spec.ASSIGNED | spec.LARGE)
_SMASHED = U64(~(spec.LARGE | spec.GFN | spec.SUBPAGES) & 2**64 - 1)
"""What PSMASH copies of the first quadword."""
_OTHERS = PAGES_PER_LARGE - 1
_REGION = np.arange(PAGES_PER_LARGE, dtype=U64)


@dataclass(frozen=True, slots=True)
class NewState:
    """The operand of RMPUPDATE without the address: what the entries shall become.

    `asid` 0 with `assigned` makes firmware pages; `large` asks for 2 MB entries. `TypeError` or `ValueError` for what
    is no operand.
    """

    assigned: bool
    asid: int = 0
    immutable: bool = False
    large: bool = False

    def __post_init__(self) -> None:
        for name in ("assigned", "immutable", "large"):
            flag(name, getattr(self, name))
        if not 0 <= whole("asid", self.asid) < spec.ASID_LIMIT:
            raise ValueError(f"asid = {self.asid}: an RMP entry holds 10 bits")

    @property
    def word(self) -> int:
        """First quadword without the guest page number."""
        flags = spec.ASSIGNED * self.assigned | spec.LARGE * self.large | spec.IMMUTABLE * self.immutable
        return flags | self.asid << spec.ASID_SHIFT


HYPERVISOR = NewState(assigned=False)
FIRMWARE = NewState(assigned=True, immutable=True)


def rmpupdate(rmp: Rmp, pages: Pages, gfns: Pages, new: NewState, in_use: Set[int] = frozenset()) -> Codes:
    """Execute RMPUPDATE for each of `pages` with the guest page number at the same place in `gfns`.

    With `new.large` each page number names a 2 MB page. `in_use` are pages that a running guest's
    VMCB or VMSA occupies. Returns `RmpCode` values (n,). Repeated pages are done in order. `ValueError` or
    `TypeError` where an operand is no page number; a page without an entry is an architectural failure.
    """
    pages, gfns = checked_pages("pages", pages), checked_pages("gfns", gfns, spec.GFN_LIMIT)
    if len(gfns) != len(pages):
        raise ValueError(f"gfns has {len(gfns)} pages, pages has {len(pages)}: they must match")
    if len(pages) == 1 and not new.large and rmp.words is not None and int(pages[0]) not in in_use:
        return np.array([rmpupdate_one(rmp, int(pages[0]), int(gfns[0]), new)], np.uint8)
    update = _update_large if new.large else _update_small

    def step(part: Pages, where: slice) -> Codes:
        return update(rmp, part, page_numbers(gfns[where]), new, in_use)

    return _in_steps(pages, CHUNK // PAGES_PER_LARGE if new.large else CHUNK, step)


def psmash(rmp: Rmp, pages: Pages, in_use: Set[int] = frozenset()) -> Codes:
    """Execute PSMASH for each of `pages`, which name 2 MB pages: each becomes 512 pages of 4 KB, otherwise unchanged.

    Returns `RmpCode` values (n,); operands as for `rmpupdate`. That an immutable entry is refused with
    FAIL_PERMISSION is unconfirmed, that pages are covered is checked before in-use is inferred from RMPUPDATE.
    """
    pages = checked_pages("pages", pages)
    return _in_steps(pages, CHUNK // PAGES_PER_LARGE, lambda part, _: _smash(rmp, page_numbers(part), in_use))


def rmpread(rmp: Rmp, pages: Pages) -> tuple[Codes, Bytes]:
    """Execute RMPREAD for each of `pages`: return codes (n,) and what it stores, (n, 16) bytes of `RMPUPDATE_STATE`.

    It tells of the page's own entry, inside a 2 MB entry too. The region's status says of a 2 MB-aligned page that
    others of its region are assigned (inferred from Linux). A page without an entry fails with FAIL_INPUT
    (unconfirmed), and zeros stand for what is then not stored.
    """
    pages = checked_pages("pages", pages)
    codes, low = np.zeros(len(pages), np.uint8), rmp.peek(pages)[:, 0]
    refuse(codes, ~rmp.covers(page_numbers(pages)), RmpCode.FAIL_INPUT)
    state = np.zeros((len(pages), 2), U64)
    fields = {
        "gpa": (low & U64(spec.GFN)) >> U64(spec.GFN_SHIFT) << U64(PAGE_SHIFT),
        "assigned": low & U64(spec.ASSIGNED) != 0,
        "page_size": low & U64(spec.LARGE) != 0,
        "region_status": low & U64(spec.SUBPAGES) != 0,
        "immutable": low & U64(spec.IMMUTABLE) != 0,
        "asid": (low & U64(spec.ASID)) >> U64(spec.ASID_SHIFT),
    }
    for name, values in fields.items():
        word, place = divmod(RMPUPDATE_STATE.fields[name].first_bit, 64)
        state[:, word] |= values.astype(U64) << U64(place)
    return codes, state.view(np.uint8)


def refuse(codes: Codes, where: NDArray[np.bool_], code: RmpCode) -> None:
    """Give the pages `where` a check fails its code, unless an earlier check has failed already."""
    if where.any():
        codes[(codes == RmpCode.SUCCESS) & where] = code


def _in_steps(pages: Pages, size: int, execute: Callable[[Pages, slice], Codes]) -> Codes:
    """The codes of an operation on at most `size` pages at once, in which no page comes twice."""
    codes = np.empty(len(pages), np.uint8)
    start = 0
    while start < len(pages):
        part = pages[start : start + size]
        where = slice(start, start + (len(part) if isinstance(part, range) else _distinct(part)))
        codes[where] = execute(pages[where], where)
        start = where.stop
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


def _busy(places: Words, in_use: Set[int], large: bool) -> NDArray[np.bool_]:
    """Which pages, or 2 MB pages, meet one in use (that all of a 2 MB range counts is inferred)."""
    used = np.fromiter(in_use, U64, len(in_use))
    return np.isin(places & ~LARGE_MASK, used & ~LARGE_MASK) if large else np.isin(places, used)


def _common(rmp: Rmp, pages: Pages, new: NewState, in_use: Set[int]) -> tuple[Codes, Words]:
    """The checks that do not depend on neighbours, and the entries (those not covered as zero)."""
    entries, places = rmp.peek(pages), page_numbers(pages)
    codes = np.zeros(len(pages), np.uint8)
    if new.large:
        refuse(codes, (places & LARGE_MASK) != 0, RmpCode.FAIL_INPUT)
    if not new.assigned and (new.immutable or new.asid):
        refuse(codes, np.ones(len(pages), bool), RmpCode.FAIL_INPUT)
    refuse(codes, ~rmp.covers(places), RmpCode.FAIL_INPUT)
    refuse(codes, _busy(places, in_use, new.large), RmpCode.FAIL_INUSE)
    refuse(codes, entries[:, 0] & U64(spec.IMMUTABLE) != 0, RmpCode.FAIL_PERMISSION)
    return codes, entries


def _update_small(rmp: Rmp, pages: Pages, gfns: Words, new: NewState, in_use: Set[int]) -> Codes:
    codes, old = _common(rmp, pages, new, in_use)
    bases, member = regions(pages)
    heads = rmp.peek(bases)
    large = heads[:, 0] & _LARGE_ENTRY == _LARGE_ENTRY
    if large.any():
        refuse(codes, large[member], RmpCode.FAIL_OVERLAP)
    done = codes == RmpCode.SUCCESS
    if not done.any():
        return codes

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


def _update_large(rmp: Rmp, pages: Pages, gfns: Words, new: NewState, in_use: Set[int]) -> Codes:
    codes, old = _common(rmp, pages, new, in_use)
    low = old[:, 0]
    small = (low & U64(spec.ASSIGNED) != 0) & (low & U64(spec.LARGE) == 0)
    refuse(codes, small | (low & U64(spec.SUBPAGES) != 0), RmpCode.FAIL_OVERLAP)
    done = codes == RmpCode.SUCCESS
    if not done.any():
        return codes

    heads = page_numbers(pages)[done]
    entries = np.zeros((len(heads), PAGES_PER_LARGE, 2), U64)
    entries[:, :, 0] = U64(spec.ASSIGNED * new.assigned)
    entries[:, 0] = _changed(old, gfns, new)[done]
    _store_regions(rmp, heads, entries)
    _count(rmp, old[done], new, PAGES_PER_LARGE)
    return codes


def _smash(rmp: Rmp, heads: Words, in_use: Set[int]) -> Codes:
    codes, old = np.zeros(len(heads), np.uint8), rmp.peek(heads)
    refuse(codes, heads & LARGE_MASK != 0, RmpCode.FAIL_INPUT)
    refuse(codes, ~rmp.covers(heads), RmpCode.FAIL_INPUT)
    refuse(codes, _busy(heads, in_use, large=True), RmpCode.FAIL_INUSE)
    refuse(codes, old[:, 0] & _LARGE_ENTRY != _LARGE_ENTRY, RmpCode.FAIL_BADADDR)
    refuse(codes, old[:, 0] & U64(spec.IMMUTABLE) != 0, RmpCode.FAIL_PERMISSION)
    done = codes == RmpCode.SUCCESS
    if not done.any():
        return codes

    entries = np.repeat(old[done][:, None], PAGES_PER_LARGE, axis=1)
    low = entries[:, :, 0]
    entries[:, :, 0] = low & _SMASHED | low + (_REGION << U64(spec.GFN_SHIFT)) & U64(spec.GFN)
    entries[:, 0, 0] |= U64(_OTHERS << spec.SUBPAGE_SHIFT)
    _store_regions(rmp, heads[done], entries)
    return codes


def _store_regions(rmp: Rmp, heads: Words, entries: Words) -> None:
    """Write all entries (n, 512, 2) of 2 MB regions, which their first pages name."""
    rmp.store((heads[:, None] + _REGION).reshape(-1), entries.reshape(-1, 2))


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
    """RMPUPDATE of one 4 KB page that is not in use, on plain integers: what a notebook's single step costs.

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
    rmp.changed(page)
    return RmpCode.SUCCESS
