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


@pytest.mark.parametrize(("text", "message"), [("zz", "is no number"), ("0x10001", "is no page's address")])
def test_an_address_that_is_none_is_told(lab: Lab, text: str, message: str) -> None:
    desk = lab.desk
    desk.gpa.value = text
    desk.buttons["RMPUPDATE"].click()
    assert message in desk.complaint.value
    assert desk.made is None
    desk.gpa.value = "0x10000"
    desk.buttons["RMPUPDATE"].click()
    assert desk.complaint.value == ""


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
    assert "is no number" in shown.complaint.value
    assert shown.told.address == 0x300000
    shown.address.value = "0x10000"
    assert shown.complaint.value == ""
    read(shown._repr_mimebundle_()[0]["text/html"])


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
