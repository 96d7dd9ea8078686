"""The pictures of the chapter on the guest, as a reader reads them: sequence, GHCB page, two eyes, acceptance."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from snpbook.attest.checks import Result
from snpbook.spec.ghcb import GHCB, Nae, valid_bitmap
from snpbook.spec.layout import Record
from snpbook.views.acceptance_course import Course, Point, course
from snpbook.views.ghcb_page import Exchange, ghcb_page, list_header, marked
from snpbook.views.page_seen import Seen, page_seen
from snpbook.views.sequence import Party, Step, ending, sequence
from tests.views.reading import read

SVG = "{http://www.w3.org/2000/svg}"
ENTRY = {"gpa": "0x5000", "asid": "1", "assigned": True, "validated": True}


def page(*marks: str, **fields: int | bytes) -> Record:
    return GHCB.record(valid_bitmap=valid_bitmap(*marks), **fields)


def drawn(html: str) -> ET.Element:
    ((_, picture),) = read(html).pictures
    return picture


def frames(picture: ET.Element, **attributes: str) -> int:
    return sum(
        all(each.get(name.replace("_", "-")) == value for name, value in attributes.items())
        for each in picture.iter(f"{SVG}rect")
    )


# The sequence.


def test_each_step_is_drawn_and_listed() -> None:
    steps = [
        Step(Party.PROGRAM, Party.KERNEL, "CPUID"),
        Step(Party.KVM, Party.KVM, "RMPUPDATE"),
        Step(Party.KVM, Party.GHCB, "writes RAX = 0x5", tampered=True),
    ]
    shown = sequence(steps, "A play")
    picture = drawn(shown.html)
    texts = [each.text for each in picture.iter(f"{SVG}text")]
    assert [text for text in texts if text in ("CPUID", "RMPUPDATE", "✗ writes RAX = 0x5")] == [
        "CPUID", "RMPUPDATE", "✗ writes RAX = 0x5",
    ]  # fmt: skip
    arrows = [each for each in picture.iter(f"{SVG}path") if each.get("marker-end")]
    assert [arrow.get("stroke-dasharray") for arrow in arrows] == ["none", "6 4"]
    assert len(list(picture.iter(f"{SVG}circle"))) == 1
    rows = shown.text.splitlines()
    assert rows[3].split() == ["1", "program", "guest", "kernel", "CPUID"]
    assert rows[5].endswith("✗ writes RAX = 0x5")


def test_no_words_leave_the_picture() -> None:
    steps = [Step(source, target, "w" * 90) for source in Party for target in Party]
    picture = drawn(sequence(steps, "Wide").html)
    for text in picture.iter(f"{SVG}text"):
        if text.text and text.text.startswith("www"):
            assert 90 * 6.6 / 2 <= float(text.get("x", 0)) <= float(picture.get("width", 0)) - 90 * 6.6 / 2


def test_a_long_play_is_cut_in_its_middle() -> None:
    steps = [Step(Party.KERNEL, Party.KVM, f"number {n}") for n in range(100)]
    text = sequence(steps, "Long").text
    assert "number 17" in text
    assert "… 76 steps more …" in text
    assert "number 94" in text
    assert "number 50" not in text
    assert "… " not in sequence(steps[:24], "Short").text


@pytest.mark.parametrize(("result", "words"), [(Result.PASSED, "goes on"), (Result.FAILED, "stops"),
                                              (Result.SKIPPED, "hangs")])  # fmt: skip
def test_endings(result: Result, words: str) -> None:
    shown = ending(result, "because <b>")
    assert f"the guest {words}: because <b>" in shown.text
    assert "because <b>" in read(shown.html).words


# The GHCB page.

ASKED = page("rax", "sw_exit_code", sw_exit_code=Nae.CPUID, rax=1)
ANSWERED = page("rax", "rbx", sw_exit_code=Nae.CPUID, rax=0x1234, rbx=7)


def test_marks_are_framed_and_changes_stand_out() -> None:
    shown = ghcb_page(Exchange(ASKED, ANSWERED, ANSWERED.replace(rbx=9)))
    picture = drawn(shown.html)
    assert frames(picture, fill_opacity="0.16") == 4, "two marked quadwords on each side"
    assert frames(picture, stroke_dasharray="4 3") == 1
    assert frames(picture, stroke_width="2", fill="none") == 4, "the bitmap, twice two quadwords"
    rows = {line[8:].split("  ")[0]: line for line in shown.text.splitlines()}
    assert rows["RAX"].split()[2:] == ["0x1", "✓", "0x1234", "✓", "0x1234", "✓"]
    assert rows["RBX"].split()[2:] == ["0x7", "✓", "✗", "0x9", "✓"]
    assert "bits 63, 114" in rows["valid bitmap"]
    assert "changed after the answer: RBX" in read(shown.html).pictures[0][0]


def test_a_mark_that_is_taken_away_stands_out() -> None:
    found = ANSWERED.replace(valid_bitmap=valid_bitmap("rbx"))
    shown = ghcb_page(Exchange(ASKED, ANSWERED, found))
    assert "✗ bits 99" in shown.text
    assert "0x1234 ✓" in shown.text
    assert "✗ 0x1234" in shown.text
    assert marked(found) == ["rbx"]


def test_bytes_are_where_the_document_has_them() -> None:
    """SW_EXITCODE is at 0x390, RAX at 0x1F8, PROTOCOL_VERSION at 0xFFA."""
    made = page("rax", sw_exit_code=Nae.CPUID, rax=0xAB, protocol_version=2)
    picture = drawn(ghcb_page(Exchange(made, made, made)).html)
    texts = [each.text for each in picture.iter(f"{SVG}text")]
    assert [text for text in texts if text and text.startswith("0x")] == ["0x1f0", "0x390", "0x3f0", "0xff0"]
    assert texts.count("ab") == texts.count("72") == 2


def test_a_list_is_taken_apart() -> None:
    buffer = b"\2\0\7\0\0\0\1\0".ljust(2032, b"\0")
    made = page("sw_exit_code", sw_exit_code=Nae.PAGE_STATE_CHANGE, shared_buffer=buffer)
    assert list_header(made) == (2, 7, 0x10000)
    rows = [line.split() for line in ghcb_page(Exchange(made, made, made)).text.splitlines()]
    assert ["0x802", "list:", "end_entry", "7", "7", "7"] in rows
    assert "list: cur_entry" not in ghcb_page(Exchange(ASKED, ASKED, ASKED)).text


# Two eyes.


def test_both_eyes() -> None:
    private = Seen(0x5000, b"\x8f" * 32, b"secret".ljust(32, b"\0"), "", 0x9000, ENTRY, True, True, True)
    shown = page_seen(private)
    rows = {line[:19].strip(): line for line in shown.text.splitlines()}
    assert rows["as text"].split(maxsplit=3)[2:] == ["·" * 32, "secret" + "·" * 26]
    assert "private (attribute in KVM)" in rows["private or shared"]
    assert "private (C-bit 1)" in rows["private or shared"]
    assert rows["validated"].split() == ["validated", "yes", "accepted", "by", "itself"]
    assert read(shown.html).tables == ["The page at GPA 0x5000"]


def test_what_one_of_them_cannot_see() -> None:
    untouched = Seen(0x5000, None, None, "not accepted", 0, {}, True, True, False)
    text = page_seen(untouched).text
    for words in ("nowhere yet", "✗ no memory behind it yet", "✗ not accepted", "no page", "not accepted by itself"):
        assert words in text
    shared = Seen(0x5000, bytes(32), bytes(32), "", 0x9000, {"assigned": False}, False, False, False)
    assert "the hypervisor's" in page_seen(shared).text
    assert "shared (C-bit 0)" in page_seen(shared).text


# Acceptance.


@pytest.mark.parametrize(
    ("share", "used"), [(0, [0]), (25, [0, 2]), (49, [0, 2]), (50, [0, 2, 4]), (100, [0, 2, 4, 6, 8])]
)
def test_a_course_ends_where_less_is_used(share: int, used: list[int]) -> None:
    whole = Course("lazy", tuple(Point(2 * n, 4 + 2 * n, 10 * n, n) for n in range(5)))
    assert [point.used for point in whole.until(share).points] == used
    assert whole.until(share).name == "lazy"


def test_courses_are_stairs_with_numbers() -> None:
    eager = Course("eager", (Point(0, 16, 4000, 20), Point(4, 16, 4000, 20)))
    lazy = Course("lazy", (Point(0, 4, 1000, 20), Point(2, 6, 1500, 21), Point(4, 8, 2000, 22)))
    shown = course([eager, lazy], 16)
    picture = drawn(shown.html)
    paths = [each.get("d", "") for each in picture.iter(f"{SVG}path")]
    assert [path.count("H") for path in paths] == [1, 2]
    assert [each.get("stroke-dasharray") for each in picture.iter(f"{SVG}path")] == ["none", "7 4"]
    rows = shown.text.splitlines()
    assert rows[4].split() == ["eager,", "at", "the", "end", "16.0", "4,000", "20"]
    assert rows[6].split()[-3:] == ["8.0", "2,000", "22"]
    assert "programs use 4 MiB" in shown.text
