"""The model-specific registers of one core, and those that a running guest has of its own.

The table `MSR_FACTS` says which exist, for whom, and what SYSCFG.SNPEn locks; this file obeys it and keeps
what only silicon does on a write. Sources: APM2 15.34.10, 15.36.2, 15.36.4; firmware 1.55.25 (what SNP_INIT
compares).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snpbook.hardware.bios import SNP_READY, BiosSetup
from snpbook.hardware.dram import whole
from snpbook.hardware.exits import GeneralProtection
from snpbook.hardware.rmp_range import RmpRange
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.image import FOUR_GIB
from snpbook.spec.msr import (
    DEBUG_STATUS_GUEST,
    DEBUG_STATUS_SMM,
    FIXED_MTRRS,
    HWCR_SMM_LOCK,
    MSR_FACTS,
    MTRR_FIX_WRITE_BACK,
    RMP_ADDRESS_MASK,
    RMP_LAST_BYTE,
    SAME_ON_ALL_CORES,
    SYSCFG_BIOS,
    SYSCFG_MEM_ENCRYPT,
    SYSCFG_SNP_EN,
    SYSCFG_VMPL_EN,
    TSEG_MASK_VALID,
    VMPAGE_FLUSH_ASID,
    Msr,
    MsrFacts,
    SnpLock,
)
from snpbook.spec.products import Product
from snpbook.spec.sev_features import sev_status

_CITE = "APM2 15.34.10, 15.36.2"


class Msrs:
    """One core's registers as the host sees them, beginning with what the BIOS wrote.

    `hypervisor_owns(spa)` asks the RMP for a page; `flush_guest_page(address, asid)` writes back and drops the
    lines that a guest has of the page at a host virtual address, and is False where nothing is mapped there.
    """

    def __init__(
        self,
        product: Product,
        bios: Mapping[Msr, int],
        *,
        hypervisor_owns: Callable[[int], bool],
        flush_guest_page: Callable[[int, int], bool],
    ) -> None:
        self.product = product
        self._hypervisor_owns, self._flush_guest_page = hypervisor_owns, flush_guest_page
        self._values = {msr: 0 for msr, facts in MSR_FACTS.items() if _exists(facts, product) and facts.host}
        self.set_by_bios(bios)
        self.in_guest = False
        """Whether a thread of this core is in guest mode."""
        self.in_smm = False
        """Whether a thread of this core is in system management mode."""

    def __repr__(self) -> str:
        return f"Msrs({self.product.name}, SYSCFG {self._values[Msr.SYSCFG]:#x})"

    def set_by_bios(self, values: Mapping[Msr, int]) -> None:
        """Set registers as the BIOS does at reset, before any lock. `ValueError` for one that the core lacks."""
        for msr, value in values.items():
            if msr not in self._values:
                raise ValueError(f"{self.product.title} has no {msr.name} on the host")
            self._values[msr] = _word(value)

    @property
    def snp_enabled(self) -> bool:
        return bool(self._values[Msr.SYSCFG] & SYSCFG_SNP_EN)

    def rdmsr(self, msr: int) -> int:
        """Read a register; `GeneralProtection` for one that the host does not have or may only write."""
        self._require("RDMSR", msr, "r")
        if msr == Msr.DEBUG_STATUS:
            return DEBUG_STATUS_GUEST * self.in_guest | DEBUG_STATUS_SMM * self.in_smm
        if msr == Msr.SMM_KEY:  # reads as zero (unconfirmed)
            return 0
        return self._values[Msr(msr)]

    def wrmsr(self, msr: int, value: int) -> None:
        """Write a register.

        `GeneralProtection` for one that the host does not have or may only read, for reserved bits, and for what
        SYSCFG.SNPEn has locked; what it makes the core ignore changes nothing. `ValueError` or `TypeError` for a
        value that no register holds.
        """
        value = _word(value)
        facts = self._require("WRMSR", msr, "w")
        msr = Msr(msr)
        if self.snp_enabled and facts.lock is SnpLock.FAULTS:
            raise GeneralProtection(f"WRMSR {msr.name} once SNP is on", "SYSCFG.SNPEn=0", 1, "APM2 15.36.2")
        if self.snp_enabled and facts.lock is SnpLock.IGNORED:
            return
        valid = facts.valid
        if msr is Msr.SYSCFG and SevCapability.SEV_SNP not in self.product.capabilities:
            valid &= ~(SYSCFG_SNP_EN | SYSCFG_VMPL_EN)
        _require_valid(msr, value, valid)
        match msr:
            case Msr.VMPAGE_FLUSH:
                self._flush(value)
                return
            case Msr.VM_HSAVE_PA:
                self._require_owned(value)
            case Msr.RMP_BASE:  # an 8 KB place: what the low bits read as is inferred
                value &= RMP_ADDRESS_MASK
            case Msr.RMP_END:
                value |= RMP_LAST_BYTE
            case Msr.HWCR:  # SmmLock is cleared by reset only (unconfirmed)
                value |= self._values[msr] & HWCR_SMM_LOCK
        self._values[msr] = value

    def _require(self, instruction: str, msr: int, access: str) -> MsrFacts:
        name = _name(msr)
        rule = f"{instruction} {name} on the host"
        if msr not in self._values:
            raise GeneralProtection(rule, f"a register of the host on {self.product.title}", name, _CITE)
        facts = MSR_FACTS[Msr(msr)]
        _require_access(rule, facts, access)
        return facts

    def _require_owned(self, spa: int) -> None:
        spa &= ~(1 << self.product.c_bit)
        if self.snp_enabled and not self._hypervisor_owns(spa):
            raise GeneralProtection("VM_HSAVE_PA names a page of the hypervisor", "unassigned", spa, "APM2 15.36.12")

    def _flush(self, value: int) -> None:
        address, asid = value & ~VMPAGE_FLUSH_ASID, value & VMPAGE_FLUSH_ASID
        if not asid:
            raise GeneralProtection("VMPAGE_FLUSH names a guest's ASID", "not 0", asid, "APM2 15.34.9")
        if not self._flush_guest_page(address, asid):
            raise GeneralProtection("VMPAGE_FLUSH names a mapped page", "mapped", address, "APM2 15.34.9")


@dataclass(slots=True)
class GuestMsrs:
    """The registers that a guest has of its own and reaches without its hypervisor.

    All others are intercepted, a #VC of the guest, and none of this class's business: ask `MSR_FACTS`. `registers`
    are the VMSA's, by name; `ghcb` is the VMCB's field; `tsc_mhz` is the host's clock, which GUEST_TSC_SCALE turns
    into the guest's (inferred). `flush_tlb` drops the translations of the guest's ASID.
    """

    product: Product
    registers: dict[str, Any]
    sev: bool
    sev_es: bool
    ghcb: int
    tsc_mhz: int
    flush_tlb: Callable[[], None]

    def rdmsr(self, msr: int) -> int:
        """Read a register; `GeneralProtection` for one that this guest does not have."""
        self._require("RDMSR", msr, "r")
        match Msr(msr):
            case Msr.GHCB:
                return self.ghcb
            case Msr.SEV_STATUS:
                return sev_status(sev=self.sev, sev_es=self.sev_es, features=self._features)
            case Msr.GUEST_TSC_FREQ:
                return self.tsc_mhz * int(self.registers["guest_tsc_scale"]) >> 32
            case _:
                return int(self.registers[Msr(msr).name.lower()])

    def wrmsr(self, msr: int, value: int) -> None:
        """Write a register; `GeneralProtection` also for a read-only one and for reserved bits."""
        value = _word(value)
        facts = self._require("WRMSR", msr, "w")
        _require_valid(Msr(msr), value, facts.valid)
        if msr == Msr.GHCB:
            self.ghcb = value
            return
        self.registers[Msr(msr).name.lower()] = value
        if msr == Msr.VIRTUAL_TOM:
            self.flush_tlb()

    @property
    def _features(self) -> int:
        return int(self.registers["sev_features"]) if self.sev and self.sev_es else 0

    def _require(self, instruction: str, msr: int, access: str) -> MsrFacts:
        name, facts = _name(msr), MSR_FACTS[Msr(msr)] if msr in MSR_FACTS else None
        rule = f"{instruction} {name} in a guest"
        if facts is None or not facts.guest or not _exists(facts, self.product):
            raise GeneralProtection(rule, f"a register of guests on {self.product.title}", name, _CITE)
        if msr == Msr.GHCB and not self.sev_es:
            raise GeneralProtection(rule, "SEV-ES on", "off", _CITE)
        if facts.feature & ~self._features:
            raise GeneralProtection(rule, f"{facts.feature.name} on", "off", _CITE)
        _require_access(rule, facts, access)
        return facts


def first_disagreement(cores: Sequence[Msrs], msrs: Iterable[Msr] = SAME_ON_ALL_CORES) -> tuple[Msr, list[int]] | None:
    """The first of `msrs` that is not the same on all cores of all sockets, with each core's value."""
    for msr in msrs:
        values = [core.rdmsr(msr) for core in cores]
        if len(set(values)) > 1:
            return msr, values
    return None


def bios_settings(
    product: Product, low_end: int, top: int, tseg: tuple[int, int], rmp: RmpRange, setup: BiosSetup = SNP_READY
) -> dict[Msr, int]:
    """What the BIOS writes on every core: encryption, the lock of SMM, memory and RMP where the map has them.

    `low_end` is the end of DRAM below 4 GiB, `top` the end of all, `tseg` first byte and end. A product without
    SNP has no RMP registers. Values besides addresses and `setup` are the model's choice (MODEL).
    """
    settings = {
        Msr.SYSCFG: SYSCFG_BIOS if setup.smee else SYSCFG_BIOS & ~SYSCFG_MEM_ENCRYPT,
        Msr.HWCR: HWCR_SMM_LOCK * setup.smm_lock,
        **dict.fromkeys(FIXED_MTRRS, MTRR_FIX_WRITE_BACK),
        Msr.MTRR_FIX_16K_A0000: 0,  # video memory: not cached
        Msr.TOP_MEM: low_end,
        Msr.TOP_MEM2: top if top > FOUR_GIB else 0,
        Msr.TSEG_BASE: tseg[0],
        Msr.TSEG_MASK: (1 << product.physical_bits) - (tseg[1] - tseg[0]) | TSEG_MASK_VALID,
    }
    if SevCapability.SEV_SNP in product.capabilities:
        settings |= {Msr.RMP_BASE: rmp.base, Msr.RMP_END: max(rmp.end, 0)}
    return settings


def _exists(facts: MsrFacts, product: Product) -> bool:
    return facts.needs in product.capabilities


def _require_access(rule: str, facts: MsrFacts, access: str) -> None:
    if access not in facts.access:
        kind = {"r": "read-only", "w": "write-only"}[facts.access]
        raise GeneralProtection(rule, {"r": "readable", "w": "writable"}[access], kind, _CITE)


def _require_valid(msr: Msr, value: int, valid: int) -> None:
    if value & ~valid:
        raise GeneralProtection(f"WRMSR {msr.name}: reserved bits are 0", 0, value & ~valid, _CITE)


def _name(msr: int) -> str:
    return Msr(msr).name if msr in MSR_FACTS else f"{msr:#010x}"


def _word(value: int) -> int:
    if not 0 <= whole("value", value) < 2**64:
        raise ValueError(f"value = {value:#x}: a register holds 64 bits")
    return value
