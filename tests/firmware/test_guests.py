"""A guest's life: GCTX_CREATE, LAUNCH_START, ACTIVATE, DECOMMISSION, check by check, and states by commands."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.context import GUEST_CONTEXT
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.states import GUEST_TRANSITIONS, GuestState, PlatformState
from snpbook.spec.status import Status
from tests.firmware.rows import PLACES, Attempt, Row, assert_refused, double, lookup_rows, single
from tests.machines import FREE, GCTX, PAGE, Board

LOW = Row("gctx not page-aligned", Status.INVALID_PARAM, {"low": 8})
OFF = Row("platform UNINIT", Status.INVALID_PLATFORM_STATE, {"off": True})
NO_CONTEXT = Row("gctx no Context", Status.INVALID_GUEST, {"gctx": FREE})
PREFIX = [LOW, OFF, *lookup_rows("gctx"), NO_CONTEXT]


def board_with(state: GuestState, asid: int = 1) -> Board:
    """A board whose context at GCTX is in `state`, with an ASID where the state has one."""
    board = Board().initialise()
    if state is GuestState.INIT:
        board.create()
        return board
    board.start(asid=asid if state is GuestState.LAUNCH else 1)
    if state is GuestState.RUNNING:
        board.finish()
    return board


def attempt(board: Board, command: Command, off: bool, stray: tuple[int, ...] = (), **fields: Any) -> Attempt:
    if off:
        board.psp.state = PlatformState.UNINIT
    return Attempt(board, command, fields, stray)


def gctx_create(low: int = 0, off: bool = False, page: int = GCTX, new: NewState | None = FIRMWARE) -> Attempt:
    board = Board().initialise()
    if new and page == GCTX:
        board.assign(GCTX & -(2 << 20) if new.large else GCTX, new)
    return attempt(board, Command.SNP_GCTX_CREATE, off, gctx_paddr=page + low)


GCTX_CREATE = [
    LOW,
    OFF,
    *lookup_rows("page")[:-1],
    Row("page in no DRAM and beyond the table", Status.INVALID_PAGE_STATE, {"page": PLACES["hole"]}),
    Row("page in a hole", Status.INVALID_PAGE_STATE, {"page": 128 << 20}),
    Row("page Hypervisor", Status.INVALID_PAGE_STATE, {"new": None}),
    Row("page Reclaim", Status.INVALID_PAGE_STATE, {"new": NewState(assigned=True)}),
    Row("page Pre-Guest", Status.INVALID_PAGE_STATE, {"new": NewState(assigned=True, asid=1, immutable=True)}),
    Row("2 MB page", Status.INVALID_PAGE_SIZE, {"new": NewState(assigned=True, immutable=True, large=True)}),
]


@single(GCTX_CREATE)
def test_gctx_create_refuses(row: Row) -> None:
    assert_refused(gctx_create(**row.options), row.status)


@double(GCTX_CREATE)
def test_gctx_create_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(gctx_create(**first.options, **second.options), first.status)


@pytest.mark.parametrize(
    ("policy", "sockets", "status"), [(1 << 20, 1, 0), (1 << 20, 2, 7), (0, 2, 0)], ids=["one", "two", "any"]
)
def test_a_guest_of_one_socket_is_not_activated_on_two(policy: int, sockets: int, status: int) -> None:
    board = Board(cores=16, sockets=sockets).initialise()
    board.start(asid=0, policy=DEFAULT_POLICY | policy)
    assert board.command(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1) == status


def test_a_guest_of_one_socket_stays_on_it() -> None:
    """ACTIVATE_EX: cores 0 to 7 and 8 to 15 are complexes of two sockets."""
    board = Board(cores=16, sockets=2).initialise()
    board.start(asid=0, policy=DEFAULT_POLICY | 1 << 20)
    ids = FREE + 4096
    found = []
    for listed in ([0, 9], [9], [3], [12]):
        board.machine.dram.write(ids, b"".join(number.to_bytes(4, "little") for number in listed))
        fields = {"length": 0x20, "gctx_paddr": GCTX, "asid": 1, "numids": len(listed), "ids_paddr": ids}
        found.append(int(board.command(Command.SNP_ACTIVATE_EX, **fields)))
    assert found == [7, 0, 7, 0]


def test_gctx_create_makes_an_encrypted_context() -> None:
    board = Board().initialise()
    board.machine.dram.write(GCTX, b"left over" * 10)
    board.create()
    assert board.state(GCTX) == PageState.CONTEXT
    entry = board.cpu.rmp_entry(GCTX >> 12)
    assert (entry.assigned, entry.immutable, entry.lock, entry.vmsa, entry.asid, entry.gfn) == (1, 1, 1, 1, 0, 0)
    context = board.psp.context(GCTX)
    blank = GUEST_CONTEXT.record()
    assert {name for name, value in context if value != getattr(blank, name)} == {"vek_seed", "launch_tcb"}
    assert context.launch_tcb == int(board.psp.committed_tcb)
    raw = board.cpu.read(GCTX, PAGE)
    assert context.vek_seed not in raw
    assert raw.count(b"\0") < 100, "the page is encrypted"
    assert board.command(Command.SNP_GCTX_CREATE, gctx_paddr=GCTX) is Status.INVALID_PAGE_STATE, "a second time"


def launch_start(
    low: int = 0, off: bool = False, gctx: int = GCTX, state: GuestState = GuestState.INIT,
    policy: int = DEFAULT_POLICY, stray: tuple[int, ...] = (), **fields: Any,
) -> Attempt:  # fmt: skip
    board = board_with(state)
    return attempt(board, Command.SNP_LAUNCH_START, off, stray, gctx_paddr=gctx + low, policy=policy, **fields)


POLICIES = {
    "bit 17 zero": 0x10000,
    "SMT forbidden": 0x20000,
    "ABI minor too new": 0x30000 | 1 << 8 | 56,
    "ABI major too new": 0x30000 | 2 << 8,
    "CXL bit unknown": 0x230000,
    "bit 63": 1 << 63 | 0x30000,
}
LAUNCH_START = [
    Row("reserved flag", Status.INVALID_PARAM, {"stray": (0x18 * 8 + 2,)}),
    *PREFIX,
    Row("guest LAUNCH", Status.INVALID_GUEST_STATE, {"state": GuestState.LAUNCH}),
    Row("guest RUNNING", Status.INVALID_GUEST_STATE, {"state": GuestState.RUNNING}),
    Row("agent no Context", Status.INVALID_GUEST, {"ma_en": 1, "ma_gctx_paddr": FREE}),
    *(Row(f"policy: {name}", Status.POLICY_FAILURE, {"policy": policy}) for name, policy in POLICIES.items()),
]


@single(LAUNCH_START)
def test_launch_start_refuses(row: Row) -> None:
    assert_refused(launch_start(**row.options), row.status)


@double(LAUNCH_START)
def test_launch_start_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(launch_start(**first.options, **second.options), first.status)


@pytest.mark.parametrize("policy", [0x30000, 0x30000 | 55, 0x30000 | 1 << 8 | 55, 0x1F0000, 0x30000 | 0xFF])
def test_launch_start_accepts(policy: int) -> None:
    """The minimum ABI is compared as (major, minor): 0.255 is older than 1.55."""
    built = launch_start(policy=policy, desired_tsc_khz=7, gosvw=bytes(range(16)))
    assert built.issue() is Status.SUCCESS
    context = built.board.psp.context(GCTX)
    assert (context.state, context.policy, context.desired_tsc_khz) == (GuestState.LAUNCH, policy, 7)
    assert (context.gosvw, context.report_id_ma, context.launch_digest) == (bytes(range(16)), b"\xff" * 32, bytes(48))
    secrets = [context.oek, context.vmrk, context.report_id, *(getattr(context, f"vmpck{i}") for i in range(4))]
    assert len({*secrets, context.vek_seed, bytes(32)}) == 9, "all drawn, all different"
    assert built.board.psp.guest_count == 1


def activate(
    low: int = 0, off: bool = False, gctx: int = GCTX, state: GuestState = GuestState.LAUNCH, asid: int = 1,
    pages: bool = False, slot: str = "", current: int = 0, stray: tuple[int, ...] = (),
) -> Attempt:  # fmt: skip
    board = board_with(state, asid=current)
    if pages:
        board.assign(FREE + PAGE, NewState(assigned=True, asid=asid), 0x1000)
    if slot:
        board.psp.asids.states[0, asid] = {"dirty": 1, "allocated": 2, "in use": 3}[slot]
    return attempt(board, Command.SNP_ACTIVATE, off, stray, gctx_paddr=gctx + low, asid=asid)


ACTIVATE = [
    *PREFIX,
    Row("guest INIT", Status.INVALID_GUEST_STATE, {"state": GuestState.INIT}),
    Row("ASID has no counter", Status.INVALID_ASID, {"asid": 2048, "pages": False, "slot": ""}),
    Row("pages carry the ASID", Status.INVALID_CONFIG, {"pages": True}),
    Row("ASID 0", Status.INVALID_ASID, {"asid": 0, "pages": False, "slot": ""}),
    Row("ASID above the limit", Status.INVALID_ASID, {"asid": 510, "slot": ""}),
    Row("ASID allocated", Status.ASID_OWNED, {"slot": "allocated"}),
    Row("ASID in use", Status.ASID_OWNED, {"slot": "in use"}),
    Row("guest has an ASID", Status.ACTIVE, {"current": 7, "state": GuestState.LAUNCH}),
    Row("ASID dirty", Status.DF_FLUSH_REQUIRED, {"slot": "dirty"}),
    Row("ASID for plain SEV", Status.INVALID_ASID, {"asid": 100}),
]


@single(ACTIVATE)
def test_activate_refuses(row: Row) -> None:
    assert_refused(activate(**row.options), row.status)


@double(ACTIVATE)
def test_activate_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(activate(**first.options, **second.options), first.status)


@pytest.mark.parametrize("asid", [1, 99])
def test_activate_installs_the_key(asid: int) -> None:
    built = activate(asid=asid)
    machine = built.board.machine
    assert not machine.encryption.has_key(asid)
    assert built.issue() is Status.SUCCESS
    assert machine.encryption.has_key(asid)
    assert built.board.psp.context(GCTX).asid == asid
    assert asid not in machine.runnable, "allocated: no VMRUN before LAUNCH_FINISH"
    assert built.issue() is Status.ASID_OWNED, "a second time"


def decommission(low: int = 0, off: bool = False, gctx: int = GCTX) -> Attempt:
    return attempt(board_with(GuestState.RUNNING), Command.SNP_DECOMMISSION, off, gctx_paddr=gctx + low)


@single(PREFIX)
def test_decommission_refuses(row: Row) -> None:
    assert_refused(decommission(**row.options), row.status)


@double(PREFIX)
def test_decommission_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(decommission(**first.options, **second.options), first.status)


@pytest.mark.parametrize("state", list(GuestState))
def test_decommission_ends_a_guest_in_any_state(state: GuestState) -> None:
    board = board_with(state)
    assert board.psp.guest_count == (state is not GuestState.INIT)
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert board.state(GCTX) == PageState.FIRMWARE
    assert board.psp.guest_count == 0
    assert not board.machine.runnable
    assert board.command(Command.SNP_DECOMMISSION, gctx_paddr=GCTX) is Status.INVALID_GUEST, "a second time"


def test_the_c_bit_of_a_page_address_is_ignored() -> None:
    c_bit = 1 << 51
    board = Board().initialise()
    board.assign(GCTX, FIRMWARE)
    board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=GCTX | c_bit)
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX | c_bit, policy=DEFAULT_POLICY)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX | c_bit, asid=1)
    board.assign(FREE, NewState(assigned=True, asid=1, immutable=True), 0x1000)
    board.ok(Command.SNP_LAUNCH_UPDATE, gctx_paddr=GCTX, page_paddr=FREE | c_bit, page_type=LaunchPage.NORMAL)
    assert board.state(FREE) == PageState.GUEST_VALID
    board.ok(Command.SNP_PAGE_RECLAIM, page=(FREE | c_bit) >> 12)
    board.ok(Command.SNP_LAUNCH_FINISH, gctx_paddr=GCTX | c_bit)
    assert board.psp.context(GCTX).state is GuestState.RUNNING
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX | c_bit)


# The product of guest states and commands, from the sheet: what each pair answers and where the guest then is.

OK, NOT_NOW = Status.SUCCESS, Status.INVALID_GUEST_STATE
PRODUCT = {
    "INIT": {"SNP_LAUNCH_START": (OK, "LAUNCH"), "SNP_DECOMMISSION": (OK, None)},
    "LAUNCH": {
        "SNP_ACTIVATE": (OK, "LAUNCH"),
        "SNP_LAUNCH_UPDATE": (OK, "LAUNCH"),
        "SNP_LAUNCH_FINISH": (OK, "RUNNING"),
        "SNP_DECOMMISSION": (OK, None),
    },
    "RUNNING": {
        "SNP_ACTIVATE": (OK, "RUNNING"),
        "SNP_GUEST_REQUEST": (Status.INVALID_PARAM, "RUNNING"),  # admitted: the empty message is what it refuses
        "SNP_DECOMMISSION": (OK, None),
    },
}
GUEST_COMMANDS = [
    "SNP_LAUNCH_START", "SNP_ACTIVATE", "SNP_LAUNCH_UPDATE", "SNP_LAUNCH_FINISH", "SNP_GUEST_REQUEST",
    "SNP_DECOMMISSION",
]  # fmt: skip


def _arguments(board: Board, command: str) -> dict[str, Any]:
    """Everything right but for the guest's state."""
    board.assign(FREE, NewState(assigned=True, asid=3, immutable=True), 0x1000)
    board.assign(FREE + PAGE, FIRMWARE)
    fields: dict[str, dict[str, Any]] = {
        "SNP_LAUNCH_START": {"policy": DEFAULT_POLICY},
        "SNP_ACTIVATE": {"asid": 5},
        "SNP_LAUNCH_UPDATE": {"page_paddr": FREE, "page_type": LaunchPage.NORMAL},
        "SNP_GUEST_REQUEST": {"request_paddr": FREE + 2 * PAGE, "response_paddr": FREE + PAGE},
    }
    return {"gctx_paddr": GCTX, **fields.get(command, {})}


def _with_asid(board: Board, asid: int) -> None:
    """Give the guest an ASID, or take it away, behind the firmware's back."""
    context = board.psp.context(GCTX)
    board.psp.save_context(GCTX, context.replace(asid=asid))


@pytest.mark.parametrize("command", GUEST_COMMANDS)
@pytest.mark.parametrize("state", list(GuestState), ids=lambda state: state.name)
def test_product_of_state_and_command(state: GuestState, command: str) -> None:
    expected, after = PRODUCT[state.name].get(command, (NOT_NOW, state.name))
    board = board_with(state, asid=3)
    if state is not GuestState.INIT:
        _with_asid(board, 0 if command == "SNP_ACTIVATE" else 3)
    built = Attempt(board, Command[command], _arguments(board, command))
    if expected is NOT_NOW:
        assert_refused(built, expected)
    else:
        assert built.issue() is expected
    if after:
        assert board.psp.context(GCTX).state.name == after
    else:
        assert board.state(GCTX) == PageState.FIRMWARE


def test_the_table_says_the_same() -> None:
    admitted = {
        (GuestState[state], Command[command]): GuestState[after]
        for state, row in PRODUCT.items()
        for command, (_, after) in row.items()
        if after
    }
    assert admitted == {pair: after for pair, after in GUEST_TRANSITIONS.items() if pair[1].name in GUEST_COMMANDS}


@pytest.mark.parametrize("command", [c for c in GUEST_COMMANDS if c != "SNP_DECOMMISSION"])
def test_every_command_asks_the_table(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty table admits nothing."""
    state = next(GuestState[s] for s, row in PRODUCT.items() if command in row)
    board = board_with(state, asid=3)
    _with_asid(board, 0 if command == "SNP_ACTIVATE" or state is GuestState.INIT else 3)
    built = Attempt(board, Command[command], _arguments(board, command))
    monkeypatch.setattr("snpbook.spec.states.GUEST_TRANSITIONS", {})
    for module in ("processor", "launch_update"):
        monkeypatch.setattr(f"snpbook.firmware.{module}.GUEST_TRANSITIONS", {})
    assert built.issue() is NOT_NOW


def test_activating_a_running_guest_goes_straight_to_in_use() -> None:
    board = board_with(GuestState.RUNNING)
    board.psp.asids.states[:, 1], board.machine.runnable = 0, {}
    _with_asid(board, 0)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1)
    assert board.machine.runnable == {1: {0}}


def test_a_page_of_the_ended_guest_keeps_its_asid_closed() -> None:
    board = board_with(GuestState.LAUNCH)
    board.add(FREE, 0x1000)
    board.ok(Command.SNP_DECOMMISSION, gctx_paddr=GCTX)
    assert board.state(FREE) == PageState.GUEST_VALID, "its pages stay assigned"
    board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=GCTX)
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=DEFAULT_POLICY)
    assert_refused(Attempt(board, Command.SNP_ACTIVATE, {"gctx_paddr": GCTX, "asid": 1}), Status.INVALID_CONFIG)
    board.assign(FREE, HYPERVISOR)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1)
