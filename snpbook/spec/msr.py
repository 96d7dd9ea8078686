"""Model-specific registers of memory encryption and SNP: numbers, who reaches them, what locks them.

`MSR_FACTS` is the table that the model's cores obey. Sources: APM2 15.34.10, 15.36.2, 15.36.4, 15.36.22,
Linux msr-index.h, firmware 1.55.25.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.layout import Layout, bits
from snpbook.spec.sev_features import SevFeatures


class Msr(IntEnum):
    """Register numbers."""

    MTRR_FIX_64K_00000 = 0x250
    MTRR_FIX_16K_80000 = 0x258
    MTRR_FIX_16K_A0000 = 0x259
    MTRR_FIX_4K_C0000 = 0x268
    MTRR_FIX_4K_C8000 = 0x269
    MTRR_FIX_4K_D0000 = 0x26A
    MTRR_FIX_4K_D8000 = 0x26B
    MTRR_FIX_4K_E0000 = 0x26C
    MTRR_FIX_4K_E8000 = 0x26D
    MTRR_FIX_4K_F0000 = 0x26E
    MTRR_FIX_4K_F8000 = 0x26F
    SYSCFG = 0xC0010010
    HWCR = 0xC0010015
    IORR_BASE0 = 0xC0010016
    IORR_MASK0 = 0xC0010017
    IORR_BASE1 = 0xC0010018
    IORR_MASK1 = 0xC0010019
    TOP_MEM = 0xC001001A
    TOP_MEM2 = 0xC001001D
    TSEG_BASE = 0xC0010112
    TSEG_MASK = 0xC0010113
    VM_HSAVE_PA = 0xC0010117
    SMM_KEY = 0xC0010119
    VMPAGE_FLUSH = 0xC001011E
    VIRT_SPEC_CTRL = 0xC001011F
    GHCB = 0xC0010130
    SEV_STATUS = 0xC0010131
    RMP_BASE = 0xC0010132
    RMP_END = 0xC0010133
    GUEST_TSC_FREQ = 0xC0010134
    VIRTUAL_TOM = 0xC0010135
    RMP_CFG = 0xC0010136
    SECURE_AVIC_CONTROL = 0xC0010138
    DEBUG_STATUS = 0xC0011006
    IBS_FETCH_CTL = 0xC0011030
    IBS_OP_CTL = 0xC0011033
    SVSM_CAA = 0xC001F000
    VIRT_RMPUPDATE = 0xC001F001
    VIRT_PSMASH = 0xC001F002


class StateMsr(IntEnum):
    """Registers of a guest's state: the processor swaps them with the save area, the counter apart."""

    TSC = 0x10
    SPEC_CTRL = 0x48
    SYSENTER_CS = 0x174
    SYSENTER_ESP = 0x175
    SYSENTER_EIP = 0x176
    PAT = 0x277
    XSS = 0xDA0
    EFER = 0xC0000080
    STAR = 0xC0000081
    LSTAR = 0xC0000082
    CSTAR = 0xC0000083
    SFMASK = 0xC0000084
    FS_BASE = 0xC0000100
    GS_BASE = 0xC0000101
    KERNEL_GS_BASE = 0xC0000102
    TSC_AUX = 0xC0000103


SAVED_REGISTERS = {
    **{msr: msr.name.lower() for msr in StateMsr if msr is not StateMsr.TSC},
    StateMsr.PAT: "g_pat",
    StateMsr.FS_BASE: "fs",
    StateMsr.GS_BASE: "gs",
}
"""Where the VMSA holds them, by its names; of FS and GS it is the segment's base."""
SEGMENT_BASES = frozenset([StateMsr.FS_BASE, StateMsr.GS_BASE])
CANONICAL_MSRS = SEGMENT_BASES | {
    StateMsr.SYSENTER_ESP, StateMsr.SYSENTER_EIP, StateMsr.LSTAR, StateMsr.CSTAR, StateMsr.KERNEL_GS_BASE,
}  # fmt: skip
"""Those that hold a canonical address: another raises #GP(0)."""
PAT_TYPES = frozenset([0, 1, 4, 5, 6, 7])
"""The memory types that each byte of PAT may name: another raises #GP(0) (APM2 7.8)."""


SYSCFG = Layout(
    "Syscfg",
    8,
    Cite("APM2", "SYSCFG; 15.34, 15.36.2"),
    [
        bits("mtrr_fix_dram_en", 0, 4, 18),
        bits("mtrr_fix_dram_mod_en", 0, 4, 19, note="MFDM: the firmware wants it with SNP"),
        bits("mtrr_var_dram_en", 0, 4, 20),
        bits("mtrr_tom2_en", 0, 4, 21),
        bits("tom2_force_wb", 0, 4, 22),
        bits("mem_encryption_mod_en", 0, 4, 23),
        bits("snp_en", 0, 4, 24, note="the core enforces the RMP; cleared by reset only"),
        bits("vmpl_en", 0, 4, 25),
    ],
)

RMP_CFG = Layout(
    "RmpCfg",
    8,
    Cite("LINUX", "msr-index.h, segmented RMP (mainline after 6.12)"),
    [bits("seg_rmp_en", 0, 4, 0), bits("seg_size", 0, 4, 8, 6, note="log2 of bytes")],
)

SECURE_AVIC_CONTROL = Layout(
    "SecureAvicControl",
    8,
    Cite("APM2", "Secure AVIC"),
    [
        bits("enabled", 0, 8, 0),
        bits("allowed_nmi", 0, 8, 1),
        bits("backing_page", 0, 8, 12, 40, note="guest page number"),
    ],
)


def _mask(name: str) -> int:
    field = SYSCFG.fields[name]
    return field.limit << field.lo


SYSCFG_MFDM = _mask("mtrr_fix_dram_mod_en")
SYSCFG_MEM_ENCRYPT = _mask("mem_encryption_mod_en")
SYSCFG_SNP_EN = _mask("snp_en")
SYSCFG_VMPL_EN = _mask("vmpl_en")
SYSCFG_MULTI_KEY = 1 << 26
"""Multi-key SME, which the BIOS alone turns on (its name is from memory): SNP excludes it."""
SYSCFG_BIOS = 0xF40000
"""SYSCFG as read on a Rome host with memory encryption on."""
HWCR_SMM_LOCK = 1 << 0
DEBUG_STATUS_GUEST, DEBUG_STATUS_SMM = 1 << 2, 1 << 7
"""A thread of the core is in guest mode, or in SMM; which bit is which is inferred."""
IBS_FETCH_ENABLE, IBS_OP_ENABLE = 1 << 48, 1 << 17
"""The enable bits of instruction-based sampling in IBS_FETCH_CTL and IBS_OP_CTL (Linux perf_event.h, from memory)."""
RMP_ADDRESS_MASK = ((1 << 52) - 1) & ~0x1FFF
"""RMP_BASE holds bits 51:13 of an address."""
RMP_LAST_BYTE = 0x1FFF
"""RMP_END is the last byte of the table: its low bits are ones."""
RMP_ALIGNMENT = 0x100000
"""The firmware wants base and size of the table in multiples of 1 MB."""
VMPAGE_FLUSH_ASID = 0xFFF
"""VMPAGE_FLUSH: bits 11:0 an ASID, the others a host virtual page."""
TSEG_MASK_VALID = 0x3
"""The enable bits of TSEG_MASK (unconfirmed)."""
MTRR_FIX_WRITE_BACK = 0x0606060606060606
"""Eight ranges of write-back memory."""

FIXED_MTRRS = tuple(msr for msr in Msr if msr.name.startswith("MTRR_FIX"))
IORRS = (Msr.IORR_BASE0, Msr.IORR_MASK0, Msr.IORR_BASE1, Msr.IORR_MASK1)
SAME_ON_ALL_CORES = (
    Msr.SYSCFG, Msr.DEBUG_STATUS, *FIXED_MTRRS, *IORRS, Msr.TOP_MEM, Msr.TOP_MEM2, Msr.TSEG_BASE,
    Msr.TSEG_MASK, Msr.HWCR,
)  # fmt: skip
"""The 22 registers that SNP_INIT compares over all cores and sockets (firmware 1.55.25)."""


class SnpLock(Enum):
    """What a write does once SYSCFG.SNPEn is set on its core."""

    NONE = "takes effect"
    IGNORED = "is ignored"
    FAULTS = "raises #GP(0)"


_ALL = (1 << 64) - 1
_ADDRESS = (1 << 52) - 1
_NO_CAPABILITY, _NO_FEATURE = SevCapability(0), SevFeatures(0)


@dataclass(frozen=True, slots=True)
class MsrFacts:
    """One register.

    `host` and `guest`: who has it; a guest reaches its own without any intercept. `access`: `r`, `w` or `rw`.
    `needs`: the capability that brings it. `feature`: what the VMSA must have on for the guest to have it.
    `valid`: the bits that may be set, others raise #GP(0).
    """

    host: bool = True
    guest: bool = False
    access: str = "rw"
    needs: SevCapability = _NO_CAPABILITY
    feature: SevFeatures = _NO_FEATURE
    valid: int = _ALL
    lock: SnpLock = SnpLock.NONE


def _guest(access: str, needs: SevCapability, feature: SevFeatures, valid: int = _ALL) -> MsrFacts:
    return MsrFacts(False, True, access, needs, feature, valid)


def _rmp_bound() -> MsrFacts:
    return MsrFacts(needs=SevCapability.SEV_SNP, valid=_ADDRESS, lock=SnpLock.IGNORED)


MSR_FACTS = {
    **dict.fromkeys([*FIXED_MTRRS, *IORRS, Msr.TOP_MEM, Msr.TOP_MEM2, Msr.SMM_KEY], MsrFacts(lock=SnpLock.FAULTS)),
    **dict.fromkeys([Msr.HWCR, Msr.TSEG_BASE, Msr.TSEG_MASK, Msr.IBS_FETCH_CTL, Msr.IBS_OP_CTL], MsrFacts()),
    Msr.SYSCFG: MsrFacts(valid=_ALL & ~SYSCFG.reserved_mask, lock=SnpLock.IGNORED),
    Msr.DEBUG_STATUS: MsrFacts(access="r"),
    Msr.VM_HSAVE_PA: MsrFacts(valid=_ADDRESS & ~0xFFF),
    Msr.VMPAGE_FLUSH: MsrFacts(access="w", needs=SevCapability.PAGE_FLUSH_MSR),
    Msr.GHCB: _guest("rw", SevCapability.SEV_ES, _NO_FEATURE),
    Msr.SEV_STATUS: MsrFacts(guest=True, access="r", needs=SevCapability.SEV),
    Msr.RMP_BASE: _rmp_bound(),
    Msr.RMP_END: _rmp_bound(),
    Msr.GUEST_TSC_FREQ: _guest("r", SevCapability.SECURE_TSC, SevFeatures.SECURE_TSC),
    Msr.VIRTUAL_TOM: _guest("rw", SevCapability.VIRTUAL_TOM_MSR, SevFeatures.VIRTUAL_TOM, _ADDRESS & ~0x1FFFFF),
    Msr.RMP_CFG: MsrFacts(needs=SevCapability.SEGMENTED_RMP, valid=_ALL & ~RMP_CFG.reserved_mask, lock=SnpLock.FAULTS),
    Msr.SECURE_AVIC_CONTROL: _guest(
        "rw", SevCapability.SECURE_AVIC, SevFeatures.SECURE_AVIC, _ALL & ~SECURE_AVIC_CONTROL.reserved_mask
    ),
    **dict.fromkeys([Msr.VIRT_SPEC_CTRL, Msr.SVSM_CAA, Msr.VIRT_RMPUPDATE, Msr.VIRT_PSMASH], MsrFacts(host=False)),
}
"""Every register of the model.

The last four exist only where a hypervisor emulates them: no product has them (8000_0008 EBX[25] for
VIRT_SPEC_CTRL), and a guest's access is intercepted. Unconfirmed: the locks of RMP_BASE and RMP_END, that
DEBUG_STATUS is read-only, that a register without its guest feature raises #GP(0).
"""
