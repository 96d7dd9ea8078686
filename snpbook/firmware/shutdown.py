"""SNP_SHUTDOWN and SNP_SHUTDOWN_EX: SNP off, and with the bits of the latter the IOMMU's and the cores' part as well.

The table and all page states outlive a shutdown. Sources: SNP ABI; order of checks and quirks of firmware 1.55.25.
"""

from __future__ import annotations

from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.commands import Command
from snpbook.spec.layout import Record
from snpbook.spec.msr import SYSCFG_SNP_EN, Msr
from snpbook.spec.platform import Fault, FeatureEcx
from snpbook.spec.snp_buffers import SNP_SHUTDOWN_EX
from snpbook.spec.states import PLATFORM_TRANSITIONS, LegacyPlatformState
from snpbook.spec.status import Status, require


def snp_shutdown(psp: SecureProcessor, buffer: Record) -> None:
    """SNP_SHUTDOWN_EX without any bit."""
    snp_shutdown_ex(psp, SNP_SHUTDOWN_EX.record(length=SNP_SHUTDOWN_EX.size))


def snp_shutdown_ex(psp: SecureProcessor, buffer: Record) -> None:
    """Turn SNP off, once no guest is left and every ASID is clean; a second time it is a success without effect."""
    # CHECKS
    legacy = psp.legacy.state
    gone = legacy is LegacyPlatformState.UNINIT
    require(gone, Status.INVALID_PLATFORM_STATE, "legacy platform state", "UNINIT", legacy.name)
    if not psp.initialised:
        return
    rule = "every ASID is clean on every core complex"
    require(psp.asids.all_clean, Status.DF_FLUSH_REQUIRED, rule, "clean", "in use, allocated or dirty")
    size = SNP_SHUTDOWN_EX.size
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length)
    psp.require_reserved_zero()
    iommu, cores = buffer.iommu_snp_shutdown, buffer.x86_snp_shutdown
    require(iommu or not cores, Status.INVALID_PARAM, "X86_SNP_SHUTDOWN comes with IOMMU_SNP_SHUTDOWN", 1, iommu)
    if cores:
        known = FeatureEcx.X86_SNP_SHUTDOWN in psp.release.abi.features
        require(known, Status.INVALID_PARAM, "the firmware knows X86_SNP_SHUTDOWN", 1, 0)
        answers = Fault.NO_ANSWER not in psp.faults
        require(answers, Status.SHUTDOWN_INCOMPLETE, "the other processors acknowledge", cite="MODEL")

    # ACTION
    if iommu:
        _forget_rmp(psp)
    if cores:
        for core in psp.machine.cores:
            core.set_by_bios({Msr.SYSCFG: core.rdmsr(Msr.SYSCFG) & ~SYSCFG_SNP_EN})
        psp.machine.rmp_located = False
    psp.machine.hidden_asids = psp.asids.hidden = 0
    psp.rapl_disabled = False

    # STATE
    psp.state, psp.vlek = PLATFORM_TRANSITIONS[psp.state, Command.SNP_SHUTDOWN_EX], None


def _forget_rmp(psp: SecureProcessor) -> None:
    """The IOMMU enforces the table no longer, no ASID keeps its key, and what the firmware keeps for good begins anew.

    Quirk: the firmware does the last only when its next command comes, which nobody can tell. The model's IOMMU has no
    log pages that would become Reclaim (MODEL).
    """
    psp.machine.iommu.snp_enabled = False
    for asid in range(1, psp.asids.limit + 1):
        if psp.machine.encryption.has_key(asid):
            psp.machine.encryption.remove(asid)
    psp.rmp_tcb = None
    psp.mask_chip_id = psp.mask_chip_key = False
    psp.committed, psp.committed_tcb = psp.release, psp.current_tcb
