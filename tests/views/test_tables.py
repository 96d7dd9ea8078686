from itertools import pairwise

import pytest

from snpbook.attest.checks import Check, Result
from snpbook.spec.layout import REGISTRY, Layout
from snpbook.spec.rmp import RMP_ENTRY
from snpbook.views.bits import bits
from snpbook.views.checks import checks
from snpbook.views.page import entry_fields, page, permissions
from snpbook.views.svg import image
from snpbook.views.tables import table
from snpbook.views.values import show
from tests.views.reading import read


def test_table_escapes_and_aligns() -> None:
    view = table("A <b>", ["name", "value"], [("x & y", "1"), ("z", "<script>")], mono=["value"], note="end")
    page_ = read(view.html)
    assert page_.tables == ["A <b>"]
    assert "<script>" in page_.words
    assert view.text.splitlines() == ["A <b>", "name   value", "-----  --------", "x & y  1", "z      <script>", "end"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Odd: a row of 1 cells in a table of 2 columns"):
        table("Odd", ["a", "b"], [("1",)])


def test_a_picture_without_alternative_is_refused() -> None:
    with pytest.raises(ValueError, match="text alternative"):
        image("<svg/>", "  ")


def test_checks_tell_verdict_by_word_and_mark() -> None:
    made = [
        Check("report.version", Result.PASSED, 3, 3, "SNP"),
        Check("report.signature", Result.FAILED, b"\1" * 48, "bad", "SNP"),
        Check("chain.crl", Result.SKIPPED, "", "no CRL given", "KDS"),
    ]
    view = checks(made)
    assert "✗ failed" in view.text
    assert view.text.endswith("1 passed, 1 failed, 1 skipped")
    assert "010101010101010101010101… (48 bytes)" in read(view.html).words


@pytest.mark.parametrize("layout", REGISTRY.values(), ids=lambda layout: layout.name)
def test_every_layout_has_a_diagram(layout: Layout) -> None:
    view = bits(layout)
    page_ = read(view.html)
    for name in layout.fields:
        assert name in view.text
    for _, picture in page_.pictures:
        drawn = [node.text for node in picture.iter() if node.tag.endswith("text")]
        assert set(layout.fields) <= set(drawn)
        boxes = [node for node in picture.iter() if node.tag.endswith("rect") and node.get("stroke")]
        assert len(boxes) >= len(layout.rows())


def test_boxes_of_a_row_fill_it_and_do_not_overlap() -> None:
    (_, picture), *_ = read(bits(RMP_ENTRY).html).pictures
    spans: dict[str, list[tuple[float, float]]] = {}
    for node in picture.iter():
        if node.tag.endswith("rect") and node.get("stroke"):
            x, width = float(node.get("x", "")), float(node.get("width", ""))
            spans.setdefault(node.get("y", ""), []).append((x, x + width))
    assert len(spans) == 2
    for row in map(sorted, spans.values()):
        assert all(abs(one[1] - other[0]) < 0.01 for one, other in pairwise(row))


def test_inspector_decodes_an_entry() -> None:
    entry = RMP_ENTRY.record(assigned=1, asid=5, gfn=0xFFFFF, validated=1, vmsa=1, vmpl0=0x1F, vmpl1=0x3)
    lines = page(0x43001, 0xC, entry_fields(entry)).text.splitlines()
    assert lines[0] == "Page 0x4_3001"
    told = dict(line.split(maxsplit=1) for line in lines[1:] if not line.startswith("page size"))
    assert told["state"] == "V  Guest-Valid"
    assert (told["spa"], told["gpa"], told["asid"]) == ("0x4300_1000", "0xffff_f000", "5")
    assert (told["validated"], told["immutable"], told["vmsa"]) == ("yes", "no", "yes")
    assert (told["VMPL0"], told["VMPL1"], told["VMPL3"]) == ("R W Xu Xs SSS", "R W", "none")


def test_permissions_name_each_right() -> None:
    assert [permissions(1 << bit) for bit in range(5)] == ["R", "W", "Xu", "Xs", "SSS"]


def test_values_read_well() -> None:
    assert [show(v) for v in (None, True, 9, 10, 0x12345678, b"\1\2", "x")] == [
        "", "yes", "9", "0xa", "0x1234_5678", "0102", "x",
    ]  # fmt: skip
