"""VMRUN: the consistency checks, the registers in and out of the VMSA, the exit into the VMCB.

The hypervisor sees exit codes; the registers go back into the encrypted page. Source: APM2 15.36.12
(checks of VMCB and VMSA pages), 15.35.
"""

from __future__ import annotations

from typing import Any

from snpbook.hardware.checks import check_write
from snpbook.hardware.core import GuestCore
from snpbook.hardware.dram import whole
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Exit, GeneralProtection, Invalid, Npf
from snpbook.hardware.machine import Machine
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.msr import HWCR_SMM_LOCK, Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import VMCB
from snpbook.spec.vmsa import SNP_ACTIVE, VMSA


def vmrun(machine: Machine, vmcb_spa: int, executor: CoroutineExecutor, vcpu: str) -> Exit:
    """Run the vCPU of the VMCB at `vmcb_spa` to its next exit.

    `GeneralProtection` where the VMCB's address is no page or the page not the hypervisor's; `Invalid` where the
    state to run is not consistent. Of the VMCB and the VMSA only what the exit concerns is written.
    """
    vmcb_spa = whole("vmcb_spa", vmcb_spa)
    if not 0 <= vmcb_spa <= machine.dram.size - PAGE_SIZE or vmcb_spa % PAGE_SIZE:
        raise GeneralProtection("VMRUN takes the address of a page of memory", "a VMCB", vmcb_spa, "APM2 15.5.1")
    page = vmcb_spa >> PAGE_SHIFT
    if machine.snp_enabled and check_write(machine.rmp, range(page, page + 1)).any():
        raise GeneralProtection("VMRUN: the VMCB page is the hypervisor's", "unassigned", "assigned", "APM2 15.36.12")
    vmcb = VMCB.unpack(machine.memory.read(KeyId.UNENCRYPTED, vmcb_spa, PAGE_SIZE))
    refused = _refusal(machine, vmcb)
    if refused:
        return _left(machine, vmcb_spa, Invalid(refused))
    page = vmcb.vmsa_pa >> PAGE_SHIFT
    before = machine.memory.read_pages(vmcb.asid, range(page, page + 1)).tobytes()
    registers = dict(VMSA.unpack(before))
    refused = _inconsistency(machine, registers)
    if refused:
        return _left(machine, vmcb_spa, Invalid(refused))
    core = GuestCore(machine, vmcb, registers, vcpu)
    exit_ = executor.run(core)
    kept = int.from_bytes(before, "little") & VMSA.reserved_mask  # what the layout does not name stays
    after = int.from_bytes(VMSA.pack(**core.registers), "little") | kept
    machine.memory.write(vmcb.asid, page << PAGE_SHIFT, after.to_bytes(PAGE_SIZE, "little"))
    machine.memory.write(KeyId.UNENCRYPTED, vmcb_spa + VMCB.offset("ghcb_gpa"), core.msrs.ghcb.to_bytes(8, "little"))
    return _left(machine, vmcb_spa, exit_)


def _refusal(machine: Machine, vmcb: Record) -> str:
    """The first consistency check of the VMCB and of the VMSA's page that fails, or nothing."""
    if not (vmcb.sev and vmcb.sev_es and vmcb.nested_paging):
        return "an SNP guest runs with nested paging, SEV and SEV-ES on"
    if not machine.cores[0].rdmsr(Msr.HWCR) & HWCR_SMM_LOCK:
        return "HWCR.SmmLock is set"
    if vmcb.asid not in machine.runnable:
        return "the ASID is in use by an active guest"
    page = vmcb.vmsa_pa >> PAGE_SHIFT
    if page >= machine.rmp.entries:
        return "the VMSA page is covered by the RMP"
    entry = machine.rmp.entry(page)
    if not entry.assigned or entry.asid != vmcb.asid:
        return "the VMSA page is the guest's"
    if entry.immutable:
        return "the VMSA page is mutable"
    return "" if entry.vmsa else "the VMSA page is marked as a VMSA in the RMP"


def _inconsistency(machine: Machine, registers: dict[str, Any]) -> str:
    """The first consistency check of the VMSA's contents that fails, or nothing."""
    if not registers["sev_features"] & SNP_ACTIVE:
        return "the VMSA page of a guest without SNPActive is the hypervisor's"
    if not machine.snp_enabled:
        return "SEV_FEATURES.SNPActive needs SYSCFG.SNPEn"
    return "" if registers["vmpl"] < machine.product.vmpls else "the VMPL exists (MODEL)"


def _left(machine: Machine, vmcb_spa: int, exit_: Exit) -> Exit:
    """Write the exit into the VMCB for the hypervisor to read."""
    info = (int(exit_.error), exit_.gpa) if isinstance(exit_, Npf) else (0, 0)
    for name, value in zip(("exit_code", "exit_info_1", "exit_info_2"), (exit_.code, *info), strict=True):
        machine.memory.write(KeyId.UNENCRYPTED, vmcb_spa + VMCB.offset(name), int(value).to_bytes(8, "little"))
    return exit_
