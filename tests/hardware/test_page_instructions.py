"""PVALIDATE, RMPADJUST and RMPQUERY on the table: the rules one by one; random runs are in `test_host_instructions`."""

import pytest

from snpbook.hardware.checks import Access
from snpbook.hardware.host_instructions import NewState, rmpupdate
from snpbook.hardware.page_instructions import pvalidate, rmpadjust, rmpquery
from snpbook.hardware.rmp import Rmp
from snpbook.spec.rmp import RmpCode
from tests.hardware.tables import ENTRIES, segments, table
from tests.hardware.test_host_instructions import GUEST, LARGE, both, numbers, raw, set_raw

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


@both
def test_pvalidate_between_guest_invalid_and_guest_valid(mapping: bool) -> None:
    rmp = table(mapping)
    rmpupdate(rmp, numbers(8), numbers(1), NewState(True, 1))
    rmpupdate(rmp, numbers(512), numbers(0x49800), NewState(True, 3, large=True))
    assert pvalidate(rmp, numbers(8), numbers(1), 1, True).fault is None
    assert raw(rmp, 8) == 0x4008000000001001
    assert pvalidate(rmp, numbers(8), numbers(1), 1, False).fault is None
    assert raw(rmp, 8) == 0x0008000000001001
    assert pvalidate(rmp, numbers(512), numbers(0x49800), 3, True, large=True).fault is None
    assert raw(rmp, 512) == 0x4018000049800003


def test_every_change_is_noted() -> None:
    for make in (table, lambda: table(mapping=False), segments):
        rmp = make()
        for page in (1, 2, 3):
            rmpupdate(rmp, numbers(page), numbers(page), GUEST)
        for pages in (numbers(1), numbers(2, 3)):
            before = rmp.changes
            rmp.dram.snapshot()
            pvalidate(rmp, pages, pages, 5, True)
            assert rmp.changes > before
            assert any(rmp.dram.written)
            before = rmp.changes
            assert not rmpadjust(rmp, pages, pages, 5, 0, 1, 3, False).codes.any()
            assert rmp.changes > before
        before = rmp.changes
        pvalidate(rmp, numbers(1, 2), numbers(1, 2), 5, True)
        pvalidate(rmp, numbers(1), numbers(1), 5, True)
        assert rmpadjust(rmp, numbers(1), numbers(1), 5, 1, 2, 4, False).codes.tolist() == [2]
        assert rmp.changes == before


# RMPADJUST


def validated(mapping: bool, *pages: int) -> Rmp:
    rmp = guest_pages(mapping, *pages)
    rmpupdate(rmp, numbers(512), numbers(512), LARGE)
    for page in (*pages, 512):
        set_raw(rmp, page, raw(rmp, page) | 1 << 62, 0x0103050F)
    return rmp


def rights(rmp: Rmp, page: int) -> int:
    return int(rmp.load(range(page, page + 1))[0, 1])


@both
def test_rights_are_granted_by_those_who_hold_them(mapping: bool) -> None:
    rmp = validated(mapping, 1, 2)
    set_raw(rmp, 2, raw(rmp, 2), 0x0103070F)
    pages = numbers(1, 2)
    assert rmpadjust(rmp, pages, pages, 5, 1, 3, 7, False).codes.tolist() == [RmpCode.FAIL_PERMISSION, 0]
    assert (rights(rmp, 1), rights(rmp, 2)) == (0x0103050F, 0x0703070F)
    assert rmpadjust(rmp, pages, pages, 5, 1, 2, 0, False).codes.tolist() == [0, 0]
    assert (rights(rmp, 1), rights(rmp, 2)) == (0x0100050F, 0x0700070F)
    assert rmpadjust(rmp, pages, pages, 5, 0, 1, 0x1F, False).codes.tolist() == [2, 2]  # VMPL0 holds no shadow stack


@both
def test_the_vmsa_bit_is_vmpl0s(mapping: bool) -> None:
    rmp = validated(mapping, 1)
    page, plain = numbers(1), raw(validated(mapping, 1), 1)
    rmpadjust(rmp, page, page, 5, 1, 2, 1, True)
    assert raw(rmp, 1) == plain
    rmpadjust(rmp, page, page, 5, 0, 2, 1, True)
    assert raw(rmp, 1) == plain | 1 << 61
    rmpadjust(rmp, page, page, 5, 1, 2, 1, False)
    assert raw(rmp, 1) == plain | 1 << 61
    rmpadjust(rmp, page, page, 5, 0, 2, 1, False)
    assert raw(rmp, 1) == plain


@both
def test_rmpadjust_of_2mb_changes_the_2mb_entry(mapping: bool) -> None:
    rmp = validated(mapping, 1)
    before = raw(rmp, 512)
    assert rmpadjust(rmp, numbers(512), numbers(512), 5, 0, 1, 2, False, large=True).codes.tolist() == [0]
    assert (raw(rmp, 512), rights(rmp, 512)) == (before, 0x0103020F)
    assert rmp.load(range(513, 1024)).tolist() == [[1, 0]] * 511
    done = rmpadjust(rmp, numbers(1, 515), numbers(1, 515), 5, 0, 1, 1, False)
    assert (done.codes.tolist(), done.fault) == ([0], Access.PAGE_SIZE)


@both
def test_validation_comes_before_the_size_of_a_2mb_request(mapping: bool) -> None:
    rmp = validated(mapping, 0)
    done = rmpadjust(rmp, numbers(0), numbers(0), 5, 0, 1, 1, False, large=True)
    assert (done.codes.tolist(), done.fault) == ([RmpCode.FAIL_SIZEMISMATCH], None)
    pvalidate(rmp, numbers(0), numbers(0), 5, False)
    done = rmpadjust(rmp, numbers(0), numbers(0), 5, 0, 1, 1, False, large=True)
    assert (done.codes.tolist(), done.fault) == ([], Access.NOT_VALIDATED)
    set_raw(rmp, 512, raw(rmp, 512) & ~(1 << 62))
    done = rmpadjust(rmp, numbers(515), numbers(515), 5, 0, 1, 1, False)
    assert done.fault is Access.PAGE_SIZE


@both
@pytest.mark.parametrize(("vmpl", "target", "code"), [(0, 0, 2), (1, 0, 2), (3, 3, 2), (0, 4, 1), (3, 4, 1)])
def test_targets(mapping: bool, vmpl: int, target: int, code: int) -> None:
    rmp = validated(mapping, 1)
    before = rmp.load(range(ENTRIES)).copy()
    pages = numbers(1, ENTRIES)
    done = rmpadjust(rmp, pages, pages, 5, vmpl, target, 1, True)
    assert (done.codes.tolist(), done.fault) == ([code, code], None)
    query = rmpquery(rmp, pages, pages, 5, vmpl, target)
    assert (query.codes.tolist(), query.permissions.tolist(), query.fault) == ([2, 2], [0, 0], None)
    assert (rmp.load(range(ENTRIES)) == before).all()


@both
@pytest.mark.parametrize(
    ("page", "gfn", "fault"),
    [
        (ENTRIES, ENTRIES, Access.NOT_COVERED),
        (9, 9, Access.NOT_GUEST_OWNED),
        (3, 4, Access.REVERSE_MAP),
        (6, 6, Access.IMMUTABLE),
        (7, 7, Access.NOT_VALIDATED),
    ],
)
def test_rights_up_to_a_fault_in_the_middle(mapping: bool, page: int, gfn: int, fault: Access) -> None:
    rmp = validated(mapping, 1, 2, 3, 4)
    rmpupdate(rmp, numbers(6), numbers(6), NewState(True, 5, immutable=True))
    rmpupdate(rmp, numbers(7), numbers(7), GUEST)
    places, guest = numbers(1, 2, page, 4), numbers(1, 2, gfn, 4)
    done = rmpadjust(rmp, places, guest, 5, 0, 1, 1, False)
    assert (done.codes.tolist(), done.fault, len(done.checks)) == ([0, 0], fault, 2)
    assert [rights(rmp, p) >> 8 & 0xFF for p in (1, 2, 3, 4)] == [1, 1, 5, 5]
    query = rmpquery(rmp, places, guest, 5, 0, 2)
    assert (query.codes.tolist(), query.permissions.tolist(), query.fault) == ([0, 0], [3, 3], fault)


# RMPQUERY


@both
def test_a_2mb_entry_answers_for_each_of_its_pages(mapping: bool) -> None:
    rmp = validated(mapping, 1)
    set_raw(rmp, 512, raw(rmp, 512) | 1 << 61, 0x0103050F)
    query = rmpquery(rmp, numbers(1, 512, 777), numbers(1, 512, 777), 5, 1, 3)
    assert (query.codes.tolist(), query.large.tolist()) == ([0, 0, 0], [False, True, True])
    assert (query.permissions.tolist(), query.vmsa.tolist()) == ([1, 1, 1], [False, True, True])
