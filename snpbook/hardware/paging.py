"""Page walks through four levels of tables for many pages at once: what a walk finds, and the bits that it must set.

`walk` knows the format of the tables only; who may read a table page, and under which key, is told by its caller.
`nested_walk` is the host's half: tables in memory of the hypervisor. Nothing here changes memory except `set_bits`.
Sources: APM2 5.3, 5.4, 15.25, 15.34.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.checks import Access, AccessKind, check_write
from snpbook.hardware.dram import Words
from snpbook.hardware.memory import Memory
from snpbook.hardware.rmp import U64, Rmp
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import (
    PAGE_TABLE_LEVELS,
    PTE_ACCESSED,
    PTE_ADDRESS,
    PTE_DIRTY,
    PTE_LARGE,
    PTE_LARGE_RESERVED,
    PTE_NO_EXECUTE,
    PTE_PRESENT,
    PTE_SIZE,
    PTE_USER,
    PTE_WRITE,
    PTES_PER_TABLE,
    FaultError,
)

_INDEX_BITS = 9
_AT_ONCE = 512
"""Table pages in which bits are set at once."""
_INDEX = U64(PTES_PER_TABLE - 1)
_LIMIT = U64(PTES_PER_TABLE**PAGE_TABLE_LEVELS)
_LARGE, _PRESENT, _ACCESSED = U64(PTE_LARGE), U64(PTE_PRESENT), U64(PTE_ACCESSED)
_RESERVED = U64(FaultError.PRESENT | FaultError.RESERVED)
Flags = NDArray[np.bool_]
Rows = NDArray[np.intp]
Keys = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Step:
    """One level of a walk: the entries of which it made use, for the pages with the indices `owners`."""

    owners: Rows
    tables: Words
    addresses: Words
    keys: Keys
    entries: Words
    leaf: Flags

    def missing(self, write: bool) -> Words:
        """The bits that an access adds to each entry: accessed, and dirty where a write used a leaf."""
        bits: Words = (_ACCESSED | self.leaf * U64(PTE_DIRTY * write)) & ~self.entries
        return bits


@dataclass(frozen=True, slots=True)
class Walk:
    """What the tables say of each page: `entries` are the leaves, of level 0 (4 KB) to 2 (1 GB).

    `rights` has the bits that all entries on the way share: writable, user, and no-execute inverted. Where the walk
    did not get to a leaf (`~done`), `errors` are its bits of `FaultError`: 0 for an entry that is not present.
    """

    done: Flags
    errors: Words
    entries: Words
    rights: Words
    levels: Words
    ends: Rows
    """The page at which the outcome of each is noted while the walk goes on: its own, or that of its neighbours."""
    steps: list[Step]
    numbers: Words

    def everywhere(self) -> Walk:
        """The same with the outcome at every page."""
        if (self.ends == np.arange(len(self.ends))).all():
            return self
        at = self.ends
        return replace(
            self,
            done=self.done[at],
            errors=self.errors[at],
            entries=self.entries[at],
            rights=self.rights[at],
            levels=self.levels[at],
        )

    def frames(self, c_bit: int | None) -> Words:
        """Where the pages lie: page numbers without the C-bit, 0 where there is no leaf."""
        inside = np.left_shift(U64(1), self.levels * U64(_INDEX_BITS)) - U64(1)
        frames = (self.entries & address_mask(c_bit)) >> U64(PAGE_SHIFT)
        found: Words = frames & ~inside | np.where(self.done, self.numbers & inside, U64(0))
        return found

    def forbids(self, *, write: bool, fetch: bool, user: bool) -> Flags:
        """Which pages' rights are not enough for an access that needs these."""
        needed = U64(PTE_WRITE * write | PTE_USER * user | PTE_NO_EXECUTE * fetch)
        forbidden: Flags = self.rights & needed != needed
        return forbidden


Locate = Callable[[Words, Rows], tuple[Words, Keys, Flags]]
"""From pointers (CR3 or entries) of the pages with indices `owners`: the tables' system pages and key ids, and which
of them can be read; of the others it keeps the reason."""


def walk(
    memory: Memory,
    root: int,
    numbers: Words,
    locate: Locate,
    *,
    c_bit: int | None,
    reserved: int = 0,
    together: bool = False,
) -> Walk:
    """Walk the tables behind `root` for page numbers, of which 36 bits count; `reserved` are bits that must be 0.

    `together`: neighbours that use one entry use it once, in the name of the first of them; `Walk.ends` says which.
    """
    count = len(numbers)
    found = Walk(
        done=np.zeros(count, bool),
        errors=np.zeros(count, U64),
        entries=np.zeros(count, U64),
        rights=np.full(count, ~U64(0)),
        levels=np.zeros(count, U64),
        ends=np.arange(count),
        steps=[],
        numbers=numbers,
    )
    runs = _Runs.at(PAGE_TABLE_LEVELS - 1, numbers, together)
    pointers, rights = np.full(len(runs), root, U64), np.full(len(runs), ~U64(0))
    for level in reversed(range(PAGE_TABLE_LEVELS)):
        pages, keys, ok = locate(pointers, runs.starts)
        runs.leave(found, ~ok)
        tables = (pointers & address_mask(c_bit)) >> U64(PAGE_SHIFT)
        runs, parents = runs.split(ok, _Runs.at(level, numbers, together))
        owners, pages, keys, tables = runs.starts, pages[parents], keys[parents], tables[parents]
        index = numbers[owners] >> U64(_INDEX_BITS * level) & _INDEX
        addresses = (pages << U64(PAGE_SHIFT)) + index * U64(PTE_SIZE)
        entries = read_words(memory, keys, addresses)
        present = entries & _PRESENT != 0
        large = entries & _LARGE != 0
        wrong = entries & U64(reserved) != 0
        wrong |= large & (entries & U64(PTE_LARGE_RESERVED[level]) != 0)
        found.errors[owners[present & wrong]] = _RESERVED
        used = present & ~wrong
        leaf = used & (large if level else np.ones(len(used), bool))
        found.steps.append(Step(owners[used], tables[used], addresses[used], keys[used], entries[used], leaf[used]))
        rights = np.where(used, rights[parents] & (entries ^ U64(PTE_NO_EXECUTE)), rights[parents])
        found.rights[owners] = rights
        ends = owners[leaf]
        found.done[ends], found.entries[ends], found.levels[ends] = True, entries[leaf], level
        more = used & ~leaf
        runs.leave(found, ~more)
        runs, pointers, rights = runs.only(more), entries[more], rights[more]
        if not len(runs):
            break
    return found.everywhere() if together else found


@dataclass(frozen=True, slots=True)
class _Runs:
    """Stretches of pages, by the first of each and the one behind its last, that share a pointer or an entry."""

    starts: Rows
    stops: Rows

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def at(cls, level: int, numbers: Words, together: bool) -> _Runs:
        """All pages, by the entry of a level that they use; each for itself unless `together`."""
        starts = np.arange(len(numbers))
        if together and level:
            place = numbers >> U64(_INDEX_BITS * level)
            starts = np.flatnonzero(np.append(True, place[1:] != place[:-1])[: len(numbers)])
        return cls(starts, np.append(starts[1:], len(numbers))[: len(starts)])

    def only(self, chosen: Flags) -> _Runs:
        return _Runs(self.starts[chosen], self.stops[chosen])

    def split(self, chosen: Flags, finer: _Runs) -> tuple[_Runs, Rows]:
        """The parts of the chosen runs, and of which run each is a part."""
        parents = np.searchsorted(self.starts, finer.starts, side="right") - 1
        inside = (parents >= 0) & (finer.starts < self.stops[parents]) & chosen[parents]
        return finer.only(inside), parents[inside]

    def leave(self, found: Walk, gone: Flags) -> None:
        """The walk of some runs is over: what it came to stands at the first page of each."""
        starts, lengths = self.starts[gone], (self.stops - self.starts)[gone]
        if (lengths > 1).any():
            places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
            found.ends[places] = np.repeat(starts, lengths)


@dataclass(frozen=True, slots=True)
class NestedWalk:
    """Where guest pages lie: system pages, whether a 2 MB or 1 GB leaf maps them, and the leaf's C-bit.

    `faults` says which pages the tables refuse, `errors` with which bits of `FaultError`, those that tell of the
    access not among them.
    """

    pages: Words
    large: Flags
    host_c: Flags
    faults: Flags
    errors: Words
    steps: list[Step]


def nested_walk(
    memory: Memory,
    rmp: Rmp | None,
    root: int,
    gfns: Words,
    kind: AccessKind,
    *,
    c_bit: int,
    host_keys: Keys,
    together: bool = False,
) -> NestedWalk:
    """Translate guest page numbers through the nested tables at `root`; `rmp` is None where SNP is off.

    Every nested access is a user's (APM2 15.25.5), and the tables are the host's: their pages must be the hypervisor's
    (that this is told as an #NPF with the bit RMP is inferred), and their C-bits choose between the two `host_keys`.
    The host has EFER.NXE set, and an entry that leads out of DRAM counts as one with reserved bits set (MODEL).
    """
    top, errors = U64(memory.size >> PAGE_SHIFT), np.zeros(len(gfns), U64)

    def locate(pointers: Words, owners: Rows) -> tuple[Words, Keys, Flags]:
        tables = (pointers & address_mask(c_bit)) >> U64(PAGE_SHIFT)
        ok = (tables < top) & (gfns[owners] < _LIMIT)
        errors[owners[ok ^ (gfns[owners] < _LIMIT)]] = _RESERVED
        if rmp is not None:
            foreign = check_write(rmp, tables) != Access.GRANTED
            errors[owners[ok & foreign]] = U64(FaultError.PRESENT | FaultError.RMP)
            ok &= ~foreign
        return tables, host_keys[_bit(pointers, c_bit).astype(np.intp)], ok

    found = walk(memory, root, gfns, locate, c_bit=c_bit, together=together)
    pages = found.frames(c_bit)
    errors = np.where(found.done, U64(0), errors[found.ends] | found.errors)
    outside = found.done & (pages >= top)
    errors[outside] = _RESERVED
    forbidden = found.forbids(write=kind.writes_nested, fetch=kind is AccessKind.FETCH, user=True)
    forbidden &= found.done & ~outside
    errors[forbidden] = U64(FaultError.PRESENT)
    faults = ~found.done | outside | forbidden
    return NestedWalk(pages, found.levels > 0, _bit(found.entries, c_bit), faults, errors, found.steps)


def address_mask(c_bit: int | None) -> np.uint64:
    """The address bits of an entry whose bit `c_bit` is a C-bit."""
    return U64(PTE_ADDRESS if c_bit is None else PTE_ADDRESS & ~(1 << c_bit))


def read_words(memory: Memory, keys: Keys, addresses: Words) -> Words:
    """The words at addresses, each under its own key id."""
    found = np.empty_like(addresses)
    for key in distinct_keys(keys):
        mine = keys == key
        found[mine] = memory.words(key, addresses[mine])
    return found


def set_bits(memory: Memory, keys: Keys, addresses: Words, bits: Words) -> None:
    """Set bits in words of memory; pages in which nothing is to be set are not written."""
    for key in distinct_keys(keys):
        mine = keys == key
        pages, rows = np.unique(addresses[mine] >> U64(PAGE_SHIFT), return_inverse=True)
        index = ((addresses[mine] & U64(PAGE_SIZE - 1)) // U64(PTE_SIZE)).astype(np.intp)
        for first in range(0, len(pages), _AT_ONCE):
            some, part = pages[first : first + _AT_ONCE], (rows >= first) & (rows < first + _AT_ONCE)
            content = np.array(memory.read_pages(key, some))
            np.bitwise_or.at(content.view("<u8"), (rows[part] - first, index[part]), bits[mine][part])
            memory.write_pages(key, some, content)


def distinct_keys(keys: Keys) -> list[int]:
    """The key ids of some accesses, of which there are at most three: none, the host's, the guest's."""
    if len(keys) and (keys == keys[0]).all():
        return [int(keys[0])]
    return [int(key) for key in np.unique(keys)]


def _bit(words: Words, number: int) -> Flags:
    is_set: Flags = words & U64(1 << number) != 0
    return is_set
