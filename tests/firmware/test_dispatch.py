"""The mailbox and its dispatch: unknown ids, reserved bits of every buffer, events, and only the register's ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.firmware.legacy_buffers import ShortBuffer
from snpbook.firmware.processor import Commands, Handler, SecureProcessor
from snpbook.firmware.table import COMMANDS
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command, MailboxRegister
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.trace import FirmwareCommand
from tests.firmware.rows import Attempt, assert_refused
from tests.machines import BUFFER, FREE, GCTX, MIB, PAGE, SYSCFG_FOR_SNP, Board, World

KNOWN = {
    *range(0x01, 0x0F), *range(0x20, 0x26), *range(0x30, 0x37), *range(0x40, 0x45), *range(0x50, 0x54), 0x60, 0x61,
    0x70, 0x71, *range(0x81, 0x87), *range(0x90, 0x96), *range(0xA0, 0xA3), 0xB0, 0xB1, *range(0xC0, 0xC4),
    *range(0xC6, 0xCC), 0xCD, 0xCE,
}  # fmt: skip
"""The commands of firmware 1.55 by number, without ring buffer mode."""
YOUNGER = {0x85: "1.52", 0xCA: "1.53", 0xCD: "1.54", 0xB2: "1.58"}


@pytest.mark.parametrize("release", ["1.51", "1.55", "1.58"])
def test_every_other_id_is_invalid_and_nothing_is_read(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    board = Board(release=release)
    known = (KNOWN | {0xB2}) - {number for number, since in YOUNGER.items() if since > release}
    before = World.of(board)

    def no_read(*arguments: object) -> bytes:
        raise AssertionError(f"memory was read: {arguments}")

    with monkeypatch.context() as patch:
        for name in ("read", "gather", "words", "pieces"):
            patch.setattr(board.machine.dram, name, no_read)
        for command in range(0x800):
            if command & 0xFF not in known:
                assert board.send(command, 1 << 60) is Status.INVALID_COMMAND, hex(command)
    assert World.of(board) == before


@pytest.mark.parametrize(("command", "what"), [(0x0F, "ring buffer mode"), (0xD1, "trusted I/O")])
def test_what_is_not_modelled_is_refused_by_name(command: int, what: str) -> None:
    board = Board()
    assert board.send(command, 0) is Status.INVALID_COMMAND
    assert f"{what} is not modelled" in board.log.events[-1].reason


def test_the_firmware_decodes_eight_bits_of_a_command() -> None:
    board = Board().initialise()
    assert board.send(0x100 | Command.SNP_DF_FLUSH, 0) is Status.SUCCESS
    assert board.log.events[-1].name == "SNP_DF_FLUSH"


# Reserved bits of each buffer by the sheet: bytes [first, end) of which all bits, then single bits.
RESERVED: dict[str, tuple[list[tuple[int, int]], list[int]]] = {
    "SNP_PLATFORM_STATUS": ([], []),
    "SNP_INIT_EX": ([(1, 8), (0x10, 0x40)], [2, 3, 4, 5, 6, 7]),
    "SNP_DECOMMISSION": ([], []),
    "SNP_ACTIVATE": ([], []),
    "SNP_GCTX_CREATE": ([], []),
    "SNP_GUEST_REQUEST": ([], []),
    "SNP_LAUNCH_START": ([(0x19, 0x1C)], [0x18 * 8 + bit for bit in range(2, 8)]),
    "SNP_LAUNCH_UPDATE": ([(9, 0x10), (0x18, 0x19), (0x1C, 0x20)], [8 * 8 + bit for bit in (5, 6, 7)]),
    "SNP_LAUNCH_FINISH": ([(0x19, 0x20)], [0x18 * 8 + bit for bit in range(3, 8)]),
    "SNP_PAGE_RECLAIM": ([], list(range(1, 12))),
}
SIZES = {
    "SNP_PLATFORM_STATUS": 8, "SNP_INIT_EX": 0x40, "SNP_DECOMMISSION": 8, "SNP_ACTIVATE": 0xC, "SNP_GCTX_CREATE": 8,
    "SNP_GUEST_REQUEST": 0x18, "SNP_LAUNCH_START": 0x30, "SNP_LAUNCH_UPDATE": 0x20, "SNP_LAUNCH_FINISH": 0x40,
    "SNP_PAGE_RECLAIM": 8,
}  # fmt: skip


def reserved_bits(command: str) -> set[int]:
    ranges, singles = RESERVED[command]
    return {bit for first, end in ranges for bit in range(8 * first, 8 * end)} | set(singles)


@pytest.mark.parametrize("command", list(SIZES))
def test_every_reserved_bit_is_refused_first_of_all(command: str) -> None:
    """Even while SNP is not initialised, and with an address that is wrong besides."""
    board = Board()
    layout = BUFFERS[Command[command]]
    assert layout is not None
    assert layout.size == SIZES[command]
    blank = bytes(layout.size)
    for bit in range(8 * layout.size):
        number = 1 << bit
        board.machine.dram.write(BUFFER, number.to_bytes(layout.size, "little"))
        status = board.send(Command[command], BUFFER)
        if bit in reserved_bits(command):
            assert status is Status.INVALID_PARAM, f"byte {bit // 8:#x} bit {bit % 8}"
            assert "reserved" in board.log.events[-1].reason
        else:
            assert "reserved" not in board.log.events[-1].reason
    board.machine.dram.write(BUFFER, blank)


def test_one_command_starts_at_a_write_of_the_command_register() -> None:
    board = Board().initialise()
    board.assign(GCTX, FIRMWARE)
    address = board.put(BUFFERS[Command.SNP_GCTX_CREATE], gctx_paddr=GCTX)
    count = len(board.log.of(FirmwareCommand))
    board.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, address)
    board.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, 0)
    board.cpu.mailbox_write(MailboxRegister.COMMAND, 1 << 31 | Command.SNP_GCTX_CREATE << 16)
    assert len(board.log.of(FirmwareCommand)) == count, "the response bit is the firmware's: nothing starts"
    board.cpu.mailbox_write(MailboxRegister.COMMAND, Command.SNP_GCTX_CREATE << 16 | 1)
    assert board.cpu.mailbox_read(MailboxRegister.COMMAND) == 1 << 31, "done, status 0"
    assert board.log.of(FirmwareCommand)[count].name == "SNP_GCTX_CREATE"


def test_the_address_has_two_halves() -> None:
    board = Board().initialise()
    assert board.send(Command.SNP_GCTX_CREATE, BUFFER | 1 << 32) is Status.INVALID_CONFIG


def test_events_tell_the_command_its_arguments_and_the_reason() -> None:
    board = Board().initialise()
    board.assign(GCTX, FIRMWARE)
    board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=GCTX)
    done = board.log.events[-1]
    assert (done.name, done.status, done.arguments["gctx_paddr"], done.reason) == ("SNP_GCTX_CREATE", 0, GCTX, "")
    board.command(Command.SNP_GCTX_CREATE, gctx_paddr=GCTX)
    refused = board.log.events[-1]
    assert (refused.name, refused.status) == ("SNP_GCTX_CREATE", Status.INVALID_PAGE_STATE)
    assert "CONTEXT" in refused.reason
    board.send(0x7FF, 0)
    assert board.log.events[-1].name == "0xff"


@given(command=st.sampled_from(sorted(COMMANDS)), data=st.binary(min_size=64, max_size=64))
def test_random_buffers_get_a_status(command: Command, data: bytes) -> None:
    """Whatever stands in a buffer, the answer is a status; a refusal changes nothing."""
    board = Board().initialise()
    board.start()
    board.machine.dram.write(BUFFER, data)
    before = World.of(board)
    if board.send(command, BUFFER) is not Status.SUCCESS:
        assert World.of(board) == before


@given(
    command=st.sampled_from(sorted(COMMANDS)),
    values=st.lists(st.sampled_from([0, 1, 3, GCTX, GCTX + 4096, 47 * MIB, 1 << 51, 0x30000]), min_size=8, max_size=8),
)
def test_plausible_buffers_get_a_status(command: Command, values: list[int]) -> None:
    board = Board().initialise()
    board.start()
    board.assign(GCTX + 4096, FIRMWARE)
    board.machine.dram.write(BUFFER, b"".join(value.to_bytes(8, "little") for value in values))
    before = World.of(board)
    if board.send(command, BUFFER) is not Status.SUCCESS:
        assert World.of(board) == before


def test_df_flush_takes_no_buffer() -> None:
    board = Board()
    assert_refused(Attempt(board, Command.SNP_DF_FLUSH), Status.WBINVD_REQUIRED)


# Command buffers that are written back: a board whose legacy commands do what a test says.

LENGTH = BUFFERS[Command.GET_ID]
STATUS = BUFFERS[Command.PLATFORM_STATUS]
SPOILT = bytes(range(1, 13))


def legacy_board(handler: Handler, *, state: str = "FIRMWARE") -> Board:
    """A board with SNP on, whose PLATFORM_STATUS and GET_ID are a handler of ours, and a page for their buffers."""
    board = Board().initialise()
    commands: Commands = {Command.PLATFORM_STATUS: (STATUS, handler, None), Command.GET_ID: (LENGTH, handler, None)}
    both = {**COMMANDS, **commands}
    board.psp._commands = both
    board.machine.dram.write(FREE, SPOILT)
    if state != "HYPERVISOR":
        board.assign(FREE, FIRMWARE)
    return board


def refuse(psp: SecureProcessor, buffer: Record) -> Record | None:
    raise FirmwareRefusal(Status.INVALID_CONFIG, "never")


def too_short(psp: SecureProcessor, buffer: Record) -> Record | None:
    raise ShortBuffer(buffer.replace(len=0x40), "length", 0x40, 0)


def answer(psp: SecureProcessor, buffer: Record) -> Record | None:
    return buffer.replace(**{name: 7 for name in ("build", "len") if name in buffer.layout.fields})


def test_an_answer_is_written_and_its_page_is_reclaimed() -> None:
    board = legacy_board(answer)
    assert board.send(Command.PLATFORM_STATUS, FREE) is Status.SUCCESS
    assert board.machine.dram.read(FREE, 12) == bytes([0] * 7 + [7] + [0] * 4), "an output begins with nothing"
    assert board.state(FREE) == PageState.RECLAIM
    event = board.log.events[-1]
    assert [*event.changed, *event.before, *event.after] == [FREE >> 12, PageState.FIRMWARE, PageState.RECLAIM]


def test_the_length_needed_is_written_though_the_command_is_refused() -> None:
    board = legacy_board(too_short)
    assert board.send(Command.GET_ID, FREE) is Status.INVALID_LENGTH
    assert board.machine.dram.read(FREE, 12) == SPOILT[:8] + bytes([0x40, 0, 0, 0])
    assert board.state(FREE) == PageState.RECLAIM


@pytest.mark.parametrize("command", [Command.GET_ID, Command.PLATFORM_STATUS])
def test_any_other_refusal_leaves_the_buffer_and_reclaims_its_page(command: Command) -> None:
    board = legacy_board(refuse)
    assert board.send(command, FREE) is Status.INVALID_CONFIG
    assert board.machine.dram.read(FREE, 12) == SPOILT
    assert board.state(FREE) == PageState.RECLAIM


@pytest.mark.parametrize("at", [FREE, FREE - 4], ids=["page", "first of two pages"])
def test_a_buffer_page_of_the_host_is_refused(at: int) -> None:
    board = legacy_board(answer, state="HYPERVISOR" if at == FREE else "FIRMWARE")
    before = World.of(board)
    assert board.send(Command.PLATFORM_STATUS, at) == 0x5A
    assert World.of(board) == before


def test_after_a_shutdown_the_page_is_not_tested_and_is_reclaimed_all_the_same() -> None:
    board = legacy_board(answer)
    board.assign(FREE + PAGE, NewState(assigned=True, asid=3, immutable=True), 0x1000)
    board.ok(Command.SNP_SHUTDOWN)
    assert board.send(Command.PLATFORM_STATUS, FREE + PAGE) is Status.SUCCESS
    assert board.state(FREE + PAGE) == PageState.GUEST_INVALID


def test_before_snp_a_buffer_is_any_page() -> None:
    board = Board()
    board.psp._commands = {Command.PLATFORM_STATUS: (STATUS, answer, None)}
    assert board.send(Command.PLATFORM_STATUS, FREE) is Status.SUCCESS
    assert board.machine.dram.read(FREE + 7, 1) == b"\7"


# Error information, and one command at a time.


def error_info(board: Board) -> int:
    low, high = (board.cpu.mailbox_read(r) for r in (MailboxRegister.ADDRESS_LOW, MailboxRegister.ADDRESS_HIGH))
    return high << 32 | low


def test_the_address_registers_hold_error_information_afterwards() -> None:
    board = Board().initialise()
    board.assign(FREE, FIRMWARE)
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE)
    assert error_info(board) == 0
    assert board.command(Command.SNP_PLATFORM_STATUS, status_paddr=FREE + PAGE) is Status.INVALID_PAGE_STATE
    assert error_info(board) == 0x1A
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=FREE)
    assert error_info(board) == 0


def test_a_look_up_of_a_default_page_is_told() -> None:
    """A kernel may cover only a part of memory."""
    board = Board(installed=512 * MIB)
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_BASE, 32 * MIB)
        core.wrmsr(Msr.RMP_END, 33 * MIB - 1)
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    board.ok(Command.SNP_INIT)
    uncovered = 300 * MIB
    assert board.state(uncovered) == PageState.DEFAULT
    board.ok(Command.SNP_PLATFORM_STATUS, status_paddr=uncovered)
    assert error_info(board) == 0x3FF


def test_a_command_while_one_runs_is_a_misuse() -> None:
    board = Board()
    seen: list[str] = []

    def interrupt(event: object) -> None:
        with pytest.raises(ValueError, match="one command at a time"):
            board.send(Command.SNP_DF_FLUSH, 0)
        seen.append(type(event).__name__)

    stop = board.machine.trace.subscribe(interrupt)
    board.send(Command.SNP_DF_FLUSH, 0)
    stop()
    assert seen == ["FirmwareCommand"]
    board.send(Command.SNP_DF_FLUSH, 0)
