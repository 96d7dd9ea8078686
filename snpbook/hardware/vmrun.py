"""VMRUN: the consistency checks, the registers in and out of the VMSA, the exit into the VMCB.

The hypervisor sees exit codes; the registers go back into the encrypted page. Source: APM2 15.36.12
(checks of VMCB and VMSA pages), 15.35.
"""

from __future__ import annotations

import numpy as np

from snpbook.hardware.core import GuestCore
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Exit, GeneralProtection, Invalid, Npf
from snpbook.hardware.machine import Machine
from snpbook.hardware.rmp import U64
from snpbook.spec.layout import Record
from snpbook.spec.msr import HWCR_SMM_LOCK, Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import VMCB
from snpbook.spec.vmsa import SNP_ACTIVE, VMSA


def vmrun(machine: Machine, vmcb_spa: int, executor: CoroutineExecutor, vcpu: str) -> Exit:
    """Run the vCPU of the VMCB at `vmcb_spa` to its next exit.

    `GeneralProtection` where the VMCB's own page is not the hypervisor's; `Invalid` where the state
    to run is not consistent.
    """
    page = vmcb_spa >> PAGE_SHIFT
    if machine.snp_enabled and page < machine.rmp.entries and machine.rmp.entry(page).assigned:
        raise GeneralProtection("VMRUN.VMCB page is the hypervisor's", "unassigned", "assigned", "APM2 15.36.12")
    vmcb = VMCB.unpack(machine.dram.read(vmcb_spa, PAGE_SIZE))
    exit_: Exit
    refused = _refusal(machine, vmcb)
    if refused:
        exit_ = Invalid(refused)
        _store(machine, vmcb_spa, vmcb, exit_)
        return exit_
    vmsa_page = np.array([vmcb.vmsa_pa >> PAGE_SHIFT], U64)
    registers = dict(VMSA.unpack(machine.encryption.read_pages(vmcb.asid, vmsa_page).tobytes()))
    if registers["sev_features"] & SNP_ACTIVE and not machine.snp_enabled:
        exit_ = Invalid("SEV_FEATURES.SNPActive needs SYSCFG.SNPEn")
        _store(machine, vmcb_spa, vmcb, exit_)
        return exit_
    core = GuestCore(machine, vmcb, registers, vcpu)
    exit_ = executor.run(core)
    page_bytes = np.frombuffer(VMSA.pack(**core.registers), np.uint8).reshape(1, PAGE_SIZE)
    machine.encryption.write_pages(vmcb.asid, vmsa_page, page_bytes)
    _store(machine, vmcb_spa, vmcb.replace(ghcb_gpa=core.ghcb_msr), exit_)
    return exit_


def _refusal(machine: Machine, vmcb: Record) -> str:
    """The first consistency check that fails, or nothing."""
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


def _store(machine: Machine, vmcb_spa: int, vmcb: Record, exit_: Exit) -> None:
    """Write the exit into the VMCB for the hypervisor to read."""
    info = {"exit_info_1": int(exit_.error), "exit_info_2": exit_.gpa} if isinstance(exit_, Npf) else {}
    machine.dram.write(vmcb_spa, bytes(vmcb.replace(exit_code=exit_.code, **info)))
