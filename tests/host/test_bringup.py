"""Each step of the bring-up and each way it fails: what the log says, what the parameters read, what flags are left.

Lines and numbers are typed again from the kernel's sources and from logs of real hosts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from snpbook.hardware.bios import BiosSetup
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.host.kernel import Kernel
from snpbook.spec.bring_up import BRING_UP
from snpbook.spec.eras import NAMES
from snpbook.spec.msr import Msr
from snpbook.spec.products import product
from snpbook.spec.vmsa import CpuidSignature
from snpbook.system import System
from snpbook.trace import Trace

MIB, GIB = 1 << 20, 1 << 30
NO_BIOS = "SEV-SNP: Memory for the RMP table has not been reserved by BIOS"
NO_SEV = "ccp 0000:22:00.1: SEV: memory encryption not enabled by BIOS"
DISABLED = "kvm_amd: SEV-SNP disabled (ASIDs 1 - 99)"
ALL, SEV_ONLY = "svm sev sev_es sev_snp", "svm sev sev_es"


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong; lines that must and must not be in the log, parameters, flags of /proc/cpuinfo."""

    id: str
    reads: str
    flags: str
    lines: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    bios: BiosSetup = field(default_factory=BiosSetup)
    cmdline: str = ""
    kvm_amd: str = ""
    kvm: str = ""
    snp_en: bool = False


MAINLINE = [
    Failure("no SMEE", "NNN", "svm", (NO_SEV,), ("SEV-SNP", "SEV enabled", "RMP"), BiosSetup(smee=False)),
    Failure("SMM open", "NNN", "svm", (NO_SEV,), ("SEV-SNP", "SEV enabled", "RMP"), BiosSetup(smm_lock=False)),
    Failure("no table", "YYN", SEV_ONLY, (NO_BIOS,), ("SEV-SNP disabled", "AMD-Vi"), BiosSetup(snp_coverage=0)),
    Failure(
        "table too small", "YYN", ALL,
        (
            "SEV-SNP: RMP table physical range [0x0000000001000000 - 0x00000000014fffff]",
            "SEV-SNP: Memory reserved for the RMP table does not cover full system RAM "
            "(expected 0x1804000 got 0x500000)",
            "AMD-Vi: SNP: RMP initialization failed, SNP cannot be supported.", DISABLED,
        ),
        ("IOMMU SNP support enabled",), BiosSetup(snp_coverage=GIB, rmp_base=16 * MIB),
    ),
    Failure(
        "table that does not cover itself", "YYN", ALL,
        (
            "SEV-SNP: Memory reserved for the RMP table does not cover full system RAM "
            "(expected 0x1804000 got 0x1800000)",
        ),
        bios=BiosSetup(snp_coverage=6 * GIB - 25 * MIB),
    ),
    Failure("no IOMMU", "YYN", ALL, (DISABLED,), ("AMD-Vi",), BiosSetup(iommu=False)),
    Failure("iommu=off", "YYN", ALL, (DISABLED,), ("AMD-Vi",), cmdline="iommu=off"),
    Failure("amd_iommu=off", "YYN", ALL, (DISABLED,), ("AMD-Vi",), cmdline="amd_iommu=off"),
    Failure(
        "iommu=pt", "YYN", ALL,
        (
            "iommu: Default domain type: Passthrough (set via kernel command line)",
            "AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.", DISABLED,
        ),
        cmdline="iommu=pt",
    ),
    Failure(
        "passthrough before V2", "YYN", ALL,
        ("AMD-Vi: SNP: IOMMU disabled or configured in passthrough mode, SNP cannot be supported.",),
        ("V2 page table",), BiosSetup(nbio_snp=False), cmdline="amd_iommu=pgtbl_v2 iommu.passthrough=1",
    ),
    Failure(
        "V2 before the feature", "YYN", ALL,
        ("AMD-Vi: SNP: IOMMU is configured with V2 page table mode, SNP cannot be supported.", DISABLED),
        ("feature not enabled",), BiosSetup(nbio_snp=False), cmdline="amd_iommu=pgtbl_v2",
    ),
    Failure(
        "NBIO", "YYN", ALL, ("AMD-Vi: SNP: IOMMU SNP feature not enabled, SNP cannot be supported.", DISABLED),
        bios=BiosSetup(nbio_snp=False),
    ),
    Failure(
        "crooked table", "NNN", ALL,
        (
            "ccp 0000:22:00.1: SEV-SNP: SNP_INIT_EX failed rc -5, error 0x3", "kvm_amd: SEV disabled (ASIDs 100 - 509)",
            "kvm_amd: SEV-ES disabled (ASIDs 1 - 99)", DISABLED,
        ),
        bios=BiosSetup(rmp_base=64 * MIB + 8192), snp_en=True,
    ),
    Failure(
        "ASID limit 1", "YNN", ALL,
        (
            "kvm_amd: SEV enabled (ASIDs 1 - 509)", "kvm_amd: SEV-ES disabled (ASIDs 0 - 0)",
            "kvm_amd: SEV-SNP disabled (ASIDs 0 - 0)",
        ),
        bios=BiosSetup(min_sev_asid=1), snp_en=True,
    ),
    Failure(
        "ASID limit 510", "YYY", ALL,
        ("kvm_amd: SEV unusable (ASIDs 510 - 509)", "kvm_amd: SEV-SNP enabled (ASIDs 1 - 509)"),
        bios=BiosSetup(min_sev_asid=510), snp_en=True,
    ),
    Failure("sev=0", "NNN", ALL, ("kvm_amd: SEV disabled (ASIDs 0 - 0)",), ("API",), kvm_amd="sev=0", snp_en=True),
    Failure(
        "npt=0", "NNN", ALL,
        ("kvm_amd: Nested Paging disabled", "kvm_amd: SEV-ES disabled (ASIDs 0 - 4294967295)"),
        kvm_amd="npt=0", snp_en=True,
    ),
    Failure("nrips=0", "NNN", ALL, ("kvm_amd: SEV disabled (ASIDs 0 - 0)",), kvm_amd="nrips=0", snp_en=True),
    Failure("sev_es=0", "YNN", ALL, ("kvm_amd: SEV-ES disabled (ASIDs 1 - 99)",), kvm_amd="sev_es=n", snp_en=True),
    Failure("lbrv=0", "YNN", ALL, (DISABLED,), ("LBR",), kvm_amd="lbrv=0", snp_en=True),
    Failure("mmio_caching", "YNN", ALL, (DISABLED,), kvm="mmio_caching=off", snp_en=True),
    Failure("sev_snp=0", "YYN", ALL, (DISABLED,), kvm_amd="sev_snp=0", snp_en=True),
    Failure("SME", "YYY", "svm sme sev sev_es sev_snp", ("Memory Encryption Features active: AMD SME",),
            cmdline="mem_encrypt=on", snp_en=True),
]  # fmt: skip
V7_IOMMU = "AMD-Vi: SNP: IOMMU is disabled or configured in passthrough mode, SNP cannot be supported"
V7 = [
    Failure("no SMEE", "NNN", "svm", (NO_SEV,), ("SEV-SNP", "ASIDs", "RMP"), BiosSetup(smee=False)),
    Failure("no table", "YYN", SEV_ONLY, ("AMD-Vi: SNP enabled", NO_BIOS, "SEV-ES supported: 99 ASIDs"),
            bios=BiosSetup(snp_coverage=0)),
    Failure("iommu=pt", "YYN", SEV_ONLY, (V7_IOMMU,), ("RMP",), cmdline="iommu=pt"),
    Failure("iommu=off", "YYN", SEV_ONLY, (V7_IOMMU,), ("RMP",), cmdline="iommu=off"),
    Failure("no IOMMU", "YYN", SEV_ONLY, ("AMD-Vi: SNP: Too late to enable SNP for IOMMU.",), ("RMP",),
            BiosSetup(iommu=False)),
    Failure("NBIO", "YYN", SEV_ONLY, (), ("RMP", "AMD-Vi"), BiosSetup(nbio_snp=False)),
    Failure("V2 becomes V1", "YYY", ALL,
            ("AMD-Vi: SNP enabled", "AMD-Vi: Force to using AMD IOMMU v1 page table due to SNP"),
            cmdline="amd_iommu=pgtbl_v2", snp_en=True),
    Failure("ASID limit 1", "YNN", ALL, ("SEV supported: 509 ASIDs",), ("SEV-ES",), BiosSetup(min_sev_asid=1),
            snp_en=True),
    Failure("crooked table", "YYY", ALL, (
            "ccp 0000:22:00.1: SEV-SNP: failed to INIT error 0x3",
            "ccp 0000:22:00.1: SEV: failed to INIT error 0x1, rc -5",
        ),
            bios=BiosSetup(rmp_base=64 * MIB + 8192), snp_en=True),
    Failure("SME", "YYY", "svm sme sev sev_es sev_snp", ("AMD Memory Encryption Features active: SME",),
            cmdline="mem_encrypt=on", snp_en=True),
    Failure("unknown parameter", "YYY", ALL, ("kvm_amd: unknown parameter 'debug_swap' ignored",),
            kvm_amd="debug_swap=1", snp_en=True),
]  # fmt: skip


def boot(era: str, failure: Failure) -> Kernel:
    system = System("milan", "bring-up", installed=4 * GIB, cores=2, bios=failure.bios)
    modules = {"kvm_amd": failure.kvm_amd, "kvm": failure.kvm}
    system.host.boot(era, cmdline=failure.cmdline, modules=modules)
    return system.host


def check(era: str, failure: Failure) -> None:
    kernel = boot(era, failure)
    assert kernel.booted
    log = kernel.log.lines
    assert [line for line in failure.lines if line not in log] == []
    assert sorted(map(log.index, failure.lines)) == [log.index(line) for line in failure.lines]
    assert [line for line in log for word in failure.absent if word in line] == []
    reads = "".join(
        kernel.cat(f"/sys/module/kvm_amd/parameters/{name}").strip() for name in ("sev", "sev_es", "sev_snp")
    )
    assert reads == failure.reads
    assert f"flags\t\t: {failure.flags}\n" in kernel.cat("/proc/cpuinfo")
    assert bool(kernel.cpu.rdmsr(Msr.SYSCFG) >> 24 & 1) == failure.snp_en
    assert kernel.platform.snp == failure.snp_en


@pytest.mark.parametrize("failure", MAINLINE, ids=lambda one: one.id)
def test_mainline(failure: Failure) -> None:
    check("mainline", failure)


@pytest.mark.parametrize("failure", V7, ids=lambda one: one.id)
def test_v7(failure: Failure) -> None:
    check("rfc-v7", failure)


def test_every_era_has_a_row() -> None:
    assert tuple(BRING_UP) == NAMES


def test_v7_counts_pages_and_mainline_addresses() -> None:
    """4 GB of memory up to address 6 GB: a table for 5 GB is enough for v7, whose firmware then finds it too short."""
    short = Failure("", "", "", bios=BiosSetup(snp_coverage=5 * GIB, rmp_base=16 * MIB))
    assert any("does not cover" in line for line in boot("mainline", short).log.lines)
    kernel = boot("rfc-v7", short)
    assert not any("does not cover" in line for line in kernel.log.lines)
    assert kernel.platform.snp


@pytest.mark.parametrize("era", ["mainline", "rfc-v7"])
def test_registers_that_are_no_range(era: str) -> None:
    system = System("milan", installed=GIB, cores=2)
    for core in system.machine.cores:
        core.set_by_bios({Msr.RMP_BASE: 0x30000000, Msr.RMP_END: 0x2FFFFFFF - 0x100000})
    system.host.boot(era)
    said = {
        "mainline": "SEV-SNP: RMP configuration not valid: base=0x30000000, end=0x2fefffff",
        "rfc-v7": "SEV-SNP: Failed to map RMP table addr 0x30000000 size 0xfffffffffff00000",
    }[era]
    assert said in system.host.log.lines
    assert not system.machine.snp_enabled


@pytest.mark.parametrize(("era", "family", "known"), [
    ("mainline", 0x19, True), ("mainline", 0x1A, True), ("mainline", 0x17, False), ("rfc-v7", 0x19, True),
    ("rfc-v7", 0x1A, False),
])  # fmt: skip
def test_the_formats_of_the_table_that_a_kernel_knows(era: str, family: int, known: bool) -> None:
    chip = replace(product("milan"), signature=CpuidSignature(family, 1, 1))
    machine = Machine(chip, GIB, boot_entropy=bytes(32), trace=Trace(), cores=1)
    kernel = Kernel(HostCpu(machine))
    kernel.boot(era)
    assert kernel.platform.snp == known
    assert any("RMP table physical" in line for line in kernel.log.lines) == known


def test_capacities_and_what_a_panic_does() -> None:
    kernel = boot("mainline", MAINLINE[-1])
    assert kernel.cat("/sys/fs/cgroup/misc.capacity") == "sev 410\nsev_es 99\n"
    assert kernel.cat("/sys/module/kernel/parameters/crash_kexec_post_notifiers") == "Y\n"
    assert kernel.cat("/sys/module/kvm_amd/parameters/debug_swap") == "Y\n"
    assert kernel.cat("/sys/module/ccp/parameters/psp_cmd_timeout") == "100\n"
    assert kernel.cat("/sys/module/ccp/parameters/init_ex_path") == "(null)\n"
    assert kernel.cat("/proc/cmdline") == "mem_encrypt=on\n"
    v7 = boot("rfc-v7", MAINLINE[-1])
    assert v7.cat("/sys/module/kernel/parameters/crash_kexec_post_notifiers") == "N\n"
    with pytest.raises(OSError, match="debug_swap"):
        v7.cat("/sys/module/kvm_amd/parameters/debug_swap")
