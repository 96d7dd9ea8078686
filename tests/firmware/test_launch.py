"""SNP_LAUNCH_UPDATE and SNP_LAUNCH_FINISH, check by check; what a page type leaves; runs equal to single commands."""

from __future__ import annotations

from hashlib import sha384
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.launch import SECRETS_PAGE
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.rmp import VMPL0_FULL
from snpbook.spec.states import GuestState, PlatformState
from snpbook.spec.status import Status
from tests.firmware.rows import PLACES, Attempt, Row, assert_refused, double, lookup_rows, single
from tests.firmware.test_guests import PREFIX
from tests.machines import FREE, GCTX, MIB, PAGE, Board, World

PRE_GUEST = NewState(assigned=True, asid=1, immutable=True)
LARGE = NewState(assigned=True, asid=1, immutable=True, large=True)
OTHER = NewState(assigned=True, asid=2, immutable=True)


def launch_update(
    low: int = 0, page_low: int = 0, off: bool = False, gctx: int = GCTX, page: int = FREE, new: NewState = PRE_GUEST,
    size: int = 0, kind: int = LaunchPage.NORMAL, guest: str = "LAUNCH", asid: int = 1, data: bytes = b"",
    stray: tuple[int, ...] = (), inside: int = 0,
) -> Attempt:  # fmt: skip
    board = Board().initialise()
    if guest == "INIT":
        board.create()
    else:
        board.start(asid=asid)
    if guest == "RUNNING":
        board.finish()
    board.machine.dram.write(FREE, data)
    board.assign(FREE, new, 0x200000)
    if off:
        board.psp.state = PlatformState.UNINIT
    fields = {"gctx_paddr": gctx + low, "page_paddr": page + inside + page_low, "page_size": size, "page_type": kind}
    return Attempt(board, Command.SNP_LAUNCH_UPDATE, fields, stray)


def cpuid(count: int, stray: int = 0) -> bytes:
    """The head of a CPUID page; `stray` is a reserved byte to set."""
    head = bytearray(count.to_bytes(4, "little").ljust(16, b"\0"))
    if stray:
        head[stray] = 1
    return bytes(head)


UPDATE = [
    Row("reserved bit", Status.INVALID_PARAM, {"stray": (8 * 8 + 5,)}),
    Row("page not page-aligned", Status.INVALID_PARAM, {"page_low": 16}),
    *PREFIX[:2],
    *lookup_rows("page"),
    *PREFIX[2:],
    Row("page Hypervisor", Status.INVALID_PAGE_STATE, {"new": HYPERVISOR}),
    Row("page Firmware", Status.INVALID_PAGE_STATE, {"new": FIRMWARE}),
    Row("page Guest-Invalid", Status.INVALID_PAGE_STATE, {"new": NewState(assigned=True, asid=1)}),
    Row("2 MB of a 4 KB page", Status.INVALID_PAGE_SIZE, {"size": 1}),
    Row("4 KB of a 2 MB page", Status.INVALID_PAGE_SIZE, {"new": LARGE}),
    Row("2 MB not aligned", Status.INVALID_ADDRESS, {"new": LARGE, "size": 1, "inside": PAGE}),
    *(
        Row(f"{kind.name} of 2 MB", Status.INVALID_PAGE_SIZE, {"new": LARGE, "size": 1, "kind": kind})
        for kind in (LaunchPage.VMSA, LaunchPage.SECRETS, LaunchPage.CPUID)
    ),
    Row("type 0", Status.INVALID_PARAM, {"kind": 0}),
    Row("type 7", Status.INVALID_PARAM, {"kind": 7}),
    Row("guest INIT", Status.INVALID_GUEST_STATE, {"guest": "INIT"}),
    Row("guest RUNNING", Status.INVALID_GUEST_STATE, {"guest": "RUNNING"}),
    Row("guest inactive", Status.INACTIVE, {"asid": 0}),
    Row("page of another ASID", Status.INVALID_PAGE_OWNER, {"new": OTHER}),
    Row("CPUID: 65 entries", Status.INVALID_PARAM, {"kind": LaunchPage.CPUID, "data": cpuid(65)}),
    Row("CPUID: reserved at 4", Status.INVALID_PARAM, {"kind": LaunchPage.CPUID, "data": cpuid(1, 4)}),
    Row("CPUID: reserved at 15", Status.INVALID_PARAM, {"kind": LaunchPage.CPUID, "data": cpuid(1, 15)}),
]


@single(UPDATE)
def test_launch_update_refuses(row: Row) -> None:
    assert_refused(launch_update(**row.options), row.status)


@double([row for row in UPDATE if row.options != {"guest": "RUNNING"}])
def test_launch_update_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(launch_update(**first.options, **second.options), first.status)


def test_a_second_time_the_page_is_the_guests() -> None:
    built = launch_update()
    assert built.issue() is Status.SUCCESS
    assert_refused(built, Status.INVALID_PAGE_STATE)


# What a type leaves behind.

PATTERN = bytes(range(256)) * 16
VMPL0 = VMPL0_FULL
"""RMPUPDATE gives VMPL0 everything, and the launch leaves that as it is."""


def launched(kind: LaunchPage, data: bytes = PATTERN, **fields: Any) -> Board:
    """A board with one page of a type launched at FREE, guest address 0x5000."""
    board = Board().initialise()
    board.start()
    board.machine.dram.write(FREE, data)
    board.add(FREE, 0x5000, kind, **fields)
    return board


def plain(board: Board, spa: int = FREE, asid: int = 1) -> bytes:
    return board.machine.encryption.read_pages(asid, range(spa >> 12, (spa >> 12) + 1)).tobytes()


def page_info(
    contents: bytes, kind: int, gpa: int, before: bytes = bytes(48), perms: tuple[int, ...] = (0, 0, 0)
) -> bytes:
    """PAGE_INFO and its hash, spelled out: IMI 0, VMPL1 at 0x65, VMPL2 at 0x66, VMPL3 at 0x67."""
    assert len(before + contents) == 0x60
    info = before + contents + bytes([0x70, 0, kind, 0, 0, *perms]) + gpa.to_bytes(8, "little")
    assert len(info) == 0x70
    return sha384(info).digest()


@pytest.mark.parametrize("kind", [LaunchPage.NORMAL, LaunchPage.UNMEASURED, LaunchPage.ZERO, LaunchPage.CPUID])
def test_page_types(kind: LaunchPage) -> None:
    data = bytes(4) if kind is LaunchPage.CPUID else PATTERN
    board = launched(kind, data)
    expected = bytes(PAGE) if kind is LaunchPage.ZERO else data.ljust(PAGE, b"\0")
    assert plain(board) == expected
    assert board.cpu.read(FREE, PAGE) != expected, "in DRAM it is encrypted"
    contents = sha384(PATTERN).digest() if kind is LaunchPage.NORMAL else bytes(48)
    assert board.psp.context(GCTX).launch_digest == page_info(contents, kind, 0x5000)
    assert board.state(FREE) == PageState.GUEST_VALID
    entry = board.cpu.rmp_entry(FREE >> 12)
    assert (entry.asid, entry.gfn, entry.vmsa, entry.immutable, entry.lock) == (1, 5, 0, 0, 0)
    assert (entry.vmpl0, entry.vmpl1, entry.vmpl2, entry.vmpl3) == (VMPL0, 0, 0, 0)


def test_secrets_page() -> None:
    board = launched(LaunchPage.SECRETS)
    context, raw = board.psp.context(GCTX), plain(board)
    assert raw[:4] == (3).to_bytes(4, "little")
    assert raw[8:12] == (0x00A00F11).to_bytes(4, "little"), "family, model, stepping of Milan"
    for number in range(4):
        assert raw[0x20 + 32 * number :][:32] == getattr(context, f"vmpck{number}")
    assert raw[0xA0:0x100] == bytes(0x60), "the guest's own area"
    assert SECRETS_PAGE.reserved_set(raw) == []
    assert context.launch_digest == page_info(bytes(48), 5, 0x5000)
    assert all(getattr(context, f"vmpck{number}") not in board.cpu.read(0, 64 * MIB) for number in range(4))


def test_vmsa_page_is_measured_without_the_tsc_fields() -> None:
    board = launched(LaunchPage.VMSA, PATTERN)
    measured = PATTERN[:0x2F0] + bytes(16) + PATTERN[0x300:]
    assert board.psp.context(GCTX).launch_digest == page_info(sha384(measured).digest(), 2, 0x5000)
    assert plain(board) == PATTERN[:0x380] + bytes(8) + b"\xff" * 8 + PATTERN[0x390:]
    assert board.cpu.rmp_entry(FREE >> 12).vmsa == 1


@pytest.mark.parametrize("perms", [(0xF, 3, 1), (1, 0, 0), (0, 0, 0x1F)])
def test_permissions_go_into_the_entry_and_the_digest(perms: tuple[int, int, int]) -> None:
    board = launched(LaunchPage.NORMAL, vmpl1_perms=perms[0], vmpl2_perms=perms[1], vmpl3_perms=perms[2])
    entry = board.cpu.rmp_entry(FREE >> 12)
    assert (entry.vmpl0, entry.vmpl1, entry.vmpl2, entry.vmpl3) == (VMPL0, *perms)
    expected = page_info(sha384(PATTERN).digest(), 1, 0x5000, perms=perms)
    assert board.psp.context(GCTX).launch_digest == expected


def test_an_imi_page_says_so_in_the_digest() -> None:
    board = launched(LaunchPage.ZERO, imi_page=1)
    info = bytes(0x60) + bytes([0x70, 0, 3, 1, 0, 0, 0, 0]) + (0x5000).to_bytes(8, "little")
    assert board.psp.context(GCTX).launch_digest == sha384(info).digest()


# The printed chain.

CHAIN = [
    (
        LaunchPage.NORMAL,
        0,
        "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20",
    ),
    (
        LaunchPage.ZERO,
        0x1000,
        "3bb77aec4f0d90c147b6b7884b6bd5741994d2575305f89639c95186690d949261186702ef51f2fa7c0dd4c90f03ebfd",
    ),
    (
        LaunchPage.UNMEASURED,
        0x2000,
        "2904df3d88c1174e011bf113d78e2e6a25a8d43cbe047460257dc617210d9dbad410737337d3abcb02c82f3fff625df4",
    ),
    (
        LaunchPage.SECRETS,
        0x3000,
        "be5cbd2d68b9649eaa74bf51925b7722aeafd3df80590e24a91e6007453a529685fdbfde9c5ec0e2cd0def6f0e65f220",
    ),
    (
        LaunchPage.CPUID,
        0x4000,
        "43af46e6b20bf630da0dbc6392e51fee9dfa805945d2411f0ed748bd44e3601c016e737b423dc8af9fd91b48bc8c5cca",
    ),
    (
        LaunchPage.VMSA,
        0xFFFFFFFFF000,
        "f6741910fc3349f40b1f443300a3ca65c5046c5405db1dc42b13ae3d5cd36382e55114593fd48a9d80da790dbabd7b9d",
    ),
]


@pytest.mark.parametrize("mapping", [False, True], ids=["dictionary", "mapping"])
@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_printed_chain(name: str, mapping: bool) -> None:
    board = Board(name, mapping=mapping).initialise()
    board.start()
    for index, (kind, gpa, digest) in enumerate(CHAIN):
        board.add(FREE + index * PAGE, gpa, kind)
        assert board.psp.context(GCTX).launch_digest.hex() == digest


def test_printed_digest_with_permissions() -> None:
    board = launched_zero(0, vmpl1_perms=0xF, vmpl2_perms=3, vmpl3_perms=1)
    assert board.psp.context(GCTX).launch_digest.hex() == (
        "113f3016280394f88f6032595b95396c5bb25d3f37596dcee79bd474ab3259ead8ba3a856afdafa2dbc0aabcf19059b8"
    )


def test_printed_digest_of_a_large_page() -> None:
    board = launched_zero(0x200000, page_size=1)
    assert board.psp.context(GCTX).launch_digest.hex() == (
        "d6b9a916f116fab05cb1aec1c3c0bde4eaca07c0384bb94002ebacc58422cfbcf9a34dba18df1f28e20b5a0c4819c313"
    )
    assert plain(board, FREE + 511 * PAGE) == bytes(PAGE)
    assert board.cpu.read(FREE + 511 * PAGE, PAGE) != bytes(PAGE)
    assert set(board.machine.rmp.states(range(FREE >> 12, (FREE >> 12) + 512))) == {PageState.GUEST_VALID}
    assert board.machine.rmp.states(range((FREE >> 12) + 512, (FREE >> 12) + 513))[0] == PageState.HYPERVISOR


def launched_zero(gpa: int, **fields: Any) -> Board:
    board = Board().initialise()
    board.start()
    board.add(FREE, gpa, **fields)
    return board


def test_a_page_changed_before_its_update_is_measured_as_changed() -> None:
    """The host cannot write a Pre-Guest page; who reaches the DIMM can."""
    digests = []
    for flip in (False, True):
        built = launch_update(data=PATTERN)
        dram = built.board.machine.dram
        if flip:
            dram.write(FREE + 100, bytes([dram.read(FREE + 100, 1)[0] ^ 1]))
        assert built.issue() is Status.SUCCESS
        digests.append(built.board.psp.context(GCTX).launch_digest)
    changed = PATTERN[:100] + bytes([PATTERN[100] ^ 1]) + PATTERN[101:]
    assert digests == [page_info(sha384(page).digest(), 1, 0x200000) for page in (PATTERN, changed)]


# A run of commands is the commands one by one.

STATES = {
    "pre-guest": PRE_GUEST, "other": OTHER, "hypervisor": HYPERVISOR, "firmware": FIRMWARE,
    "invalid": NewState(assigned=True, asid=1),
}  # fmt: skip


def board_of_pages(states: list[str], seed: int = 0) -> Board:
    board = Board().initialise()
    board.start()
    noise = np.random.default_rng(seed).integers(0, 3, (len(states), PAGE), np.uint8)
    for index, state in enumerate(states):
        board.machine.dram.write(FREE + index * PAGE, noise[index] if index % 3 else noise[index, 0].repeat(PAGE))
        board.assign(FREE + index * PAGE, STATES[state], 0x10000 + 0x3000 * index)
    return board


def one_by_one(board: Board, command: Command, pages: range, **fields: Any) -> tuple[int, Status]:
    for done, page in enumerate(pages):
        place = {"page_paddr": page << 12} if command is Command.SNP_LAUNCH_UPDATE else {"page": page}
        status = board.command(command, **{**fields, **place})
        if status is not Status.SUCCESS:
            return done, status
    return len(pages), Status.SUCCESS


def clean(board: Board) -> World:
    """The world without the command buffer, which differs between the two ways."""
    board.machine.dram.write(16 * MIB, bytes(64))
    return World.of(board)


def assert_same(states: list[str], command: Command, start: int = FREE >> 12, **fields: Any) -> tuple[int, Status]:
    whole, single = board_of_pages(states), board_of_pages(states)
    pages = range(start, start + len(states))
    result = whole.run(command, pages, **fields)
    assert result == one_by_one(single, command, pages, **fields)
    assert clean(whole) == clean(single)
    return result


@pytest.mark.parametrize("kind", [1, 3, 4, 5, 6, 2, 0])
def test_run_of_each_type(kind: int) -> None:
    done, status = assert_same(
        ["pre-guest"] * 5, Command.SNP_LAUNCH_UPDATE, gctx_paddr=GCTX, page_type=kind, vmpl1_perms=3
    )
    if kind == LaunchPage.CPUID:  # the pages' noise is no CPUID page
        assert status is Status.INVALID_PARAM
    else:
        assert (done, status) == ((5, Status.SUCCESS) if kind else (0, Status.INVALID_PARAM))


@pytest.mark.parametrize("bad", ["other", "hypervisor", "firmware", "invalid"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_run_stops_at_the_first_bad_page(bad: str, at: int) -> None:
    states = ["pre-guest"] * 5
    states[at] = bad
    done, status = assert_same(states, Command.SNP_LAUNCH_UPDATE, gctx_paddr=GCTX, page_type=1)
    assert done == at
    assert status is (Status.INVALID_PAGE_OWNER if bad == "other" else Status.INVALID_PAGE_STATE)


@given(
    states=st.lists(st.sampled_from(["pre-guest"] * 6 + list(STATES)), min_size=1, max_size=8),
    kind=st.sampled_from([1, 1, 3, 4, 6, 2]),
)
def test_random_runs(states: list[str], kind: int) -> None:
    assert_same(states, Command.SNP_LAUNCH_UPDATE, gctx_paddr=GCTX, page_type=kind)


def test_run_into_the_rmp_does_what_stands_before_it() -> None:
    start = (PLACES["rmp"] >> 12) - 3
    boards = []
    for _ in range(2):
        board = Board().initialise()
        board.start()
        board.assign(start << 12, PRE_GUEST, 0x1000, 3)
        boards.append(board)
    pages, fields = range(start, start + 5), {"gctx_paddr": GCTX, "page_type": 1}
    result = boards[0].run(Command.SNP_LAUNCH_UPDATE, pages, **fields)
    assert result == one_by_one(boards[1], Command.SNP_LAUNCH_UPDATE, pages, **fields) == (3, Status.INVALID_PARAM)
    assert clean(boards[0]) == clean(boards[1])


def test_run_of_large_pages() -> None:
    digests = []
    for ways in (1, 2):
        board = Board().initialise()
        board.start()
        board.assign(20 * MIB, LARGE, 0x400000, 2)
        board.machine.dram.write(20 * MIB + 3 * MIB, PATTERN)
        pages = range(20 * MIB >> 12, (20 * MIB >> 12) + 1024, 512)
        for part in (pages,) if ways == 1 else (pages[:1], pages[1:]):
            assert (
                board.run(Command.SNP_LAUNCH_UPDATE, part, gctx_paddr=GCTX, page_type=1, page_size=1)[1]
                is Status.SUCCESS
            )
        digests.append((board.psp.context(GCTX).launch_digest, clean(board)))
    assert digests[0] == digests[1]
    expected = bytes(48)
    for number in range(1024):
        contents = sha384(PATTERN if number == 768 else bytes(PAGE)).digest()
        expected = page_info(contents, 1, 0x400000 + number * PAGE, expected)
    assert digests[0][0] == expected


def test_an_empty_run_is_a_mistake_of_the_caller() -> None:
    board = board_of_pages([])
    with pytest.raises(ValueError, match="at least one page"):
        board.run(Command.SNP_LAUNCH_UPDATE, range(5, 5), gctx_paddr=GCTX, page_type=1)


def test_a_command_without_a_page_cannot_be_repeated() -> None:
    board = board_of_pages([])
    assert board.run(Command.SNP_LAUNCH_FINISH, range(5, 9), gctx_paddr=GCTX) == (0, Status.INVALID_COMMAND)


# LAUNCH_FINISH; what its ID block does is in test_identity.


def launch_finish(
    low: int = 0, off: bool = False, gctx: int = GCTX, guest: str = "LAUNCH", asid: int = 1,
    stray: tuple[int, ...] = (), **fields: Any,
) -> Attempt:  # fmt: skip
    board = Board().initialise()
    if guest == "INIT":
        board.create()
    else:
        board.start(asid=asid)
    if guest == "RUNNING":
        board.finish()
    if off:
        board.psp.state = PlatformState.UNINIT
    return Attempt(board, Command.SNP_LAUNCH_FINISH, {"gctx_paddr": gctx + low, **fields}, stray)


FINISH = [
    Row("reserved flag", Status.INVALID_PARAM, {"stray": (0x18 * 8 + 3,)}),
    Row("reserved bit 63", Status.INVALID_PARAM, {"stray": (0x18 * 8 + 63,)}),
    *PREFIX,
    Row("guest INIT", Status.INVALID_GUEST_STATE, {"guest": "INIT"}),
    Row("guest RUNNING", Status.INVALID_GUEST_STATE, {"guest": "RUNNING"}),
    Row("guest inactive", Status.INACTIVE, {"asid": 0}),
    Row("ID block in the RMP", Status.INVALID_ADDRESS, {"id_block_en": 1, "id_block_paddr": PLACES["rmp"]}),
    Row("ID block in no DRAM", Status.INVALID_CONFIG, {"id_block_en": 1, "id_block_paddr": PLACES["hole"]}),
    Row("ID auth above the limit", Status.INVALID_ADDRESS, {"id_block_en": 1, "id_auth_paddr": PLACES["limit"]}),
]


@single(FINISH)
def test_launch_finish_refuses(row: Row) -> None:
    assert_refused(launch_finish(**row.options), row.status)


@double([row for row in FINISH if row.options != {"guest": "RUNNING"}])
def test_launch_finish_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(launch_finish(**first.options, **second.options), first.status)


def test_launch_finish_lets_the_guest_run() -> None:
    built = launch_finish(host_data=b"h" * 32, vcek_dis=1, auth_key_en=1)
    assert built.board.machine.runnable == {}
    assert built.issue() is Status.SUCCESS
    assert built.board.machine.runnable == {1: {0}}
    context = built.board.psp.context(GCTX)
    assert (context.state, context.host_data, context.vcek_dis) == (GuestState.RUNNING, b"h" * 32, 1)
    assert (context.id_block_en, context.author_key_en) == (0, 1), "AUTH_KEY_EN without an ID block is stored unchecked"
    assert (context.id_block, context.id_key_digest, context.author_key_digest) == (bytes(96), bytes(48), bytes(48))
