"""Exercises on the reverse map table itself: an entry, the size of the table, and a table in which something is wrong.

The tables are made by the model's own instructions on a workbench; the expected numbers are counted by hand.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.hardware.rmp_range import RmpRange
from snpbook.hardware.workbench import PLAY, BareGuest, Workbench
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.rmp import (
    ASID,
    ASID_SHIFT,
    ASSIGNED,
    BOOKKEEPING_SIZE,
    ENTRY_SIZE,
    GFN,
    GFN_LIMIT,
    GFN_SHIFT,
    LARGE,
    RMP_ENTRY,
    VALIDATED,
)

Entries = NDArray[np.uint64]

FIRST = PLAY.start
"""The first page of the workbench that exercises use."""
GIB = 1 << 30
_ALIGNMENT = 2 * PAGE_SIZE


def give(
    bench: Workbench, guest: BareGuest, page: int, gfn: int, *, large: bool = False, validate: bool = True
) -> None:
    """Make a page the guest's: mapped, assigned, and unless told otherwise validated."""
    guest.map(gfn, range(page, page + 1), large=large)
    new = NewState(assigned=True, asid=guest.asid, large=large)
    bench.host.rmpupdate(range(page, page + 1), range(gfn, gfn + 1), new)
    if validate:
        guest.pvalidate(gfn, large=large)


# 1: one entry


def _decode_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Workbench], object], expected: tuple[object, ...], rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench = Workbench("genoa")
            prepare(bench)
            return answer(int(bench.host.rmp_words(range(FIRST, FIRST + 1))[0, 0]))

        words = dict(zip(("asid", "gpa", "pages", "validated"), expected, strict=True))
        return Case(name, run, words, rule, str(RMP_ENTRY.cite))

    return [
        case(
            "accepted by guest 5 at GPA 0x1f000", lambda bench: give(bench, bench.guest(5), FIRST, 0x1F),
            (5, 0x1F000, 1, True), "the ASID is bits 60:51, which need mask and shift; the GPA is bits 50:12, in place",
        ),
        case(
            "assigned to guest 1 at GPA 0x1000, not yet accepted",
            lambda bench: give(bench, bench.guest(1), FIRST, 1, validate=False), (1, 0x1000, 1, False),
            "the host assigns, the guest validates: two bits, and only the second one is the guest's word",
        ),
        case(
            "a 2 MB page of guest 3 at GPA 0x39800000",
            lambda bench: give(bench, bench.guest(3), FIRST, 0x39800, large=True), (3, 0x39800000, 512, True),
            "bit 1 of the entry says 2 MB, which is 512 pages of 4 KB",
        ),
        case(
            "assigned to guest 677 at the last GPA that an entry can name",
            lambda bench: bench.host.rmpupdate(
                range(FIRST, FIRST + 1), range(GFN_LIMIT - 1, GFN_LIMIT), NewState(assigned=True, asid=677)
            ),
            (677, GFN, 1, False), "the ASID has 10 bits and the guest page number 39: the masks must be as wide",
        ),
        case(
            "the firmware's", lambda bench: bench.host.rmpupdate(range(FIRST, FIRST + 1), range(1), FIRMWARE),
            (0, 0, 1, False), "the firmware's own pages have ASID 0",
        ),
    ]  # fmt: skip


DECODE_STUB = '''\
def decode(low):
    """What does the first word of an RMP entry say?"""
    ...  # return {"asid": ..., "gpa": ..., "pages": ..., "validated": ...}
'''


def decode(low: int) -> dict[str, Any]:
    """What does the first word of an RMP entry say?"""
    return {
        "asid": (low & ASID) >> ASID_SHIFT,
        "gpa": low & GFN,
        "pages": 512 if low & LARGE else 1,
        "validated": bool(low & VALIDATED),
    }


def _no_shift(low: int) -> dict[str, Any]:
    return {**decode(low), "asid": low & ASID}


def _eight_bits(low: int) -> dict[str, Any]:
    return {**decode(low), "asid": low >> ASID_SHIFT & 255}


def _four_gigabytes(low: int) -> dict[str, Any]:
    return {**decode(low), "gpa": low & GFN & 4 * GIB - 1}


def _assigned_is_enough(low: int) -> dict[str, Any]:
    return {**decode(low), "validated": bool(low & ASSIGNED)}


def _always_small(low: int) -> dict[str, Any]:
    return {**decode(low), "pages": 1}


DECODE = register(
    Exercise(
        id="reverse_map_table.1",
        title="Read an entry",
        minutes=8,
        difficulty=1,
        prerequisites=("bits and masks",),
        task=(
            "You are given the first word of an RMP entry. Return a dictionary: the ASID of its owner ('asid'), the "
            "guest "
            "physical address that it belongs at ('gpa'), how many pages of 4 KB it speaks for ('pages', 1 or 512), "
            "and "
            "whether the guest has accepted it ('validated', True or False)."
        ),
        stub=DECODE_STUB,
        reference=decode,
        wrong=(
            Wrong(_no_shift, "which need mask and shift"),
            Wrong(_eight_bits, "the ASID has 10 bits"),
            Wrong(_four_gigabytes, "the guest page number 39"),
            Wrong(_assigned_is_enough, "only the second one is the guest's word"),
            Wrong(_always_small, "512 pages of 4 KB"),
        ),
        hints=(
            "The picture of the entry above shows where each field lies. Masks for all of them are in "
            "snpbook.spec.rmp.",
            "low & GFN is the address already: its bits are stored in their place. The ASID needs a shift.",
            "(low & ASID) >> ASID_SHIFT, low & GFN, 512 if low & LARGE else 1, bool(low & VALIDATED).",
        ),
        solution=(
            "One 64-bit word says whose the page is, where in that guest it belongs, how large it is and whether the "
            "guest "
            "agreed. The address is stored in its place, so it needs a mask alone."
        ),
        cases=_decode_cases,
    )
)

# 2: the size of the table


def _end_cases() -> list[Case]:
    def case(name: str, base: int, memory: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            end = answer(base, memory)
            if end is None:
                return None
            where = RmpRange(base, int(end))
            spare = where.entries - (memory >> PAGE_SHIFT)
            fits = where.fits(1 << 52)
            return {"last page covered": spare >= 0, "no larger than needed": 0 <= spare < _ALIGNMENT // ENTRY_SIZE,
                    "aligned to 8 KB": fits}  # fmt: skip

        wanted = {"last page covered": True, "no larger than needed": True, "aligned to 8 KB": True}
        return Case(name, run, wanted, rule, "APM2 15.36.4")

    return [
        case(
            "4 GB of memory, the table at 1 MB", 0x100000, 4 * GIB,
            "the first 16 KB of the table hold no entries, and RMP_END is its last byte, not the one behind",
        ),
        case("1 TB of memory, the table at 64 GB", 64 * GIB, 1024 * GIB, "one entry of 16 bytes for each page of 4 KB"),
        case(
            "3 MB of memory", 0x100000, 3 << 20,
            "RMP_BASE and RMP_END + 1 are multiples of 8 KB: round the size up",
        ),
    ]  # fmt: skip


END_STUB = '''\
def rmp_end(base, memory):
    """RMP_END for a table at `base` that covers `memory` bytes from address 0."""
    ...
'''


def rmp_end(base: int, memory: int) -> int:
    """RMP_END for a table at `base` that covers `memory` bytes from address 0."""
    size = BOOKKEEPING_SIZE + memory // PAGE_SIZE * ENTRY_SIZE
    return base + -(-size // 0x2000) * 0x2000 - 1


def _no_bookkeeping(base: int, memory: int) -> int:
    return rmp_end(base, memory) - BOOKKEEPING_SIZE


def _half_entries(base: int, memory: int) -> int:
    return rmp_end(base, memory // 2 if memory > 4 * GIB else memory)


def _no_rounding(base: int, memory: int) -> int:
    return base + BOOKKEEPING_SIZE + memory // PAGE_SIZE * ENTRY_SIZE - 1


RMP_END = register(
    Exercise(
        id="reverse_map_table.2",
        title="How large is the table?",
        minutes=8,
        difficulty=1,
        prerequisites=(),
        task=(
            "The BIOS must set memory aside for the table before the kernel runs. Given RMP_BASE and the bytes of "
            "memory to "
            "cover, from address 0 on, return RMP_END for the smallest table that the registers can describe."
        ),
        stub=END_STUB,
        reference=rmp_end,
        wrong=(
            Wrong(_no_bookkeeping, "the first 16 KB of the table hold no entries"),
            Wrong(_half_entries, "one entry of 16 bytes for each page"),
            Wrong(_no_rounding, "round the size up"),
        ),
        hints=(
            "How many pages are there, and how many bytes does each cost? What lies in front of the first entry?",
            "RMP_END names the last byte of the table. Check yourself: 4 GB with the table at 0x100000 ends at "
            "0x1103fff.",
            "size = 0x4000 + memory // 4096 * 16; round it up to a multiple of 0x2000; RMP_END is base + size - 1.",
        ),
        solution=(
            "16 bytes for 4096 are 1/256 of memory: 4 GB for each TB, in front of it 16 KB of bookkeeping. The "
            "registers "
            "hold addresses in steps of 8 KB, and RMP_END is the table's last byte. (Firmware wants 1 MB steps.)"
        ),
        cases=_end_cases,
    )
)

# 3: a table in which something is wrong


def _table(bench: Workbench) -> Entries:
    return np.array(bench.host.rmp_words(PLAY))


def _moved(bench: Workbench, *, again: bool = True) -> None:
    """The host gives the guest's GPA 0x10000 another page, and the guest validates it once more if told so."""
    guest = bench.guest(1)
    give(bench, guest, FIRST, 0x10)
    give(bench, guest, FIRST + 1, 0x11)
    give(bench, guest, FIRST + 7, 0x10, validate=again)


def _two_guests(bench: Workbench) -> None:
    give(bench, bench.guest(1), FIRST, 0x10)
    give(bench, bench.guest(2), FIRST + 1, 0x10)


def _inside_large(bench: Workbench) -> None:
    guest = bench.guest(1)
    give(bench, guest, FIRST + PAGES_PER_LARGE, 0x200, large=True)
    give(bench, guest, FIRST + 3, 0x205)


def _double_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Workbench], None], expected: list[tuple[int, int]], rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench = Workbench()
            prepare(bench)
            return answer(_table(bench))

        return Case(name, run, expected, rule, "APM2 15.36.6")

    return [
        case(
            "the host moved a page, and the guest validated it a second time", _moved, [(1, 0x10)],
            "two validated entries with the same owner and the same GPA: the host can switch between them",
        ),
        case(
            "the guest did not validate the second page", lambda bench: _moved(bench, again=False), [],
            "a page that is not validated is no danger: the guest cannot reach it without #VC",
        ),
        case(
            "two guests that use the same GPA", _two_guests, [],
            "each guest has its own address space: owner and GPA together must be unique",
        ),
        case(
            "a 4 KB page at an address inside a validated 2 MB page", _inside_large, [(1, 0x205)],
            "a 2 MB entry speaks for 512 guest pages, and its own page number names only the first of them",
        ),
    ]  # fmt: skip


DOUBLE_STUB = '''\
def double_mappings(words):
    """Which (ASID, guest page number) pairs have two validated pages behind them?"""
    ...
'''


def double_mappings(words: Entries) -> list[tuple[int, int]]:
    """Which (ASID, guest page number) pairs have two validated pages behind them?"""
    seen: set[tuple[int, int]] = set()
    twice: set[tuple[int, int]] = set()
    for low in words[:, 0].tolist():
        if not (low & ASSIGNED and low & VALIDATED):
            continue
        asid, gfn = (low & ASID) >> ASID_SHIFT, (low & GFN) >> GFN_SHIFT
        for number in range(gfn, gfn + (512 if low & LARGE else 1)):
            (twice if (asid, number) in seen else seen).add((asid, number))
    return sorted(twice)


def _by_gpa_and_owner(words: Entries, *, validated: bool, owner: bool) -> list[tuple[int, int]]:
    keep = words[:, 0] & ASSIGNED != 0
    if validated:
        keep &= words[:, 0] & VALIDATED != 0
    low = words[keep, 0]
    low = low[low & ASID != 0]
    asids = (low & ASID) >> ASID_SHIFT if owner else np.ones(len(low), np.uint64)
    pairs = list(zip(asids.tolist(), ((low & GFN) >> GFN_SHIFT).tolist(), strict=True))
    return sorted({pair for pair in pairs if pairs.count(pair) > 1})


def _finds_nothing(words: Entries) -> list[tuple[int, int]]:
    return []


def _any_assigned(words: Entries) -> list[tuple[int, int]]:
    return _by_gpa_and_owner(words, validated=False, owner=True)


def _any_owner(words: Entries) -> list[tuple[int, int]]:
    return _by_gpa_and_owner(words, validated=True, owner=False)


def _small_only(words: Entries) -> list[tuple[int, int]]:
    return _by_gpa_and_owner(words, validated=True, owner=True)


DOUBLE_MAPPINGS = register(
    Exercise(
        id="reverse_map_table.3",
        title="Find the double mapping",
        minutes=15,
        difficulty=2,
        prerequisites=("exercise 1",),
        task=(
            "A guest has not kept count of what it validated. You are given all raw entries, uint64 with two words "
            "per page. "
            "Return a sorted list of pairs (ASID, guest page number), one for each guest page that two validated "
            "entries "
            "claim. A 2 MB entry claims 512 guest pages."
        ),
        stub=DOUBLE_STUB,
        reference=double_mappings,
        wrong=(
            Wrong(_finds_nothing, "two validated entries with the same owner"),
            Wrong(_any_assigned, "a page that is not validated is no danger"),
            Wrong(_any_owner, "owner and GPA together must be unique"),
            Wrong(_small_only, "a 2 MB entry speaks for 512 guest pages"),
        ),
        hints=(
            "Walk over the entries and keep a set of the (ASID, guest page number) pairs that you have met.",
            "Skip entries that are not assigned or not validated. What does an entry with LARGE claim?",
            "For each validated entry add (asid, n) for n from gfn on, 1 or 512 of them; what was there before is "
            "the answer.",
        ),
        solution=(
            "The RMP maps system pages to guest pages, so nothing in the hardware keeps two of them from naming the "
            "same guest "
            "page. That is the guest's part: validate each GPA once. Where it did so twice, the host can swap the "
            "two pages "
            "behind its back by editing the nested tables, which is a replay."
        ),
        cases=_double_cases,
    )
)
