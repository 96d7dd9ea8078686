"""VMRUN and #VMEXIT: the checks, the registers in and out, the exit into the VMCB.

Between the two the core is in guest mode, and the pages that it works with are in use: nobody changes their RMP
entries. The hypervisor sees exits; the registers go back to where they came from. Sources: APM2 15.5, 15.6,
15.35, 15.36.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from snpbook.hardware.consistency import CONTROL_CHECKS, STATE_CHECKS, Candidate, first_failure
from snpbook.hardware.core import GuestCore
from snpbook.hardware.dram import whole
from snpbook.hardware.exits import Exit, GeneralProtection, Intercepted, Npf, Vmgexit
from snpbook.hardware.injection import take_event
from snpbook.hardware.intercepts import is_behind
from snpbook.hardware.machine import Machine
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import VMCB


class Executor(Protocol):
    """What runs a guest on a core: programs, or one day machine code."""

    def run(self, core: GuestCore) -> Exit:
        """Run from the core's registers to the next exit, and leave the registers there. An event comes first."""


def vmrun(machine: Machine, vmcb_spa: int, executor: Executor, vcpu: str, core: int = 0) -> Exit:
    """Run the vCPU of the VMCB at `vmcb_spa` on a core to its next exit.

    `GeneralProtection` where the VMCB's address is no page or the page not the hypervisor's; `Invalid` where the
    state to run is not consistent. Of the VMCB and the save area only what the exit concerns is written.
    `ValueError` for a core that does not exist or is in guest mode. VM_HSAVE_PA is not looked at (unconfirmed).
    """
    vmcb = _read_vmcb(machine, vmcb_spa)
    if not 0 <= whole("core", core) < len(machine.cores) or machine.cores[core].in_guest:
        raise ValueError(f"core = {core}: one of the machine's {len(machine.cores)}, not in guest mode")
    physical = machine.cores[core]
    physical.idle = False
    candidate = Candidate(machine, physical, vmcb, vmcb_spa)
    refused = first_failure(CONTROL_CHECKS, candidate) or first_failure(STATE_CHECKS, candidate)
    if refused:
        return _left(machine, vmcb_spa, refused)
    area = candidate.area
    guest = GuestCore(machine, vmcb, area.registers(physical), vcpu, physical)
    physical.tlb.enter(vmcb.asid, vmcb.tlb_control, guest.registers if candidate.snp else None)
    guest.event, changes = take_event(vmcb, guest.registers)
    guest.vmcb = vmcb.replace(**changes)
    with _guest_mode(candidate):
        exit_ = executor.run(guest)
    area.store(guest.registers, physical)
    changes["ghcb_gpa"] = guest.msrs.ghcb
    if candidate.has(SevCapability.ALLOWED_SEV_FEATURES):  # unconfirmed
        changes["guest_sev_features"] = candidate.features
    if isinstance(exit_, Vmgexit) and candidate.on(SevFeatures.VMGEXIT_PARAMETER):
        changes |= {"vmgexit_rax": guest.registers["rax"], "vmgexit_cpl": guest.registers["cpl"]}
    if not vmcb.sev_es:  # a program's instruction is one step of RIP long
        changes["next_rip"] = guest.registers["rip"] + (not is_behind(guest, exit_))
    return _left(machine, vmcb_spa, exit_, **changes)


def _read_vmcb(machine: Machine, spa: int) -> Record:
    if not 0 <= whole("vmcb_spa", spa) <= machine.dram.size - PAGE_SIZE or spa % PAGE_SIZE:
        raise GeneralProtection("VMRUN takes the address of a page of memory", "a VMCB", spa, "APM2 15.5.1")
    if machine.snp_enabled and not machine.hypervisor_owns(spa):
        raise GeneralProtection("VMRUN: the VMCB page is the hypervisor's", "unassigned", "assigned", "APM2 15.36.12")
    return VMCB.unpack(machine.memory.read(KeyId.UNENCRYPTED, spa, PAGE_SIZE))


@contextmanager
def _guest_mode(candidate: Candidate) -> Iterator[None]:
    """The core is in the guest, and its VMCB, VMSA and AVIC page are in use."""
    machine, core, vmcb = candidate.machine, candidate.core, candidate.vmcb
    pages = {candidate.vmcb_spa >> PAGE_SHIFT}
    if vmcb.sev_es:
        pages.add(candidate.vmsa_page)
    if candidate.avic:
        pages.add(vmcb.avic_backing_page >> PAGE_SHIFT)
    pages -= machine.in_use
    machine.in_use |= pages
    core.in_guest = True
    try:
        yield
    finally:
        core.in_guest = False
        machine.in_use -= pages


def _left(machine: Machine, vmcb_spa: int, exit_: Exit, **changes: int) -> Exit:
    """Write the exit and what else an exit changes into the VMCB, for the hypervisor to read."""
    match exit_:
        case Npf():
            info = (int(exit_.error), exit_.gpa)
        case Intercepted():
            info = (exit_.info_1, exit_.info_2)
        case _:
            info = (0, 0)
    changes |= {"exit_code": exit_.code, "exit_info_1": info[0], "exit_info_2": info[1]}
    for name, value in changes.items():
        field = VMCB.fields[name]
        data = int(value).to_bytes(field.size, "little")
        machine.memory.write(KeyId.UNENCRYPTED, vmcb_spa + field.offset, data)
    return exit_
