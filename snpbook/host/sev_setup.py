"""What kvm_amd decides when it loads: which kinds of guests are possible, and how many ASIDs each has.

What the module's parameters read afterwards is decided here. Source: Linux arch/x86/kvm/svm/sev.c
(sev_hardware_setup), RFC v7 patch 36.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from snpbook.hardware.ports import HostCpu
from snpbook.host.bringup import Platform
from snpbook.host.log import KernelLog
from snpbook.host.modules import Value
from snpbook.spec.bring_up import NO_CAPACITY, BringUp
from snpbook.spec.cpuid import (
    EXTENDED_FEATURES_2_LEAF,
    NO_NESTED_DATA_BREAKPOINTS,
    SVM_DECODE_ASSISTS,
    SVM_FLUSH_BY_ASID,
    SVM_LBR,
    SVM_LEAF,
    SVM_NESTED_PAGING,
    SVM_NEXT_RIP,
    SevCapability,
)


@dataclass(frozen=True, slots=True)
class SevSupport:
    """What KVM offers: `capacity` is what misc.capacity lists, the number of ASIDs by the cgroup's key."""

    sev: bool = False
    sev_es: bool = False
    sev_snp: bool = False
    debug_swap: bool = False
    capacity: Mapping[str, int] | None = None


class SevSetup:
    """One load of the module. `initialise` brings the secure processor up and says whether it succeeded."""

    def __init__(
        self, cpu: HostCpu, platform: Platform, rows: BringUp, log: KernelLog, parameters: Mapping[str, Value]
    ) -> None:
        self._cpu, self._platform, self._rows, self._log = cpu, platform, rows, log
        self._given = parameters
        self._svm = cpu.product.cpuid(SVM_LEAF).edx
        self._npt = bool(parameters["npt"]) and self._has(SVM_NESTED_PAGING)
        self._lbrv = bool(parameters["lbrv"]) and self._has(SVM_LBR)

    def run(self, *, mmio_caching: bool, initialise: Callable[[], bool], snp_up: Callable[[], bool]) -> SevSupport:
        """Decide, initialise where it is this module that does so, and print the result."""
        self._log(self._rows.nested_paging.format(state="enabled" if self._npt else "disabled"))
        if self._lbrv:
            self._log(self._rows.lbr_virtualisation)
        sev = self._sev()
        # The bounds of ASIDs are read only once SEV is possible.
        least, most = (self._cpu.product.min_sev_asid, self._cpu.product.asid_limit) if sev else (0, 0)
        es = sev and mmio_caching and self._lbrv and self._wanted("sev_es", SevCapability.SEV_ES) and least > 1
        snp = es and bool(self._given["sev_snp"]) and self._platform.snp
        capacity = {"sev": most - least + 1} if sev and least <= most else {}
        if es:
            capacity["sev_es"] = least - 1
        if not self._rows.psp_at_probe and self._given["sev"]:
            if not initialise():
                sev = es = snp = False
            snp = snp and snp_up()
        self._tell(least, most, sev=sev, es=es, snp=snp)
        return SevSupport(sev, es, snp, es and self._debug_swap(), capacity)

    def _sev(self) -> bool:
        needs = self._npt and self._given["nrips"] and self._has(SVM_NEXT_RIP, SVM_DECODE_ASSISTS, SVM_FLUSH_BY_ASID)
        return bool(needs) and self._wanted("sev", SevCapability.SEV)

    def _wanted(self, name: str, feature: SevCapability) -> bool:
        return bool(self._given.get(name)) and feature in self._platform.features

    def _has(self, *bits: int) -> bool:
        return all(self._svm & bit for bit in bits)

    def _debug_swap(self) -> bool:
        breakpoints = self._cpu.product.cpuid(EXTENDED_FEATURES_2_LEAF).eax & NO_NESTED_DATA_BREAKPOINTS
        return bool(breakpoints) and self._wanted("debug_swap", SevCapability.DEBUG_VIRTUALIZATION)

    def _tell(self, least: int, most: int, *, sev: bool, es: bool, snp: bool) -> None:
        if not self._rows.sev_ranges:
            if sev:
                self._log(f"SEV supported: {most - least + 1} ASIDs")
            if es:
                self._log(f"SEV-ES {'and SEV-SNP ' if snp else ''}supported: {least - 1} ASIDs")
            return
        features = self._platform.features
        first, last = int(least > 1), (least - 1) & NO_CAPACITY
        if SevCapability.SEV in features:
            state = ("enabled" if least <= most else "unusable") if sev else "disabled"
            self._log(f"kvm_amd: SEV {state} (ASIDs {least} - {most})")
        if SevCapability.SEV_ES in features:
            self._log(f"kvm_amd: SEV-ES {'enabled' if es else 'disabled'} (ASIDs {first} - {last})")
        if SevCapability.SEV_SNP in features:
            self._log(f"kvm_amd: SEV-SNP {'enabled' if snp else 'disabled'} (ASIDs {first} - {last})")
