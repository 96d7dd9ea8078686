"""RMPUPDATE and PVALIDATE: equal to the scalar reference in every code, entry and counter; the rules one by one."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware import instructions
from snpbook.hardware.checks import Access
from snpbook.hardware.instructions import HYPERVISOR, NewState, pvalidate, pvalidate_one, rmpupdate, rmpupdate_one
from snpbook.hardware.rmp import Rmp
from snpbook.spec.rmp import RmpCode
from tests.hardware.tables import ENTRIES, assert_same, compare, copy, fill, table
from tests.reference.rmp import ReferenceRmp

both = pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])
GUEST = NewState(assigned=True, asid=5)
LARGE = NewState(assigned=True, asid=5, large=True)


def numbers(*pages: int) -> Any:
    return np.array(pages, np.uint64)


def raw(rmp: Rmp, page: int) -> int:
    return int(rmp.load(range(page, page + 1))[0, 0])


@both
@given(rng=st.randoms(use_true_random=False))
def test_random_operations_equal_the_reference(mapping: bool, rng: random.Random) -> None:
    compare(rng, mapping)


@given(rng=st.randoms(use_true_random=False))
def test_one_page_paths_equal_the_reference(rng: random.Random) -> None:
    model, rmp = ReferenceRmp(ENTRIES), table()
    fill(model, rng)
    copy(model, rmp)
    for _ in range(12):
        known = [page for page, entry in model.table.items() if entry.assigned] or [7]
        page = rng.choice((*rng.choices(known, k=3), rng.randrange(ENTRIES + 3)))
        entry, gfn = model.answering(page) if page < ENTRIES else (model.entry(0), 1)
        gfn, asid = rng.choice((gfn, gfn, gfn ^ 1)), rng.choice((entry.asid or 1, entry.asid or 1, 2))
        if rng.random() < 0.5:
            new = NewState(rng.random() < 0.7, rng.choice((0, asid)), rng.random() < 0.3)
            wanted = model.rmpupdate(page, gfn, new.assigned, new.asid, new.immutable)
            assert rmpupdate_one(rmp, page, gfn, new) == wanted
        else:
            validate = rng.random() < 0.5
            outcome, carry = model.pvalidate(page, gfn, asid, validate)
            found = pvalidate_one(rmp, page, gfn, asid, validate)
            assert (found.name if isinstance(found, Access) else (0, found)) == (
                outcome if isinstance(outcome, str) else (outcome, carry)
            )
    assert_same(model, rmp)


@pytest.mark.parametrize("large", [False, True])
def test_a_long_run_is_done_in_steps(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "CHUNK", 1024)
    model, rmp = ReferenceRmp(ENTRIES), table()
    fill(model, random.Random(11))
    copy(model, rmp)
    pages = range(0, ENTRIES + 512, 512 if large else 1)
    codes = rmpupdate(rmp, pages, range(4096, 4096 + len(pages)), NewState(assigned=True, asid=2, large=large))
    assert codes.tolist() == [model.rmpupdate(p, 4096 + i, True, 2, large=large) for i, p in enumerate(pages)]
    assert_same(model, rmp)


# RMPUPDATE


@both
def test_order_of_the_checks(mapping: bool) -> None:
    rmp = table(mapping)
    pages = numbers(8, 8, 8, 8, 512, 515)
    new = [HYPERVISOR, NewState(assigned=True, asid=5, immutable=True), GUEST, HYPERVISOR, LARGE, GUEST]
    codes = [int(rmpupdate(rmp, numbers(int(p)), numbers(1), n)[0]) for p, n in zip(pages, new, strict=True)]
    assert codes == [0, 0, RmpCode.FAIL_PERMISSION, RmpCode.FAIL_PERMISSION, 0, RmpCode.FAIL_OVERLAP]
    wrong = [
        (numbers(9), LARGE, RmpCode.FAIL_INPUT),  # not aligned
        (numbers(9), NewState(assigned=False, asid=5), RmpCode.FAIL_INPUT),
        (numbers(9), NewState(assigned=False, immutable=True), RmpCode.FAIL_INPUT),
        (numbers(ENTRIES), GUEST, RmpCode.FAIL_INPUT),
        (numbers(0), LARGE, RmpCode.FAIL_OVERLAP),  # page 8 is assigned
    ]
    before = rmp.load(range(ENTRIES)).copy()
    for page, state, code in wrong:
        assert rmpupdate(rmp, page, numbers(1), state).tolist() == [code]
    assert (rmp.load(range(ENTRIES)) == before).all()


@both
def test_pages_in_use_are_refused_before_the_entry_is_looked_at(mapping: bool) -> None:
    rmp = table(mapping)
    rmpupdate(rmp, numbers(8), numbers(1), NewState(assigned=True, asid=5, immutable=True))
    busy = frozenset({8, 9})
    assert rmpupdate(rmp, range(7, 11), range(4), GUEST, busy).tolist() == [0, 3, 3, 0]
    assert rmpupdate(rmp, numbers(0, 512), numbers(0, 512), LARGE, busy).tolist() == [RmpCode.FAIL_INUSE, 0]


@both
def test_immutable_alone_keeps_what_the_guest_accepted(mapping: bool) -> None:
    """Guest-Valid to Pre-Swap: any other change takes validation, VMSA mark and permissions away."""
    for other in (NewState(assigned=True, asid=6), NewState(assigned=True, asid=5, immutable=True)):
        for gfn in (1, 2):
            rmp = table(mapping)
            rmpupdate(rmp, numbers(8), numbers(1), GUEST)
            entry = rmp.load(numbers(8)).copy()
            entry[0] |= numbers(1 << 61 | 1 << 62, 0x030500)
            rmp.store(numbers(8), entry)
            assert rmpupdate(rmp, numbers(8), numbers(gfn), other).tolist() == [0]
            low, high = rmp.load(numbers(8))[0].tolist()
            kept = other.asid == 5 and gfn == 1
            assert (low >> 61 & 3, high) == ((3, 0x03050F) if kept else (0, 0xF))


@both
def test_a_2mb_entry_marks_its_other_pages(mapping: bool) -> None:
    rmp = table(mapping)
    assert rmpupdate(rmp, numbers(512), numbers(0x49800), NewState(assigned=True, asid=3, large=True)).tolist() == [0]
    assert raw(rmp, 512) == 0x0018000049800003
    assert rmp.load(range(513, 1024)).tolist() == [[1, 0]] * 511
    assert rmp.counters(3) == 512
    again = NewState(assigned=True, asid=4, large=True)  # a 2 MB entry is no overlap with itself
    assert rmpupdate(rmp, numbers(512), numbers(0), again).tolist() == [0]
    assert (rmp.counters(3), rmp.counters(4)) == (0, 512)
    assert rmpupdate(rmp, numbers(512), numbers(0), NewState(assigned=False, large=True)).tolist() == [0]
    assert not rmp.load(range(512, 1024)).any()


@both
def test_a_run_is_the_same_as_its_pages_one_by_one(mapping: bool) -> None:
    whole, single = table(mapping), table(mapping)
    pages = np.array([5, 700, 5, 6, 5, 512], np.uint64)
    for new in (GUEST, HYPERVISOR, NewState(assigned=True, asid=5, immutable=True), GUEST):
        codes = rmpupdate(whole, pages, pages + np.uint64(3), new)
        one = [int(rmpupdate(single, pages[i : i + 1], pages[i : i + 1] + np.uint64(3), new)[0]) for i in range(6)]
        assert codes.tolist() == one
    assert (whole.load(range(ENTRIES)) == single.load(range(ENTRIES))).all()


BAD_OPERANDS = [
    (np.array([1.0]), numbers(1), TypeError, r"pages = float64 \(1,\): a range or an array of integers"),
    ([1], numbers(1), TypeError, r"pages = \[1\]: a range or an array of integers"),
    (numbers(1), np.array([[1]]), TypeError, r"gfns = int64 \(1, 1\)"),
    (np.array([-1]), numbers(1), ValueError, "pages: -1 is no page number"),
    (range(-1, 1), range(2), ValueError, "pages: -1 is no page number"),
    (range(5, 3, -1), range(2), ValueError, "a run goes upwards"),
    (range(3), range(2), ValueError, "gfns has 2 pages, pages has 3: they must match"),
    (numbers(1), numbers(1 << 39), ValueError, "gfns: page 0x8000000000 is beyond the last, 0x7fffffffff"),
]


@both
@pytest.mark.parametrize(("pages", "gfns", "error", "text"), BAD_OPERANDS)
def test_bad_operands_change_nothing(mapping: bool, pages: Any, gfns: Any, error: type[Exception], text: str) -> None:
    rmp = table(mapping)
    with pytest.raises(error, match=text):
        rmpupdate(rmp, pages, gfns, GUEST)
    assert not rmp.load(range(ENTRIES)).any()


@pytest.mark.parametrize(("asid", "error"), [(1024, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_an_asid_fits_the_entry(asid: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="asid"):
        NewState(assigned=True, asid=asid)


def test_arrays_of_any_integer_type_are_page_numbers() -> None:
    rmp = table()
    assert rmpupdate(rmp, np.array([3, 4]), np.array([1, 2], np.uint8), GUEST).tolist() == [0, 0]
    assert raw(rmp, 4) == 0x0028000000002001


# PVALIDATE


def guest_pages(mapping: bool, *pages: int) -> Rmp:
    rmp = table(mapping)
    assert not rmpupdate(rmp, numbers(*pages), numbers(*pages), GUEST).any()
    return rmp


@both
def test_validation_and_its_alarm(mapping: bool) -> None:
    rmp = guest_pages(mapping, 1, 2, 3)
    one_and_two, all_three = numbers(1, 2), numbers(1, 2, 3)
    first = pvalidate(rmp, one_and_two, one_and_two, 5, True)
    assert (first.codes.tolist(), first.unchanged.tolist(), first.fault) == ([0, 0], [False, False], None)
    second = pvalidate(rmp, all_three, all_three, 5, True)
    assert second.unchanged.tolist() == [True, True, False]
    assert [raw(rmp, page) >> 62 & 1 for page in (1, 2, 3)] == [1, 1, 1]
    undone = pvalidate(rmp, all_three, all_three, 5, False)
    assert undone.unchanged.tolist() == [False] * 3
    assert not [page for page in (1, 2, 3) if raw(rmp, page) >> 62 & 1]


@both
def test_a_page_named_twice_is_validated_once(mapping: bool) -> None:
    rmp = guest_pages(mapping, 1, 2)
    pages = numbers(2, 1, 2, 2)
    assert pvalidate(rmp, pages, pages, 5, True).unchanged.tolist() == [False, False, True, True]


@both
@pytest.mark.parametrize(
    ("page", "gfn", "fault"),
    [
        (ENTRIES, ENTRIES, Access.NOT_COVERED),
        (9, 9, Access.NOT_GUEST_OWNED),
        (3, 4, Access.REVERSE_MAP),
        (6, 6, Access.IMMUTABLE),
        (513, 513, Access.PAGE_SIZE),
    ],
)
def test_a_fault_in_the_middle_leaves_the_rest_untouched(mapping: bool, page: int, gfn: int, fault: Access) -> None:
    rmp = guest_pages(mapping, 1, 2, 3, 4)
    rmpupdate(rmp, numbers(6), numbers(6), NewState(assigned=True, asid=5, immutable=True))
    rmpupdate(rmp, numbers(512), numbers(512), LARGE)
    done = pvalidate(rmp, numbers(1, 2, page, 4), numbers(1, 2, gfn, 4), 5, True)
    assert (done.codes.tolist(), done.fault) == ([0, 0], fault)
    assert [raw(rmp, p) >> 62 & 1 for p in (1, 2, 3, 4, 6, 512)] == [1, 1, 0, 0, 0, 0]


@both
def test_sizes_that_differ(mapping: bool) -> None:
    rmp = guest_pages(mapping, 0, 1)
    rmpupdate(rmp, numbers(512), numbers(512), LARGE)
    done = pvalidate(rmp, numbers(0, 512), numbers(0, 512), 5, True, large=True)
    assert (done.codes.tolist(), done.unchanged.tolist()) == ([RmpCode.FAIL_SIZEMISMATCH, 0], [False, False])
    assert (raw(rmp, 0) >> 62 & 1, raw(rmp, 512) >> 62 & 1, raw(rmp, 513)) == (0, 1, 1)


@both
def test_a_2mb_page_at_an_odd_place_is_validated_in_its_own_entry(mapping: bool) -> None:
    """The host may assign a 2 MB page of guest page 509 and map guest page 512 to its fourth page."""
    rmp = table(mapping)
    rmpupdate(rmp, numbers(512), numbers(509), LARGE)
    done = pvalidate(rmp, numbers(515, 512), numbers(512, 509), 5, True, large=True)
    assert (done.codes.tolist(), done.unchanged.tolist(), done.fault) == ([0, 0], [False, True], None)
    assert (raw(rmp, 512) >> 62 & 1, raw(rmp, 515)) == (1, 1)
