"""Shutdown of everything, also in part and on a panic: its order, and what each refusal leaves."""

from __future__ import annotations

import errno

import pytest

from snpbook.hardware.host_instructions import NewState
from snpbook.spec.commands import Command, PspRegister
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.host.sev_device import (
    COMMIT,
    Host,
    check_pages,
    down,
    fails,
    lines,
    spoil,
)
from tests.machines import MIB


def test_a_failed_shutdown_of_sev_is_ignored_but_keeps_snp_up(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    spoil(monkeypatch, host, Command.SHUTDOWN, Status.HWERROR_PLATFORM)
    with fails(errno.EIO, Status.INVALID_PLATFORM_STATE):
        host.ccp.shutdown()
    assert "SEV: failed to SHUTDOWN error 0x13, rc -5" in lines(host)
    assert lines(host)[-1] == "SEV-SNP firmware shutdown failed, rc -5, error 0x1"
    assert host.ccp.snp_initialised
    assert host.ccp.tmr is None


@pytest.mark.parametrize("again", [False, True])
def test_a_flush_where_the_firmware_asks_for_one(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    host = Host()
    host.commands()
    times = 2 if again else 1
    spoil(monkeypatch, host, Command.SNP_SHUTDOWN_EX, Status.DF_FLUSH_REQUIRED, times=times)
    if again:
        with fails(errno.EIO, Status.DF_FLUSH_REQUIRED):
            host.ccp.shutdown()
    else:
        host.ccp.shutdown()
    assert host.commands() == ["SHUTDOWN", "SNP_SHUTDOWN_EX", "SNP_DF_FLUSH", "SNP_SHUTDOWN_EX"]
    assert host.ccp.snp_initialised is again


def test_a_flush_that_fails_then(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    spoil(monkeypatch, host, Command.SNP_SHUTDOWN_EX, Status.DF_FLUSH_REQUIRED)
    spoil(monkeypatch, host, Command.SNP_DF_FLUSH, Status.WBINVD_REQUIRED)
    with fails(errno.EIO, Status.WBINVD_REQUIRED):
        host.ccp.shutdown()
    assert lines(host)[-1] == "SEV-SNP DF_FLUSH failed, ret = -5, error = 0xe"
    assert host.ccp.snp_initialised


def test_the_tmr_that_the_firmware_keeps_is_leaked(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    tmr, before = host.ccp.tmr, host.kernel.memory.allocated
    spoil(monkeypatch, host, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE, after=100)
    host.ccp.shutdown()
    assert host.ccp.leaks.listed == [tmr[100:]]
    assert host.ccp.leaks.forgotten == [tmr[:100]]
    assert f"SEV-SNP: Leaking PFN range {tmr[100]:#x}-{tmr.stop:#x}" in host.kernel.log.lines
    assert not host.ccp.snp_initialised, "SNP goes down all the same"
    monkeypatch.undo()
    check_pages(host, before - 512 - 1)


def test_the_iommus_buffers_come_back() -> None:
    host = Host()
    pages = host.kernel.memory.allocate(512 + 3, align=512)
    host.board.assign(pages.start << 12, NewState(assigned=True, large=True))
    host.board.assign((pages.start + 512) << 12, NewState(assigned=True), count=3)
    assert host.board.state(pages.start << 12) == PageState.RECLAIM
    host.ccp.iommu_buffers = [pages]
    host.ccp.shutdown()
    assert (host.board.machine.rmp.states(pages) == PageState.HYPERVISOR).all()
    assert not host.board.machine.rmp.load(pages).any()


def test_a_buffer_of_the_iommu_that_is_free_stops_the_shutdown() -> None:
    host = Host()
    pages = host.kernel.memory.allocate(1, align=512)
    host.ccp.iommu_buffers = [pages]
    with fails(errno.EINVAL):
        host.ccp.shutdown()
    assert f"AMD-Vi: IOMMU PFN {pages.start:x} not assigned in RMP table" in host.kernel.log.lines
    assert lines(host)[-1] == "SNP IOMMU shutdown failed"
    assert host.ccp.snp_initialised


def test_the_size_of_the_tmr_follows_snp() -> None:
    host = Host()
    assert host.ccp.tmr_size == 2 * MIB
    host.ccp.shutdown()
    assert host.ccp.tmr_size == MIB


def test_a_panic_shuts_down_without_interrupts() -> None:
    host = Host()
    assert host.ccp.panic_notifier
    host.kernel.cpu.mailbox_write(PspRegister.INTERRUPT_ENABLE, 0)
    host.ccp.panic()
    assert not host.ccp.snp_initialised
    assert not host.board.psp.initialised
    assert host.commands()[-2:] == ["SHUTDOWN", "SNP_SHUTDOWN_EX"]


def test_a_panic_amid_a_call_leaves_the_firmware_alone() -> None:
    host = Host()
    call = host.process.calling(host.fd, 0xC0105300, bytearray(COMMIT.to_bytes(16, "little")))
    next(call)
    next(call)
    host.commands()
    host.ccp.panic()
    assert host.commands() == []
    assert host.ccp.snp_initialised


def test_a_panic_before_snp_or_after_its_end_does_nothing() -> None:
    host = down()
    assert not host.ccp.panic_notifier
    host.ccp.panic()
    assert host.commands() == []
