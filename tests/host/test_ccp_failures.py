"""/dev/sev where something fails: the firmware, its answer, memory, pages that do not change hands; nothing is lost."""

from __future__ import annotations

import errno
import struct
from itertools import product

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from tests.host.sev_device import (
    COMMIT,
    GET_ID,
    GET_ID2,
    MARK,
    NO_FW_CALL,
    PDH_EXPORT,
    PDH_GEN,
    PEK_CSR,
    PEK_GEN,
    PEK_IMPORT,
    RESET,
    SET_CONFIG,
    SNP_STATUS,
    STATUS,
    VLEK_LOAD,
    Host,
    check_pages,
    fail_allocation,
    fail_rmpupdate,
    spoil,
)
from tests.sampling import sampled

CERT, CHAIN = 2084, 3 * 2084
CONFIG = struct.pack("<QI52s", 0, 3, bytes(52))


@pytest.fixture
def host() -> Host:
    """SNP and SEV-ES are up."""
    return Host()


@pytest.fixture
def lazy() -> Host:
    """SNP is up, SEV waits for its first use."""
    return Host(lazy=True)


ISSUES = {
    RESET: Command.PLATFORM_RESET, STATUS: Command.PLATFORM_STATUS, PEK_GEN: Command.PEK_GEN, PEK_CSR: Command.PEK_CSR,
    PDH_GEN: Command.PDH_GEN, PDH_EXPORT: Command.PDH_CERT_EXPORT, PEK_IMPORT: Command.PEK_CERT_IMPORT,
    GET_ID: Command.GET_ID, GET_ID2: Command.GET_ID, SNP_STATUS: Command.SNP_PLATFORM_STATUS,
    COMMIT: Command.SNP_COMMIT, SET_CONFIG: Command.SNP_CONFIG, VLEK_LOAD: Command.SNP_VLEK_LOAD,
}  # fmt: skip


def arguments(host: Host, command: int) -> int:
    """Good arguments of a sub-command: the address of its structure."""
    pdh, chain = host.memory + 0x1000, host.memory + 0x4000
    match command:
        case 3 | 8:
            return host.put(struct.pack("<QI", pdh, CERT))
        case 5 | 6:
            return host.put(struct.pack("<QIQI", pdh, CERT, chain, CHAIN))
        case 11:
            return host.put(CONFIG)
        case 12:
            return host.put(struct.pack("<IB3xQ", 16, 0, pdh))
    return host.memory


@pytest.mark.parametrize("command", ISSUES)
def test_a_refusal_is_eio_with_the_firmwares_code(host: Host, monkeypatch: pytest.MonkeyPatch, command: int) -> None:
    data, before = arguments(host, command), host.kernel.memory.allocated
    spoil(monkeypatch, host, ISSUES[command], Status.HWERROR_PLATFORM)
    assert host.issue(command, data) == (errno.EIO, 0x13)
    check_pages(host, before)
    monkeypatch.undo()
    assert host.issue(STATUS, host.memory) == (0, 0), "the driver goes on"


def test_every_code_arrives(host: Host) -> None:
    for status in Status:
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, host, Command.SNP_COMMIT, status)
            assert host.issue(COMMIT) == (errno.EIO, status) or status is Status.SUCCESS


@pytest.mark.parametrize("step", ["INIT", "DF_FLUSH"])
@pytest.mark.parametrize("command", [PEK_GEN, PDH_GEN, PEK_CSR, PDH_EXPORT, PEK_IMPORT])
def test_a_temporary_init_that_is_refused(lazy: Host, monkeypatch: pytest.MonkeyPatch, command: int, step: str) -> None:
    spoil(monkeypatch, lazy, Command[step], Status.HWERROR_UNSAFE)
    assert lazy.issue(command, arguments(lazy, command)) == (errno.EIO, 0x14)


@pytest.mark.parametrize("command", [PEK_GEN, PEK_CSR, PDH_EXPORT, PEK_IMPORT])
def test_where_the_firmware_was_not_called_only_init_says_so(lazy: Host, command: int) -> None:
    lazy.ccp.dead = True
    assert lazy.issue(command, arguments(lazy, command)) == (errno.EBUSY, NO_FW_CALL)
    assert lazy.issue(COMMIT) == (errno.EBUSY, MARK)


@pytest.mark.parametrize("command", ISSUES)
def test_a_timeout_ends_the_driver(host: Host, command: int) -> None:
    data, before = arguments(host, command), host.kernel.memory.allocated
    processor, host.board.machine.mailbox._processor = host.board.machine.mailbox._processor, None
    number, error = host.issue(command, data)
    host.board.machine.mailbox._processor = processor
    wanted = errno.EFAULT if command == SNP_STATUS else errno.ETIMEDOUT
    assert (number, error) == (wanted, 0), "the status page that does not come back outweighs the time-out"
    assert "disabling PSP" in host.kernel.dmesg
    for other in (COMMIT, STATUS, PEK_GEN):
        assert host.issue(other, host.memory) == (errno.EBUSY, MARK)
    check_pages(host, before)


@pytest.mark.parametrize(("command", "snp", "number"), sampled(product(ISSUES, (True, False), range(5)), 35))
def test_out_of_memory_at_each_allocation(
    monkeypatch: pytest.MonkeyPatch, command: int, snp: bool, number: int
) -> None:
    """ENOMEM for the driver's own memory, EFAULT for what the firmware is to get; and nothing is lost unnamed."""
    host = Host(lazy=not snp)
    if not snp:
        host.ccp.shutdown()
    data, before = arguments(host, command), host.kernel.memory.allocated
    count = fail_allocation(monkeypatch, host, number)
    result = host.issue(command, data)
    failed = count() > number
    monkeypatch.undo()
    if failed:
        assert result[0] in (errno.ENOMEM, errno.EFAULT, errno.EIO, 0), "the TMR's absence costs SEV-ES alone"
    check_pages(host, before)


LENDING = (STATUS, PEK_CSR, PDH_EXPORT, GET_ID, SNP_STATUS)


@pytest.mark.parametrize(("command", "number", "assigned"), sampled(product(LENDING, range(3), (True, False)), 15))
def test_a_page_that_does_not_change_hands(
    host: Host, monkeypatch: pytest.MonkeyPatch, command: int, number: int, assigned: bool
) -> None:
    data, before = arguments(host, command), host.kernel.memory.allocated
    fail_rmpupdate(monkeypatch, number, assigned=assigned)
    result = host.issue(command, data)
    assert result[0] in (0, errno.EFAULT)
    monkeypatch.undo()
    check_pages(host, before)


@pytest.mark.parametrize(("command", "number"), sampled(product(LENDING, range(4)), 12))
def test_a_page_that_the_firmware_keeps(host: Host, monkeypatch: pytest.MonkeyPatch, command: int, number: int) -> None:
    data, before = arguments(host, command), host.kernel.memory.allocated
    spoil(monkeypatch, host, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE, after=number)
    result = host.issue(command, data)
    leaked = host.ccp.leaks.count
    assert (result == (errno.EFAULT, 0)) == bool(leaked)
    assert f"Leaking PFN range 0x{host.ccp.leaks.listed[0].start:x}" in host.kernel.dmesg if leaked else True
    check_pages(host, before)
