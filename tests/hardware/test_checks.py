"""Access checks: the product of entries and accesses, against the reference."""

import itertools
from collections.abc import Iterator

import numpy as np

from snpbook.hardware.checks import Access, check_guest, check_guest_one, check_write
from snpbook.hardware.rmp import Rmp
from snpbook.spec.pages import VmplPermission
from tests.hardware.tables import ENTRIES, copy, names, table
from tests.reference.rmp import Entry, ReferenceRmp
from tests.sampling import sampled

FLAGS = ("assigned", "immutable", "validated")
ENTRY_CASES = [
    dict(zip((*FLAGS, "asid", "gfn", "large"), values, strict=True))
    for values in itertools.product((False, True), (False, True), (False, True), (0, 5, 6), (512, 513), (False, True))
]
ACCESSES = list(itertools.product((0, 1, 3), (0, 1, 3, 8), (False, True), (512, 515)))


def tables() -> Iterator[tuple[ReferenceRmp, Rmp, Rmp]]:
    """One table for each kind of entry, at the head of a 2 MB region, with a neighbour."""
    for values in sampled(ENTRY_CASES, 20):
        model = ReferenceRmp(ENTRIES)
        model.table[512] = Entry(**values, vmpl=[15, 1, 0, 8])
        neighbour = {name: value for name, value in values.items() if name != "large"}
        model.table[515] = (
            Entry(assigned=values["assigned"]) if values["large"] else Entry(**neighbour, vmpl=[3, 3, 3, 3])
        )
        if values["large"] and values["assigned"]:
            model.table.update({513 + i: Entry(assigned=True) for i in range(511)})
        model.recount()
        mapped, paged = table(), table(mapping=False)
        copy(model, mapped)
        copy(model, paged)
        yield model, mapped, paged


def test_every_access_to_every_kind_of_entry() -> None:
    for model, mapped, paged in tables():
        for vmpl, need, large, page in ACCESSES:
            for gfn, asid in itertools.product((512, 515, 516), (5, 6)):
                wanted = model.check(page, gfn, asid, vmpl, need, large)
                places, guests = np.array([page] * 2, np.uint64), np.array([gfn] * 2, np.uint64)
                for rmp in (mapped, paged):
                    found = check_guest(rmp, places, guests, asid, vmpl, VmplPermission(need), large=large)
                    assert names(found) == [wanted] * 2, (model.entry(page), vmpl, need, large, gfn, asid)
                if not large:
                    assert Access(check_guest_one(mapped, page, gfn, asid, vmpl, need)).name == wanted
        for large, first in itertools.product((False, True), (512, 513, 515, 520)):
            for rmp in (mapped, paged):
                assert names(check_write(rmp, range(first, first + 2), large=large)) == [
                    model.check_write(page, large) for page in (first, first + 1)
                ]


def test_pages_without_an_entry() -> None:
    rmp = table()
    pages = range(ENTRIES - 1, ENTRIES + 1)
    assert names(check_guest(rmp, pages, pages, 5)) == ["NOT_GUEST_OWNED", "NOT_COVERED"]
    assert names(check_write(rmp, pages)) == names(check_write(rmp, pages, large=True)) == ["GRANTED", "GRANTED"]


def test_a_host_may_write_hv_fixed_pages() -> None:
    """Hypervisor-Owned asks for Assigned alone."""
    model, rmp = ReferenceRmp(ENTRIES), table()
    model.table[7] = Entry(immutable=True)
    copy(model, rmp)
    assert names(check_write(rmp, range(7, 8))) == ["GRANTED"]


def test_a_2mb_write_fails_for_any_neighbour() -> None:
    for page in (0, 1, 511):
        model, rmp = ReferenceRmp(ENTRIES), table()
        model.rmpupdate(page, page, True, 5)
        copy(model, rmp)
        pages = range(2, 6)
        assert names(check_write(rmp, pages)) == ["GRANTED"] * 4
        assert names(check_write(rmp, pages, large=True)) == ["NOT_HYPERVISOR_OWNED"] * 4
        assert names(check_write(rmp, range(512, 513), large=True)) == ["GRANTED"]


def test_long_runs_and_arrays() -> None:
    model, rmp = ReferenceRmp(ENTRIES), table()
    for page in range(ENTRIES):
        model.table[page] = Entry(assigned=True, asid=5, gfn=page + 3, validated=page % 100 != 9, vmpl=[15, 1, 1, 1])
    model.recount()
    copy(model, rmp)
    order = np.random.default_rng(1).permutation(ENTRIES).astype(np.uint64)
    for pages, gfns in ((range(ENTRIES), range(3, ENTRIES + 3)), (order, order + np.uint64(3))):
        for vmpl, need in ((0, VmplPermission.READ | VmplPermission.WRITE), (1, VmplPermission.WRITE)):
            found = check_guest(rmp, pages, gfns, 5, vmpl, need)
            assert names(found) == [model.check(int(p), int(p) + 3, 5, vmpl, need) for p in pages]
