"""The mailbox and its dispatch: unknown ids, reserved bits of every buffer, events, and only the register's ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.host_instructions import FIRMWARE
from snpbook.spec.commands import Command, MailboxRegister
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.status import Status
from snpbook.trace import FirmwareCommand
from tests.firmware.rows import Attempt, assert_refused
from tests.machines import BUFFER, GCTX, MIB, Board, World

KNOWN = {0x83, 0x84, 0x85, 0x90, 0x91, 0x93, 0x94, 0xA0, 0xA1, 0xA2, 0xC7}
"""The commands of the slice, by number."""


def test_every_other_id_is_invalid_and_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board().initialise()
    before = World.of(board)

    def no_read(*arguments: object) -> bytes:
        raise AssertionError(f"memory was read: {arguments}")

    with monkeypatch.context() as patch:
        for name in ("read", "gather", "words", "pieces"):
            patch.setattr(board.machine.dram, name, no_read)
        for command in range(0x800):
            if command not in KNOWN:
                assert board.send(command, 1 << 60) is Status.INVALID_COMMAND, hex(command)
    assert World.of(board) == before


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
    assert board.log.events[-1].name == "0x7ff"


@given(command=st.sampled_from([Command(number) for number in sorted(KNOWN)]), data=st.binary(min_size=64, max_size=64))
def test_random_buffers_get_a_status(command: Command, data: bytes) -> None:
    """Whatever stands in a buffer, the answer is a status; a refusal changes nothing."""
    board = Board().initialise()
    board.start()
    board.machine.dram.write(BUFFER, data)
    before = World.of(board)
    if board.send(command, BUFFER) is not Status.SUCCESS:
        assert World.of(board) == before


@given(
    command=st.sampled_from([Command(n) for n in sorted(KNOWN)]),
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
