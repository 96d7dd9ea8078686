"""The kernel's boot: its log and commands in order, what it leaves in the machine, and that it always comes up."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.hardware.bios import BiosSetup
from snpbook.hardware.ports import HostCpu
from snpbook.host.kernel import Kernel
from snpbook.host.refusal import KernelError
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.system import System
from snpbook.trace import FirmwareCommand, Message
from tests.machines import MIB, Board, booted

MILAN_V7 = [
    "iommu: Default domain type: Translated",
    "AMD-Vi: SNP enabled",
    "SEV-SNP: RMP table physical address [0x000000017e700000 - 0x000000017fffffff]",
    "ccp 0000:22:00.1: sev enabled",
    "ccp 0000:22:00.1: psp enabled",
    "ccp 0000:22:00.1: SEV-SNP API:1.55 build:29",
    "SVM: kvm: Nested Paging enabled",
    "SVM: LBR virtualization supported",
    "SEV supported: 410 ASIDs",
    "SEV-ES and SEV-SNP supported: 99 ASIDs",
]
MILAN_MAINLINE = [
    "SEV-SNP: RMP table physical range [0x000000017e700000 - 0x000000017fffffff]",
    "SEV-SNP: Reserving start/end of RMP table on a 2MB boundary [0x000000017e600000]",
    "iommu: Default domain type: Translated",
    "AMD-Vi: IOMMU SNP support enabled.",
    "ccp 0000:22:00.1: sev enabled",
    "ccp 0000:22:00.1: psp enabled",
    "kvm_amd: Nested Paging enabled",
    "kvm_amd: LBR virtualization supported",
    "ccp 0000:22:00.1: SEV-SNP API:1.55 build:29",
    "ccp 0000:22:00.1: SEV API:1.55 build:29",
    "kvm_amd: SEV enabled (ASIDs 100 - 509)",
    "kvm_amd: SEV-ES enabled (ASIDs 1 - 99)",
    "kvm_amd: SEV-SNP enabled (ASIDs 1 - 99)",
]


@pytest.mark.parametrize(
    ("era", "lines"), [("rfc-v7", MILAN_V7), ("mainline", MILAN_MAINLINE), ("svsm-host", MILAN_MAINLINE)]
)
def test_log_and_commands_in_order(era: str, lines: list[str]) -> None:
    system = System("milan", "boot", installed=4 << 30)
    log = system.record()
    system.host.boot(era)
    assert [event.text for event in log.of(Message)] == lines
    assert system.host.dmesg.splitlines() == lines
    names = [event.name for event in log.of(FirmwareCommand)]
    assert names[:5] == ["PLATFORM_STATUS", "SNP_INIT_EX", "SNP_DF_FLUSH", "INIT", "DF_FLUSH"]
    assert set(names[5:]) <= {"SNP_PAGE_RECLAIM", "SNP_PLATFORM_STATUS"}
    assert all(event.status == 0 for event in log.of(FirmwareCommand))
    assert system.host.era.name == era


@pytest.mark.parametrize(
    ("product", "api", "sev", "es"),
    [("naples", "0.17 build:48", "5 - 15", "1 - 4"), ("rome", "0.24 build:14", "100 - 509", "1 - 99")],
)
def test_processors_without_snp_come_up_with_sev_and_sev_es(product: str, api: str, sev: str, es: str) -> None:
    system = System(product, installed=1 << 30)
    system.host.boot("mainline")
    last = [f"kvm_amd: SEV enabled (ASIDs {sev})", f"kvm_amd: SEV-ES enabled (ASIDs {es})"]
    assert system.host.log.lines[-3:] == [f"ccp 0000:22:00.1: SEV API:{api}", *last]
    assert not any("SNP" in line for line in system.host.log.lines)
    with pytest.raises(KernelError) as refused:
        system.create_vm()
    assert refused.value.errno == errno.EINVAL


def test_the_table_covers_all_memory_and_every_core_enforces_it() -> None:
    system = booted(installed=4 << 30)
    machine = system.machine
    need = (machine.map.top >> 12) * 16 + 0x4000
    assert machine.map.rmp.end + 1 - machine.map.rmp.base == -(-need // MIB) * MIB
    assert [core.snp_enabled for core in machine.cores] == [True] * 8
    assert [core.rdmsr(Msr.SYSCFG) for core in machine.cores] == [0xF40000 | 1 << 19 | 1 << 24 | 1 << 25] * 8
    assert [core.rdmsr(Msr.VM_HSAVE_PA) for core in machine.cores] == [0] * 8
    used = machine.rmp.states(range(16 * MIB >> 12, (16 * MIB >> 12) + 64))
    assert set(used.tolist()) == {PageState.HYPERVISOR}, "what the driver borrowed, it took back"


def test_a_host_boots_once() -> None:
    system = booted()
    with pytest.raises(KernelError, match="boots once") as refused:
        system.host.boot()
    assert refused.value.errno == errno.EBUSY
    assert isinstance(refused.value, OSError)


def test_what_is_not_modelled_is_named() -> None:
    system = System(installed=1 << 30)
    with pytest.raises(ValueError, match=r"'rfc-v9'.*rfc-v7"):
        system.host.boot(era="rfc-v9")
    with pytest.raises(ValueError, match=r"'vfio'.*kvm_amd"):
        system.host.boot(modules={"vfio": "x=1"})
    system.host.boot(era="rfc-v7")


def unbooted(**bios: object) -> tuple[Board, Kernel]:
    board = Board(cores=2, installed=1 << 30, **bios)  # type: ignore[arg-type]
    return board, Kernel(HostCpu(board.machine))


def test_the_table_is_zeroed_before_it_counts_and_kept_where_it_counts_already() -> None:
    board, kernel = unbooted()
    base = board.machine.map.rmp.base
    board.machine.dram.write(base + 0x4000 + 16, b"\xff" * 16)
    board.machine.mailbox._processor = None  # so that the firmware does not build the table anew
    kernel.boot("mainline")
    assert board.machine.dram.read(base, 0x8000) == bytes(0x8000)
    board.machine.dram.write(base + 0x4000 + 16, b"\xff" * 16)
    second = Kernel(HostCpu(board.machine))
    second.boot("mainline")
    assert board.machine.dram.read(base + 0x4000 + 16, 16) == b"\xff" * 16
    assert second.platform.snp


def test_kexec_after_a_shutdown_brings_snp_up_again() -> None:
    board, kernel = unbooted()
    kernel.boot("mainline")
    kernel.ccp.shutdown()
    second = Kernel(HostCpu(board.machine))
    second.boot("mainline")
    assert second.log.lines == kernel.log.lines
    assert second.sev.sev_snp


def test_kexec_without_a_shutdown_finds_the_firmware_in_use() -> None:
    board, kernel = unbooted()
    kernel.boot("mainline")
    second = Kernel(HostCpu(board.machine))
    second.boot("mainline")
    said = "ccp 0000:22:00.1: SEV: failed to get status. Error: 0x5a"
    assert said in second.log.lines, "it asks through a page that is not the firmware's"
    assert second.log.lines[-1] == "kvm_amd: SEV-SNP disabled (ASIDs 1 - 99)"
    assert second.booted
    assert second.platform.snp, "the table is enforced as before"
    assert (second.sev.sev, second.sev.sev_es, second.sev.sev_snp) == (False, False, False)


def test_kexec_from_a_kernel_without_snp_finds_sev_initialised() -> None:
    """SNP is initialised before SEV or not at all: the driver goes by the legacy platform's state."""
    board, kernel = unbooted()
    kernel.boot("mainline", cmdline="iommu=off")
    second = Kernel(HostCpu(board.machine))
    second.boot("mainline")
    assert second.platform.snp
    assert (second.sev.sev, second.sev.sev_es, second.sev.sev_snp) == (True, True, False)
    assert second.log.lines[-1] == "kvm_amd: SEV-SNP disabled (ASIDs 1 - 99)"


def test_the_firmwares_refusal_takes_sev_away_from_mainline_and_nothing_from_v7() -> None:
    board, kernel = unbooted()
    for core in board.machine.cores[1:]:
        core.set_by_bios({Msr.HWCR: 0})
    kernel.boot("mainline")
    assert "ccp 0000:22:00.1: SEV-SNP: SNP_INIT_EX failed rc -5, error 0x3" in kernel.log.lines
    assert not kernel.sev.sev
    board, kernel = unbooted()
    for core in board.machine.cores[1:]:
        core.set_by_bios({Msr.HWCR: 0})
    kernel.boot("rfc-v7")
    assert "ccp 0000:22:00.1: SEV-SNP: failed to INIT error 0x3" in kernel.log.lines
    assert kernel.sev.sev_snp, "v7 does not ask the firmware"
    assert not kernel.kvm.snp, "and cannot run what it promises"


def test_a_driver_without_a_processor_times_out_and_the_host_comes_up() -> None:
    board, kernel = unbooted()
    board.machine.mailbox._processor = None
    kernel.boot("mainline")
    assert "ccp 0000:22:00.1: sev command 0x4 timed out, disabling PSP" in kernel.log.lines
    assert kernel.cat("/sys/module/kvm_amd/parameters/sev") == "N\n"


@pytest.mark.parametrize(("era", "number"), [("mainline", errno.EINVAL), ("rfc-v7", errno.ENOTTY)])
def test_snp_guests_are_refused_by_their_system_call(era: str, number: int) -> None:
    system = System(installed=1 << 30, bios=BiosSetup(nbio_snp=False))
    system.host.boot(era)
    with pytest.raises(KernelError) as refused:
        system.create_vm()
    assert refused.value.errno == number


def test_there_is_no_kvm_before_boot_nor_without_its_module() -> None:
    _, kernel = unbooted()
    for _ in range(2):
        with pytest.raises(KernelError) as refused:
            kernel.process().open("/dev/kvm")
        assert refused.value.errno == errno.ENOENT
        if not kernel.booted:
            kernel.boot(modules={"kvm_amd": "sev=maybe"})


@pytest.mark.parametrize("setup", [BiosSetup(), BiosSetup(rmp_base=33 * MIB), BiosSetup(snp_coverage=0)])
def test_the_kernel_gives_out_no_memory_that_is_somebody_elses(setup: BiosSetup) -> None:
    for installed in (64 * MIB, 1 << 30, 4 << 30):
        board = Board(installed=installed, bios=setup)
        kernel = Kernel(HostCpu(board.machine))
        memory = board.machine.map
        forbidden = np.zeros(memory.top >> 12, bool)
        forbidden[: 16 * MIB >> 12] = True
        forbidden[memory.tseg[0] >> 12 : memory.tseg[1] >> 12] = True
        base, end = memory.rmp.base >> 21 << 9, (memory.rmp.end + 1 + 2 * MIB - 1) >> 21 << 9
        forbidden[base:end] = True  # with the 2 MB around its ends
        dram = np.zeros(memory.top >> 12, bool)
        for start, stop in memory.dram:
            dram[start >> 12 : stop >> 12] = True
        free = kernel.memory.free
        assert free == int((dram & ~forbidden).sum()) - 2, "all but the driver's buffers"
        pages = kernel.memory.take(free)
        assert not forbidden[pages.astype(np.int64)].any()


def test_platform_status_before_and_after() -> None:
    system = System(installed=1 << 30)
    assert system.host.ccp.platform_status().state == 0
    system.host.boot()
    status = system.host.ccp.platform_status()
    assert (status.state, status.is_rmp_init, status.guest_count) == (1, 1, 0)
    guest = system.create_vm()
    assert system.host.ccp.platform_status().guest_count == 1, "QEMU starts the launch as it makes the VM"
    guest.launch()
    assert system.host.ccp.platform_status().guest_count == 1
    guest.vmm.close()
    assert system.host.ccp.platform_status().guest_count == 0
