"""Page state changes: the exits of later kernels, run by run, against a reference; the raw exit of the v7 series."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.host.askers import (
    BUFFER,
    BUFFER_SIZE,
    CODE,
    HYPERCALL,
    INFO1,
    INFO2,
    SCRATCH,
    VMGEXIT,
    Asker,
    ghcb,
    infos,
    snp,
)
from tests.reference import kvm_page_states as reference

PSC = 0x80000010
PRIVATE, SHARED, LARGE = 1 << 52, 2 << 52, 1 << 56
Exit = tuple[int, int, int]


def entry(gfn: int, operation: int = SHARED, cur: int = 0, large: bool = False) -> int:
    return cur | gfn << 12 | operation | LARGE * large


def body(entries: list[int], cur: int = 0, end: int | None = None) -> bytes:
    head = struct.pack("<HHI", cur, len(entries) - 1 if end is None else end, 0)
    return head + struct.pack(f"<{len(entries)}Q", *entries)


def ask(asker: Asker, buffer: bytes, at: int = BUFFER, fail: int = -1) -> tuple[list[Exit], tuple[int, int], bytes]:
    """A page state change whose question number `fail` the VMM refuses: exits, SW_EXITINFO, the scratch area."""
    exits: list[Exit] = []

    def serve(reason: int) -> None:
        assert reason == HYPERCALL
        number, *arguments = asker.exit("<Q6QQQ")
        assert (number, arguments[3:]) == (12, [0, 0, 0, 0, 0])
        exits.append((arguments[0], arguments[1], arguments[2]))
        asker.put((22 * (len(exits) - 1 == fail)).to_bytes(8, "little"), 0x38)

    fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: asker.ghcb + at}
    answer = asker.page(ghcb(fields, buffer=bytes(at - BUFFER) + buffer), serve)
    return exits, infos(answer), answer[at : BUFFER + BUFFER_SIZE]


# By hand.


def test_done() -> None:
    entries = [entry(0x400), entry(0x401), entry(0x600, large=True), entry(0x800, large=True), entry(0xA00, PRIVATE)]
    exits, info, after = ask(snp(), body(entries))
    assert exits == [(0x400000, 2, 0), (0x600000, 1024, 1), (0xA00000, 1, 16)]
    assert info == (0, 0)
    expected = [entries[0] | 1, entries[1] | 1, entries[2] | 512, entries[3] | 512, entries[4] | 1]
    assert after[: 8 + 40] == body(expected, cur=5, end=4)


def test_a_partly_done_large_entry_goes_on_alone() -> None:
    """With its remaining pages, in an exit that has the flag of a large one."""
    exits, info, _ = ask(snp(), body([entry(0x600, cur=500, large=True), entry(0x800, large=True)]))
    assert exits == [(0x7F4000, 12, 1), (0x800000, 512, 1)]
    assert info == (0, 0)


def test_sizes_do_not_mix() -> None:
    entries = [entry(0x5FF), entry(0x600, large=True), entry(0x800)]
    exits, info, _ = ask(snp(), body(entries))
    assert exits == [(0x5FF000, 1, 0), (0x600000, 512, 1), (0x800000, 1, 0)]
    assert info == (0, 0)


def test_a_failure_keeps_what_is_done() -> None:
    entries = [entry(0x400), entry(0x500), entry(0x600)]
    exits, info, after = ask(snp(), body(entries), fail=1)
    assert len(exits) == 2
    assert info == (0, 0x100 << 32)
    assert after[:32] == body([entry(0x400, cur=1), *entries[1:]], cur=1, end=2)


def test_other_operations_count_as_done() -> None:
    entries = [entry(0x400, 3 << 52), entry(0x401, 3 << 52), entry(0x402, 0), entry(0x403)]
    exits, info, after = ask(snp(), body(entries))
    assert (exits, info) == ([(0x403000, 1, 0)], (0, 0))
    assert after[:40] == body([each | 1 for each in entries], cur=4, end=3)


def test_nothing_left() -> None:
    for cur, end in ((1, 0), (900, 0), (900, 252)):
        exits, info, after = ask(snp(), body([entry(0x400)], cur=cur, end=end))
        assert (exits, info, after[:4]) == ([], (0, 0), struct.pack("<HH", cur, end))
    assert ask(snp(), body([entry(0x400, cur=1)]))[:2] == ([], (0, 0))


@pytest.mark.parametrize(("end", "at"), [(253, BUFFER), (0xFFFF, BUFFER), (0, BUFFER + 2024), (3, BUFFER + 2000)])
def test_more_entries_than_there_is_room(end: int, at: int) -> None:
    assert ask(snp(), body([], end=end), at=at)[:2] == ([], (0, 1 << 32 | 1))


@pytest.mark.parametrize(("end", "at"), [(252, BUFFER), (2, BUFFER + 2000)])
def test_as_many_entries_as_there_is_room(end: int, at: int) -> None:
    entries = [entry(0x400 + 2 * i) for i in range(end + 1)]
    exits, info, _ = ask(snp(), body(entries), at=at)
    assert (len(exits), info) == (end + 1, (0, 0))


@pytest.mark.parametrize("at", [0, BUFFER - 8, BUFFER + BUFFER_SIZE - 7, 0xFF8])
def test_scratch_outside_of_the_shared_buffer(at: int) -> None:
    asker = snp()
    fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: asker.ghcb + at}
    assert infos(asker.page(ghcb(fields))) == (2, 3)


def test_a_vmm_that_serves_no_hypercalls() -> None:
    asker = snp()
    asker.vm.exit_hypercalls = 0
    for buffer in (body([entry(0x400)]), body([], end=999)):
        assert ask(asker, buffer)[:2] == ([], (0, 0x100 << 32))


def test_the_buffer_is_read_again_after_each_run() -> None:
    """A guest that changes its list meanwhile gets what it then says."""
    asker = snp()
    exits: list[Exit] = []

    def serve(reason: int) -> None:
        exits.append(asker.exit("<3Q", 8))
        if len(exits) == 1:
            asker.vmm.write(asker.ghcb + BUFFER, struct.pack("<HH", 0, 1))
            asker.vmm.write(asker.ghcb + BUFFER + 16, struct.pack("<Q", entry(0x700, PRIVATE)))

    fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: asker.ghcb + BUFFER}
    buffer = body([entry(0x400), entry(0x500), entry(0x600)])
    assert infos(asker.page(ghcb(fields, buffer=buffer), serve)) == (0, 0)
    assert exits == [(0x400000, 1, 0), (0x700000, 1, 16)]


def test_a_guest_that_grows_its_list_meanwhile_is_stopped() -> None:
    asker = snp()

    def serve(reason: int) -> None:
        asker.vmm.write(asker.ghcb + BUFFER + 2, struct.pack("<H", 253))

    fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: asker.ghcb + BUFFER}
    assert infos(asker.page(ghcb(fields, buffer=body([entry(0x400)])), serve)) == (0, 1 << 32 | 1)


def test_kvm_itself_changes_nothing() -> None:
    """The attribute is the VMM's to set, and the RMP follows it."""
    asker = snp()
    ask(asker, body([entry(0x480), entry(0x481)]))
    assert asker.vm.is_private(range(0x480, 0x482)).all()


# Against the reference.

gfns = st.sampled_from([0, 1, 2, 3, 0x1FF, 0x200, 0x201, 0x3FF, 0x400, 0x600, 0x800, (1 << 40) - 0x200, (1 << 40) - 1])
words = st.builds(
    lambda gfn, operation, cur, large: cur | gfn << 12 | operation << 52 | large << 56,
    gfns,
    st.sampled_from([0, 1, 1, 2, 2, 3, 15]),
    st.sampled_from([0, 0, 0, 0, 1, 2, 511, 512, 513, 4095]),
    st.booleans(),
)


@st.composite
def runs(draw: st.DrawFn) -> list[int]:
    """Entries of which many follow one another."""
    entries: list[int] = []
    for _ in range(draw(st.integers(1, 5))):
        first, operation, large = draw(gfns), draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
        step = 512 if large else 1
        names = [(first // step + i) % (1 << 31) * step for i in range(draw(st.integers(1, 4)))]
        entries += [entry(gfn, operation << 52, large=large) for gfn in names]
    return entries


@given(
    entries=st.one_of(st.lists(words, max_size=8), runs()),
    cur=st.sampled_from([0, 0, 0, 1, 2, 7, 252, 253, 0xFFFF]),
    end=st.one_of(st.none(), st.sampled_from([0, 1, 5, 252, 253, 0xFFFF])),
    at=st.sampled_from([0, 0, 8, 1000, 1968, 2016, 2024]),
    fail=st.sampled_from([-1, -1, 0, 1, 2]),
)
def test_as_the_reference(entries: list[int], cur: int, end: int | None, at: int, fail: int) -> None:
    buffer = bytearray(body(entries, cur % (1 << 16), (len(entries) or 1) - 1 if end is None else end))
    buffer = (buffer + bytes(BUFFER_SIZE))[: BUFFER_SIZE - at]
    exits, info, after = ask(snp(), bytes(buffer), at=BUFFER + at, fail=fail)
    expected: list[Exit] = []

    def answer(question: Exit) -> int:
        expected.append(question)
        return len(expected) - 1 == fail

    result = reference.serve(buffer, answer)
    assert (exits, info, after) == (expected, (0, result), bytes(buffer))


# The v7 series.


@pytest.mark.parametrize("answer", [(0, 0), (0, 1 << 32 | 2), (2, 3)])
def test_the_v7_series_hands_the_page_on_and_tells_of_success(answer: tuple[int, int]) -> None:
    asker = snp("rfc-v7")
    fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: asker.ghcb + BUFFER}

    def serve(reason: int) -> None:
        assert reason == VMGEXIT
        assert asker.exit("<QB") == (asker.ghcb, 0)
        for offset, value in zip((INFO1, INFO2), answer, strict=True):
            asker.vmm.write(asker.ghcb + offset, value.to_bytes(8, "little"))

    assert infos(asker.page(ghcb(fields, buffer=body([entry(0x400)])), serve)) == (0, 0)
