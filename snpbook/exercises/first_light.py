"""Exercises of the overture: what the RMP says of a guest's memory, read off the raw entries.

Layout and states of the entries are those of `spec.rmp` and `spec.pages`; the cases are built with the layout, the
expected numbers by hand.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.exercises.registry import Answer, Case, Exercise, Wrong, register
from snpbook.spec.rmp import ASID, ASID_SHIFT, ASSIGNED, IMMUTABLE, RMP_ENTRY, VALIDATED

Entries = NDArray[np.uint64]

_VALID = {"assigned": 1, "validated": 1}


def _entries(*fields: dict[str, Any]) -> Entries:
    """Raw entries, uint64[n, 2], as they lie in memory."""
    raw = b"".join(RMP_ENTRY.pack(**entry) for entry in fields)
    return np.frombuffer(raw, "<u8").reshape(-1, 2).astype(np.uint64)


def _guest(asid: int, count: int, **fields: int) -> list[dict[str, Any]]:
    return [{**_VALID, "asid": asid, "gfn": 0x800 + number, "vmpl0": 0xF, **fields} for number in range(count)]


def _cases() -> list[Case]:
    hypervisor: list[dict[str, Any]] = [{}, {}]

    def case(name: str, entries: list[dict[str, Any]], asid: int, expected: int, rule: str) -> Case:
        def run(answer: Answer) -> object:
            return answer(_entries(*entries), asid)

        return Case(name, run, expected, rule, str(RMP_ENTRY.cite))

    return [
        case(
            "three pages of the guest among pages of the hypervisor", hypervisor + _guest(5, 3), 5, 3,
            "assigned is bit 0, the ASID bits 60:51, validated bit 62 of the first word: mask before you compare",
        ),
        case(
            "two pages that the host assigned and the guest has not accepted", _guest(5, 1) + _guest(5, 2, validated=0),
            5, 1, "RMPUPDATE by the host is not enough: the guest must have accepted the page by PVALIDATE",
        ),
        case(
            "two guests", _guest(1, 2) + _guest(3, 4), 1, 2,
            "a page belongs to one ASID alone, compared as a whole",
        ),
        case(
            "a page that is about to be swapped out", _guest(5, 2) + _guest(5, 1, immutable=1), 5, 2,
            "an immutable page is in the hands of the firmware, though it is validated (state Pre-Swap)",
        ),
        case(
            "the guest's saved registers", _guest(5, 2) + _guest(5, 1, vmsa=1), 5, 3,
            "a VMSA is a page of the guest like any other",
        ),
        case(
            "an entry that is not assigned", _guest(5, 2) + _guest(5, 1, assigned=0), 5, 2,
            "without the assigned bit the page is the hypervisor's, whatever else the entry holds",
        ),
        case("no page at all", hypervisor, 5, 0, "a guest may have no page yet"),
    ]  # fmt: skip


STUB = '''\
def usable_pages(words, asid):
    """How many pages can the guest with this ASID use right now?"""
    ...
'''


def usable_pages(words: Entries, asid: int) -> int:
    """How many pages can the guest with this ASID use right now?"""
    entry = words[:, 0]
    mine = (entry & ASID) >> ASID_SHIFT == asid
    accepted = (entry & ASSIGNED != 0) & (entry & VALIDATED != 0)
    frozen = entry & IMMUTABLE != 0
    return int((mine & accepted & ~frozen).sum())


def _trusts_the_host(words: Entries, asid: int) -> int:
    entry = words[:, 0]
    return int(((entry & ASSIGNED != 0) & ((entry & ASID) >> ASID_SHIFT == asid)).sum())


def _forgets_the_mask(words: Entries, asid: int) -> int:
    entry = words[:, 0]
    return int(((entry >> ASID_SHIFT == asid) & (entry & VALIDATED != 0)).sum())


def _any_guest(words: Entries, asid: int) -> int:
    entry = words[:, 0]
    return int(((entry & ASSIGNED != 0) & (entry & VALIDATED != 0) & (entry & IMMUTABLE == 0)).sum())


def _forgets_immutable(words: Entries, asid: int) -> int:
    entry = words[:, 0]
    mine = (entry & ASID) >> ASID_SHIFT == asid
    return int((mine & (entry & ASSIGNED != 0) & (entry & VALIDATED != 0)).sum())


USABLE_PAGES = register(
    Exercise(
        id="first_light.1",
        title="Whose page is it?",
        minutes=10,
        difficulty=1,
        prerequisites=("NumPy masks",),
        task=(
            "You are given raw RMP entries of 4 KB pages, an array of uint64 with two words per page, and the ASID of "
            "a guest. Return how many of these pages the guest can use right now: assigned to it, accepted by it, and "
            "not held by the firmware. The masks ASSIGNED, ASID, ASID_SHIFT, VALIDATED and IMMUTABLE are in "
            "snpbook.spec.rmp; all of them speak of the first word."
        ),
        stub=STUB,
        reference=usable_pages,
        wrong=(
            Wrong(_trusts_the_host, "must have accepted the page by PVALIDATE"),
            Wrong(_forgets_the_mask, "mask before you compare"),
            Wrong(_any_guest, "belongs to one ASID alone"),
            Wrong(_forgets_immutable, "in the hands of the firmware"),
        ),
        hints=(
            "Two parties must agree before a guest can use a page. Which bit does the host set, and which the guest?",
            "words[:, 0] is the first word of every page. Cut the ASID out of it with its mask before you shift it.",
            "A page counts if (entry & ASSIGNED) and (entry & VALIDATED) are set, (entry & IMMUTABLE) is not, and "
            "(entry & ASID) >> ASID_SHIFT equals the ASID. Combine the four masks with & and sum.",
        ),
        solution=(
            "The host assigns a page by RMPUPDATE and the guest accepts it by PVALIDATE; only both together make it "
            "usable, which is why a host cannot slip a page in. The ASID says whose page it is, and an immutable page "
            "is being worked on by the firmware."
        ),
        cases=_cases,
    )
)
