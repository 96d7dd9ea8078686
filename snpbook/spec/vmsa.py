"""The VMSA: a vCPU's register state in its own encrypted page, and the state it has at reset.

Sources: APM2 15.34 and appendix B, Linux struct sev_es_save_area; reset values as KVM, EC2 and
Google hand them to SNP_LAUNCH_UPDATE (they are measured, so every bit counts).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, Record, raw, sub, uint
from snpbook.spec.pages import PAGE_SIZE

SEGMENT = Layout(
    "VmsaSegment",
    16,
    Cite("APM2", "VMSA layout"),
    [uint("selector", 0, 2), uint("attrib", 2, 2), uint("limit", 4, 4), uint("base", 8, 8)],
)

_SEGMENTS = ["es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr"]
_QUADWORDS = {
    0x0A0: "pl0_ssp", 0x0A8: "pl1_ssp", 0x0B0: "pl2_ssp", 0x0B8: "pl3_ssp", 0x0C0: "u_cet",
    0x0D0: "efer", 0x140: "xss", 0x148: "cr4", 0x150: "cr3", 0x158: "cr0", 0x160: "dr7", 0x168: "dr6",
    0x170: "rflags", 0x178: "rip", 0x180: "dr0", 0x188: "dr1", 0x190: "dr2", 0x198: "dr3",
    0x1A0: "dr0_addr_mask", 0x1A8: "dr1_addr_mask", 0x1B0: "dr2_addr_mask", 0x1B8: "dr3_addr_mask",
    0x1D8: "rsp", 0x1E0: "s_cet", 0x1E8: "ssp", 0x1F0: "isst_addr", 0x1F8: "rax", 0x200: "star",
    0x208: "lstar", 0x210: "cstar", 0x218: "sfmask", 0x220: "kernel_gs_base", 0x228: "sysenter_cs",
    0x230: "sysenter_esp", 0x238: "sysenter_eip", 0x240: "cr2", 0x268: "g_pat", 0x270: "dbgctl",
    0x278: "br_from", 0x280: "br_to", 0x288: "last_excp_from", 0x290: "last_excp_to", 0x2E0: "spec_ctrl",
    0x2F0: "guest_tsc_scale", 0x2F8: "guest_tsc_offset", 0x300: "reg_prot_nonce", 0x308: "rcx", 0x310: "rdx",
    0x318: "rbx", 0x320: "secure_avic_control", 0x328: "rbp", 0x330: "rsi", 0x338: "rdi", 0x340: "r8", 0x348: "r9",
    0x350: "r10", 0x358: "r11", 0x360: "r12", 0x368: "r13", 0x370: "r14", 0x378: "r15", 0x390: "guest_exitinfo1",
    0x398: "guest_exitinfo2", 0x3A0: "guest_exitintinfo", 0x3A8: "guest_nrip", 0x3B0: "sev_features",
    0x3B8: "vintr_ctrl", 0x3C0: "guest_exitcode", 0x3C8: "virtual_tom", 0x3D0: "tlb_id", 0x3D8: "pcpu_id",
    0x3E0: "eventinj", 0x3E8: "xcr0", 0x400: "x87_dp", 0x418: "x87_rip",
}  # fmt: skip

_IBS = (
    "ibs_fetch_ctl", "ibs_fetch_linaddr", "ibs_op_ctl", "ibs_op_rip", "ibs_op_data", "ibs_op_data2", "ibs_op_data3",
    "ibs_dc_linaddr", "bp_ibstgt_rip", "ic_ibs_extd_ctl",
)  # fmt: skip
_RAW = {
    0x3F0: ("xsave_valid_bitmap", 16), 0x420: ("x87_registers", 80), 0x470: ("xmm", 256), 0x570: ("ymm_hi", 256),
    0x670: ("lbr_stack", 256), 0x900: ("guest_intercepts", 32), 0x920: ("guest_msr_intercepts", 32),
    0x980: ("opmask", 64), 0x9C0: ("zmm_hi", 512), 0xBC0: ("hi16_zmm", 1024),
}  # fmt: skip
_SMALL = {
    0x0CA: ("vmpl", 1), 0x0CB: ("cpl", 1), 0x2E8: ("pkru", 4), 0x2EC: ("tsc_aux", 4), 0x408: ("mxcsr", 4),
    0x40C: ("x87_ftw", 2), 0x40E: ("x87_fsw", 2), 0x410: ("x87_fcw", 2), 0x412: ("x87_fop", 2), 0x414: ("x87_ds", 2),
    0x416: ("x87_cs", 2),
}  # fmt: skip

VMSA = Layout(
    "Vmsa",
    PAGE_SIZE,
    Cite("APM2", "VMSA layout"),
    [sub(name, 0x10 * i, SEGMENT) for i, name in enumerate(_SEGMENTS)]
    + [uint(name, offset, 8) for offset, name in _QUADWORDS.items()]
    + [uint(name, offset, size) for offset, (name, size) in _SMALL.items()]
    + [raw(name, offset, size) for offset, (name, size) in _RAW.items()]
    + [uint("lbr_select", 0x770, 8)]
    + [uint(name, 0x778 + 8 * i, 8) for i, name in enumerate(_IBS)],
)
"""Opmask and ZMM state are Genoa's, the guest's own intercepts Turin's."""

SAVE_AREA = Layout(
    "VmcbSaveArea",
    0x2E8,
    Cite("LINUX", "arch/x86/include/asm/svm.h, struct vmcb_save_area"),
    [sub(name, 0x10 * i, SEGMENT) for i, name in enumerate(_SEGMENTS)]
    + [uint("cpl", 0x0CB, 1)]
    + [
        uint(name, offset, 8)
        for offset, name in _QUADWORDS.items()
        if offset == 0x0D0 or 0x148 <= offset <= 0x178 or 0x1D8 <= offset <= 0x2E0
    ],
)
"""What the VMCB holds in the clear of a guest without SEV-ES: the same offsets as in a VMSA."""

UNSAVED_REGISTERS = ("rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)), "xss", "tsc_aux")
"""Registers that VMRUN and #VMEXIT leave alone without SEV-ES: host software saves and loads them."""
SYNCED_REGISTERS = (*UNSAVED_REGISTERS[:-1], "xcr0", "pkru")
"""Registers outside of the VMCB that KVM copies into a save area before it is encrypted (sev_es_sync_vmsa)."""
X87_STATE = ("x87_dp", "mxcsr", "x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_rip", "x87_registers", "xmm", "ymm_hi")
"""State of x87, SSE and AVX that KVM copies along for guests of a newer kind; segments of x87 stay 0."""
DR7_RESET = 0x400
"""DR7 without breakpoints."""
DEBUG_REGISTERS = tuple(f"dr{i}{part}" for part in ("", "_addr_mask") for i in range(4))
"""Breakpoints, which VMRUN and #VMEXIT swap only for a guest with DebugVirtualization."""

XSAVE_PLACES = {
    "x87_fcw": 0x00, "x87_fsw": 0x02, "x87_ftw": 0x04, "x87_fop": 0x06, "x87_rip": 0x08, "x87_dp": 0x10, "mxcsr": 0x18,
    "xmm": 0xA0, "ymm_hi": 0x240,
}  # fmt: skip
"""Where the standard format of XSAVE has the state of x87, SSE and AVX that a VMSA has, too (APM2 11.5). Of x87 the
registers lie 16 bytes apart there and 10 here: see `X87_REGISTERS`."""
X87_REGISTERS, X87_SPACING, X87_SIZE = 0x20, 16, 10

CHECKED_BYTES = 0xFC0
"""The checksum of a SEV-ES guest's VMSA covers bytes 0 to 0xFBF (firmware 1.55.25)."""

LOADABLE_REGISTERS = frozenset(_QUADWORDS.values()) - {
    "rip", "reg_prot_nonce", "guest_tsc_scale", "guest_tsc_offset", "guest_exitinfo1", "guest_exitinfo2",
    "guest_exitintinfo", "guest_nrip", "guest_exitcode", "sev_features", "vintr_ctrl", "virtual_tom", "tlb_id",
    "pcpu_id", "eventinj", "secure_avic_control",
}  # fmt: skip
"""What software at CPL 0 loads by its own instructions; VMPL, CPL and what the table holds back are not among it."""

UNMEASURED_FROM, UNMEASURED_TO = VMSA.offset("guest_tsc_scale"), VMSA.offset("reg_prot_nonce")
"""GUEST_TSC_SCALE and GUEST_TSC_OFFSET count as zero in the measurement of a VMSA page."""

GUEST_FIELDS_AT_LAUNCH = {0x380: bytes(8), 0x388: b"\xff" * 8}
"""What the firmware writes into a launched VMSA after measuring it (firmware 1.55.25)."""

INITIAL_VMSA_GPA = 0xFFFFFFFFF000
"""Where KVM places the measured VMSAs."""
BSP_RESET_EIP = 0xFFFFFFF0
KVM_RESET_TR = 0x83
"""Attributes of the task segment that KVM itself sets at reset; QEMU sets others (`reset_vmsa`)."""

SNP_ACTIVE = 0x1
EFER_LME, EFER_LMA, EFER_NXE, EFER_SVME = 0x100, 0x400, 0x800, 0x1000
CS_LONG = 0x200
"""A segment's attributes are those of a VMCB: bit 9 of a code segment's says 64-bit (with EFER.LMA)."""
CR0_PE, CR0_ET, CR0_WP, CR0_PG = 0x1, 0x10, 0x10000, 0x80000000
CR0_CD_NW = 0x60000000
"""Cache disable and not write-through: SVM guests of KVM have them clear whatever the VMM sets (a quirk)."""
CR4_PAE, CR4_MCE = 0x20, 0x40
CR4_PGE, CR4_LA57, CR4_SMEP, CR4_SMAP = 0x80, 0x1000, 0x100000, 0x200000
CR4_OSXSAVE, CR4_PKE = 0x40000, 0x400000
RFLAGS_AC = 0x40000
RFLAGS_IF = 0x200


class Vmm(Enum):
    """Whose launch: the VMMs differ in the measured reset state and in the order of pages."""

    QEMU = "QEMU"
    EC2 = "ec2"
    GCE = "gce"


def reset_vmsa(eip: int, vcpu_signature: int, sev_features: int, vmm: Vmm = Vmm.QEMU) -> Record:
    """The VMSA of a vCPU at reset that starts at `eip`.

    `vcpu_signature` is CPUID Fn1 EAX of the vCPU model; KVM leaves it in RDX.
    """
    attrib = 0x9A if vmm is Vmm.EC2 and eip == BSP_RESET_EIP else 0x9B
    code = SEGMENT.record(selector=0xF000, attrib=attrib, limit=0xFFFF, base=eip & 0xFFFF0000)
    return _reset_but_entry(vcpu_signature, sev_features, vmm).replace(cs=code, rip=eip & 0xFFFF)


@lru_cache(maxsize=1)
def _reset_but_entry(vcpu_signature: int, sev_features: int, vmm: Vmm) -> Record:
    """What the vCPUs of a launch have in common: all but the place where each starts."""
    qemu, ec2 = vmm is Vmm.QEMU, vmm is Vmm.EC2

    def segment(attrib: int) -> Record:
        return SEGMENT.record(attrib=attrib, limit=0xFFFF)

    data, table = segment(0x93), segment(0)
    return VMSA.record(
        es=data,
        ss=segment(0x92) if ec2 else data,
        ds=data,
        fs=data,
        gs=data,
        gdtr=table,
        ldtr=segment(0x82),
        idtr=table,
        tr=segment(0x83 if ec2 else 0x8B),
        efer=EFER_SVME,
        cr4=CR4_MCE,
        cr0=CR0_ET,
        dr7=0x400,
        dr6=0xFFFF0FF0,
        rflags=2,
        g_pat=0x70106 if vmm is Vmm.GCE else 0x0007040600070406,
        rdx=vcpu_signature if qemu else 0x600,
        sev_features=sev_features,
        xcr0=1,
        mxcsr=0x1F80 if qemu else 0,
        x87_fcw=0x37F if qemu else 0,
    )


def init_vmsa(vector: int, sev_features: int, vmpl: int = 0) -> Record:
    """The VMSA that a guest makes for a further processor: after INIT and a start-up message with `vector`.

    Source: Linux arch/x86/coco/sev/core.c (wakeup_cpu_via_vmgexit); the attributes of its segments are from memory.
    """
    data = SEGMENT.record(attrib=0x92, limit=0xFFFF)
    return _reset_but_entry(0, sev_features, Vmm.QEMU).replace(
        es=data, ss=data, ds=data, fs=data, gs=data, tr=SEGMENT.record(attrib=0x83, limit=0xFFFF),
        cs=SEGMENT.record(selector=vector << 8, attrib=0x9A, limit=0xFFFF, base=vector << 12),
        rip=0, cr0=CR0_CD_NW | CR0_ET, x87_ftw=0x5555, x87_fcw=0x40, vmpl=vmpl,
    )  # fmt: skip


def svsm_vmsa(eip: int, vcpu_signature: int) -> Record:
    """The start state of an SVSM under QEMU: flat 32-bit protected mode, SNP active.

    x87 FCW is 0 here, as `sev-snp-measure` has it and its published digests need.
    """
    flat = SEGMENT.record(selector=0x10, attrib=0xC93, limit=0xFFFFFFFF)
    reset = reset_vmsa(BSP_RESET_EIP, vcpu_signature, SNP_ACTIVE)
    code = SEGMENT.record(selector=8, attrib=0xC9B, limit=0xFFFFFFFF)
    return reset.replace(cs=code, ds=flat, es=flat, ss=flat, fs=flat, cr0=CR0_ET | CR0_PE, rip=eip, x87_fcw=0)


@dataclass(frozen=True, slots=True)
class CpuidSignature:
    """Family, model and stepping, combined values as CPUID Fn1 EAX encodes them."""

    family: int
    model: int
    stepping: int

    @classmethod
    def from_int(cls, eax: int) -> CpuidSignature:
        """Decode CPUID Fn1 EAX; extended family and model count where the base family is 0xF."""
        family, model = eax >> 8 & 0xF, eax >> 4 & 0xF
        if family == 0xF:
            family, model = family + (eax >> 20 & 0xFF), model | (eax >> 16 & 0xF) << 4
        return cls(family, model, eax & 0xF)

    def __int__(self) -> int:
        low, high = (0xF, (self.family - 0xF) & 0xFF) if self.family > 0xF else (self.family, 0)
        return high << 20 | (self.model >> 4 & 0xF) << 16 | low << 8 | (self.model & 0xF) << 4 | self.stepping & 0xF


_NAPLES, _ROME = CpuidSignature(23, 1, 2), CpuidSignature(23, 49, 0)
_MILAN, _GENOA, _TURIN = CpuidSignature(25, 1, 1), CpuidSignature(25, 17, 0), CpuidSignature(26, 0, 0)

VCPU_TYPES = {
    **dict.fromkeys(["EPYC", "EPYC-v1", "EPYC-v2", "EPYC-IBPB", "EPYC-v3", "EPYC-v4"], _NAPLES),
    **dict.fromkeys(["EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2", "EPYC-Rome-v3"], _ROME),
    **dict.fromkeys(["EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2"], _MILAN),
    **dict.fromkeys(["EPYC-Genoa", "EPYC-Genoa-v1"], _GENOA),
    "EPYC-Turin": _TURIN,
}
"""QEMU's vCPU types and the signature that each leaves in a measured VMSA."""
