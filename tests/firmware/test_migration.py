"""A guest moves from one board to another and goes on as if it had not; what is replayed or mixed up stays out."""

from __future__ import annotations

import struct

import pytest

from snpbook.hardware.exits import HostPageFault
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.firmware.migrants import (
    AGENT,
    GUEST,
    MDATA,
    POLICY,
    PRIVATE,
    REQUEST,
    RESPONSE,
    VMSA_GPA,
    Home,
    Luggage,
)  # fmt: skip
from tests.firmware.test_requests import seal
from tests.machines import MIB, PAGE, Board

ALL = [*PRIVATE, VMSA_GPA]


def departed() -> tuple[Home, Luggage, bytes]:
    """A guest half-way through its program, packed and exported; it is gone where it was."""
    home = Home(Board(), 18 * MIB)
    home.launch()
    assert home.run().busy
    luggage = home.pack()
    status, context = home.export()
    assert status == 0
    return home, luggage, context


def arrived(how: str, context: bytes, name: str = "milan") -> Home:
    home = Home(Board(name), 20 * MIB, asid=4)
    assert home.receive(how, context) == 0
    return home


def unmoved() -> object:
    home = Home(Board(), 18 * MIB)
    home.launch()
    home.run()
    return home.run().outcome


@pytest.mark.parametrize("name", ["milan", "genoa"])
@pytest.mark.parametrize("how", ["import", "absorb"])
def test_a_moved_guest_goes_on_as_if_it_had_stayed(how: str, name: str) -> None:
    old, luggage, context = departed()
    new = arrived(how, context, name)
    assert new.take_entries(luggage.entries) == 0
    for slot, gpa in enumerate(ALL):
        if how == "import" or gpa not in (PRIVATE[0],):
            assert new.take_page(slot, gpa, luggage.pages[gpa]) == 0, hex(gpa)
    new.executor.restore(old.executor.snapshot())
    new.build()
    outcome = new.run().outcome
    assert isinstance(outcome, tuple)
    assert outcome == unmoved()


def test_what_the_outcome_depends_on() -> None:
    """Each of memory, VMSA and message number shows in it: another one gives another outcome."""
    memory, registers, said, key, number = unmoved()
    assert memory[:16] == b"data of the image"[:16]
    assert memory[100:132] != (b"data of the image" * 10)[100:132]
    assert registers[0] == 0x1234567890AB
    assert said[0x50 - 0x20 + 0x40 :][:48] != bytes(48), "the measurement"
    assert key[:4] == bytes(4)
    assert number == 6


def test_the_exported_guest_is_gone() -> None:
    old, _, _ = departed()
    assert old.board.state(GUEST) == PageState.FIRMWARE
    assert old.export()[0] == Status.INVALID_GUEST
    assert old.asid not in old.board.machine.runnable


# What the host on the other side may try.


@pytest.fixture
def halfway() -> tuple[Home, Luggage]:
    """The entries are there, the pages are not yet."""
    _, luggage, context = departed()
    new = arrived("import", context)
    assert new.take_entries(luggage.entries) == 0
    return new, luggage


def test_the_host_writes_no_entry(halfway: tuple[Home, Luggage]) -> None:
    new, _ = halfway
    with pytest.raises(HostPageFault):
        new.board.cpu.write(MDATA + 64, new.board.cpu.read(MDATA, 64))


def test_pages_are_not_interchangeable(halfway: tuple[Home, Luggage]) -> None:
    new, luggage = halfway
    for slot, gpa in enumerate(ALL[:-1]):
        other = ALL[(slot + 1) % (len(ALL) - 1)]
        assert new.take_page(slot, gpa, luggage.pages[other]) == Status.BAD_MEASUREMENT
    assert new.take_page(len(ALL) - 1, VMSA_GPA, luggage.pages[PRIVATE[0]]) == Status.BAD_MEASUREMENT


@pytest.mark.parametrize("spoil", [
    lambda page: page[:-16] + bytes(16), lambda page: page[:2048].ljust(4096, b"\0"),
    lambda page: page[16:] + page[:16], lambda page: bytes(4096), lambda page: bytes([page[0] ^ 1]) + page[1:],
], ids=["cut by a block", "cut in half", "blocks moved", "nothing", "a bit"])  # fmt: skip
def test_pages_are_whole(halfway: tuple[Home, Luggage], spoil: object) -> None:
    new, luggage = halfway
    assert callable(spoil)
    for slot, gpa in ((0, PRIVATE[0]), (len(ALL) - 1, VMSA_GPA)):
        assert new.take_page(slot, gpa, spoil(luggage.pages[gpa])) == Status.BAD_MEASUREMENT
        assert new.take_page(slot, gpa, luggage.pages[gpa]) == 0


def test_a_page_comes_once(halfway: tuple[Home, Luggage]) -> None:
    new, luggage = halfway
    for slot, gpa in ((1, PRIVATE[1]), (len(ALL) - 1, VMSA_GPA)):
        assert new.take_page(slot, gpa, luggage.pages[gpa]) == 0
        assert new.take_page(slot, gpa, luggage.pages[gpa]) == Status.INVALID_MDATA_ENTRY


def test_a_vmsa_is_no_data_and_data_no_vmsa(halfway: tuple[Home, Luggage]) -> None:
    new, luggage = halfway
    assert new.take_page(len(ALL) - 1, PRIVATE[0], luggage.pages[VMSA_GPA]) == Status.INVALID_MDATA_ENTRY
    assert new.take_page(0, VMSA_GPA, luggage.pages[PRIVATE[0]]) == Status.INVALID_MDATA_ENTRY


def test_the_entries_come_once_and_are_the_last_ones() -> None:
    old = Home(Board(), 18 * MIB)
    old.launch()
    old.run()
    older = old.pack()
    assert old.take_entries(older.entries) == 0
    assert old.take_page(0, PRIVATE[0], older.pages[PRIVATE[0]]) == 0
    for gpa in ALL[1:]:
        assert old.take_page(ALL.index(gpa), gpa, older.pages[gpa]) == 0
    newer = old.pack()
    status, context = old.export()
    assert status == 0
    new = arrived("import", context)
    assert new.take_entries(older.entries) == Status.BAD_MEASUREMENT
    assert new.take_entries(newer.entries[:-8] + bytes(8)) == Status.BAD_MEASUREMENT
    assert new.take_entries(newer.entries) == 0
    assert new.take_entries(newer.entries, MDATA + PAGE) == Status.INVALID_MDATA_ENTRY
    assert new.take_page(0, PRIVATE[0], older.pages[PRIVATE[0]]) == Status.BAD_MEASUREMENT
    assert new.take_page(0, PRIVATE[0], newer.pages[PRIVATE[0]]) == 0


# Contexts.


def test_a_context_needs_its_root_entry() -> None:
    old = Home(Board(), 18 * MIB)
    old.launch()
    for imi in (1, 0):
        status, context = old.export(imi)
        assert status == 0
        new = Home(Board(), 20 * MIB)
        assert new.receive("import", context) == Status.INVALID_MDATA_ENTRY
        assert new.board.psp.context(GUEST).state == 0
        other = Home(Board(), 20 * MIB)
        assert other.receive("absorb", context) == Status.INVALID_MDATA_ENTRY
        assert other.board.psp.context(GUEST).state == 1


def test_a_live_export_leaves_the_guest_running() -> None:
    home = Home(Board(), 18 * MIB)
    home.launch()
    assert home.export(1)[0] == 0
    assert home.board.state(GUEST) == PageState.CONTEXT
    assert home.run().busy


@pytest.mark.parametrize(("size", "version"), [(0x2FF, 3), (0x300, 2), (0x300, 4), (0, 0)])
@pytest.mark.parametrize("how", ["import", "absorb"])
def test_the_form_of_a_context(how: str, size: int, version: int) -> None:
    _, _, context = departed()
    new = Home(Board(), 20 * MIB)
    new.receive(how, bytes(0x300))
    kind = 9 if how == "import" else 11
    assert new.incoming(kind, context, size, version) == Status.INVALID_PARAM
    assert new.incoming(kind, context) == 0
    assert new.incoming(kind, context) == Status.INVALID_GUEST_STATE, "a second time"


def test_an_image_absorbs_only_its_own_kind() -> None:
    _, _, context = departed()
    new = Home(Board(), 20 * MIB)
    assert new.receive("absorb", context[:0x190] + b"another image".ljust(48) + context[0x1C0:]) == (
        Status.BAD_MEASUREMENT
    )
    assert new.incoming(9, context) == Status.INVALID_GUEST_STATE, "a launch imports nothing"
    assert new.incoming(11, context) == 0
    board = new.board
    assert board.psp.context(GUEST).launch_digest == context[:48]
    assert board.psp.context(GUEST).imi_en == 0


def test_only_the_agent_may() -> None:
    """A second agent, a running guest as any other, gets nothing of the first one's guests."""
    home = Home(Board(), 18 * MIB)
    home.launch()
    stranger = GUEST + 8 * 4096
    home.board.start(stranger, 10)
    home.board.finish(stranger)
    assert home.export(gctx=stranger)[0] == Status.INVALID_GUEST
    assert home.export(gctx=GUEST)[0] == Status.INVALID_GUEST, "it has an agent"
    new = Home(Board(), 20 * MIB)
    _, _, context = departed()
    new.receive("absorb", bytes(0x300))
    new.board.start(stranger, 10)
    new.board.finish(stranger)
    assert new.incoming(11, context, gctx=stranger) == Status.INVALID_GUEST
    assert new.incoming(11, context) == 0


def test_a_guest_of_its_own_moves_without_an_agent() -> None:
    """It exports itself with VMPCK0, and a guest made of the same image becomes it; the next number fits."""
    old, new = Home(Board(), 18 * MIB), Home(Board("genoa"), 20 * MIB, asid=4)
    for home in (old, new):
        home.board.start(GUEST, home.asid)
        home.add_helper()
        home.board.finish(GUEST)
    assert old.export(gctx=GUEST, vmpck=1)[0] == Status.INVALID_GUEST, "VMPCK0 only"
    status, context = old.export(imi=1, gctx=GUEST)
    assert status == 0
    own = new.board.psp.context(GUEST)
    assert new.incoming(15, context[:0x190] + bytes(48) + context[0x1C0:], gctx=GUEST) == Status.BAD_MEASUREMENT
    assert new.incoming(15, context, 0x2FF, gctx=GUEST) == Status.INVALID_PARAM
    assert new.incoming(15, context, gctx=GUEST) == 0
    was, now = old.board.psp.context(GUEST), new.board.psp.context(GUEST)
    assert was.msg_count0 == now.msg_count0 == 2
    assert was.msg_count1 == now.msg_count1 == 2
    kept, taken = ("report_id", "vek_seed", "asid"), ("oek", "vmpck0", "vmpck3", "vmrk", "launch_digest")
    assert all(getattr(now, name) == getattr(own, name) for name in kept)
    assert all(getattr(now, name) == getattr(was, name) for name in taken)
    assert own.oek != was.oek


# The order in which messages are judged.


def message(kind: int, gctx: int = GUEST, *, stray: int = 0, size: int = 0x300, version: int = 3) -> tuple[bytes, int]:
    """A migration message without a context worth the name, and the size of its answer."""
    if kind == 7:
        return struct.pack("<QII", gctx, 2 * stray, 0), 0xFA0
    if kind == 13:
        return struct.pack("<QQ16x32s", gctx, stray, b"V" * 32), 0x10
    return struct.pack("<QIIQ8x", gctx, size, version, stray) + bytes(0x190) + b"i" * 48 + bytes(0x140), 0x10


NOWHERE = 30 * MIB
ORDER = [
    ("export: reserved", 7, {"stray": 1, "gctx": NOWHERE}, {}, Status.INVALID_PARAM),
    ("export: no context", 7, {"gctx": NOWHERE}, {}, Status.INVALID_GUEST),
    ("export: unaligned", 7, {"gctx": GUEST + 8}, {}, Status.INVALID_GUEST),
    ("export: address beyond all", 7, {"gctx": 2**64 - 4096}, {}, Status.INVALID_GUEST),
    ("export: of a launch", 7, {}, {"vmpck": 1}, Status.INVALID_GUEST_STATE),
    ("import: reserved", 9, {"stray": 1, "version": 2, "gctx": NOWHERE}, {}, Status.INVALID_PARAM),
    ("import: version", 9, {"version": 2, "gctx": NOWHERE}, {}, Status.INVALID_PARAM),
    ("import: no context", 9, {"gctx": NOWHERE}, {}, Status.INVALID_GUEST),
    ("import: into a launch", 9, {}, {}, Status.INVALID_GUEST_STATE),
    ("absorb: reserved", 11, {"stray": 1}, {}, Status.INVALID_PARAM),
    ("absorb: no context", 11, {"version": 2, "gctx": NOWHERE}, {}, Status.INVALID_GUEST),
    ("absorb: no image", 11, {"version": 2}, {}, Status.INVALID_GUEST_STATE),
    ("vmrk: another key first", 13, {"stray": 1, "gctx": NOWHERE}, {"vmpck": 1}, Status.INVALID_PARAM),
    ("vmrk: another key", 13, {"gctx": NOWHERE}, {"vmpck": 1}, Status.INVALID_PARAM),
    ("vmrk: no context", 13, {"gctx": NOWHERE}, {}, Status.INVALID_GUEST),
    ("vmrk: not in launch", 13, {"gctx": AGENT}, {}, Status.INVALID_GUEST_STATE),
    ("vmrk: another's guest", 13, {}, {}, Status.INVALID_GUEST),
    ("absorb without agent: reserved", 15, {"gctx": 1}, {}, Status.INVALID_PARAM),
    ("absorb without agent: another image", 15, {"gctx": 0, "version": 2}, {}, Status.BAD_MEASUREMENT),
]


@pytest.mark.parametrize(("name", "kind", "body", "sender", "status"), ORDER, ids=[row[0] for row in ORDER])
def test_refused_messages(name: str, kind: int, body: dict[str, int], sender: dict[str, int], status: Status) -> None:
    """GUEST is in LAUNCH and has no agent. The answer tells, nothing but the sender's count has changed."""
    home = Home(Board(), 18 * MIB)
    home.board.start(GUEST, home.asid)
    before = home.board.psp.context(GUEST)
    payload, size = message(kind, **body)
    answer = home.tell(kind, payload, size, **sender)
    assert answer == struct.pack("<I", status).ljust(size, b"\0")
    assert home.board.psp.context(GUEST) == before


def test_an_image_in_launch_takes_no_root_key() -> None:
    home = Home(Board(), 18 * MIB)
    for imi, status in ((1, Status.INVALID_GUEST_STATE), (0, Status.SUCCESS)):
        home.board.create(GUEST)
        agent = {"ma_en": 1, "ma_gctx_paddr": AGENT, "imi_en": imi}
        home.board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GUEST, policy=POLICY, **agent)
        assert home.tell(13, message(13)[0], 0x10) == struct.pack("<I12x", status)
        home.board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GUEST)
        home.reclaim(GUEST)
        home.board.assign(GUEST, HYPERVISOR)


def test_a_guest_with_an_agent_absorbs_nothing_on_its_own() -> None:
    home = Home(Board(), 18 * MIB)
    home.launch()
    status, context = home.export(imi=1)
    assert status == 0
    assert home.incoming(15, context, gctx=GUEST) == Status.INVALID_GUEST


def test_an_export_stands_although_its_answer_does_not_fit() -> None:
    home = Home(Board(), 18 * MIB)
    home.launch()
    agent = home.board.psp.context(AGENT)
    home.board.machine.dram.write(REQUEST, seal(agent.vmpck0, message(7)[0], seqno=agent.msg_count0 + 1, kind=7))
    home.board.assign(RESPONSE, FIRMWARE)
    fields = {"gctx_paddr": AGENT, "request_paddr": REQUEST, "response_paddr": RESPONSE + 16}
    assert home.board.command(Command.SNP_GUEST_REQUEST, **fields) is Status.INVALID_PARAM
    assert home.board.state(GUEST) == PageState.FIRMWARE, "the guest is gone all the same"
    assert home.board.psp.context(AGENT) == agent, "and the message may come again"
