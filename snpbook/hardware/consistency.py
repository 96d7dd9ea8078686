"""The consistency checks of VMRUN as two tables, in the order in which they are made; the first that fails answers.

`CONTROL_CHECKS` look at the VMCB, the core and the VMSA's address, `STATE_CHECKS` at what the save area holds. The
documents list the checks without an order: the order is the model's (MODEL). Sources: APM2 15.5.1, 15.20, 15.34.3,
15.35, 15.36.12 to 15.36.22.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from snpbook.hardware.exits import Invalid
from snpbook.hardware.machine import Core, Machine
from snpbook.hardware.save_area import SaveArea
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.layout import Record
from snpbook.spec.msr import HWCR_SMM_LOCK, IBS_FETCH_ENABLE, IBS_OP_ENABLE, Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import EVENT, EXCEPTION_VECTORS, VINTR_CTRL, EventKind, ExitCode, Vector
from snpbook.spec.vmsa import EFER_SVME


@dataclass
class Candidate:
    """What VMRUN is asked to enter: a VMCB on a core. Its save area is read when the first check asks for it."""

    machine: Machine
    core: Core
    vmcb: Record
    vmcb_spa: int

    @cached_property
    def area(self) -> SaveArea:
        if self.vmcb.sev_es:
            return SaveArea.encrypted(self.machine, self.vmcb)
        return SaveArea.plain(self.machine, self.vmcb_spa)

    def has(self, capability: SevCapability) -> bool:
        return capability in self.machine.product.capabilities

    @cached_property
    def features(self) -> SevFeatures:
        """SEV_FEATURES of the VMSA; nothing without SEV-ES."""
        return SevFeatures(self.area.loaded["sev_features"] if self.vmcb.sev_es else 0)

    @cached_property
    def snp(self) -> bool:
        return SevFeatures.SNP_ACTIVE in self.features

    def on(self, *features: SevFeatures) -> bool:
        """Whether all of these features are on."""
        return all(feature in self.features for feature in features)

    @cached_property
    def avic(self) -> bool:
        return bool(_control(self.vmcb.virtual_interrupt).avic_enable)

    @property
    def vmsa_page(self) -> int:
        page: int = self.vmcb.vmsa_pa >> PAGE_SHIFT
        return page

    @cached_property
    def event(self) -> Record:
        """The event to inject from the VMCB; none where the guest has AlternateInjection, which has its own."""
        word = 0 if self.on(SevFeatures.ALTERNATE_INJECTION) else self.vmcb.event_injection
        return EVENT.unpack(word.to_bytes(EVENT.size, "little"))


@dataclass(frozen=True, slots=True)
class Check:
    """One rule; `holds` says whether a candidate obeys it, `code` is the exit if not."""

    rule: str
    holds: Callable[[Candidate], bool]
    code: ExitCode = ExitCode.INVALID


def first_failure(checks: Sequence[Check], candidate: Candidate) -> Invalid | None:
    """The exit of the first check that fails; None where all hold."""
    failed = next((check for check in checks if not check.holds(candidate)), None)
    return None if failed is None else Invalid(failed.rule, failed.code)


def _control(word: int) -> Record:
    return VINTR_CTRL.unpack(word.to_bytes(VINTR_CTRL.size, "little"))


def _owned_or_off(c: Candidate, spa: int) -> bool:
    return not c.machine.snp_enabled or c.machine.hypervisor_owns(spa)


def _ibs_is_off(c: Candidate) -> bool:
    fetch, op = c.core.rdmsr(Msr.IBS_FETCH_CTL), c.core.rdmsr(Msr.IBS_OP_CTL)
    return not fetch & IBS_FETCH_ENABLE and not op & IBS_OP_ENABLE


def _allowed(c: Candidate) -> bool:
    limited = c.has(SevCapability.ALLOWED_SEV_FEATURES) and c.vmcb.allowed_sev_features_enable
    return not limited or not int(c.features) & ~c.vmcb.allowed_sev_features


def _event_exists(c: Candidate) -> bool:
    event = c.event
    if event.kind == EventKind.EXCEPTION and (event.vector >= EXCEPTION_VECTORS or event.vector == Vector.NMI):
        return not event.valid
    return not event.valid or event.kind in set(EventKind)


def _event_is_for_es(c: Candidate) -> bool:
    soft = c.event.kind == EventKind.SOFTWARE_INTERRUPT or c.event.vector in (Vector.BP, Vector.OF)
    return not c.vmcb.sev_es or not c.event.valid or not soft


def _event_is_hv(c: Candidate) -> bool:
    if not c.on(SevFeatures.RESTRICTED_INJECTION) or not c.event.valid:
        return True
    return (c.event.vector, c.event.kind, c.event.has_error) == (Vector.HV, EventKind.EXCEPTION, 0)


def _is_free(c: Candidate) -> bool:
    known = c.has(SevCapability.ALTERNATE_INJECTION) or c.has(SevCapability.SECURE_AVIC)
    if not known or not c.vmcb.sev_es:
        return True
    return not _control(c.area.loaded["vintr_ctrl"]).busy


def _vmsa_entry(c: Candidate) -> Record:
    return c.machine.rmp.entry(c.vmsa_page)


def _is_guests(c: Candidate) -> bool:
    entry = _vmsa_entry(c)
    return bool(entry.assigned) and entry.asid == c.vmcb.asid


def _sibling_is_idle(c: Candidate) -> bool:
    sibling = c.machine.sibling(c.core)
    return sibling is None or (sibling.idle and not sibling.in_guest)


CONTROL_CHECKS = (
    Check("the ASID is not that of the host", lambda c: c.vmcb.asid != 0),
    Check("nested paging is on: shadow paging is not modelled (MODEL)", lambda c: bool(c.vmcb.nested_paging)),
    Check("SEV-ES needs SEV", lambda c: bool(c.vmcb.sev) or not c.vmcb.sev_es),
    Check("SEV needs HWCR.SmmLock", lambda c: not c.vmcb.sev or bool(c.core.rdmsr(Msr.HWCR) & HWCR_SMM_LOCK)),
    Check("the ASID can be encrypted", lambda c: not c.vmcb.sev or c.vmcb.asid <= c.machine.product.asid_limit),
    Check("the ASID is in use by an active guest", lambda c: not c.vmcb.sev or c.vmcb.asid in c.machine.runnable),
    Check(
        "the guest is active on the core's complex",
        lambda c: not c.vmcb.sev or c.core.ccx in c.machine.runnable.get(c.vmcb.asid, ()),
    ),
    Check(
        "SEV needs a 64-bit host",
        lambda c: not c.vmcb.sev or c.core.long_mode or not c.has(SevCapability.HOST_64BIT),
    ),
    Check("SEV-ES needs LBR virtualization", lambda c: not c.vmcb.sev_es or bool(c.vmcb.lbr_virtualization)),
    Check(
        "the AVIC backing page is the hypervisor's",
        lambda c: not c.avic or _owned_or_off(c, c.vmcb.avic_backing_page),
    ),
    Check(
        "the VMSA lies in a page of memory",
        lambda c: not c.vmcb.sev_es or (c.vmcb.vmsa_pa % PAGE_SIZE == 0 and c.machine.is_dram(c.vmsa_page)),
    ),
    Check(
        "the VMSA is in no core's use (MODEL)",
        lambda c: not c.vmcb.sev_es or c.vmsa_page not in c.machine.in_use,
        ExitCode.BUSY,
    ),
)
"""Not in the documents' list for SEV: ASID 0 (from memory), that SEV-ES needs SEV and LBR virtualization (inferred)."""

STATE_CHECKS = (
    Check("SEV_FEATURES.SNPActive needs SYSCFG.SNPEn", lambda c: not c.snp or c.machine.snp_enabled),
    Check("the VMSA page is covered by the RMP", lambda c: not c.snp or c.vmsa_page < c.machine.rmp.entries),
    Check("the VMSA page is the guest's", lambda c: not c.snp or _is_guests(c)),
    Check("the VMSA page is mutable", lambda c: not c.snp or not _vmsa_entry(c).immutable),
    Check("the VMSA page is marked as a VMSA in the RMP", lambda c: not c.snp or bool(_vmsa_entry(c).vmsa)),
    Check(
        "the VMSA page of a guest without SNPActive is the hypervisor's",
        lambda c: not c.vmcb.sev_es or c.snp or _owned_or_off(c, c.vmcb.vmsa_pa),
    ),
    Check(
        "the VMSA of a SEV-ES guest has its checksum",
        lambda c: not c.vmcb.sev_es or c.snp or c.area.checksum_matches,
    ),
    Check(
        "the VMPL exists (MODEL)",
        lambda c: not c.snp or c.area.loaded["vmpl"] < c.machine.product.vmpls,
    ),
    Check("EFER.SVME is set in the VMSA", lambda c: not c.vmcb.sev_es or bool(c.area.loaded["efer"] & EFER_SVME)),
    Check(
        "SEV_FEATURES are known to the processor", lambda c: not int(c.features) & ~int(c.machine.product.sev_features)
    ),
    Check("SEV_FEATURES are among ALLOWED_SEV_FEATURES", _allowed),
    Check(
        "restricted and alternate injection exclude each other",
        lambda c: not c.on(SevFeatures.RESTRICTED_INJECTION, SevFeatures.ALTERNATE_INJECTION),
    ),
    Check(
        "restricted injection goes without AVIC",
        lambda c: not c.on(SevFeatures.RESTRICTED_INJECTION) or not c.avic,
    ),
    Check(
        "alternate injection goes without AVIC",
        lambda c: not c.on(SevFeatures.ALTERNATE_INJECTION) or not c.avic,
    ),
    Check("the injected event exists", _event_exists),
    Check("SEV-ES: no software interrupt, no #BP and no #OF is injected", _event_is_for_es),
    Check("restricted injection: #HV alone is injected, without an error code", _event_is_hv),
    Check(
        "VmplSSS goes without the VMCB's shadow-stack check",
        lambda c: not c.on(SevFeatures.VMPL_SSS) or not c.vmcb.sss_check,
    ),
    Check(
        "PreventHostIBS: the host's IBS is off",
        lambda c: not c.on(SevFeatures.PREVENT_HOST_IBS) or _ibs_is_off(c),
    ),
    Check("VINTR_CTRL.BUSY is clear", _is_free, ExitCode.BUSY),
    Check(
        "SmtProtection: the sibling thread is idle",
        lambda c: not c.on(SevFeatures.SMT_PROTECTION) or _sibling_is_idle(c),
        ExitCode.IDLE_REQUIRED,
    ),
)
"""Unknown bits of SEV_FEATURES are inferred, EFER.SVME and events that do not exist are from memory. No code says when
the state of the performance counters gives INVALID_PMC: there is no check for it. 4 KB entries are assumed for the
VMSA's page, and any guest address (inferred). Without SEV-ES the hypervisor keeps EFER.SVME set: unchecked (MODEL)."""
