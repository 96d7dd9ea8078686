"""Exercises on the reverse map table's instructions: the reader acts as host and guest on a workbench.

What counts is where the pages end and how many instructions it took, one for each page; both are read off the machine.
"""

from collections.abc import Callable

import numpy as np

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.exercises.reverse_map_table import FIRST, give
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.workbench import BareGuest, Workbench
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE, PageState, VmplPermission
from snpbook.trace import Instruction, Recorder

_GFN, _LARGE_GFN = 0x10, 0x200
_SOURCE = "APM2 15.36.5"

# 4: from the hypervisor to the guest


def _usable(guest: BareGuest, gfn: int) -> bool:
    return isinstance(guest.core().read(gfn << PAGE_SHIFT, 1), bytes)


def _bring_cases() -> list[Case]:
    def case(name: str, prepare: Callable[[Workbench], object], instructions: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench, log = Workbench(), Recorder()
            guest = bench.guest(1)
            prepare(bench)
            guest.map(_GFN, range(FIRST, FIRST + 1))
            bench.trace.subscribe(log)
            returned = answer(bench.host, guest, FIRST, _GFN)
            count = sum(event.count for event in log.of(Instruction))
            return {"usable": _usable(guest, _GFN), "instructions": count} if count or returned is not None else None

        return Case(name, run, {"usable": True, "instructions": instructions}, rule, _SOURCE)

    return [
        case(
            "a page of the hypervisor", lambda bench: None, 2,
            "the host assigns by RMPUPDATE, and then the guest must accept by PVALIDATE",
        ),
        case(
            "a page that is assigned already",
            lambda bench: give(bench, bench.guest(1), FIRST, _GFN, validate=False), 1,
            "an entry that already names this guest and this GPA needs no RMPUPDATE",
        ),
        case(
            "a page of another guest", lambda bench: give(bench, bench.guest(2), FIRST, 0x99), 2,
            "RMPUPDATE takes a page from one guest to another in one step, and clears Validated as it does",
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


BRING_IN = register(
    Exercise(
        id="reverse_map_table.4",
        title="From the hypervisor to the guest",
        minutes=10,
        difficulty=2,
        prerequisites=("exercise 1",),
        task=(
            "Make a page usable for the guest, with as few instructions as its present state allows. The host has "
            "already mapped it. host.rmp_entry(page) reads an entry and costs nothing; host.rmpupdate(range(page, "
            "page + 1), range(gfn, gfn + 1), NewState(assigned=True, asid=guest.asid)) and guest.pvalidate(gfn) are "
            "instructions. Return what the last one answered."
        ),
        stub=BRING_STUB,
        reference=bring_in,
        wrong=(
            Wrong(_host_alone, "the guest must accept by PVALIDATE"),
            Wrong(_always_both, "needs no RMPUPDATE"),
            Wrong(_takes_back_first, "in one step"),
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
            bench, log = Workbench(), Recorder()
            guest = bench.guest(1)
            give(bench, guest, FIRST, _LARGE_GFN, large=True, validate=False)
            if smashed:
                bench.host.psmash(range(FIRST, FIRST + 1))
                guest.map(_LARGE_GFN, range(FIRST, FIRST + PAGES_PER_LARGE))
            bench.trace.subscribe(log)
            returned = answer(bench.host, guest, FIRST, _LARGE_GFN, count)
            done = sum(event.count for event in log.of(Instruction))
            states = bench.machine.rmp.states(range(FIRST, FIRST + PAGES_PER_LARGE))
            valid = np.flatnonzero(states == PageState.GUEST_VALID).tolist() == list(range(count))
            others = int(np.count_nonzero(states == PageState.GUEST_INVALID)) == PAGES_PER_LARGE - count
            told = {"these pages valid": valid, "the others assigned": others, "instructions": done}
            return told if done or returned is not None else None

        wanted = {"these pages valid": True, "the others assigned": True, "instructions": instructions}
        return Case(name, run, wanted, rule, "APM2 15.36.11")

    return [
        case("all 512 pages", 512, False, 1, "a 2 MB entry is validated as a whole by one PVALIDATE of 2 MB"),
        case(
            "the first 16 pages", 16, False, 17,
            "PVALIDATE of 4 KB on a 2 MB entry is an #NPF with SIZEM: the host must split the entry by PSMASH",
        ),
        case(
            "the first 3 pages of a region that is split already", 3, True, 3,
            "there is nothing to smash in a region of 4 KB entries: PSMASH answers 7",
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
            "validated and no others; the rest stays assigned. Use as few instructions as possible, counted by pages: "
            "host.psmash(range(page, page + 1)), guest.pvalidate(gfn, count) and guest.pvalidate(gfn, large=True). "
            "Return what the last one answered."
        ),
        stub=PART_STUB,
        reference=accept_part,
        wrong=(
            Wrong(_always_smashes, "as a whole by one PVALIDATE of 2 MB"),
            Wrong(_never_smashes, "the host must split the entry by PSMASH"),
            Wrong(_smashes_what_is_split, "nothing to smash"),
        ),
        hints=(
            "Try guest.pvalidate(gfn, 16) and look at the fault that it returns.",
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

# 6: rights for VMPL1


def _grant_cases() -> list[Case]:
    def case(name: str, count: int, large: bool, rule: str) -> Case:
        def run(answer: Answer) -> object:
            bench = Workbench()
            guest = bench.guest(1)
            step = PAGES_PER_LARGE if large else 1
            for number in range(count):
                give(bench, guest, FIRST + number * step, _LARGE_GFN + number * step, large=large)
            if answer(guest, _LARGE_GFN, count, large) is None:
                return None
            last = _LARGE_GFN + count * step - 1 << PAGE_SHIFT
            reads = [isinstance(guest.core(vmpl).read(last, 1), bytes) for vmpl in (1, 2)]
            first = isinstance(guest.core(1).read(_LARGE_GFN << PAGE_SHIFT, 1), bytes)
            writes = guest.core(1).write(last, b"\1") is None
            return {"VMPL1 reads the first page": first, "VMPL1 reads the last page": reads[0],
                    "VMPL1 writes": writes, "VMPL2 reads": reads[1]}  # fmt: skip

        wanted = {"VMPL1 reads the first page": True, "VMPL1 reads the last page": True, "VMPL1 writes": False,
                  "VMPL2 reads": False}  # fmt: skip
        return Case(name, run, wanted, rule, "APM2 15.36.7")

    return [
        case("one page of 4 KB", 1, False, "the mask is all that the target may do from now on: READ alone, for VMPL1"),
        case("four pages of 4 KB", 4, False, "each entry has its own rights: every page must be adjusted"),
        case("a page of 2 MB", 1, True, "RMPADJUST must name the size of the entry, or it faults with SIZEM"),
    ]


GRANT_STUB = '''\
def grant(guest, gfn, count, large):
    """Let VMPL1 read `count` pages from `gfn` on, which are 2 MB pages if `large`, and do nothing else with them."""
    ...
'''


def grant(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    """Let VMPL1 read `count` pages from `gfn` on, which are 2 MB pages if `large`, and do nothing else with them."""
    return guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ, large=large)


def _grants_everything(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.ALL, large=large)


def _first_page_only(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, 1, target=1, rights=VmplPermission.READ, large=large)


def _small_pages_only(guest: BareGuest, gfn: int, count: int, large: bool) -> object:
    return guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ)


GRANT = register(
    Exercise(
        id="reverse_map_table.6",
        title="A window for VMPL1",
        minutes=8,
        difficulty=2,
        prerequisites=(),
        task=(
            "VMPL0 runs a small service module, VMPL1 the operating system. Some validated pages are the module's. Let "
            "VMPL1 read them, but not write or execute, and leave VMPL2 and VMPL3 without any right. "
            "guest.rmpadjust(gfn, "
            "count, target=..., rights=..., large=...) executes RMPADJUST at VMPL0; rights are a VmplPermission such "
            "as "
            "READ, WRITE, EXECUTE_USER or several joined by |. Return its answer."
        ),
        stub=GRANT_STUB,
        reference=grant,
        wrong=(
            Wrong(_grants_everything, "READ alone"),
            Wrong(_first_page_only, "every page must be adjusted"),
            Wrong(_small_pages_only, "must name the size of the entry"),
        ),
        hints=(
            "After RMPUPDATE only VMPL0 has rights. Which of the others needs any?",
            "The mask does not add to the old rights, it replaces them. What is the smallest that lets VMPL1 read?",
            "guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ, large=large)",
        ),
        solution=(
            "RMPADJUST writes the permission byte of one less privileged level, and can grant only what the caller "
            "holds. "
            "VMPL0 never loses its own rights, which is why software there can protect itself from the rest of the "
            "guest."
        ),
        cases=_grant_cases,
    )
)
