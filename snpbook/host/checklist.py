"""The checklist of a host for SNP: what `snphost ok` asks, row by row in the order of the kernel's own bring-up.

It looks where a person may look, and nowhere else: MSRs, CPUID, files under /proc and /sys, the log, and /dev/sev.
Rows stand below what they need; below a failure they are skipped. Sources: Linux arch/x86/kernel/cpu/amd.c,
arch/x86/virt/svm/sev.c, drivers/iommu/amd/init.c, arch/x86/kvm/svm/sev.c; virtee/snphost (form and words of a result).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from snpbook.host.pseudo_files import CMDLINE, IOMMU_FEATURES, parameter
from snpbook.host.refusal import KernelError
from snpbook.spec.bring_up import PASSTHROUGH, SNP_API, SYSCFG_ENFORCING
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF, SevCapability
from snpbook.spec.iommu import EFR_SNP_SUPPORT
from snpbook.spec.msr import HWCR_SMM_LOCK, RMP_ADDRESS_MASK, RMP_ALIGNMENT, SYSCFG_MEM_ENCRYPT, Msr
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.rmp import BOOKKEEPING_SIZE, ENTRY_SIZE
from snpbook.spec.uapi_psp import CMD, COMMANDS, ISSUE_CMD, SNP_STATUS, PspCommand

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel


_SNP_STATUS = next(number for number, command in COMMANDS.items() if command is PspCommand.SNP_PLATFORM_STATUS)


class State(StrEnum):
    """How a row ended."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Item:
    """One row: `found` is the evidence, `why` and `remedy` stand where it failed."""

    name: str
    level: int
    state: State
    found: str = ""
    why: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """As `snphost ok` prints it."""
        return f"[ {self.state:^4} ] {'  ' * self.level}- {self.name}{f': {self.found}' if self.found else ''}"


class Evidence:
    """What a person can find out about a host that has booted."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel, self._cpu = kernel, kernel.cpu
        self.leaf = self._cpu.product.cpuid(ENCRYPTED_MEMORY_LEAF).decode(ENCRYPTED_MEMORY)
        self.dmesg = kernel.dmesg

    def msr(self, msr: Msr) -> list[int]:
        """A register on every core."""
        return [self._cpu.rdmsr(msr, core) for core in self._cpu.cores]

    def bits(self, msr: Msr, mask: int) -> tuple[bool, str]:
        """Whether all cores have all bits of `mask` set, and how the first core that has not reads."""
        values = self.msr(msr)
        wrong = [core for core, value in enumerate(values) if value & mask != mask]
        core = wrong[0] if wrong else 0
        return not wrong, f"{msr.name} {values[core]:#x} on core {core}"

    def text(self, path: str) -> str | None:
        """A file under /proc or /sys; None where there is none."""
        try:
            return self._kernel.cat(path).strip()
        except KernelError:
            return None

    def parameter(self, name: str) -> tuple[bool, str]:
        """A parameter of kvm_amd: whether it is on, and what its file reads."""
        text = self.text(parameter("kvm_amd", name))
        return text in ("Y", "1"), f"{name} reads {text}" if text else "no such file"

    def snp_status(self) -> tuple[bool, str]:
        """SNP_PLATFORM_STATUS of /dev/sev, asked as any program of the host asks."""
        process = self._kernel.process()
        try:
            fd, place = process.open("/dev/sev"), process.mmap(SNP_STATUS.size)
            process.ioctl(fd, ISSUE_CMD, CMD.pack(cmd=_SNP_STATUS, data=place))
            status = SNP_STATUS.unpack(process.space.copy_in(place, SNP_STATUS.size))
        except KernelError as error:
            return False, str(error)
        finally:
            process.exit()
        api = (status.api_major, status.api_minor)
        told = f"API {api[0]}.{api[1]} build {status.build_id}, state {status.state}"
        return status.state != 0 and api >= SNP_API, told


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the list.

    `snp` rows are skipped on a processor without SNP; one that `follows` has its own remedy only where all rows before
    it passed.
    """

    name: str
    level: int
    look: Callable[[Evidence], tuple[bool, str]]
    why: str
    remedy: str | Callable[[Evidence], str]
    snp: bool = True
    follows: bool = False


def _rmp(evidence: Evidence) -> tuple[int, int]:
    return evidence.msr(Msr.RMP_BASE)[0], evidence.msr(Msr.RMP_END)[0]


def _reserved(evidence: Evidence) -> tuple[bool, str]:
    base, end = _rmp(evidence)
    there = bool(base & RMP_ADDRESS_MASK and end & RMP_ADDRESS_MASK) and base <= end
    return there, f"RMP_BASE {base:#x}, RMP_END {end:#x}"


def _covers(evidence: Evidence) -> tuple[bool, str]:
    base, end = _rmp(evidence)
    top = max(evidence.msr(Msr.TOP_MEM)[0], evidence.msr(Msr.TOP_MEM2)[0], end + 1)
    need, size = (top >> PAGE_SHIFT) * ENTRY_SIZE + BOOKKEEPING_SIZE, end + 1 - base
    return need <= size, f"{size:#x} bytes, memory needs {need:#x}"


def _aligned(evidence: Evidence) -> tuple[bool, str]:
    base, end = _rmp(evidence)
    return not (base | end + 1) % RMP_ALIGNMENT, f"{base:#x} to {end:#x}"


def _iommu(evidence: Evidence) -> tuple[bool, str]:
    text = evidence.text(IOMMU_FEATURES)
    return text is not None, "no ivhd0" if text is None else f"features {text}"


def _why_no_iommu(evidence: Evidence) -> str:
    words = (evidence.text(CMDLINE) or "").split()
    off = [word for word in words if word.startswith(("iommu=", "amd_iommu=")) and "off" in word]
    return f"command line: without {off[0]}" if off else "BIOS: IOMMU = Enabled"


def _translated(evidence: Evidence) -> tuple[bool, str]:
    line = next((line for line in evidence.dmesg.splitlines() if "Default domain type" in line), "not told")
    return PASSTHROUGH not in line, line


def _v1(evidence: Evidence) -> tuple[bool, str]:
    refused = "V2 page table mode" in evidence.dmesg
    return not refused, "V2" if refused else "V1"


def _efr(evidence: Evidence) -> tuple[bool, str]:
    features = int(evidence.text(IOMMU_FEATURES) or "0", 16)
    return bool(features & EFR_SNP_SUPPORT), f"SNPSup {features // EFR_SNP_SUPPORT & 1}"


def _asids(evidence: Evidence) -> tuple[bool, str]:
    least = evidence.leaf.min_sev_asid
    return least > 1, f"1 to {least - 1}" if least > 1 else "none: plain SEV guests have them all"


def _why_not_loaded(evidence: Evidence) -> str:
    bad = [line for line in evidence.dmesg.splitlines() if "invalid for parameter" in line]
    return f"module options: {bad[0]}" if bad else "modprobe kvm_amd"


ROWS: tuple[Row, ...] = (
    Row(
        "SEV-SNP in the processor", 0,
        lambda e: (bool(e.leaf.capabilities & SevCapability.SEV_SNP), f"8000_001F EAX {e.leaf.capabilities:#x}"),
        "EAX bit 4 of CPUID 8000_001F", "a processor of family 19h or later", snp=False,
    ),
    Row(
        "Memory encryption", 0, lambda e: e.bits(Msr.SYSCFG, SYSCFG_MEM_ENCRYPT),
        "without SYSCFG bit 23 the kernel clears every feature, and ccp alone mentions it", "BIOS: SMEE = Enabled",
        snp=False,
    ),
    Row(
        "System management mode locked", 1, lambda e: e.bits(Msr.HWCR, HWCR_SMM_LOCK),
        "without HWCR bit 0 the kernel clears SEV, SEV-ES and SEV-SNP, and ccp blames encryption",
        "BIOS: SMM Lock = Enabled", snp=False,
    ),
    Row(
        "Memory reserved for the RMP", 1, _reserved,
        "the table lies in memory that the BIOS must keep from the kernel", "BIOS: SNP Memory Coverage = Enabled",
    ),
    Row(
        "RMP covers all memory", 2, _covers,
        "each 4 KB page up to the last address has an entry of 16 bytes, behind 16 KB of bookkeeping",
        "BIOS: SNP Memory Coverage for all memory",
    ),
    Row(
        "RMP in steps of 1 MB", 2, _aligned,
        "SNP_INIT_EX refuses another base or size with INVALID_CONFIG", "BIOS: the RMP at a multiple of 1 MB",
    ),
    Row(
        "IOMMU running", 1, _iommu,
        "devices must not write what guests own; a kernel without IOMMU clears SNP", _why_no_iommu,
    ),
    Row(
        "Devices translated, not passed through", 2, _translated,
        "an entry in passthrough mode escapes the check", "command line: without iommu=pt",
    ),
    Row(
        "IOMMU with V1 page tables", 2, _v1,
        "with V2 tables the device table has no mode that SNP allows", "command line: without amd_iommu=pgtbl_v2",
    ),
    Row(
        "IOMMU can enforce the RMP", 2, _efr,
        "SNPSup is bit 63 of the extended features; the message speaks of the IOMMU, the option is another",
        "BIOS: NBIO, SEV-SNP Support = Enabled",
    ),
    Row(
        "RMP enforced by every core", 1, lambda e: e.bits(Msr.SYSCFG, SYSCFG_ENFORCING),
        "the kernel sets MFDM, SNPEn and VMPLEn once all of the above holds", "the log", follows=True,
    ),
    Row(
        "ASIDs for SEV-ES and SEV-SNP", 0, _asids,
        "they have the ASIDs below EDX of CPUID 8000_001F", "BIOS: SEV-ES ASID space limit above 1", snp=False,
    ),
    Row(
        "kvm_amd loaded", 0, lambda e: (e.text(parameter("kvm_amd", "sev")) is not None, ""),
        "a value that is none of its parameter's type keeps a module out", _why_not_loaded, snp=False,
    ),
    Row(
        "SEV enabled in KVM", 1, lambda e: e.parameter("sev"),
        "needs kvm_amd.sev, nested paging, next RIP, and a secure processor that came up",
        "kvm_amd: sev=1, npt=1, nrips=1", snp=False, follows=True,
    ),
    Row(
        "SEV-ES enabled in KVM", 2, lambda e: e.parameter("sev_es"),
        "needs kvm_amd.sev_es, MMIO caching, LBR virtualisation and ASIDs",
        "kvm_amd: sev_es=1, lbrv=1; kvm: mmio_caching=1", snp=False, follows=True,
    ),
    Row(
        "SEV-SNP enabled in KVM", 3, lambda e: e.parameter("sev_snp"),
        "needs kvm_amd.sev_snp, and all of the above", "kvm_amd: sev_snp=1", follows=True,
    ),
    Row(
        "SNP initialised", 0, Evidence.snp_status,
        "SNP_PLATFORM_STATUS of /dev/sev", "the log's line of SNP_INIT_EX", follows=True,
    ),
)  # fmt: skip


def checklist(kernel: Kernel) -> tuple[Item, ...]:
    """The rows of a host that has booted."""
    evidence = Evidence(kernel)
    snp, items, failed = bool(evidence.leaf.capabilities & SevCapability.SEV_SNP), [], len(ROWS)
    for row in ROWS:
        if row.level <= failed:
            failed = len(ROWS)
        if row.level > failed or (row.snp and not snp):
            items.append(Item(row.name, row.level, State.SKIP))
            continue
        passed, found = row.look(evidence)
        if passed:
            items.append(Item(row.name, row.level, State.PASS, found))
            continue
        failed = row.level
        remedy = row.remedy if isinstance(row.remedy, str) else row.remedy(evidence)
        if row.follows and any(item.state is State.FAIL for item in items):
            remedy = "see the rows above"
        items.append(Item(row.name, row.level, State.FAIL, found, row.why, remedy))
    return tuple(items)
