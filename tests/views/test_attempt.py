"""What instructions answered, entries bit by bit, accesses explained, and the life of a page: both forms agree."""

import html
import re

import pytest

from snpbook.hardware.attempts import Order, attempt
from snpbook.hardware.checks import AccessKind
from snpbook.hardware.explorer import explain_device, explain_guest, explain_host
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.workbench import PLAY, Workbench
from snpbook.spec.pages import PageState
from snpbook.spec.transitions import PAGE_TRANSITIONS
from snpbook.spec.vmcb import PTE_NO_EXECUTE as NO_EXECUTE
from snpbook.spec.vmcb import FaultError
from snpbook.views import attempt as views
from snpbook.views.entry import entry, entry_change
from snpbook.views.explorer import explanation, survey, verdict
from snpbook.views.palette import PAGES
from snpbook.views.states import page_life
from tests.views.reading import read

P = PLAY.start
VALID = 0x4008000000011001
NEVER_SET = FaultError.SHADOW_STACK | FaultError.SUPERVISOR_SHADOW_STACK | FaultError.NOT_RESTARTABLE
"""Their rows say that what they tell of is not modelled."""


def assigned() -> Workbench:
    bench = Workbench()
    attempt(bench, Order("RMPUPDATE", range(P, P + 4), 0x10, NewState(True, 1)))
    bench.guest(1).map(0x10, range(P, P + 4))
    return bench


def test_pages_that_answer_alike_share_a_row() -> None:
    made = attempt(assigned(), Order("PVALIDATE", range(P, P + 6), 0x10, asid=1))
    view = views.attempt(made)
    lines = view.text.splitlines()
    assert lines[0] == "PVALIDATE by guest 1 at VMPL0"
    assert lines[3].split() == ["0x800..0x803", "(4)", "✓", "SUCCESS", "(0)", "CF", "=", "0"]
    assert "✗ #NPF" in lines[4]
    assert "EXITINFO1 0x580000005, EXITINFO2 0x14000  Guest-Owned" in lines[4]
    assert lines[4].endswith("assigned to ASID 1  not assigned  APM2 15.36.10")
    assert "\u2013 not reached" in lines[5]
    assert read(view.html).tables == [lines[0]]


def test_a_success_has_no_columns_for_refusals() -> None:
    view = views.attempt(attempt(Workbench(), Order("RMPUPDATE", range(P, P + 1), 0x10, NewState(True, 1))))
    assert view.text.splitlines()[1].split() == ["pages", "answer"]


def test_many_different_answers_are_cut() -> None:
    bench = Workbench()
    for page in range(P, P + 64, 2):
        attempt(bench, Order("RMPUPDATE", range(page, page + 1), 0, NewState(True, 1, immutable=True)))
    view = views.attempt(attempt(bench, Order("RMPUPDATE", range(P, P + 64), 0x10, NewState(True, 1))))
    assert view.text.endswith(f"and {64 - views.ROWS} more rows")


def test_an_entry_is_drawn_bit_by_bit() -> None:
    view = entry((VALID, 0x10F), "Page 0x801")
    ((alt, picture),) = read(view.html).pictures
    assert "0x4008000000011001 0x000000000000010f" in alt
    digits = [
        node for node in picture.iter() if "mono" in node.get("font-family", "") and node.get("font-size") == "11"
    ]
    ones = [str(node.text) for node in digits if set(str(node.text)) == {"1"}]
    assert sum(map(len, ones)) == bin(VALID).count("1") + bin(0x10F).count("1")
    drawn = {node.text for node in picture.iter() if node.tag.endswith("text")}
    assert {"validated", "asid", "gfn", "assigned", "vmpl3"} <= drawn
    assert "asid               1" in view.text
    assert "VMPL1              R" in view.text


def test_what_has_changed_is_told_and_marked() -> None:
    view = entry_change((VALID & ~(1 << 62), 15), (VALID, 15), "Page 0x801")
    assert [line.split()[0] for line in view.text.splitlines()[3:]] == ["raw,", "raw,", "validated"]
    ((alt, picture),) = read(view.html).pictures
    assert alt.endswith("changed: validated.")
    bold = [node.text for node in picture.iter() if node.get("font-weight") == "700"]
    assert bold == ["0", "1"]
    same = entry_change((VALID, 15), (VALID, 15), "Page 0x801")
    assert same.text.endswith("Nothing has changed.")


def test_an_access_that_fails_is_told_down_to_the_bits() -> None:
    bench = assigned()
    told = explain_guest(bench.guest(1).core(), 0x10000, AccessKind.WRITE)
    view = explanation(told)
    assert verdict(told).text == (
        "Write at 0x10000 by guest, ASID 1, VMPL0, CPL 0: #VC: the guest itself is told: "
        "Validated wants validated, found not validated"
    )
    assert read(view.html).tables == [
        "The guest's walk: its own tables", "Nested walk of GPA 0x10000, the page",
        "Checks on the page, system page 0x800", "#VC, vector 29",
    ]  # fmt: skip
    assert "PAGE_NOT_VALIDATED: CR2 = 0x10000" in view.text
    assert "VMPL0 permissions  \u2013 not reached" in view.text
    assert view.html.count("<details>") == 9, "each table's nested walk and checks, and the check on all entries"


def test_the_rights_of_all_entries_have_a_row_of_their_own() -> None:
    bench = assigned()
    guest = bench.guest(1)
    view = explanation(explain_guest(guest.core(), 0x10000, AccessKind.READ))
    rows = [line for line in view.text.splitlines() if "7 met" in line]
    assert len(rows) == 4, "seven checks on each table"
    assert "Page-Size: met, found 4 KB<br>Validated: met, found validated" in view.html
    guest.protect(0x10, add=NO_EXECUTE)
    refused = explain_guest(guest.core(), 0x10000, AccessKind.FETCH)
    text = explanation(refused).text
    assert [len(visit.checks) for visit in refused.visits] == [7] * 4
    assert "all entries together" in text
    assert "wanted: executable; all grant: user, writable" in text
    assert "Checks on the entries of the guest's tables\n" in text


@pytest.mark.parametrize("address", [1 << 63, 1 << 47, (1 << 64) - (1 << 47) - 1])
def test_an_address_that_is_not_canonical_is_not_walked(address: int) -> None:
    told = explain_guest(assigned().guest(1).core(), address, AccessKind.READ)
    assert told.failed is not None
    assert told.failed.name == "Canonical address"
    assert told.page is None
    view = explanation(told)
    assert view.text.startswith(f"Read at {address:#x} by guest, ASID 1, VMPL0, CPL 0: #GP in the guest: Canonical")
    assert read(view.html).tables == ["Checks on the address"]


@pytest.mark.parametrize("address", [0, (1 << 47) - 1, (1 << 64) - (1 << 47), (1 << 64) - 1])
def test_a_canonical_address_is_walked(address: int) -> None:
    told = explain_guest(assigned().guest(1).core(), address, AccessKind.READ)
    assert told.visits[0].what == "PML4"
    assert told.failed is not None
    assert told.failed.name in {"Guest tables: present", "Nested tables: present"}


@pytest.mark.parametrize("address", [0x14000, 0x8000010000])
def test_every_bit_of_exitinfo1_has_a_row(address: int) -> None:
    bench = assigned()
    told = explain_guest(bench.guest(1).core(), address, AccessKind.WRITE)
    text = explanation(told).text
    shown = re.findall(r"^(\d+) +([01]) +(\w+)", text, re.MULTILINE)
    assert [name for _, _, name in shown] == [bit.name for bit in FaultError]
    unmodelled = re.findall(r"^\d+ +0 +(\w+) .*not modelled\)$", text, re.MULTILINE)
    assert unmodelled == [bit.name for bit in NEVER_SET]
    error = sum(1 << int(bit) for bit, value, _ in shown if value == "1")
    assert f"EXITINFO1 = {error:#x}" in text


def test_host_and_device() -> None:
    bench = assigned()
    host = explanation(explain_host(bench.machine, P << 12, AccessKind.WRITE)).text
    assert "#PF error code 0x80000003, system address 0x800000" in host
    assert "Hypervisor-Owned  ✗ failed  not assigned  assigned to ASID 1" in host
    device = explain_device(bench.machine, P << 12, AccessKind.WRITE)
    assert "stopped by the IOMMU" in verdict(device).text
    free = explanation(explain_host(bench.machine, P << 12, AccessKind.READ))
    assert "let through, system page 0x800" in free.text
    read(free.html)


def test_a_survey_has_a_cell_for_each_access() -> None:
    bench = assigned()
    kinds = {"reads": AccessKind.READ, "writes": AccessKind.WRITE}
    view = survey({"a page": {name: explain_host(bench.machine, P << 12, kind) for name, kind in kinds.items()}})
    assert view.text.splitlines()[-1].split("  ") == ["a page", "✓ yes", "✗ Hypervisor-Owned"]
    read(view.html)


def test_the_life_of_a_page_shows_every_transition() -> None:
    view = page_life()
    page = read(view.html)
    (_, picture), *_ = page.pictures
    arrows = [node for node in picture.iter() if node.get("marker-end")]
    labels = [node.text for group in picture.iter() if group.get("paint-order") for node in group]
    assert len(arrows) == len({(one.source, one.target, one.mover) for one in PAGE_TRANSITIONS})
    names = {(one.source, one.target, one.by.removeprefix("SNP_").removeprefix("PAGE_")) for one in PAGE_TRANSITIONS}
    assert sorted(", ".join(map(str, labels)).split(", ")) == sorted(name for _, _, name in names)
    assert labels.count("PVALIDATE") == 2, "there and back"
    *lines, note = view.text.splitlines()
    assert len(lines) == 3 + len(PAGE_TRANSITIONS)
    drawn = {state for one in PAGE_TRANSITIONS for state in (one.source, one.target)}
    absent = set(PageState) - drawn - {PageState.INVALID, PageState.DEFAULT}
    assert absent == {state for state in PageState if PAGES[state].label in re.findall(r"[\w-]+", note)} - drawn
    assert note in html.unescape(view.html)
