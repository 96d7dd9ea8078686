"""The mailbox from the driver's side: two command buffers, time-outs, and buffers that are lost in preparation."""

from __future__ import annotations

import errno

import pytest

from snpbook.hardware.ports import HostCpu
from snpbook.host.kernel import Kernel
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command, PspRegister
from snpbook.spec.status import Status
from tests.host.sev_device import (
    COMMIT,
    MARK,
    PDH_GEN,
    PEK_CSR,
    STATUS,
    Host,
    check_pages,
    fail_rmpupdate,
    fails,
    spoil,
)
from tests.machines import Board


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_command_asks_for_an_interrupt_and_serves_it(host: Host) -> None:
    written = []
    original = HostCpu.mailbox_write

    def note(self: HostCpu, register: object, value: int) -> None:
        written.append((register, value))
        original(self, register, value)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCpu, "mailbox_write", note)
        assert host.issue(COMMIT) == (0, 0)
    assert written[-2][1] == Command.SNP_COMMIT << 16 | 1
    assert written[-1] == (PspRegister.INTERRUPT_STATUS, 2)
    assert not host.kernel.cpu.mailbox_interrupt


def test_the_first_answer_makes_the_time_limit_longer() -> None:
    board = Board()
    ccp = Kernel(HostCpu(board.machine)).ccp
    assert ccp.timeout == 5
    ccp.submit(Command.NOP)
    assert ccp.timeout == 100
    host = Host(ccp="psp_cmd_timeout=7 psp_probe_timeout=3")
    assert host.ccp.timeout == 7


def test_a_refusal_is_an_answer() -> None:
    ccp = Kernel(HostCpu(Board().machine)).ccp
    with fails(errno.EIO, Status.INVALID_PLATFORM_STATE):
        ccp.submit(Command.PEK_GEN)
    assert ccp.timeout == 100
    assert not ccp.dead


def test_no_answer_within_the_limit() -> None:
    board = Board()
    kernel = Kernel(HostCpu(board.machine))
    processor, board.machine.mailbox._processor = board.machine.mailbox._processor, None
    with pytest.raises(KernelError, match=r"DF_FLUSH.*within 5 s") as late:
        kernel.ccp.submit(Command.DF_FLUSH)
    assert (late.value.errno, late.value.firmware) == (errno.ETIMEDOUT, None)
    assert kernel.log.lines == ["ccp 0000:22:00.1: sev command 0xa timed out, disabling PSP"]
    board.machine.mailbox._processor = processor
    for _ in range(2):
        with fails(errno.EBUSY):
            kernel.ccp.submit(Command.DF_FLUSH)


def test_a_lost_interrupt_is_a_time_out(host: Host) -> None:
    host.kernel.cpu.mailbox_write(PspRegister.INTERRUPT_ENABLE, 0)
    assert host.issue(COMMIT) == (errno.ETIMEDOUT, 0)
    assert host.issue(COMMIT)[0] == errno.EBUSY


def test_both_buffers_in_use_is_ebusy(host: Host) -> None:
    first, second = host.ccp.claim(), host.ccp.claim()
    assert second == first + 4096
    with fails(errno.EBUSY):
        host.ccp.claim()
    assert host.kernel.log.lines[-1] == (
        "ccp 0000:22:00.1: SEV: too many firmware commands in progress, no command buffers available."
    )
    host.ccp.release()
    assert host.ccp.claim() == second
    host.ccp.release()
    host.ccp.release()
    assert host.ccp.claim() == first


def test_a_preparation_that_fails_twice_ends_all_commands_with_a_buffer(host: Host) -> None:
    before = host.kernel.memory.allocated
    for _ in range(2):
        assert host.issue(COMMIT) == (0, 0)
        with pytest.MonkeyPatch.context() as patch:
            fail_rmpupdate(patch, 0, assigned=True)
            assert host.issue(STATUS, host.memory) == (errno.EFAULT, MARK)
        line = "ccp 0000:22:00.1: SEV: failed to prepare buffer for legacy command 0x4. Error: -14"
        assert host.kernel.log.lines[-1] == line
    for _ in range(2):
        assert host.issue(STATUS, host.memory) == host.issue(COMMIT) == (errno.EBUSY, MARK)
    assert host.issue(PDH_GEN) == (0, 0), "it has no buffer"
    check_pages(host, before)


def test_with_one_buffer_lost_nothing_nests(host: Host) -> None:
    """A command that lends pages takes the last buffer; to take them back there is none: they are leaked."""
    before = host.kernel.memory.allocated
    host.ccp.claim()
    number, error = host.issue(STATUS, host.memory)
    assert (number, error) == (errno.EFAULT, 0)
    assert host.ccp.leaks.count == 1
    check_pages(host, before)
    assert host.issue(COMMIT)[0] == errno.EBUSY


def test_output_comes_back_with_a_refusal(host: Host) -> None:
    with pytest.raises(KernelError) as short:
        host.ccp.command(Command.PEK_CSR)
    assert short.value.firmware is Status.INVALID_LENGTH
    assert int.from_bytes(short.value.buffer[8:12], "little") == 2084  # type: ignore[attr-defined]


def test_a_command_without_a_buffer_is_submitted(host: Host) -> None:
    with pytest.raises(ValueError, match="DF_FLUSH has no buffer"):
        host.ccp.command(Command.DF_FLUSH)


def test_a_late_reclaim_fails_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reclaim in flight, one refused: the command's own answer is still told."""
    spoil(monkeypatch, host, Command.SNP_PAGE_RECLAIM, Status.INVALID_PARAM, after=1, times=1)
    before = host.kernel.memory.allocated
    blob = host.memory + 0x1000
    data = host.put(blob.to_bytes(8, "little") + (2084).to_bytes(4, "little"))
    assert host.issue(PEK_CSR, data) == (errno.EFAULT, 0)
    check_pages(host, before)
    assert host.ccp.leaks.count == 1
