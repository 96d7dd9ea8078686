"""From what the BIOS left to an enforced RMP: the steps of the kernel in their order, and what each failure leaves.

Nothing here raises for a machine that is not fit: the feature is cleared, the log says so in the kernel's words, or
says nothing, and the kernel goes on. Sources: Linux arch/x86/kernel/cpu/amd.c, arch/x86/virt/svm/sev.c,
drivers/iommu/amd/init.c; RFC v7 patch 14.
"""

from __future__ import annotations

from snpbook.hardware.ports import HostCpu
from snpbook.host.cmdline import Cmdline
from snpbook.host.e820 import ram, rmp_edges
from snpbook.host.log import KernelLog
from snpbook.spec import bring_up as lines
from snpbook.spec.bring_up import SNP_ENABLE_BITS, V7_LAST_MODEL, BringUp
from snpbook.spec.cpuid import ENCRYPTED_MEMORY, ENCRYPTED_MEMORY_LEAF, SIGNATURE_LEAF, SevCapability
from snpbook.spec.iommu import EFR_SNP_SUPPORT
from snpbook.spec.msr import (
    HWCR_SMM_LOCK,
    RMP_ADDRESS_MASK,
    SYSCFG_MEM_ENCRYPT,
    SYSCFG_MFDM,
    SYSCFG_SNP_EN,
    Msr,
)
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.rmp import BOOKKEEPING_SIZE, ENTRY_SIZE
from snpbook.spec.vmsa import CpuidSignature

_SEV_ALL = SevCapability.SEV | SevCapability.SEV_ES | SevCapability.SEV_SNP


class Platform:
    """What the kernel has found: `features` are those of CPUID that it has not cleared, `snp` whether SNP is on.

    `rmp` are the first and the last byte of the table, once it is one that the kernel uses.
    """

    def __init__(self, cpu: HostCpu, cmdline: Cmdline, rows: BringUp, log: KernelLog) -> None:
        self._cpu, self._cmdline, self._rows, self._log = cpu, cmdline, rows, log
        leaf = cpu.product.cpuid(ENCRYPTED_MEMORY_LEAF).decode(ENCRYPTED_MEMORY)
        self.features = SevCapability(leaf.capabilities)
        self.snp = False
        self.rmp: tuple[int, int] | None = None
        self.iommu_running = False
        """Whether its driver has taken the IOMMU over."""

    def __repr__(self) -> str:
        return f"Platform(SNP {'on' if self.snp else 'off'}, {self.features & _SEV_ALL!r})"

    def bring_up(self) -> None:
        """All steps up to the enforced table."""
        self._detect_encryption()
        self.snp = SevCapability.SEV_SNP in self.features and self._known_processor()
        if self.snp and self._rows.rmp_first:
            self.snp = self._probe_rmp()
        if not self.snp:
            self.features &= ~SevCapability.SEV_SNP
        elif self._rows.aligns_e820:
            for block, _ in rmp_edges(self._cpu):
                self._log(lines.E820_RESERVED.format(block=block))
        self._start_iommu()
        if self.snp:
            self.snp = self._iommu_fits() and self._enable()
        if not self.snp and not self._rows.feature_kept:
            self.features &= ~SevCapability.SEV_SNP

    def _detect_encryption(self) -> None:
        """Without SMEE nothing is left, without a locked SMM nothing of SEV: the log is silent on either."""
        syscfg, hwcr = self._cpu.rdmsr(Msr.SYSCFG), self._cpu.rdmsr(Msr.HWCR)
        if not syscfg & SYSCFG_MEM_ENCRYPT:
            self.features &= ~(SevCapability.SME | _SEV_ALL)
        elif not hwcr & HWCR_SMM_LOCK:
            self.features &= ~_SEV_ALL
        if not self._cmdline.sme:
            self.features &= ~SevCapability.SME
        elif SevCapability.SME in self.features:
            self._log(self._rows.sme_active)

    def _known_processor(self) -> bool:
        """Whether the format of the RMP is known for this family."""
        signature = CpuidSignature.from_int(self._cpu.product.cpuid(SIGNATURE_LEAF).eax)
        if self._rows.rmp_first:
            return signature.family >= lines.FIRST_SNP_FAMILY
        return signature.family == lines.FIRST_SNP_FAMILY and signature.model <= V7_LAST_MODEL

    def _probe_rmp(self) -> bool:
        """Read RMP_BASE and RMP_END."""
        base, end = self._cpu.rdmsr(Msr.RMP_BASE), self._cpu.rdmsr(Msr.RMP_END)
        if not base & RMP_ADDRESS_MASK or not end & RMP_ADDRESS_MASK:
            self._log(lines.RMP_ABSENT)
            return False
        if self._rows.rmp_first and base > end:
            self._log(lines.RMP_INVALID.format(base=base, end=end))
            return False
        self.rmp = base, end
        if self._rows.rmp_first:
            self._log(self._rows.rmp_range.format(base=base, end=end))
        return True

    def _start_iommu(self) -> None:
        """The generic part of the IOMMU: how devices are mapped by default."""
        line = self._cmdline
        kind = lines.PASSTHROUGH if line.passthrough else lines.TRANSLATED
        self._log(lines.DOMAIN_TYPE.format(kind=kind, why=lines.BY_COMMAND_LINE if line.domain_chosen else ""))
        present = self._cpu.iommu_features is not None
        self.iommu_running = present and not (line.no_iommu or line.amd_iommu_off)

    def _iommu_fits(self) -> bool:
        """Whether the IOMMU can enforce the table; the first obstacle is told."""
        line, rows, efr = self._cmdline, self._rows, self._cpu.iommu_features
        obstacles = (
            (line.no_iommu, rows.iommu_off),
            (efr is None or line.amd_iommu_off, rows.iommu_absent),
            (line.passthrough, rows.iommu_passthrough),
            (line.v2_tables and rows.v2_refused, rows.iommu_v2),
            (not (efr or 0) & EFR_SNP_SUPPORT, rows.iommu_no_snp),
        )
        told = next((text for there, text in obstacles if there), None)
        if told is not None:
            self._log(told)
            return False
        if not rows.rmp_first:
            self._log(rows.iommu_on)
            if line.v2_tables:
                self._log(rows.iommu_v2)
        return True

    def _enable(self) -> bool:
        """Zero the table and have every core enforce it; a table that is enforced already stays as it is (kexec)."""
        rows, cpu = self._rows, self._cpu
        if not self._usable_rmp():
            self._log(rows.rmp_failed)
            return False
        assert self.rmp is not None
        base, end = self.rmp
        if not cpu.rdmsr(Msr.SYSCFG) & SYSCFG_SNP_EN:
            cpu.zero(base, end + 1 - base)
            cpu.wbinvd()
            for bits in (SYSCFG_MFDM, SNP_ENABLE_BITS):
                for core in cpu.cores:
                    cpu.wrmsr(Msr.SYSCFG, cpu.rdmsr(Msr.SYSCFG, core) | bits, core)
        if rows.rmp_first:
            self._log(rows.iommu_on)
        return True

    def _usable_rmp(self) -> bool:
        """Whether there is a table, large enough, in memory that can be mapped."""
        rows = self._rows
        if not rows.rmp_first and not self._probe_rmp():
            return False
        assert self.rmp is not None
        base, end = self.rmp
        size = (end + 1 - base) % 2**64
        need = self._needed(size, end)
        if need > size:
            self._log(lines.RMP_SHORT.format(need=need, size=size))
            return False
        if not rows.rmp_first:
            self._log(rows.rmp_range.format(base=base, end=end))
        mapped = any(start <= base <= end < stop for start, stop in self._cpu.memory_map.dram)
        if not mapped:  # what memremap refuses is the model's choice (MODEL)
            self._log(rows.rmp_not_mapped.format(base=base, size=size))
        return mapped

    def _needed(self, size: int, end: int) -> int:
        """How large the table must be."""
        spans = ram(self._cpu)
        if self._rows.covers_addresses:
            pages = max(spans[-1][1], end + 1) >> PAGE_SHIFT
        else:
            pages = (size + sum(stop - start for start, stop in spans)) >> PAGE_SHIFT
        return pages * ENTRY_SIZE + BOOKKEEPING_SIZE
