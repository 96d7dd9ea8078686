"""The references against the model: the table's own arithmetic and the decoded columns, on random input."""

from typing import Any

import numpy as np
import pytest

from snpbook.exercises import exercise
from snpbook.exercises.checking import tried
from snpbook.exercises.page_moves import accept_part, bring_in
from snpbook.exercises.reverse_map_table import decode, double_mappings, rmp_end
from snpbook.exercises.vmpl_rights import grant
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.rmp_range import RmpRange
from snpbook.spec.pages import VmplPermission
from snpbook.spec.rmp import RMP_ENTRY


def test_decode_equals_the_layout() -> None:
    rng = np.random.default_rng(2)
    for low in rng.integers(0, 1 << 64, 500, np.uint64).tolist():
        entry = RMP_ENTRY.unpack(low.to_bytes(8, "little") + bytes(8))
        assert decode(low) == {
            "asid": entry.asid, "gpa": entry.gfn << 12, "pages": 512 if entry.page_size else 1,
            "validated": bool(entry.validated),
        }  # fmt: skip


def test_the_end_of_the_table_is_the_documents() -> None:
    assert rmp_end(0x10_0000, 4 << 30) == 0x110_3FFF
    for memory in range(4096, 4096 * 2000, 4096 * 37):
        where = RmpRange(0x10_0000, rmp_end(0x10_0000, memory))
        assert where.fits(1 << 52)
        assert 0 <= where.entries - memory // 4096 < 512


def test_double_mappings_equal_a_count() -> None:
    rng = np.random.default_rng(5)
    fields = [
        {
            "assigned": 1,
            "validated": int(rng.integers(2)),
            "asid": int(rng.integers(1, 3)),
            "gfn": int(rng.integers(40)),
        }
        for _ in range(120)
    ]
    words = np.frombuffer(b"".join(RMP_ENTRY.pack(**entry) for entry in fields), "<u8").reshape(-1, 2)
    valid = [(entry["asid"], entry["gfn"]) for entry in fields if entry["validated"]]
    assert double_mappings(words) == sorted({pair for pair in valid if valid.count(pair) > 1})


def silently(reference: Any) -> Any:
    """The same work, and nothing returned: what a reader writes where only the machine counts."""

    def answer(*given: Any) -> None:
        reference(*given)

    return answer


def bring_in_by_words(host: Any, guest: Any, page: int, gfn: int) -> None:
    low = int(host.rmp_words(range(page, page + 1))[0, 0])
    if not (low & 1 and low >> 51 & 0x3FF == guest.asid and low >> 12 & (1 << 39) - 1 == gfn):
        host.rmpupdate(range(page, page + 1), range(gfn, gfn + 1), NewState(assigned=True, asid=guest.asid))
    guest.pvalidate(gfn)


def accept_page_by_page(host: Any, guest: Any, page: int, gfn: int, count: int) -> None:
    if host.rmp_entry(page).page_size:
        if count == 512:
            guest.pvalidate(gfn, large=True)
            return
        host.psmash(range(page, page + 1))
    for number in range(count):
        guest.pvalidate(gfn + number)


def grant_page_by_page(guest: Any, gfn: int, count: int, large: bool) -> bool:
    for number in range(count):
        guest.rmpadjust(gfn + number * (512 if large else 1), target=1, rights=VmplPermission.READ, large=large)
    return True


def grant_by_trial(guest: Any, gfn: int, count: int, large: bool) -> None:
    if guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ).fault:
        guest.rmpadjust(gfn, count, target=1, rights=VmplPermission.READ, large=True)


def grant_and_take_back(guest: Any, gfn: int, count: int, large: bool) -> None:
    for rights in (VmplPermission.ALL, VmplPermission.READ):
        guest.rmpadjust(gfn, count, target=1, rights=rights, large=large)


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (1, lambda low: {**decode(low), "validated": low >> 62 & 1, "asid": np.uint64(decode(low)["asid"])}),
        (4, silently(bring_in)),
        (4, bring_in_by_words),
        (5, silently(accept_part)),
        (5, accept_page_by_page),
        (6, silently(grant)),
        (6, grant_page_by_page),
        (6, grant_by_trial),
        (6, grant_and_take_back),
    ],
)
def test_other_right_answers_pass(number: int, answer: Any) -> None:
    outcome = tried(exercise(f"reverse_map_table.{number}"), answer)
    assert outcome, outcome


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        (1, lambda low: tuple(decode(low).values()), "Rule: expected a dict, found a list"),
        (1, lambda low: {**decode(low), "asid": "5"}, "Rule: expected a number, found text"),
        (4, lambda host, guest, page, gfn: "done", "Rule: your function executes no instruction yet"),
        (5, lambda host, guest, page, gfn, count: guest.pvalidate(gfn, large=True) if count == 512 else None,
         "(your function executes no instruction here)"),
        (5, lambda host, guest, page, gfn, count: guest.pvalidate(gfn, min(count, 16)), "SIZE_MISMATCH"),
        (6, lambda guest, gfn, count, large: guest.rmpadjust(gfn, target=0, rights=VmplPermission.READ),
         "'VMPL1': 'NONE on 1'"),
    ],
)  # fmt: skip
def test_strange_answers_are_told(number: int, answer: Any, words: str) -> None:
    assert words in repr(tried(exercise(f"reverse_map_table.{number}"), answer))
