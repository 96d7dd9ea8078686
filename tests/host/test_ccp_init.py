"""Initialisation of SNP and SEV: each step refused, each allocation out, the file of persistent data, the log."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from snpbook.hardware.bios import BiosSetup
from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp.resources import Resource
from snpbook.spec.commands import Command
from snpbook.spec.iomem import IoDescriptor
from snpbook.spec.legacy_launch import NV_SIZE
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from snpbook.trace import FirmwareCommand
from tests.host.sev_device import (
    COMMIT,
    PDH_GEN,
    PEK_GEN,
    STATUS,
    Host,
    check_pages,
    down,
    fail_allocation,
    fail_rmpupdate,
    fails,
    lines,
    spoil,
)
from tests.machines import MIB

NV = "/var/lib/sev/nv"


# In order.


def test_snp_then_sev_then_the_shutdown_of_both() -> None:
    host = down()
    done = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("wbinvd", "wrmsr"):
            original = getattr(HostCpu, name)

            def note(self: HostCpu, *args: Any, name: str = name, original: Any = original) -> Any:
                done.append(name)
                host.board.log.events.append(FirmwareCommand(name=name, status=0))
                return original(self, *args)

            patch.setattr(HostCpu, name, note)
        host.ccp.platform_init()
        assert host.commands() == [
            *["wrmsr"] * len(host.board.machine.cores),
            "wbinvd", "SNP_INIT_EX", "wbinvd", "SNP_DF_FLUSH", "INIT", "wbinvd", "DF_FLUSH",
        ]  # fmt: skip
        host.ccp.shutdown()
        assert host.commands() == ["SHUTDOWN", "wbinvd", "wbinvd", "SNP_SHUTDOWN_EX"]
    assert lines(host) == ["SEV-SNP API:1.55 build:29", "SEV API:1.55 build:29"]
    assert not host.ccp.snp_initialised
    assert host.ccp.tmr is host.ccp.range_list is None


def test_what_the_commands_are_given() -> None:
    host = down()
    before = host.kernel.memory.allocated
    host.ccp.platform_init()
    events = {event.name: event.arguments for event in host.board.log.of(FirmwareCommand)}
    assert (events["SNP_INIT_EX"]["init_rmp"], events["SNP_INIT_EX"]["list_paddr_en"]) == (1, 1)
    page = host.kernel.cpu.read(events["SNP_INIT_EX"]["list_paddr"], 4096)
    # 2 MB around the table's start, the table, and TSEG behind it: one range of 18 MB.
    assert page[:24] == struct.pack("<IIQII", 1, 0, 0x2E00000, 0x1200, 0)
    assert not any(page[24:])
    init = events["INIT"]
    assert (init["es"], init["tmr_len"], init["tmr_paddr"] % (2 * MIB)) == (1, 2 * MIB, 0)
    region = range(init["tmr_paddr"] >> 12, (init["tmr_paddr"] + 2 * MIB) >> 12)
    assert (host.board.machine.rmp.states(region) == PageState.FIRMWARE).all()
    assert host.kernel.memory.allocated == before + 512 + 1
    host.ccp.shutdown()
    check_pages(host, before)


def test_twice_changes_nothing() -> None:
    host = down()
    host.ccp.platform_init()
    host.commands()
    host.ccp.platform_init()
    assert host.commands() == []


def test_a_crash_kernel_leaves_all_as_it_is() -> None:
    host = down()
    host.ccp.kdump = True
    host.ccp.platform_init()
    assert host.commands() == []
    assert not host.ccp.snp_initialised


def test_probing_may_put_sev_off() -> None:
    host = Host(lazy=True)
    assert host.commands()[:4] == ["PLATFORM_STATUS", "SNP_INIT_EX", "SNP_DF_FLUSH", "SNP_PLATFORM_STATUS"]
    assert host.ccp.tmr is None
    host.ccp.platform_init()
    assert host.commands() == ["INIT", "DF_FLUSH"]


def test_a_host_without_snp_has_sev_alone() -> None:
    host = Host(bios=BiosSetup(snp_coverage=0))
    assert host.commands() == ["PLATFORM_STATUS", "INIT", "DF_FLUSH"]
    assert not host.ccp.snp_initialised
    assert len(host.ccp.tmr) == 256
    assert host.issue(STATUS, host.memory) == (0, 0)
    host.ccp.shutdown()
    assert host.commands() == ["PLATFORM_STATUS", "SHUTDOWN"]


@pytest.mark.parametrize(("revision", "command"), [("1.51", "SNP_INIT"), ("1.55", "SNP_INIT_EX")])
def test_older_firmware_has_no_list(revision: str, command: str) -> None:
    host = Host(release=revision)
    assert host.commands()[1] == command
    assert (host.ccp.range_list is None) == (command == "SNP_INIT")


def test_firmware_below_1_51_is_eopnotsupp_and_gets_no_legacy_init() -> None:
    host = down()
    host.ccp.version = (1, 50, 3)
    with fails(errno.EOPNOTSUPP):
        host.ccp.platform_init()
    assert host.commands() == []
    assert host.issue(PEK_GEN) == (errno.EOPNOTSUPP, 0xFFFFFFFF)


# The list.


def test_the_series_does_not_reserve_what_lies_around_the_table() -> None:
    for era, start in (("rfc-v7", 0x2F00000), ("mainline", 0x2E00000)):
        host = Host(era)
        listed = host.ccp.range_list.start << 12
        assert struct.unpack("<Q", host.kernel.cpu.read(listed + 8, 8)) == (start,)
        assert host.board.state(start) == (PageState.HV_FIXED if era == "mainline" else PageState.FIRMWARE)


def test_the_list_holds_255_ranges() -> None:
    host = down()
    host.ccp.resources = [Resource(n << 21, (n << 21) + 1, IoDescriptor.RESERVED) for n in range(8, 23)] * 17
    host.ccp.platform_init()
    host.ccp.shutdown()
    host.ccp.resources.append(host.ccp.resources[0])
    before = host.kernel.memory.allocated
    host.commands()
    with fails(errno.E2BIG):
        host.ccp.platform_init()
    assert lines(host)[-1] == "SEV: SNP_INIT_EX walk_iomem_res_desc failed rc = -7"
    assert host.commands() == [], "and no legacy INIT"
    host.ccp.shutdown()
    assert host.kernel.memory.allocated == before


def test_which_memory_is_listed() -> None:
    """The driver compares e820 types with descriptors: ACPI tables (2), ACPI NVS (3), reserved (7)."""
    host = down()
    host.ccp.resources = [Resource(n << 21, (n << 21) + 4096, kind) for n, kind in enumerate(IoDescriptor, 8)]
    host.ccp.platform_init()
    fixed = [n for n in range(8, 16) if host.board.state(n << 21) == PageState.HV_FIXED]
    assert fixed == [8 + list(IoDescriptor).index(kind) for kind in IoDescriptor if int(kind) in (2, 3, 7)]


# What is refused.


@pytest.mark.parametrize(
    ("command", "snp", "sev", "line"),
    [
        ("SNP_INIT_EX", False, False, "SEV-SNP: SNP_INIT_EX failed rc -5, error 0x3"),
        ("SNP_DF_FLUSH", False, False, "SEV-SNP: SNP_DF_FLUSH failed rc -5, error 0x3"),
        ("INIT", True, False, "SEV: INIT failed 0x3, rc -5"),
        ("DF_FLUSH", True, True, "SEV: DF_FLUSH failed 0x3, rc -5"),
    ],
)
def test_each_step_refused(monkeypatch: pytest.MonkeyPatch, command: str, snp: bool, sev: bool, line: str) -> None:
    host = down()
    before = host.kernel.memory.allocated
    spoil(monkeypatch, host, Command[command], Status.INVALID_CONFIG)
    with fails(errno.EIO, Status.INVALID_CONFIG):
        host.ccp.platform_init()
    assert lines(host)[-1] == line
    assert (host.ccp.snp_initialised, host.ccp.state.name == "INIT") == (snp, sev)
    assert "INIT" not in host.commands() or command in ("INIT", "DF_FLUSH")
    monkeypatch.undo()
    host.ccp.shutdown()
    check_pages(host, before)


def test_where_the_first_flush_fails_driver_and_firmware_part(monkeypatch: pytest.MonkeyPatch) -> None:
    host = down()
    spoil(monkeypatch, host, Command.SNP_DF_FLUSH, Status.HWERROR_PLATFORM)
    with fails(errno.EIO, Status.HWERROR_PLATFORM):
        host.ccp.platform_init()
    assert host.board.psp.initialised
    assert not host.ccp.snp_initialised
    monkeypatch.undo()
    with fails(errno.EIO, Status.INVALID_PLATFORM_STATE):
        host.ccp.platform_init()


def test_bad_persistent_data_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for times in (1, 2):
        host = down()
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, host, Command.INIT, Status.SECURE_DATA_INVALID, times=times)
            if times == 1:
                host.ccp.platform_init()
            else:
                with fails(errno.EIO, Status.SECURE_DATA_INVALID):
                    host.ccp.platform_init()
        assert host.commands().count("INIT") == 2
        text = "SEV: retrying INIT command because of SECURE_DATA_INVALID error."
        assert f"{text} Retrying once to reset PSP SEV state." in lines(host)


@pytest.mark.parametrize("number", range(4))
def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    host = down(NV)
    before = host.kernel.memory.allocated
    count = fail_allocation(monkeypatch, host, number)
    match number:
        case 0:
            with fails(errno.ENOMEM):
                host.ccp.platform_init()
            assert lines(host)[-1] == "SEV: SNP_INIT_EX range list memory allocation failed"
        case 1:
            host.ccp.platform_init()
            assert "SEV: TMR allocation failed, SEV-ES support unavailable" in lines(host)
            assert not host.board.psp.legacy.es
        case 2:
            with fails(errno.ENOMEM):
                host.ccp.platform_init()
            assert lines(host)[-1] == "SEV: INIT_EX NV memory allocation failed"
        case 3:
            host.ccp.platform_init()
            assert count() == 3
    monkeypatch.undo()
    host.ccp.shutdown()
    check_pages(host, before)


@pytest.mark.parametrize("bad", [0, 300, 511, 512, 515])
def test_pages_that_do_not_become_the_firmwares(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """The TMR's first, then the NV area's."""
    host = down(NV)
    before = host.kernel.memory.allocated
    fail_rmpupdate(monkeypatch, bad, assigned=True)
    if bad < 512:
        host.ccp.platform_init()
        assert not host.board.psp.legacy.es
        assert sum(map(len, host.ccp.leaks.forgotten)) == 512
    else:
        with fails(errno.ENOMEM):
            host.ccp.platform_init()
        assert lines(host)[-1] == "SEV: INIT_EX NV memory page state change failed."
    monkeypatch.undo()
    host.ccp.shutdown()
    check_pages(host, before)


# The file of persistent data.


def test_persistent_data_outlives_the_machine() -> None:
    host = down(NV)
    host.ccp.platform_init()
    assert f"SEV: {NV} does not exist and will be created later." in lines(host)
    assert host.commands()[2:5] == ["INIT_EX", "INIT_EX", "DF_FLUSH"], "what memory held was no data"
    stored = host.ccp.disk[NV]
    assert len(stored) == NV_SIZE
    identity = host.board.psp.legacy.identity
    host.ccp.shutdown()
    host.ccp.platform_init()
    assert host.commands()[-2:] == ["INIT_EX", "DF_FLUSH"]
    assert host.board.psp.legacy.identity == identity
    assert host.issue(PDH_GEN) == (0, 0)
    assert host.ccp.disk[NV] != stored
    stored = host.ccp.disk[NV]
    for command in (STATUS, COMMIT):
        assert host.issue(command, host.memory) == (0, 0)
    assert host.ccp.disk[NV] == stored
    host.ccp.shutdown()
    host.ccp.disk[NV] = stored[:100]
    host.ccp.platform_init()
    assert "SEV: could not read 32768 bytes to non volatile memory area, ret 100" in lines(host)


class BadDisk(dict[str, bytes]):
    """A disk on which opening a file fails."""

    def __init__(self, reading: int, writing: int) -> None:
        super().__init__()
        self.reading, self.writing = reading, writing

    def __getitem__(self, path: str) -> bytes:
        if self.reading:
            raise OSError(self.reading, "bad")
        return super().__getitem__(path)

    def __setitem__(self, path: str, data: bytes) -> None:
        if self.writing:
            raise OSError(self.writing, "bad")
        super().__setitem__(path, data)


def test_a_file_that_cannot_be_read_or_written() -> None:
    host = down(NV)
    before = host.kernel.memory.allocated
    host.ccp.disk = BadDisk(errno.EACCES, 0)
    with fails(errno.EACCES):
        host.ccp.platform_init()
    assert f"SEV: could not open {NV} for read, error -13" in lines(host)
    host.ccp.shutdown()
    check_pages(host, before)
    host.ccp.disk = BadDisk(0, errno.EROFS)
    with fails(errno.EROFS, Status.SUCCESS):
        host.ccp.platform_init()
    assert "SEV: could not open file for write, error -30" in lines(host)
    assert lines(host)[-1] == "SEV: INIT_EX failed 0x0, rc -30"
    # The firmware has initialised SEV, and the driver thinks not: neither INIT nor a shutdown gets through any more.
    assert host.issue(PEK_GEN) == (errno.EIO, Status.INVALID_PLATFORM_STATE)
    with fails(errno.EIO, Status.INVALID_PLATFORM_STATE):
        host.ccp.shutdown()
    assert host.ccp.snp_initialised
