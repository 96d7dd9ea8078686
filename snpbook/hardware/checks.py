"""The RMP checks on memory accesses, in the order of APM2 15.36.10 (table 15-39).

Each function answers for many pages at once with one `Access` value a page: the first check that
fails. What a failure becomes (#PF, #NPF, #VC) is the core's business. Nothing here changes state.
"""

from __future__ import annotations

from enum import Enum, IntEnum

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Pages, Words, page_numbers
from snpbook.hardware.rmp import CHUNK, LARGE_MASK, U64, Rmp, chunks
from snpbook.spec import rmp as spec
from snpbook.spec.pages import PAGES_PER_LARGE, VmplPermission


class AccessKind(Enum):
    """What an access does: data, instruction fetch, and the processor's own accesses to tables in a page walk.

    UPDATE sets accessed and dirty bits: a data write of 4 KB, whatever maps the table (APM2 15.36.10).
    """

    READ = (0, False, False)
    WRITE = (1, True, False)
    FETCH = (2, False, False)
    WALK = (3, False, True)
    UPDATE = (4, True, True)

    def __init__(self, number: int, writes: bool, of_tables: bool) -> None:
        self.number, self.writes, self.of_tables = number, writes, of_tables

    @property
    def writes_nested(self) -> bool:
        """Whether nested tables must grant a write: every access to the guest's tables counts as one (APM2 15.25.5)."""
        return self.writes or self.of_tables

    def need(self, cpl: int) -> VmplPermission:
        """The permissions that the access needs at its VMPL; a write without the right to read is none."""
        if self is AccessKind.FETCH:
            return VmplPermission.EXECUTE_USER if cpl == USER_CPL else VmplPermission.EXECUTE_SUPERVISOR
        return VmplPermission.READ | VmplPermission.WRITE if self.writes else VmplPermission.READ


USER_CPL = 3


class Access(IntEnum):
    """The result of the checks on one page: granted, or the first check that failed."""

    GRANTED = 0
    NOT_HYPERVISOR_OWNED = 1
    NOT_COVERED = 2
    NOT_GUEST_OWNED = 3
    REVERSE_MAP = 4
    IMMUTABLE = 5
    PAGE_SIZE = 6
    NOT_VALIDATED = 7
    VMPL = 8


_IDENTITY = U64(spec.ASSIGNED | spec.ASID | spec.GFN | spec.IMMUTABLE | spec.LARGE | spec.VALIDATED)
_GRANTED_FLAGS = spec.ASSIGNED | spec.VALIDATED
_IDENTITY_INT = int(_IDENTITY)


def check_guest(
    rmp: Rmp,
    pages: Pages,
    gfns: Pages,
    asid: int,
    vmpl: int = 0,
    need: VmplPermission = VmplPermission.READ,
    *,
    large: bool = False,
) -> NDArray[np.uint8]:
    """A private access of an SNP guest to system pages that map its pages `gfns`.

    `large` says that the nested mapping is a 2 MB one; `gfns` are page numbers that an entry can hold.
    Returns `Access` values (n,).
    """
    if len(pages) == 1 and not large and rmp.words is not None:
        return np.array([check_guest_one(rmp, int(pages[0]), int(gfns[0]), asid, vmpl, int(need))], np.uint8)
    result = np.zeros(len(pages), np.uint8)
    wanted = U64(_GRANTED_FLAGS | asid << spec.ASID_SHIFT)
    need_bits = U64(int(need) << 8 * vmpl)
    scratch = np.empty((2, min(len(pages), CHUNK)), U64)
    start = 0
    for chunk, guest in zip(chunks(pages), chunks(gfns), strict=True):
        stop = start + len(chunk)
        last = int(chunk[-1]) if isinstance(chunk, range) else int(chunk.max())
        whole = last < rmp.entries and (rmp.words is not None or rmp.covers(page_numbers(chunk)).all())
        if whole and not large:
            # Nearly every access is granted: one comparison of the whole entry answers for all.
            entries = rmp.load(chunk)
            expected, differs = scratch[0, : len(chunk)], scratch[1, : len(chunk)]
            np.left_shift(page_numbers(guest), U64(spec.GFN_SHIFT), out=expected)
            np.bitwise_xor(expected, entries[:, 0], out=differs)
            np.bitwise_xor(differs, wanted, out=differs)
            np.bitwise_and(differs, _IDENTITY, out=differs)
            np.bitwise_and(entries[:, 1], need_bits, out=expected)
            np.bitwise_xor(expected, need_bits, out=expected)
            np.bitwise_or(differs, expected, out=differs)
            if not differs.any():
                start = stop
                continue
        result[start:stop] = _explain(rmp, page_numbers(chunk), page_numbers(guest), asid, need_bits, large)
        start = stop
    return result


def _explain(rmp: Rmp, pages: Words, gfns: Words, asid: int, need_bits: np.uint64, large: bool) -> NDArray[np.uint8]:
    covered = rmp.covers(pages)
    entries = np.zeros((len(pages), 2), U64)
    entries[covered] = rmp.effective(pages[covered])
    low = entries[:, 0]
    is_large = low & U64(spec.LARGE) != 0
    owner = U64(spec.ASSIGNED | asid << spec.ASID_SHIFT)
    checks = [
        (Access.NOT_COVERED, ~covered),
        (Access.NOT_GUEST_OWNED, low & U64(spec.ASSIGNED | spec.ASID) != owner),
        (Access.REVERSE_MAP, (low & U64(spec.GFN)) >> U64(spec.GFN_SHIFT) != gfns),
        (Access.IMMUTABLE, low & U64(spec.IMMUTABLE) != 0),
        (Access.PAGE_SIZE, is_large != large),
        (Access.NOT_VALIDATED, low & U64(spec.VALIDATED) == 0),
        (Access.VMPL, entries[:, 1] & need_bits != need_bits),
    ]
    return np.select([failed for _, failed in checks], [code for code, _ in checks], Access.GRANTED).astype(np.uint8)


def check_write(rmp: Rmp, pages: Pages, *, large: bool = False) -> NDArray[np.uint8]:
    """A write by the host, a non-SNP guest or a device, or a shared write of an SNP guest.

    With `large` the pages lie in 2 MB mappings: none of their 512 pages may be assigned, which the first one's
    entry tells. Inside a 2 MB entry every page's own entry is marked as assigned (RMPUPDATE sees to it).
    """
    entries = rmp.peek(page_numbers(pages) & ~LARGE_MASK if large else pages)[:, 0]
    owned = entries & U64(spec.ASSIGNED | spec.SUBPAGES * large) != 0
    return np.where(owned, Access.NOT_HYPERVISOR_OWNED, Access.GRANTED).astype(np.uint8)


def refused_write(rmp: Rmp, pages: Pages, *, large: bool = False) -> tuple[int, int] | None:
    """The first page that `check_write` refuses, and the page whose owner is the reason: with `large` perhaps a
    neighbour. None where all may be written.
    """
    found = check_write(rmp, pages, large=large)
    if not found.any():
        return None
    page = int(pages[int(np.argmax(found != Access.GRANTED))])
    if not large:
        return page, page
    region = range(page & -PAGES_PER_LARGE, (page & -PAGES_PER_LARGE) + PAGES_PER_LARGE)
    return page, region[int(np.argmax(check_write(rmp, region) != Access.GRANTED))]


def check_guest_one(rmp: Rmp, page: int, gfn: int, asid: int, vmpl: int, need: int) -> int:
    """`check_guest` of one 4 KB mapping on plain integers; same rules, the same property test."""
    words = rmp.words
    assert words is not None
    if page >= rmp.entries:
        return Access.NOT_COVERED
    index = 2 * page
    low, high = words[index], words[index + 1]
    differs = (low ^ (_GRANTED_FLAGS | gfn << spec.GFN_SHIFT | asid << spec.ASID_SHIFT)) & _IDENTITY_INT
    if differs == 0:
        return Access.GRANTED if high >> 8 * vmpl & need == need else Access.VMPL
    if differs == spec.VALIDATED:
        return Access.NOT_VALIDATED
    base = index & ~(2 * PAGES_PER_LARGE - 1)
    if words[base] & (spec.ASSIGNED | spec.LARGE) == spec.ASSIGNED | spec.LARGE:
        low = words[base]
        offset = (page & (PAGES_PER_LARGE - 1)) << spec.GFN_SHIFT
        low = low & ~spec.GFN | low + offset & spec.GFN
    if low & (spec.ASSIGNED | spec.ASID) != spec.ASSIGNED | asid << spec.ASID_SHIFT:
        return Access.NOT_GUEST_OWNED
    if low & spec.GFN != gfn << spec.GFN_SHIFT:
        return Access.REVERSE_MAP
    if low & spec.IMMUTABLE:
        return Access.IMMUTABLE
    return Access.PAGE_SIZE  # the only bit left in which the entry can differ
