"""The table: raw entries bit for bit, states by the documents' table, coverage, counters, both back ends."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.dram import Dram
from snpbook.hardware.host_instructions import NewState, rmpupdate
from snpbook.hardware.rmp import Rmp, RmpRange, _state, decode_states
from snpbook.spec.pages import PageState
from snpbook.spec.rmp import ASSIGNED, RMP_ENTRY, RMPUPDATE_STATE
from tests.hardware.tables import BASE, ENTRIES, copy, table
from tests.reference.rmp import Entry, ReferenceRmp

both = pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])

FIELDS: dict[str, tuple[int, dict[str, int]]] = {
    "HYPERVISOR": (0, {}),
    "HV_FIXED": (0x4, {"immutable": 1}),
    "FIRMWARE": (0x8000000000000005, {"assigned": 1, "immutable": 1, "lock": 1}),
    "CONTEXT": (0xA000000000000005, {"assigned": 1, "immutable": 1, "lock": 1, "vmsa": 1}),
    "FIRMWARE_IOMMU": (0x8002000000001005, {"assigned": 1, "immutable": 1, "lock": 1, "gfn": 2 << 36 | 1}),
    "RECLAIM": (0x1, {"assigned": 1}),
    "GUEST_INVALID": (0x0008000000001001, {"assigned": 1, "asid": 1, "gfn": 1}),
    "GUEST_VALID": (0x4008000000001001, {"assigned": 1, "asid": 1, "gfn": 1, "validated": 1}),
    "GUEST_VALID 2 MB": (
        0x4018000049800003,
        {"assigned": 1, "page_size": 1, "asid": 3, "gfn": 0x49800, "validated": 1},
    ),
    "PRE_GUEST": (0x0028FFFFFFFFF005, {"assigned": 1, "immutable": 1, "asid": 5, "gfn": 0xFFFFFFFFF}),
    "GUEST_VALID VMSA": (
        0x6028FFFFFFFFF001,
        {"assigned": 1, "asid": 5, "gfn": 0xFFFFFFFFF, "validated": 1, "vmsa": 1},
    ),
    "METADATA": (0x8001000123456005, {"assigned": 1, "immutable": 1, "lock": 1, "gfn": 1 << 36 | 0x123456}),
    "HYPERVISOR head": (0x18, {"subpage_count": 3}),
}
"""The first quadwords that the hardware sheet computes."""


@pytest.mark.parametrize("name", FIELDS)
def test_published_quadwords(name: str) -> None:
    low, fields = FIELDS[name]
    entry = RMP_ENTRY.record(**fields)
    assert bytes(entry) == low.to_bytes(16, "little")
    assert RMP_ENTRY.unpack(low.to_bytes(16, "little")) == entry
    state = decode_states(np.array([[low, 0]], np.uint64))
    assert PageState(int(state[0])).name == name.split()[0]


def test_the_operand_of_rmpupdate() -> None:
    state = RMPUPDATE_STATE.pack(gpa=0x49800000, assigned=1, page_size=1, immutable=1, asid=3)
    assert state.hex() == "00008049000000000101010003000000"


ENTRIES_OF_ANY_KIND = st.builds(
    Entry,
    assigned=st.booleans(),
    immutable=st.booleans(),
    lock=st.booleans(),
    vmsa=st.booleans(),
    validated=st.booleans(),
    asid=st.sampled_from([0, 0, 1, 1023]),
    gfn=st.one_of(
        st.sampled_from([0, 1, 1 << 36, 1 << 36 | 7, 2 << 36, 2 << 36 | 1, 2 << 36 | 2, 3 << 36 | 1]),
        st.integers(0, 2**39 - 1),
    ),
    vmpl=st.lists(st.integers(0, 255), min_size=4, max_size=4),
)


@given(entries=st.lists(ENTRIES_OF_ANY_KIND, min_size=1, max_size=40))
def test_states_are_those_of_the_table(entries: list[Entry]) -> None:
    raw = np.array([entry.raw() for entry in entries], np.uint64)
    assert [PageState(int(state)).name for state in decode_states(raw)] == [entry.state() for entry in entries]
    assert [_state(int(low)) for low in raw[:, 0]] == decode_states(raw).tolist()
    columns = RMP_ENTRY.columns(raw.view(RMP_ENTRY.dtype)[:, 0])
    assert columns["asid"].tolist() == [entry.asid for entry in entries]


@both
def test_states_of_a_run(mapping: bool) -> None:
    """A 2 MB entry gives its state to its 512 pages, the firmware's as well; beyond the table is Default."""
    model, rmp = ReferenceRmp(ENTRIES), table(mapping)
    model.table[3] = Entry(immutable=True)
    model.rmpupdate(512, 77, True, 5, large=True)
    model.rmpupdate(1024, 0, True, immutable=True, large=True)
    copy(model, rmp)
    for pages in (range(ENTRIES + 5), range(500, 530), range(ENTRIES - 1, ENTRIES + 1), range(5000, 5002), range(0)):
        assert [PageState(int(state)).name for state in rmp.states(pages)] == [model.state(page) for page in pages]
        assert [rmp.state(page).name for page in pages] == [model.state(page) for page in pages]


@both
def test_which_entry_answers(mapping: bool) -> None:
    model, rmp = ReferenceRmp(ENTRIES), table(mapping)
    model.rmpupdate(512, 2**39 - 2, True, 1023, large=True)
    model.rmpupdate(7, 9, True, 4)
    copy(model, rmp)
    pages = np.array([512, 513, 514, 1023, 7, 8], np.uint64)
    low = rmp.effective(pages)[:, 0]
    columns = [(int(word) >> 51 & 1023, int(word) >> 12 & 2**39 - 1) for word in low]
    answers = [(entry.asid, gfn) for entry, gfn in (model.answering(int(page)) for page in pages)]
    assert columns == answers == [(1023, 2**39 - 2), (1023, 2**39 - 1), (1023, 0), (1023, 509), (4, 9), (0, 0)]


# Location, coverage, counters.


def test_entry_of_a_page() -> None:
    rmp = table()
    rmpupdate(rmp, np.array([5], np.uint64), np.array([1], np.uint64), NewState(assigned=True, asid=1))
    assert rmp.dram.read(BASE + 0x4000 + 5 * 16, 8) == bytes.fromhex("0110000000000800")
    assert rmp.dram.read(BASE + 8 * 1, 8) == (1).to_bytes(8, "little")
    assert rmp.entry(5).vmpl0 == 0xF


@pytest.mark.parametrize(
    ("base", "end", "covered"),
    [
        (0x10_0000, 0x110_3FFF, 4 << 30),
        (0x97D0_0000, 0xA82F_FFFF, ((262 << 20) - 0x4000) // 16 * 4096),
        (0, (16 << 20) + 0x3FFF, 4 << 30),
        (0, (4 << 30) + 0x3FFF, 1 << 40),
        (0, (24 << 30) + 0x3FFF, 6 << 40),
    ],
)
def test_coverage(base: int, end: int, covered: int) -> None:
    """The manual's example, a real 64 GB host (65.496 GiB covered), and 1/256 of memory for three sizes."""
    assert RmpRange(base, end).entries * 4096 == covered
    if base == 0x97D0_0000:
        assert round(covered / 2**30, 3) == 65.496


@both
def test_counters_follow_owners(mapping: bool) -> None:
    rmp = table(mapping)
    pages = np.arange(4, dtype=np.uint64)
    rmpupdate(rmp, pages, pages, NewState(assigned=True, asid=1023))
    rmpupdate(rmp, pages[:1], pages[:1], NewState(assigned=True, asid=2))
    rmpupdate(rmp, pages[1:2], pages[1:2], NewState(assigned=True))
    rmpupdate(rmp, pages[2:3], pages[:1], NewState(assigned=False))
    assert [rmp.counters(asid) for asid in (0, 1, 2, 1023)] == [0, 0, 1, 1]


# Back ends and operands.


@both
def test_load_store_fill_peek(mapping: bool) -> None:
    rmp = table(mapping)
    entries = np.arange(12, dtype=np.uint64).reshape(6, 2)
    rmp.store(range(4, 10), entries)
    places = np.array([ENTRIES - 1, 2, 3, 2], np.uint64)
    rmp.store(places, entries[:4])
    assert (rmp.load(range(4, 10)) == entries).all()
    assert rmp.load(places).tolist() == [[0, 1], [6, 7], [4, 5], [6, 7]]
    assert rmp.peek(np.array([ENTRIES, 4, ENTRIES + 10**9], np.uint64)).tolist() == [[0, 0], [0, 1], [0, 0]]
    assert rmp.peek(range(ENTRIES - 1, ENTRIES + 2)).tolist() == [[0, 1], [0, 0], [0, 0]]
    rmp.fill(range(4, 6), ASSIGNED)
    assert rmp.load(range(4, 7)).tolist() == [[1, 0], [1, 0], [4, 5]]


def test_a_run_is_a_view() -> None:
    rmp = table()
    assert np.shares_memory(rmp.load(range(5, 9)), rmp.load(range(ENTRIES)))


OUT_OF_RANGE = [
    (range(ENTRIES - 1, ENTRIES + 1), ValueError, "pages: page 0x800 is beyond the last, 0x7ff"),
    (np.array([ENTRIES], np.uint64), ValueError, "pages: page 0x800 is beyond the last"),
    (np.array([-1]), ValueError, "pages: -1 is no page number"),
    (np.array([0.0]), TypeError, "pages = float64"),
    (np.array([True]), TypeError, "pages = bool"),
    (3, TypeError, "pages = 3"),
]


@both
@pytest.mark.parametrize(("pages", "error", "text"), OUT_OF_RANGE)
def test_pages_without_an_entry_are_refused(mapping: bool, pages: Any, error: type[Exception], text: str) -> None:
    rmp = table(mapping)
    with pytest.raises(error, match=text):
        rmp.load(pages)
    with pytest.raises(error, match=text):
        rmp.store(pages, np.ones((2, 2), np.uint64))
    assert not rmp.load(range(ENTRIES)).any()


def test_bad_operands() -> None:
    rmp = table()
    with pytest.raises(ValueError, match=r"entries = \(2, 2\): an array of words \(3, 2\)"):
        rmp.store(range(3), np.ones((2, 2), np.uint64))
    with pytest.raises(TypeError, match=r"page = 1\.5: an integer"):
        rmp.entry(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pages: -1"):
        rmp.entry(-1)
    for asid in (-1, 2048):
        with pytest.raises(ValueError, match=f"asid = {asid}: there are 2048 counters"):
            rmp.counters(asid)
    with pytest.raises(ValueError, match="a run of page numbers with step 1"):
        rmp.states(range(0, 9, 2))


@pytest.mark.parametrize("where", [(0x1000, 0x10FFF), (0x2000, 0x10000), (0x2000, 0x1FFFFFF), (0x4000, 0x1FFF)])
def test_a_table_lies_in_memory_in_steps_of_8_kb(where: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="where = RmpRange"):
        Rmp(Dram(0x200000), RmpRange(*where))
