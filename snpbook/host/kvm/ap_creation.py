"""AP creation: an SNP guest chooses the save area of one of its vCPUs.

A good request is only queued: the target takes it as it is entered next, or at INIT. Whether the page is a save area
KVM does not look: a bad one makes the vCPU's VMRUN fail. Sources: GHCB specification; Linux arch/x86/kvm/svm/sev.c
(sev_snp_ap_creation, sev_snp_init_protected_guest_state); RFC v7 patch 54.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from snpbook.host.kvm.exchange import Exchange
from snpbook.host.refusal import KernelError, check
from snpbook.spec.ghcb import AP_CREATION, ApCreation, GhcbError
from snpbook.spec.layout import Record
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.sev_features import INJECTION_MODES, SevFeatures
from snpbook.spec.uapi_kvm import MpState
from snpbook.spec.vmcb import Vector

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_VMPLS = 4
_NO_VMSA = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Queued:
    """A save area that waits for its vCPU: at guest address `gpa`, None for none; with `on_init` until INIT."""

    gpa: int | None
    on_init: bool = False


@dataclass(frozen=True, slots=True)
class Parked:
    """What a vCPU has at a VMPL at which it does not run."""

    vmsa: int | None = None
    ghcb_msr: int = 0
    ghcb_registered: int = -1
    doorbell: int | None = None


def create(exchange: Exchange) -> bool:
    """Queue what the guest asks for.

    A refused request is an invalid input, and leaves the target as it was; in the v7 series it stops the target and is
    a #GP for the caller.
    """
    vcpu, era = exchange.vcpu, exchange.vcpu.vm.kernel.era
    info = AP_CREATION.unpack(exchange.info_1.to_bytes(AP_CREATION.size, "little"))
    target = vcpu.vm.vcpus.get(info.apic_id)
    vmpl = info.vmpl if era.ap_creation_vmpl else 0
    try:
        check(target is not None, errno.EINVAL, "a vCPU has the APIC ID", sorted(vcpu.vm.vcpus), info.apic_id)
        assert target is not None
        wanted = _checked(exchange, info, target)
    except KernelError as error:
        vcpu.vm.kernel.log(f"vmgexit: AP creation refused: {error}")
        if not era.ap_creation_error_gp:
            exchange.refuse(GhcbError.INVALID_INPUT)
            return False
        exchange.fault(Vector.GP)
        wanted = Queued(None)
    if target is not None:
        target.queued[vmpl] = wanted
        if not wanted.on_init and target.mp_state is MpState.UNINITIALIZED:
            target.mp_state = MpState.RUNNABLE
    return False


def request(exchange: Exchange) -> int:
    """Which request it is: the lower half of SW_EXITINFO1 or, where the era takes a VMPL there, the part without it."""
    limit = AP_CREATION.fields["request"].limit if exchange.vcpu.vm.kernel.era.ap_creation_vmpl else (1 << 32) - 1
    return exchange.info_1 & limit


def _checked(exchange: Exchange, info: Record, target: Vcpu) -> Queued:
    """What is to be queued; EINVAL for a request that is refused."""
    vcpu, gpa = exchange.vcpu, exchange.info_2
    sev, era = vcpu.vm.sev, vcpu.vm.kernel.era
    assert sev is not None
    wanted = request(exchange)
    if era.ap_creation_vmpl:
        check(info.vmpl < _VMPLS, errno.EINVAL, "a VMPL", f"below {_VMPLS}", info.vmpl)
        other = info.vmpl != 0 or (target is not vcpu and vcpu.vmpl == 0)
        check(other, errno.EINVAL, "VMPL0 is replaced by another vCPU at VMPL0", "such a caller", f"VMPL{vcpu.vmpl}")
    known = wanted in ApCreation._value2member_map_
    check(known, errno.EINVAL, "a request of AP creation", "0 to 2", wanted)
    if wanted == ApCreation.DESTROY:
        return Queued(None)
    changed = SevFeatures(vcpu.state.rax ^ sev.vmsa_features) & INJECTION_MODES
    # A VMPL of its own may have another way of injection (unconfirmed).
    same = not changed or (era.ap_creation_vmpl and info.vmpl != 0)
    check(same, errno.EINVAL, "the injection mode stays", repr(sev.vmsa_features & INJECTION_MODES), repr(changed))
    limit = 1 << vcpu.vm.kernel.cpu.product.physical_bits
    good = gpa % PAGE_SIZE == 0 and gpa < limit
    check(good, errno.EINVAL, "the save area is a page", f"a page below {limit:#x}", hex(gpa))
    check(gpa % LARGE_PAGE_SIZE != 0, errno.EINVAL, "the save area begins at no 2 MB boundary (erratum)", "", hex(gpa))
    return Queued(gpa, on_init=wanted == ApCreation.ON_INIT)


def update_vmsa(vcpu: Vcpu) -> None:
    """Before an entry: take the save areas that wait for it."""
    for vmpl, wanted in list(vcpu.queued.items()):
        if not wanted.on_init:
            del vcpu.queued[vmpl]
            _take(vcpu, vmpl, wanted)


def initialise(vcpu: Vcpu) -> None:
    """INIT: what waits for it, is taken at the next entry."""
    vcpu.queued = {vmpl: Queued(wanted.gpa) for vmpl, wanted in vcpu.queued.items()}


def _take(vcpu: Vcpu, vmpl: int, wanted: Queued) -> None:
    """The vCPU stops and loses its save area; with the new one it can run again, from there.

    A page that is not there yet gets memory. Which program the vCPU runs is not the save area's say (MODEL).
    """
    vmsa = None if wanted.gpa is None else _address(vcpu, wanted.gpa)
    if vmpl != vcpu.vmpl:
        parked = vcpu.parked.get(vmpl, Parked())
        vcpu.parked[vmpl] = replace(parked, vmsa=vmsa)
        if vmsa is not None:
            switch(vcpu, vmpl)
        return
    vcpu.vmsa, vcpu.mp_state = vmsa, MpState.HALTED if vmsa is None else MpState.RUNNABLE
    vcpu.set_control("vmsa_pa", _NO_VMSA if vmsa is None else vmsa)


def _address(vcpu: Vcpu, gpa: int) -> int | None:
    """The system address behind a private page of the guest; None where there is none."""
    gfn = gpa >> PAGE_SHIFT
    slot = vcpu.vm.slots.of(gfn)
    if slot is None or slot.private is None:
        return None
    try:
        return int(slot.private.frames(slot, range(gfn, gfn + 1))[0]) << PAGE_SHIFT
    except KernelError as error:
        vcpu.vm.kernel.log(f"snp: AP state update failed: {error}")
        return None


def switch(vcpu: Vcpu, vmpl: int) -> None:
    """Run at another VMPL: its save area, its GHCB MSR, its registered GHCB, its doorbell page."""
    vcpu.parked[vcpu.vmpl] = Parked(vcpu.vmsa, vcpu.control().ghcb_gpa, vcpu.ghcb_registered, vcpu.doorbell)
    fresh = vcpu.parked.pop(vmpl, Parked())
    vcpu.vmpl, vcpu.vmsa, vcpu.ghcb_registered = vmpl, fresh.vmsa, fresh.ghcb_registered
    vcpu.doorbell = fresh.doorbell
    vcpu.set_control("vmsa_pa", _NO_VMSA if fresh.vmsa is None else fresh.vmsa)
    vcpu.set_control("ghcb_gpa", fresh.ghcb_msr)
    vcpu.mp_state = MpState.HALTED if fresh.vmsa is None else MpState.RUNNABLE
