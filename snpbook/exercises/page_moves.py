"""Exercises on the reverse map table's instructions: the reader acts as host and guest on a workbench.

What counts is where the pages end and how many instructions it took, one for each page and for each fault; both are
read off the machine, and what the answer returns does not matter.
"""

from collections.abc import Callable

import numpy as np

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.exercises.reverse_map_table import FIRST, give
from snpbook.exercises.watched_guest import NOTHING, WatchedGuest
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.workbench import BareGuest, Workbench
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE, PageState

_ASID = 1
_GFN, _OTHER_GFN, _LARGE_GFN = 0x10, 0x99, 0x200
_SOURCE = "APM2 15.36.3 and 15.36.6"

# 4: from the hypervisor to the guest


def _bring_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Workbench, BareGuest], object], instructions: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench = Workbench()
            guest = WatchedGuest(bench, _ASID)
            prepare(bench, guest)
            guest.map(_GFN, range(FIRST, FIRST + 1))
            done = guest.executed(lambda: answer(bench.host, guest, FIRST, _GFN))
            usable = isinstance(guest.core().read(_GFN << PAGE_SHIFT, 1), bytes)
            return done and {"usable": usable, **done}

        wanted = {"usable": True, "instructions": instructions, "faults": "none"}
        return Case(name, run, wanted, rule, _SOURCE, NOTHING)

    return [
        case(
            "a page of the hypervisor", lambda bench, guest: None, 2,
            "the host assigns by RMPUPDATE, and then the guest must accept by PVALIDATE",
        ),
        case(
            "a page that is assigned already",
            lambda bench, guest: give(bench, guest, FIRST, _GFN, validate=False), 1,
            "an entry that already names this guest and this GPA needs no RMPUPDATE",
        ),
        case(
            "a page of this guest at another GPA",
            lambda bench, guest: give(bench, guest, FIRST, _OTHER_GFN, validate=False), 2,
            "the entry must name this GPA, too: the guest's own page at another one is not the page it expects here",
        ),
        case(
            "a page of another guest at the same GPA",
            lambda bench, guest: give(bench, bench.guest(_ASID + 1), FIRST, _GFN), 2,
            "the entry must name this guest. RMPUPDATE takes a page from another in one step, and clears Validated",
        ),
    ]  # fmt: skip


BRING_STUB = '''\
def bring_in(host, guest, page, gfn):
    """Make system page `page` a validated page of `guest` at guest page `gfn`, with the fewest instructions."""
    ...
'''


def bring_in(host: HostCpu, guest: BareGuest, page: int, gfn: int) -> object:
    """Make system page `page` a validated page of `guest` at guest page `gfn`, with the fewest instructions."""
    entry = host.rmp_entry(page)
    if (entry.assigned, entry.asid, entry.gfn) != (1, guest.asid, gfn):
        host.rmpupdate(range(page, page + 1), range(gfn, gfn + 1), NewState(assigned=True, asid=guest.asid))
    return guest.pvalidate(gfn)


def _host_alone(host: HostCpu, guest: BareGuest, page: int, gfn: int) -> object:
    return host.rmpupdate(range(page, page + 1), range(gfn, gfn + 1), NewState(assigned=True, asid=guest.asid))


def _always_both(host: HostCpu, guest: BareGuest, page: int, gfn: int) -> object:
    _host_alone(host, guest, page, gfn)
    return guest.pvalidate(gfn)


def _takes_back_first(host: HostCpu, guest: BareGuest, page: int, gfn: int) -> object:
    entry = host.rmp_entry(page)
    if entry.assigned and entry.asid != guest.asid:
        host.rmpupdate(range(page, page + 1), range(1), HYPERVISOR)
    return bring_in(host, guest, page, gfn)


def _same_owner_is_enough(host: HostCpu, guest: BareGuest, page: int, gfn: int) -> object:
    entry = host.rmp_entry(page)
    if not (entry.assigned and entry.asid == guest.asid):
        _host_alone(host, guest, page, gfn)
    return guest.pvalidate(gfn)


def _same_address_is_enough(host: HostCpu, guest: BareGuest, page: int, gfn: int) -> object:
    entry = host.rmp_entry(page)
    if not (entry.assigned and entry.gfn == gfn):
        _host_alone(host, guest, page, gfn)
    return guest.pvalidate(gfn)


BRING_IN = register(
    Exercise(
        id="reverse_map_table.4",
        title="From the hypervisor to the guest",
        minutes=10,
        difficulty=2,
        prerequisites=("exercise 1",),
        task=(
            "Be host and guest: make a page usable for the guest, with as few instructions as its present state "
            "allows. The host has already mapped it. host.rmp_entry(page) reads an entry and costs "
            "nothing; its fields are assigned, asid, gfn, page_size and validated. host.rmpupdate(range(page, page + "
            "1), range(gfn, gfn + 1), NewState(assigned=True, asid=guest.asid)) and guest.pvalidate(gfn) are "
            "instructions. What counts is the page afterwards, not what you return."
        ),
        stub=BRING_STUB,
        reference=bring_in,
        wrong=(
            Wrong(_host_alone, "the guest must accept by PVALIDATE"),
            Wrong(_always_both, "needs no RMPUPDATE"),
            Wrong(_takes_back_first, "in one step"),
            Wrong(_same_owner_is_enough, "must name this GPA, too"),
            Wrong(_same_address_is_enough, "must name this guest"),
        ),
        hints=(
            "Which two parties must agree, and in which order? Which of the two may have done its part already?",
            "Read the entry first: its fields are assigned, asid, gfn, validated. Compare them with what you want.",
            "RMPUPDATE only if (entry.assigned, entry.asid, entry.gfn) differs from (1, guest.asid, gfn); then "
            "PVALIDATE.",
        ),
        solution=(
            "RMPUPDATE replaces whatever the entry held, another guest's too, as long as it is not immutable; a "
            "change of "
            "owner, GPA or size clears Validated. So one RMPUPDATE and one PVALIDATE always do, and an entry that "
            "already "
            "fits needs the PVALIDATE alone."
        ),
        cases=_bring_cases,
    )
)

# 5: a part of a 2 MB page


def _part_cases() -> list[Case]:
    def case(name: str, count: int, smashed: bool, instructions: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench = Workbench()
            guest = WatchedGuest(bench, _ASID)
            give(bench, guest, FIRST, _LARGE_GFN, large=True, validate=False)
            if smashed:
                bench.host.psmash(range(FIRST, FIRST + 1))
                guest.map(_LARGE_GFN, range(FIRST, FIRST + PAGES_PER_LARGE))
            done = guest.executed(lambda: answer(bench.host, guest, FIRST, _LARGE_GFN, count))
            states = bench.machine.rmp.states(range(FIRST, FIRST + PAGES_PER_LARGE))
            valid = np.flatnonzero(states == PageState.GUEST_VALID).tolist() == list(range(count))
            others = int(np.count_nonzero(states == PageState.GUEST_INVALID)) == PAGES_PER_LARGE - count
            return done and {"these pages valid": valid, "the others assigned": others, **done}

        wanted = {"these pages valid": True, "the others assigned": True, "instructions": instructions,
                  "faults": "none"}  # fmt: skip
        return Case(name, run, wanted, rule, "APM2 15.36.11", NOTHING)

    return [
        case("all 512 pages", 512, False, 1, "a 2 MB entry is validated as a whole by one PVALIDATE of 2 MB"),
        case(
            "the first 16 pages", 16, False, 17,
            "PVALIDATE of 4 KB on a 2 MB entry is an #NPF with SIZEM: the host must split the entry by PSMASH first",
        ),
        case(
            "the first 3 pages of a region that is split already", 3, True, 3,
            "there is nothing to smash in a region of 4 KB entries: PSMASH answers 7",
        ),
        case(
            "all 512 pages of a region that is split already", 512, True, 512,
            "PVALIDATE of 2 MB on 4 KB entries answers FAIL_SIZEMISMATCH: the entry's size decides, not only the count",
        ),
    ]  # fmt: skip


PART_STUB = '''\
def accept_part(host, guest, page, gfn, count):
    """Validate the first `count` of the 512 pages behind `gfn`, and no other, with the fewest instructions."""
    ...
'''


def accept_part(host: HostCpu, guest: BareGuest, page: int, gfn: int, count: int) -> object:
    """Validate the first `count` of the 512 pages behind `gfn`, and no other, with the fewest instructions."""
    large = host.rmp_entry(page).page_size
    if large and count == 512:
        return guest.pvalidate(gfn, large=True)
    if large:
        host.psmash(range(page, page + 1))
    return guest.pvalidate(gfn, count)


def _always_smashes(host: HostCpu, guest: BareGuest, page: int, gfn: int, count: int) -> object:
    host.psmash(range(page, page + 1))
    return guest.pvalidate(gfn, count)


def _never_smashes(host: HostCpu, guest: BareGuest, page: int, gfn: int, count: int) -> object:
    return guest.pvalidate(gfn, large=True) if count == PAGES_PER_LARGE else guest.pvalidate(gfn, count)


def _tries_first(host: HostCpu, guest: BareGuest, page: int, gfn: int, count: int) -> object:
    if count == PAGES_PER_LARGE and host.rmp_entry(page).page_size:
        return guest.pvalidate(gfn, large=True)
    if guest.pvalidate(gfn, count).fault is None:
        return None
    return _always_smashes(host, guest, page, gfn, count)


def _whole_by_count(host: HostCpu, guest: BareGuest, page: int, gfn: int, count: int) -> object:
    if count == PAGES_PER_LARGE:
        return guest.pvalidate(gfn, large=True)
    return accept_part(host, guest, page, gfn, count)


def _smashes_what_is_split(host: HostCpu, guest: BareGuest, page: int, gfn: int, count: int) -> object:
    if count == PAGES_PER_LARGE:
        return guest.pvalidate(gfn, large=True)
    return _always_smashes(host, guest, page, gfn, count)


ACCEPT_PART = register(
    Exercise(
        id="reverse_map_table.5",
        title="A part of a large page",
        minutes=12,
        difficulty=2,
        prerequisites=("exercise 4",),
        task=(
            "The host has assigned 2 MB to the guest at guest page gfn. The guest wants the first count pages of 4 KB "
            "validated and no others; the rest stays assigned. Part of the work may be done already: "
            "host.rmp_entry(page) costs nothing. Use as few instructions as possible, counted by pages, with those "
            "that fault: host.psmash(range(page, page + 1)), guest.pvalidate(gfn, count) and guest.pvalidate(gfn, "
            "large=True). What counts is the pages afterwards, not what you return."
        ),
        stub=PART_STUB,
        reference=accept_part,
        wrong=(
            Wrong(_always_smashes, "as a whole by one PVALIDATE of 2 MB"),
            Wrong(_never_smashes, "the host must split the entry by PSMASH"),
            Wrong(_tries_first, "'instructions': 18, 'faults': '#NPF, "),
            Wrong(_smashes_what_is_split, "nothing to smash"),
            Wrong(_whole_by_count, "the entry's size decides"),
        ),
        hints=(
            "Print what guest.pvalidate(gfn, 16) returns, inside your function: of a large entry it is a fault. Which "
            "bit of its error says why?",
            "host.rmp_entry(page).page_size tells whether the entry is still a large one.",
            "All 512 of a large entry: one PVALIDATE with large=True. Fewer: PSMASH once if the entry is large, then "
            "PVALIDATE the pages.",
        ),
        solution=(
            "An entry has one Validated bit, so a 2 MB entry is accepted whole or not at all. PSMASH writes 512 "
            "entries "
            "that say the same for each page of 4 KB, without asking the guest and without changing what it agreed to."
        ),
        cases=_part_cases,
    )
)
