"""The desk and the explorer driven from Python, as a notebook drives them; in the browser they are in tests/browser."""

from typing import Any

import numpy as np
import pytest
import traitlets

from snpbook.hardware.checks import AccessKind
from snpbook.labs.reverse_map_table import Lab
from snpbook.spec.pages import PageState, VmplPermission
from snpbook.widgets.rmp_desk import RmpDesk
from snpbook.widgets.rmpmap import RmpMap
from tests.views.reading import read


@pytest.fixture
def lab() -> Lab:
    return Lab("milan")


def states(desk: RmpDesk, *pages: int) -> list[PageState]:
    return [PageState(int(desk.map.states[page - desk.map.first_pfn])) for page in pages]


# Selection on the map.


def chooser() -> RmpMap:
    return RmpMap(np.full(64, 2, np.uint8), first_pfn=0x100, selects=True)


def test_a_selection_is_a_run_with_the_cursor_in_it() -> None:
    shown = chooser()
    assert shown.chosen == range(0x100, 0x101)
    shown.choose(0x110, 0x11F)
    assert (shown.cursor, shown.selection, len(shown.chosen)) == (0x11F, (0x110, 0x11F), 16)
    assert "cursor at pfn 0x11f, Hypervisor; 16 selected, pfn 0x110 to 0x11f; 64 Hypervisor" in shown.describe()
    shown.cursor = 0x112
    assert shown.selection == (0x110, 0x11F)
    shown.cursor = 0x120
    assert shown.selection == (0x120, 0x120)
    shown.choose(0x110, 0x11F)
    shown.select(0x111)
    assert shown.selection == (0x111, 0x111)


@pytest.mark.parametrize(("ends", "message"), [((0x110, 0x140), "not on the map"), ((0x112, 0x110), "to a later one")])
def test_a_selection_that_is_none_is_refused(ends: tuple[int, int], message: str) -> None:
    shown = chooser()
    with pytest.raises(traitlets.TraitError, match=message):
        shown.selection = ends
    assert shown.selection == (0x100, 0x100)


def test_a_map_that_does_not_select_has_its_cursor_chosen() -> None:
    shown = RmpMap(np.full(64, 2, np.uint8))
    shown.select(5)
    assert shown.chosen == range(5, 6)


# The desk.


def test_the_desk_does_what_the_machine_does(lab: Lab) -> None:
    desk = lab.desk
    desk.map.choose(0x800, 0x803)
    desk.buttons["RMPUPDATE"].click()
    assert states(desk, 0x800, 0x803, 0x804) == [PageState.GUEST_INVALID] * 2 + [PageState.HYPERVISOR]
    desk.buttons["PVALIDATE"].click()
    assert states(desk, 0x803) == [PageState.GUEST_VALID] == [lab.state(0x803)]
    assert desk.describe().endswith("PVALIDATE by guest 1 at VMPL0: SUCCESS \u00d7 4")
    assert "CF = 0" in desk.result.describe()
    assert "validated" in desk.entry.describe()
    desk.map.select(0x801)
    assert "page 0x801" in desk.entry.describe()


def test_operands_come_from_the_form(lab: Lab) -> None:
    desk = lab.desk
    desk.map.choose(0xA00, 0xA00)
    desk.execute("RMPUPDATE", owner="2", gpa="0x20_0000", size=True)
    entry = lab.bench.host.rmp_entry(0xA00)
    assert (entry.asid, entry.gfn, entry.page_size) == (2, 0x200, 1)
    desk.execute("PVALIDATE", asid=2)
    desk.execute("RMPADJUST", target=3, rights=VmplPermission.READ | VmplPermission.EXECUTE_USER)
    assert lab.bench.host.rmp_entry(0xA00).vmpl3 == 5
    assert [right.name for right, box in desk.rights.items() if box.value] == ["READ", "EXECUTE_USER"]
    desk.execute("RMPUPDATE", owner="hypervisor")
    assert lab.state(0xA00) is PageState.HYPERVISOR
    desk.execute("RMPUPDATE", owner="firmware", immutable=True, size=False)
    assert lab.state(0xA00) is PageState.FIRMWARE


def test_a_refusal_shows_the_page_that_was_refused(lab: Lab) -> None:
    desk = lab.desk
    desk.map.choose(0x800, 0x801)
    desk.execute("RMPUPDATE")
    desk.map.choose(0x800, 0x805)
    shown = desk.execute("PVALIDATE")
    assert "Guest-Owned" in shown.text
    assert "page 0x802" in desk.entry.describe()
    with lab.busy(0x800):
        desk.map.select(0x800)
        assert "FAIL_INUSE (3)" in desk.execute("RMPUPDATE").text
    assert "SUCCESS (0)" in desk.execute("RMPUPDATE").text


LAST = "the last page is at 0x7fffffffff000"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zz", "First GPA: 'zz' is no number; try 0x10000"),
        ("", "First GPA: '' is no number; try 0x10000"),
        ("0x10001", "First GPA: 0x10001 is no page's address, which is a multiple of 0x1000"),
        ("-0x1000", "First GPA: -0x1000 is no page's address, which is a multiple of 0x1000"),
        ("0x8000000000000", f"First GPA: 0x8000000000000 is too large; {LAST}"),
        ("0x7fffffffff000", f"First GPA: 0x7fffffffff000 is, for 2 pages, too large; {LAST}"),
    ],
)
@pytest.mark.parametrize("instruction", ["RMPUPDATE", "PVALIDATE"])
def test_an_address_that_is_none_is_told(lab: Lab, text: str, message: str, instruction: str) -> None:
    desk = lab.desk
    desk.map.choose(0x800, 0x801)
    desk.buttons["RMPUPDATE"].click()
    before, desk.gpa.value = lab.bench.machine.rmp.peek(range(0x800, 0x802)).tobytes(), text
    desk.buttons[instruction].click()
    assert desk.gpa.complaint == message
    assert desk.made is None
    assert desk.result.describe() == "no instruction executed", "the answer of an earlier order is gone"
    assert desk.entry.describe() == ""
    assert lab.bench.machine.rmp.peek(range(0x800, 0x802)).tobytes() == before
    desk.gpa.value = "0x7ffff_fffe000"
    desk.buttons["RMPUPDATE"].click()
    assert desk.gpa.complaint == ""
    assert "SUCCESS (0)" in desk.result.describe()


@pytest.mark.parametrize(
    ("gpa", "code", "check"),
    [("0x800000000000", "#GP", "Canonical address"), ("0x40000000", "#PF", "Guest tables: present")],
)
def test_an_address_that_the_guest_cannot_use_is_its_own_fault(lab: Lab, gpa: str, code: str, check: str) -> None:
    for instruction in ("PVALIDATE", "RMPADJUST"):
        lab.desk.execute(instruction, gpa=gpa)
        assert lab.desk.made is not None
        refused = lab.desk.made.refused
        assert refused is not None
        assert refused.reason is not None
        assert (refused.code, refused.reason.name) == (code, check)


@pytest.mark.parametrize(
    ("product", "missing"), [("milan", {"RMPREAD", "RMPQUERY"}), ("genoa", {"RMPREAD"}), ("turin", set())]
)
def test_the_product_decides_which_instructions_exist(product: str, missing: set[str]) -> None:
    desk = Lab(product).desk
    assert {name for name, button in desk.buttons.items() if button.disabled} == missing
    labels = [text for text in captions(desk) if "CPUID does not list it" in text]
    assert len(labels) == len(missing)


def captions(widget: Any) -> list[str]:
    """The texts of all labels below a widget."""
    below = [text for child in getattr(widget, "children", ()) for text in captions(child)]
    return below + ([widget.value] if type(widget).__name__ == "Label" else [])


def test_the_desk_reads_on_paper(lab: Lab) -> None:
    lab.desk.map.choose(0x800, 0x803)
    lab.desk.execute("RMPUPDATE")
    data, _ = lab.desk._repr_mimebundle_()
    page = read(data["text/html"])
    assert page.tables == [
        "RMP of milan: one cell is one page of 4 KB", "Runs of pages", "RMPUPDATE by host", "RMP entry of page 0x803",
    ]  # fmt: skip
    assert data["text/plain"] == repr(lab.desk)


# The explorer.


def test_the_answer_follows_every_choice(lab: Lab) -> None:
    shown = lab.explorer
    assert shown.told.fault is None
    by_name = {one.name: one for one in shown.specimens}
    shown.show(specimen=by_name["VMPL1 may only read it"], vmpl=1, kind=AccessKind.WRITE)
    assert shown.told.failed is not None
    assert shown.told.failed.name == "VMPL1 permissions"
    assert "VMPL1 permissions wants read, write, found read" in repr(shown)
    shown.actor.value = "host"
    assert (shown.told.actor, shown.told.kind) == ("host", AccessKind.WRITE), "the kind of access stays"
    shown.show(actor="SNP guest, ASID 1", kind=AccessKind.FETCH)
    shown.actor.value = "device"
    assert shown.told.kind is AccessKind.READ, "devices do not fetch"
    shown.show(actor="SNP guest, ASID 1", kind=AccessKind.READ)
    assert shown.told.fault is None
    shown.c_bit.value = False
    assert shown.told.address == (1 << 39) + (by_name["VMPL1 may only read it"].gfn << 12)
    shown.actor.value = "host"
    assert shown.told.actor == "host"
    assert shown.told.address == by_name["VMPL1 may only read it"].page << 12
    assert [name for name, _ in shown.kind.options] == ["read", "write"]
    assert (shown.vmpl.disabled, shown.cpl.disabled, shown.c_bit.disabled) == (True, True, True)
    shown.actor.value = "guest without SNP"
    assert (shown.vmpl.disabled, shown.cpl.disabled) == (True, False)
    assert shown.told.actor.startswith("guest without SNP")


def test_an_address_may_be_typed(lab: Lab) -> None:
    shown = lab.explorer
    shown.address.value = "0x30_0000"
    assert shown.told.address == 0x300000
    shown.address.value = "here"
    assert shown.address.complaint == "Address: 'here' is no number; try 0x10000"
    assert shown.told.address == 0x300000
    assert shown.result.describe() == "no access", "the answer to another address is gone"
    assert shown.address.complaint in shown.static().text
    shown.address.value = "0x10000"
    assert shown.address.complaint == ""
    assert "let through" in shown.result.describe()
    read(shown._repr_mimebundle_()[0]["text/html"])


OUTSIDE = "is outside memory, which ends at 0x3ffffff"
TOO_WIDE = "is no address of 64 bits"


@pytest.mark.parametrize(
    ("actor", "address", "complaint"),
    [
        ("host", "-5", f"-0x5 {OUTSIDE}"), ("device", "-5", f"-0x5 {OUTSIDE}"),
        ("host", "0x4000000", f"0x4000000 {OUTSIDE}"), ("device", "0x4000000", f"0x4000000 {OUTSIDE}"),
        ("host", "0x3ffffff", ""), ("device", "0x3ffffff", ""), ("host", "0", ""),
        ("host", "0x1_0000_0000_0000_0000", f"0x10000000000000000 {OUTSIDE}"),
        ("SNP guest, ASID 1", "-5", f"-0x5 {TOO_WIDE}"), ("guest without SNP", "-5", f"-0x5 {TOO_WIDE}"),
        ("SNP guest, ASID 1", "0x10000000000000000", f"0x10000000000000000 {TOO_WIDE}"),
        ("SNP guest, ASID 1", "0xffffffffffffffff", ""), ("guest without SNP", "0x8000000000000000", ""),
    ],
)  # fmt: skip
def test_an_address_outside_is_told(lab: Lab, actor: str, address: str, complaint: str) -> None:
    shown = lab.explorer
    shown.actor.value = actor
    for kind in (AccessKind.READ, AccessKind.WRITE):
        shown.kind.value = kind
        shown.address.value = address
        assert shown.address.complaint == (f"Address: {complaint}" if complaint else "")
        assert (shown.result.describe() == "no access") == bool(complaint)
    shown.specimen.value = shown.specimens[1]
    assert shown.address.complaint == ""


def test_every_specimen_is_what_its_name_says(lab: Lab) -> None:
    text = lab.survey().text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    for name, words in [
        ("private, not validated yet", "✗ Validated"), ("another guest's", "✗ Guest-Owned"),
        ("remapped: the RMP names another GPA", "✗ Reverse-Map"), ("frozen for swapping: immutable", "✗ Mutable"),
        ("not mapped by the hypervisor", "✗ Nested tables: present"),
        ("not mapped by the guest", "✗ Guest tables: present"),
        ("read-only in the guest's tables", "✓ yes"), ("inside a 2 MB page, mapped as 4 KB", "✗ Page-Size"),
    ]:  # fmt: skip
        assert words in rows[name], rows[name]
    assert rows["shared: the hypervisor's"].count("✓ yes") == 3
