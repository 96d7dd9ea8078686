"""SEV_FEATURES and SEV_STATUS: what a guest's VMSA asks for, and how the guest reads it back.

Both words name the same features, two bits apart. Sources: APM2 15.34.10 (SEV_STATUS) and the VMSA layout.
"""

from __future__ import annotations

from enum import IntFlag

from snpbook.spec.cpuid import SevCapability


class SevFeatures(IntFlag):
    """VMSA.SEV_FEATURES."""

    SNP_ACTIVE = 1 << 0
    VIRTUAL_TOM = 1 << 1
    REFLECT_VC = 1 << 2
    RESTRICTED_INJECTION = 1 << 3
    ALTERNATE_INJECTION = 1 << 4
    DEBUG_VIRTUALIZATION = 1 << 5
    PREVENT_HOST_IBS = 1 << 6
    BTB_ISOLATION = 1 << 7
    VMPL_SSS = 1 << 8
    SECURE_TSC = 1 << 9
    VMGEXIT_PARAMETER = 1 << 10
    PMC_VIRTUALIZATION = 1 << 11
    IBS_VIRTUALIZATION = 1 << 12
    GUEST_INTERCEPT_CTL = 1 << 13
    VMSA_REG_PROT = 1 << 14
    SMT_PROTECTION = 1 << 15
    SECURE_AVIC = 1 << 16
    IBPB_ON_ENTRY = 1 << 21


INJECTION_MODES = SevFeatures.RESTRICTED_INJECTION | SevFeatures.ALTERNATE_INJECTION
"""How interrupts come: what AP creation may not change."""

REQUIRED_CAPABILITY = {
    SevFeatures.SNP_ACTIVE: SevCapability.SEV_SNP,
    SevFeatures.VIRTUAL_TOM: SevCapability.SEV_SNP,
    SevFeatures.REFLECT_VC: SevCapability.SEV_SNP,
    SevFeatures.RESTRICTED_INJECTION: SevCapability.RESTRICTED_INJECTION,
    SevFeatures.ALTERNATE_INJECTION: SevCapability.ALTERNATE_INJECTION,
    SevFeatures.DEBUG_VIRTUALIZATION: SevCapability.DEBUG_VIRTUALIZATION,
    SevFeatures.PREVENT_HOST_IBS: SevCapability.PREVENT_HOST_IBS,
    SevFeatures.BTB_ISOLATION: SevCapability.SEV_SNP,
    SevFeatures.VMPL_SSS: SevCapability.VMPL_SSS,
    SevFeatures.SECURE_TSC: SevCapability.SECURE_TSC,
    SevFeatures.VMGEXIT_PARAMETER: SevCapability.VMGEXIT_PARAMETER,
    SevFeatures.PMC_VIRTUALIZATION: SevCapability.PMC_VIRTUALIZATION,
    SevFeatures.IBS_VIRTUALIZATION: SevCapability.IBS_VIRTUALIZATION,
    SevFeatures.GUEST_INTERCEPT_CTL: SevCapability.GUEST_INTERCEPT_CTL,
    SevFeatures.VMSA_REG_PROT: SevCapability.VMSA_REG_PROT,
    SevFeatures.SMT_PROTECTION: SevCapability.SMT_PROTECTION,
    SevFeatures.SECURE_AVIC: SevCapability.SECURE_AVIC,
    SevFeatures.IBPB_ON_ENTRY: SevCapability.IBPB_ON_ENTRY,
}
"""The CPUID bit behind each feature, by name; that vTOM, ReflectVC and BTBIsolation come with SNP is inferred."""

SEV_STATUS_SEV, SEV_STATUS_ES = 1 << 0, 1 << 1
SEV_STATUS_SHIFT = 2
_ALL = sum(SevFeatures)


def sev_status(*, sev: bool, sev_es: bool, features: int = 0) -> int:
    """The SEV_STATUS of a guest: bits 0 and 1 from its VMCB, every higher one from SEV_FEATURES.

    Without SEV-ES there is no VMSA and so no feature; without SEV, as on the host, the register reads 0.
    """
    if not sev:
        return 0
    if not sev_es:
        return SEV_STATUS_SEV
    return SEV_STATUS_SEV | SEV_STATUS_ES | (features & _ALL) << SEV_STATUS_SHIFT


_STATUS_BITS = (3, 4, 5, 6, 7, 10, 11, 12, 13, 15, 16, *range(18, 23), *range(24, 64))
LINUX_MUST_KNOW: int = sum(1 << bit for bit in _STATUS_BITS)
"""Bits of SEV_STATUS behind which a guest must do something of its own (Linux 6.12, SNP_FEATURES_IMPL_REQ)."""
LINUX_KNOWS: int = SevFeatures.DEBUG_VIRTUALIZATION << SEV_STATUS_SHIFT
"""Those of them for which Linux 6.12 does."""
