"""All RMP instructions equal the scalar reference in every code, entry and counter; the host's rules one by one."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware import host_instructions
from snpbook.hardware.checks import Access
from snpbook.hardware.host_instructions import HYPERVISOR, NewState, psmash, rmpread, rmpupdate, rmpupdate_one
from snpbook.hardware.page_instructions import pvalidate_one
from snpbook.hardware.rmp import Rmp
from snpbook.spec.rmp import RMPUPDATE_STATE, RmpCode
from tests.hardware.tables import ENTRIES, assert_same, compare, copy, fill, segments, table
from tests.reference.rmp import ReferenceRmp

both = pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])
GUEST = NewState(assigned=True, asid=5)
LARGE = NewState(assigned=True, asid=5, large=True)


def numbers(*pages: int) -> Any:
    return np.array(pages, np.uint64)


def raw(rmp: Rmp, page: int) -> int:
    return int(rmp.load(range(page, page + 1))[0, 0])


def set_raw(rmp: Rmp, page: int, low: int, high: int = 0xF) -> None:
    rmp.store(numbers(page), np.array([[low, high]], np.uint64))


@pytest.mark.parametrize("make", [table, lambda: table(mapping=False), segments], ids=["map", "dict", "segments"])
@given(rng=st.randoms(use_true_random=False))
def test_random_operations_equal_the_reference(make: Callable[[], Rmp], rng: random.Random) -> None:
    compare(rng, make())


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
    monkeypatch.setattr(host_instructions, "CHUNK", 1024)
    model, rmp = ReferenceRmp(ENTRIES), table()
    fill(model, random.Random(11))
    copy(model, rmp)
    pages = range(0, ENTRIES + 512, 512 if large else 1)
    codes = rmpupdate(rmp, pages, range(4096, 4096 + len(pages)), NewState(assigned=True, asid=2, large=large))
    assert codes.tolist() == [model.rmpupdate(p, 4096 + i, True, 2, large=large) for i, p in enumerate(pages)]
    assert_same(model, rmp)
    if large:
        assert psmash(rmp, pages).tolist() == [model.psmash(page) for page in pages]
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


@pytest.mark.parametrize(
    ("operand", "text"),
    [
        ((2, 1), "assigned = 2: True or False"),
        (("yes", 1), "assigned = 'yes': True or False"),
        ((True, 1, 1), "immutable = 1: True or False"),
        ((True, 1, False, 3), "large = 3: True or False"),
    ],
)
def test_flags_of_an_operand_are_true_or_false(operand: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        NewState(*operand)


def test_arrays_of_any_integer_type_are_page_numbers() -> None:
    rmp = table()
    assert rmpupdate(rmp, np.array([3, 4]), np.array([1, 2], np.uint8), GUEST).tolist() == [0, 0]
    assert raw(rmp, 4) == 0x0028000000002001


def test_every_change_is_noted() -> None:
    """Translations and snapshots depend on it; a refusal changes nothing, and is not noted."""
    for make in (table, lambda: table(mapping=False), segments):
        rmp = make()
        for done in (
            lambda rmp=rmp: rmpupdate(rmp, numbers(5), numbers(5), GUEST),
            lambda rmp=rmp: rmpupdate(rmp, numbers(6, 7), numbers(6, 7), GUEST),
            lambda rmp=rmp: rmpupdate(rmp, numbers(512), numbers(0), LARGE),
            lambda rmp=rmp: psmash(rmp, numbers(512)),
        ):
            before = rmp.changes
            rmp.dram.snapshot()
            assert not done().any()
            assert rmp.changes > before
            assert any(rmp.dram.written)
        before = rmp.changes
        assert rmpupdate(rmp, numbers(9), numbers(9), LARGE).any()
        assert rmpupdate(rmp, numbers(9), numbers(9), NewState(False, 5)).any()
        assert psmash(rmp, numbers(512)).any()
        assert rmp.changes == before


PRINTED = {
    "HV": (HYPERVISOR, 0, 0x0),
    "Firmware": (NewState(True, immutable=True), 0, 0x5),
    "Guest-Invalid": (NewState(True, 1), 0x1, 0x0008000000001001),
    "2 MB": (NewState(True, 3, large=True), 0x49800, 0x0018000049800003),
    "Pre-Guest": (NewState(True, 5, immutable=True), 0xFFFFFFFFF, 0x0028FFFFFFFFF005),
}
"""First quadwords as RMPUPDATE writes them; the firmware adds lock, vmsa and validated to some."""


@both
@pytest.mark.parametrize("name", PRINTED)
def test_printed_words(mapping: bool, name: str) -> None:
    new, gfn, word = PRINTED[name]
    rmp = table(mapping)
    assert rmpupdate(rmp, numbers(512), numbers(gfn), new).tolist() == [0]
    assert raw(rmp, 512) == word
    assert rmpupdate(rmp, numbers(517, 520, 1023), numbers(0, 1, 2), GUEST).any() == new.large
    if name == "HV":
        assert raw(rmp, 512) == 0x18  # three of its region are assigned


HYPERVISOR_PAGE, GUEST_INVALID, GUEST_VALID = 0, 0x0028000000001001, 0x4028000000001001
TRANSITIONS = {
    "Hypervisor to Guest-Invalid": (HYPERVISOR_PAGE, NewState(True, 5), GUEST_INVALID),
    "Guest-Invalid to Hypervisor": (GUEST_INVALID, HYPERVISOR, HYPERVISOR_PAGE),
    "Guest-Valid to Hypervisor": (GUEST_VALID, HYPERVISOR, HYPERVISOR_PAGE),
    "Hypervisor to Pre-Guest": (HYPERVISOR_PAGE, NewState(True, 5, immutable=True), GUEST_INVALID | 4),
    "Hypervisor to Firmware": (HYPERVISOR_PAGE, NewState(True, immutable=True), 0x1005),
    "Guest-Valid to Pre-Swap": (GUEST_VALID, NewState(True, 5, immutable=True), GUEST_VALID | 4),
    "Guest-Invalid to Pre-Guest": (GUEST_INVALID, NewState(True, 5, immutable=True), GUEST_INVALID | 4),
    "Reclaim to Hypervisor": (1, HYPERVISOR, HYPERVISOR_PAGE),
}


@both
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions(mapping: bool, name: str) -> None:
    before, new, after = TRANSITIONS[name]
    rmp = table(mapping)
    set_raw(rmp, 512, before)
    rmp.count(5, int(bool(before >> 51)))
    assert rmpupdate(rmp, numbers(512), numbers(1), new).tolist() == [0]
    assert raw(rmp, 512) == after
    assert rmp.counters(5) == bool(after >> 51)


# PSMASH


@both
def test_psmash_copies_everything_but_size_and_guest_page(mapping: bool) -> None:
    rmp = table(mapping)
    rmpupdate(rmp, numbers(512), numbers(0x49800), NewState(True, 3, large=True))
    set_raw(rmp, 512, raw(rmp, 512) | 1 << 62 | 1 << 61, 0x0102030F)
    assert psmash(rmp, range(512, 1536, 512)).tolist() == [0, RmpCode.FAIL_BADADDR]
    entries = rmp.load(range(512, 1024)).tolist()
    assert entries[0] == [0x6018000049800001 | 511 << 3, 0x0102030F]
    assert entries[1:] == [[0x6018000049800001 + (i << 12), 0x0102030F] for i in range(1, 512)]
    assert rmp.counters(3) == 512
    assert psmash(rmp, numbers(512)).tolist() == [RmpCode.FAIL_BADADDR]
    assert rmpupdate(rmp, range(512, 1024), range(512), HYPERVISOR).tolist() == [0] * 512
    assert not rmp.load(range(512, 1024)).any()


@both
def test_psmash_order_of_the_checks(mapping: bool) -> None:
    rmp = table(mapping)
    rmpupdate(rmp, numbers(512, 1024), numbers(0, 0), LARGE)
    rmpupdate(rmp, numbers(1024), numbers(0), NewState(True, 5, immutable=True, large=True))
    before = rmp.load(range(ENTRIES)).copy()
    pages = numbers(513, ENTRIES + 1, ENTRIES, 0, 1024)
    assert psmash(rmp, pages).tolist() == [1, 1, 1, 7, 2]
    assert psmash(rmp, pages, {3, 1535, ENTRIES}).tolist() == [1, 1, 1, 3, 3]
    assert psmash(rmp, numbers(512), {1023}).tolist() == [3]
    assert (rmp.load(range(ENTRIES)) == before).all()
    assert psmash(rmp, numbers(512, 512)).tolist() == [0, 7]
    with pytest.raises(TypeError, match="pages = float64"):
        psmash(rmp, np.array([512.0]))


# RMPREAD


@both
def test_rmpread_tells_what_rmpupdate_was_told(mapping: bool) -> None:
    rmp = table(mapping)
    rmpupdate(rmp, numbers(512), numbers(0x49800), NewState(True, 3, large=True))
    rmpupdate(rmp, numbers(1025), numbers(0x77), NewState(True, 509, immutable=True))
    codes, found = rmpread(rmp, numbers(512, 513, 1024, 1025, 0, ENTRIES))
    assert codes.tolist() == [0, 0, 0, 0, 0, 1]
    assert [RMPUPDATE_STATE.unpack(row.tobytes()) for row in found] == [
        RMPUPDATE_STATE.record(gpa=0x49800000, assigned=1, page_size=1, asid=3),
        RMPUPDATE_STATE.record(assigned=1),  # its own entry
        RMPUPDATE_STATE.record(region_status=1),
        RMPUPDATE_STATE.record(gpa=0x77000, assigned=1, immutable=1, asid=509),
        RMPUPDATE_STATE.record(),
        RMPUPDATE_STATE.record(),
    ]
    assert found[3].tobytes().hex() == "007007000000000001000100fd010000"
