"""Pages lent to the firmware: states, undoing, leaks and their lines in the log; legacy commands while SNP is up."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.ports import HostCpu
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from tests.host.sev_device import Host, check_pages, fail_allocation, fail_rmpupdate, fails, spoil
from tests.machines import PAGE

POLICY_ES, POLICY_SEV = 1 << 2, 0


@pytest.fixture
def host() -> Host:
    return Host()


def states(host: Host, pages: range) -> list[int]:
    return list(map(int, host.board.machine.rmp.states(pages)))


def test_donated_pages_are_the_firmwares_until_they_come_back(host: Host) -> None:
    before = host.kernel.memory.allocated
    pages = host.ccp.donate(3)
    assert states(host, pages) == [PageState.FIRMWARE] * 3
    host.ccp.take_back(pages)
    assert states(host, pages) == [PageState.HYPERVISOR] * 3
    check_pages(host, before)


def test_before_snp_pages_have_no_state(host: Host) -> None:
    host.ccp.shutdown()
    host.commands()
    pages = host.ccp.donate(2)
    host.ccp.take_back(pages)
    assert host.commands() == []


@pytest.mark.parametrize("bad", range(4))
def test_a_block_that_is_turned_in_part_is_lost_whole(host: Host, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    before = host.kernel.memory.allocated
    fail_rmpupdate(monkeypatch, bad, assigned=True)
    with fails(errno.ENOMEM):
        host.ccp.donate(4)
    monkeypatch.undo()
    lost = host.ccp.leaks.forgotten
    assert [len(run) for run in lost] == [4]
    assert states(host, lost[0]) == [PageState.HYPERVISOR] * 4, "what was turned has come back"
    assert host.ccp.leaks.count == 0
    check_pages(host, before)


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("by", ["firmware", "rmpupdate"])
def test_the_failing_page_and_all_behind_it_are_leaked(
    host: Host, monkeypatch: pytest.MonkeyPatch, bad: int, by: str
) -> None:
    before = host.kernel.memory.allocated
    pages = host.ccp.donate(4)
    if by == "firmware":
        spoil(monkeypatch, host, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE, after=bad)
    else:
        fail_rmpupdate(monkeypatch, bad, assigned=False)
    host.ccp.take_back(pages)
    monkeypatch.undo()
    assert host.ccp.leaks.listed == [pages[bad:]]
    assert host.ccp.leaks.count == 4 - bad
    assert host.ccp.leaks.forgotten == ([pages[:bad]] if bad else []), "shared already, but nobody frees them"
    assert states(host, pages[:bad]) == [PageState.HYPERVISOR] * bad
    check_pages(host, before)


def test_leaked_pages_are_told_with_their_entries(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = host.ccp.donate(2)
    spoil(monkeypatch, host, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE, after=1)
    told = len(host.kernel.log.lines)
    with fails(errno.EIO, Status.INVALID_PAGE_STATE):
        host.ccp.reclaim(pages)
    page = pages[1]
    low, high = host.board.machine.rmp.load(range(page, page + 1))[0].tolist()
    assert low & 1, "assigned"
    assert host.kernel.log.lines[told:] == [
        f"SEV-SNP: Leaking PFN range 0x{page:x}-0x{page + 1:x}",
        f"SEV-SNP: PFN 0x{page:x}, RMP entry: [0x{low:016x} - 0x{high:016x}]",
    ]


def test_an_unassigned_page_is_told_with_its_neighbours(host: Host) -> None:
    pages = host.ccp.donate(1)
    free = pages.start + 1
    host.ccp.leaks.leak(range(free, free + 1))
    base = free // 512 * 512
    others = int(np.count_nonzero(host.board.machine.rmp.load(range(base, base + 512)).any(1)))
    lines, region = host.kernel.log.lines[-2 - others :], f"[0x{base:x} - 0x{base + 512:x}]"
    assert lines[1] == f"SEV-SNP: PFN 0x{free:x} unassigned, dumping non-zero entries in 2M PFN region: {region}"
    assert any(line.startswith(f"SEV-SNP: PFN: 0x{pages.start:x}, [0x") for line in lines[2:])


def test_what_is_leaked_is_never_given_out_again(host: Host) -> None:
    pages = host.kernel.memory.allocate(4)
    host.ccp.leaks.leak(pages[1:3])
    host.kernel.memory.release(pages)
    taken = set(host.kernel.memory.take(host.kernel.memory.free).tolist())
    assert not taken & set(pages[1:3])
    assert set(pages) - set(pages[1:3]) <= taken


def test_a_guests_page_becomes_shared_or_is_leaked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = host.kernel.memory.allocate(3)
    host.board.assign(pages.start << 12, NewState(assigned=True, asid=1), 0x5000, 3)
    fail_rmpupdate(monkeypatch, 1, assigned=False)
    assert not host.ccp.make_shared_or_leak(pages)
    assert host.ccp.leaks.listed == [pages[1:]]
    monkeypatch.undo()
    assert host.ccp.make_shared_or_leak(pages[:1])


# Legacy commands while SNP is up.


class Guest:
    """A legacy guest between LAUNCH_START and LAUNCH_FINISH, as KVM makes one."""

    def __init__(self, host: Host, policy: int, asid: int) -> None:
        self.host, self.ccp = host, host.ccp
        answer = self.ccp.command(Command.LAUNCH_START, policy=policy)
        self.handle = answer.handle
        self.issue(Command.ACTIVATE, asid=asid)
        self.pages = host.kernel.memory.allocate(2)

    @property
    def spa(self) -> int:
        return self.pages.start << 12

    def issue(self, command: Command, **fields: Any) -> Any:
        return self.ccp.command(command, handle=self.handle, **fields)


@pytest.mark.parametrize("snp", [True, False])
def test_a_legacy_guest_from_start_to_end(snp: bool) -> None:
    """The same answers with SNP and without; its memory is turned for each command, and comes back."""
    host = Host()
    if not snp:
        host.ccp.shutdown()
        host.ccp.host_snp = False
        for core in host.board.machine.cores:
            core.set_by_bios({0xC0010010: core.rdmsr(0xC0010010) & ~(1 << 24)})
        host.board.machine.rmp_located = False
        host.ccp.platform_init()
    before = host.kernel.memory.allocated
    guest, cpu = Guest(host, POLICY_ES, 5), host.kernel.cpu
    cpu.write(guest.spa, b"guest" * 1000)
    guest.issue(Command.LAUNCH_UPDATE_DATA, paddr=guest.spa, len=PAGE)
    guest.issue(Command.LAUNCH_UPDATE_VMSA, paddr=guest.spa + PAGE, len=PAGE)
    assert cpu.read(guest.spa, 5) != b"guest"
    assert host.board.machine.encryption.read(5, guest.spa, 5) == b"guest"
    blob = host.kernel.memory.allocate(1).start << 12
    with pytest.raises(KernelError) as query:
        guest.issue(Command.LAUNCH_MEASURE)
    assert query.value.firmware is Status.INVALID_LENGTH
    assert guest.issue(Command.LAUNCH_MEASURE, paddr=blob, len=48).len == 48
    assert any(cpu.read(blob, 48))
    report = guest.issue(Command.ATTESTATION, paddr=blob, len=0xD0, mnonce=b"n" * 16)
    assert (report.len, report.paddr) == (0xD0, blob), "the caller's address stands in the answer"
    assert cpu.read(blob, 16) == b"n" * 16
    guest.issue(Command.LAUNCH_FINISH)
    assert guest.issue(Command.GUEST_STATUS).state == 3
    cpu.write(blob, bytes(64))
    guest.issue(Command.DBG_DECRYPT, src_paddr=guest.spa, dst_paddr=blob, len=16)
    assert cpu.read(blob, 16) == b"guestguestguestg"
    cpu.write(blob, b"x" * 16)
    guest.issue(Command.DBG_ENCRYPT, src_paddr=blob, dst_paddr=guest.spa, len=16)
    assert host.board.machine.encryption.read(5, guest.spa, 20) == b"x" * 16 + b"uest"
    guest.issue(Command.DEACTIVATE)
    guest.issue(Command.DECOMMISSION)
    cpu.wbinvd()
    host.ccp.submit(Command.DF_FLUSH)
    host.kernel.memory.release(guest.pages)
    host.kernel.memory.release(range(blob >> 12, (blob >> 12) + 1))
    assert host.ccp.leaks.count == 0
    if snp:
        check_pages(host, before)


def test_a_refused_command_gives_guest_memory_back(host: Host) -> None:
    guest = Guest(host, POLICY_SEV, 200)
    guest.issue(Command.LAUNCH_UPDATE_DATA, paddr=guest.spa, len=2 * PAGE)
    blob = host.kernel.memory.allocate(4).start << 12
    assert guest.issue(Command.LAUNCH_MEASURE, paddr=blob, len=48).len == 48
    packet = {"hdr_paddr": blob, "hdr_len": 52, "trans_paddr": blob + PAGE, "trans_len": 16}
    with fails(errno.EIO, Status.BAD_MEASUREMENT):
        guest.issue(Command.LAUNCH_SECRET, guest_paddr=guest.spa, guest_len=16, **packet)
    assert states(host, guest.pages) == [PageState.HYPERVISOR] * 2


@pytest.mark.parametrize("number", range(3))
def test_memory_for_a_bounce_buffer_is_out(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    host = Host()
    blob = host.kernel.memory.allocate(1).start << 12
    before = host.kernel.memory.allocated
    fields = {"pdh_cert_paddr": blob, "pdh_cert_len": 2084, "cert_chain_paddr": blob, "cert_chain_len": 3 * 2084}
    fail_allocation(monkeypatch, host, number)
    if number == 2:
        host.ccp.command(Command.PDH_CERT_EXPORT, **fields)
    else:
        with fails(errno.EFAULT):
            host.ccp.command(Command.PDH_CERT_EXPORT, **fields)
        assert "Failed to allocate bounce buffer for SEV legacy command." in host.kernel.log.lines
    monkeypatch.undo()
    check_pages(host, before)


@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize("bad", range(2))
def test_guest_memory_that_does_not_change_hands(monkeypatch: pytest.MonkeyPatch, bad: int, assigned: bool) -> None:
    host = Host()
    guest = Guest(host, POLICY_SEV, 200)
    before = host.kernel.memory.allocated
    fail_rmpupdate(monkeypatch, bad, assigned=assigned)
    with fails(errno.EFAULT, None if assigned else Status.SUCCESS):
        guest.issue(Command.LAUNCH_UPDATE_DATA, paddr=guest.spa, len=2 * PAGE)
    monkeypatch.undo()
    assert host.ccp.leaks.listed == ([] if assigned else [guest.pages[bad:]])
    host.kernel.memory.release(guest.pages)
    free = set(host.kernel.memory.take(host.kernel.memory.free).tolist())
    assert free.isdisjoint(set(guest.pages) & {page for run in host.ccp.leaks.listed for page in run})
    assert host.kernel.memory.allocated > before


def test_the_command_buffer_is_turned_for_twelve_commands_only(host: Host) -> None:
    turned = set()
    original = HostCpu.rmpupdate
    pages = {buffer >> 12 for buffer in host.ccp._buffers}

    def note(self: HostCpu, numbers: Any, gfns: Any, new: Any) -> Any:
        if new.assigned and set(numbers) & pages:
            turned.add(current)
        return original(self, numbers, gfns, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCpu, "rmpupdate", note)
        for current in Command:
            if current not in (Command.SHUTDOWN, Command.SNP_SHUTDOWN, Command.SNP_SHUTDOWN_EX):
                try:
                    host.ccp.command(current)
                except (KernelError, ValueError):
                    continue
    assert {command.name for command in turned} == {
        "PLATFORM_STATUS", "GUEST_STATUS", "LAUNCH_START", "RECEIVE_START", "LAUNCH_MEASURE", "SEND_START",
        "SEND_UPDATE_DATA", "SEND_UPDATE_VMSA", "PEK_CSR", "PDH_CERT_EXPORT", "GET_ID", "ATTESTATION",
    }  # fmt: skip
