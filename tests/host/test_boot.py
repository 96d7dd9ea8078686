"""The kernel's bring-up: its order, its log lines, and how it fails."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.hardware.ports import HostCpu
from snpbook.host.kernel import Kernel
from snpbook.host.refusal import KernelError
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.status import Status
from snpbook.system import System
from snpbook.trace import FirmwareCommand, Message
from tests.machines import MIB, Board, booted


def test_log_and_commands_in_order() -> None:
    system = System("milan", "boot", installed=4 << 30)
    log = system.record()
    system.host.boot()
    lines = [event.text for event in log.of(Message)]
    assert lines == [
        "SEV-SNP: RMP table physical range [0x000000017e700000 - 0x000000017fffffff]",
        "ccp: SEV-SNP API:1.55 build:29",
        "kvm_amd: SEV-SNP enabled (ASIDs 1 - 99)",
    ]
    names = [event.name for event in log.of(FirmwareCommand)]
    assert names[:3] == ["SNP_INIT_EX", "SNP_DF_FLUSH", "SNP_PLATFORM_STATUS"]
    assert set(names[3:]) == {"SNP_PAGE_RECLAIM"}
    assert all(event.status == 0 for event in log.of(FirmwareCommand))


def test_the_table_covers_all_memory_and_every_core_enforces_it() -> None:
    system = booted(installed=4 << 30)
    machine = system.machine
    need = (machine.map.top >> 12) * 16 + 0x4000
    assert machine.map.rmp.end + 1 - machine.map.rmp.base == -(-need // MIB) * MIB
    assert [core.snp_enabled for core in machine.cores] == [True] * 8
    assert [core.rdmsr(Msr.VM_HSAVE_PA) for core in machine.cores] == [0] * 8
    used = machine.rmp.states(range(16 * MIB >> 12, (16 * MIB >> 12) + 64))
    assert set(used.tolist()) == {PageState.HYPERVISOR}, "what the driver borrowed, it took back"


def test_a_host_boots_once() -> None:
    system = booted()
    with pytest.raises(KernelError, match="boots once") as refused:
        system.host.boot()
    assert refused.value.errno == errno.EBUSY
    assert isinstance(refused.value, OSError)


def test_an_unknown_era_is_named() -> None:
    system = System(installed=1 << 30)
    with pytest.raises(ValueError, match=r"'rfc-v9'.*rfc-v7"):
        system.host.boot(era="rfc-v9")
    system.host.boot(era="rfc-v7")


def unbooted() -> tuple[Board, Kernel]:
    board = Board(cores=2, installed=1 << 30)
    return board, Kernel(HostCpu(board.machine))


def test_without_memory_encryption_in_the_bios() -> None:
    board, kernel = unbooted()
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, 0)
    with pytest.raises(KernelError, match="BIOS") as refused:
        kernel.boot()
    assert refused.value.errno == errno.ENODEV
    assert not kernel.booted
    assert not board.machine.snp_enabled


@pytest.mark.parametrize(("base", "end"), [(0, 0), (0x4000_0000, 0x3000_0000)])
def test_without_an_rmp(base: int, end: int) -> None:
    board, kernel = unbooted()
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_BASE, base)
        core.wrmsr(Msr.RMP_END, end)
    with pytest.raises(KernelError, match="not been reserved by BIOS") as refused:
        kernel.boot()
    assert refused.value.errno == errno.ENODEV


def test_with_an_rmp_that_is_too_small() -> None:
    board, kernel = unbooted()
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_END, core.rdmsr(Msr.RMP_END) - MIB)
    with pytest.raises(KernelError, match="does not cover full system RAM") as refused:
        kernel.boot()
    assert refused.value.errno == errno.ENOSYS


def test_the_firmwares_refusal_is_eio_with_its_status() -> None:
    board, kernel = unbooted()
    for core in board.machine.cores:
        core.set_by_bios({Msr.HWCR: 0})
    with pytest.raises(KernelError) as refused:
        kernel.boot()
    assert (refused.value.errno, refused.value.firmware) == (errno.EIO, Status.INVALID_CONFIG)
    assert "SNP_INIT_EX" in str(refused.value)
    assert "INVALID_CONFIG" in str(refused.value)


def test_a_driver_without_a_processor_times_out() -> None:
    board, kernel = unbooted()
    board.machine.mailbox._processor = None
    with pytest.raises(KernelError) as refused:
        kernel.boot()
    assert refused.value.errno == errno.ETIMEDOUT


def test_kvm_has_no_snp_before_boot() -> None:
    _, kernel = unbooted()
    with pytest.raises(KernelError) as refused:
        kernel.kvm.create_vm()
    assert refused.value.errno == errno.ENOTTY


def test_the_kernel_gives_out_no_memory_that_is_somebody_elses() -> None:
    for installed in (64 * MIB, 1 << 30, 4 << 30):
        board = Board(installed=installed)
        kernel = Kernel(HostCpu(board.machine))
        memory = board.machine.map
        free = kernel.memory.free
        taken = sum(stop - start for start, stop in memory.dram) - 16 * MIB - 16 * MIB
        taken -= memory.rmp.end + 1 - memory.rmp.base
        assert free == taken // 4096 - 1, "all but the kernel's 16 MiB, TSEG, the RMP and the driver's buffer"
        pages = kernel.memory.take(free)
        assert not np.isin(pages, np.arange(memory.rmp.base >> 12, memory.rmp.end + 1 >> 12)).any()
        assert not np.isin(pages, np.arange(memory.tseg[0] >> 12, memory.tseg[1] >> 12)).any()
        assert pages.min() >= 16 * MIB >> 12


def test_platform_status_before_and_after() -> None:
    system = System(installed=1 << 30)
    assert system.host.ccp.platform_status().state == 0
    system.host.boot()
    status = system.host.ccp.platform_status()
    assert (status.state, status.is_rmp_init, status.guest_count) == (1, 1, 0)
    guest = system.create_vm()
    assert system.host.ccp.platform_status().guest_count == 0
    guest.launch()
    assert system.host.ccp.platform_status().guest_count == 1
    guest.vmm.vm.destroy()
    assert system.host.ccp.platform_status().guest_count == 0
