"""CPUID: the four registers of a leaf, and the leaves that say what a processor can encrypt.

Bits of 8000_001F EAX are named here once; its other registers, 8000_0008 EAX and 8000_0025 are layouts.
The signature of leaf 1 is `CpuidSignature` in `snpbook.spec.vmsa`. Sources: APM2 15.34 to 15.36, Linux cpuid.csv
and cpufeatures.h (word 19).
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import NamedTuple

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, Record, bits, uint

SIGNATURE_LEAF, EXTENDED_SIGNATURE_LEAF = 0x1, 0x80000001
STRUCTURED_FEATURES_LEAF, XSAVE_LEAF = 0x7, 0xD
OSXSAVE, OSPKE = 1 << 27, 1 << 4
"""Bits of ECX, of leaf 1 and of leaf 7, that repeat CR4."""
TOPOLOGY_LEAVES = (0xB, 0x1F)
EXTENDED_TOPOLOGY_LEAF, PROCESSOR_TOPOLOGY_LEAF = 0xB, 0x8000001E
APIC = 1 << 9
"""EDX of leaf 1: the local APIC is on."""
RANGES, RANGE_MASK = (0x0, 0x40000000, 0x80000000), 0xFFFF0000
"""Standard, hypervisor and extended leaves: EAX of each first leaf names the last."""
INDEXED_LEAVES = frozenset([0x4, 0x7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x8000001D])
"""Leaves that ECX divides into subleaves (Linux snp_cpuid_info, is_indexed)."""
XCR0_BASIC = (1, 3)
"""XCR0 with x87 alone, and with SSE."""
XSAVE_LEGACY_SIZE = 0x240
"""Where extended states begin in an XSAVE area: behind x87, SSE and the header."""
XSAVEC, XSAVES = 1 << 1, 1 << 3
"""EAX of leaf 0xD, subleaf 1: the compacted format."""
XSAVE_ALIGNED, XSAVE_ALIGNMENT = 1 << 1, 64
"""ECX of a state's subleaf: in the compacted format it begins at a multiple of 64 bytes."""
ADDRESS_SIZES_LEAF = 0x80000008
SVM_LEAF = 0x8000000A
SVM_NESTED_PAGING, SVM_LBR, SVM_NEXT_RIP = 1 << 0, 1 << 1, 1 << 3
SVM_FLUSH_BY_ASID, SVM_DECODE_ASSISTS = 1 << 6, 1 << 7
IDLE_HLT_INTERCEPT = 1 << 30
"""8000_000A EDX: what SVM brings; the last is the intercept of a HLT that finds no virtual interrupt pending (Linux
cpufeatures.h, word 15)."""
EXTENDED_FEATURES_2_LEAF = 0x80000021
NO_NESTED_DATA_BREAKPOINTS = 1 << 0
"""8000_0021 EAX (Linux cpufeatures.h, word 20)."""
XSAVE_BASIC_SIZE = 0x240
"""The size of an XSAVE area of x87 and SSE alone."""
INITIAL_APIC_ID = 24
"""The first bit of the APIC id in EBX of leaf 1 (8 bits)."""
ENCRYPTED_MEMORY_LEAF = 0x8000001F
SEGMENTED_RMP_LEAF = 0x80000025


class Registers(NamedTuple):
    """EAX, EBX, ECX and EDX of one leaf."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0

    def __repr__(self) -> str:
        return " ".join(f"{register:08X}" for register in self)

    def decode(self, layout: Layout) -> Record:
        """The leaf's fields by one of the layouts below."""
        return layout.unpack(struct.pack("<4I", *self))

    @classmethod
    def of(cls, record: Record) -> Registers:
        """The registers that hold a leaf's fields."""
        return cls(*struct.unpack("<4I", bytes(record)))


class SevCapability(IntFlag):
    """8000_001F EAX: memory encryption and SEV features of the processor.

    SVSM_COMM_PAGE_MSR and NESTED_VIRT_SNP_MSR are told by a hypervisor to its guests, never by silicon.
    """

    SME = 1 << 0
    SEV = 1 << 1
    PAGE_FLUSH_MSR = 1 << 2
    SEV_ES = 1 << 3
    SEV_SNP = 1 << 4
    VMPL = 1 << 5
    RMPQUERY = 1 << 6
    VMPL_SSS = 1 << 7
    SECURE_TSC = 1 << 8
    TSC_AUX_VIRTUALIZATION = 1 << 9
    HW_ENF_CACHE_COH = 1 << 10
    HOST_64BIT = 1 << 11
    RESTRICTED_INJECTION = 1 << 12
    ALTERNATE_INJECTION = 1 << 13
    DEBUG_VIRTUALIZATION = 1 << 14
    PREVENT_HOST_IBS = 1 << 15
    VTE = 1 << 16
    VMGEXIT_PARAMETER = 1 << 17
    VIRTUAL_TOM_MSR = 1 << 18
    IBS_VIRTUALIZATION = 1 << 19
    PMC_VIRTUALIZATION = 1 << 20
    RMPREAD = 1 << 21
    GUEST_INTERCEPT_CTL = 1 << 22
    SEGMENTED_RMP = 1 << 23
    VMSA_REG_PROT = 1 << 24
    SMT_PROTECTION = 1 << 25
    SECURE_AVIC = 1 << 26
    ALLOWED_SEV_FEATURES = 1 << 27
    SVSM_COMM_PAGE_MSR = 1 << 28
    NESTED_VIRT_SNP_MSR = 1 << 29
    HV_IN_USE_WR_ALLOWED = 1 << 30
    IBPB_ON_ENTRY = 1 << 31


INSTRUCTIONS = {
    "RMPUPDATE": SevCapability.SEV_SNP,
    "PSMASH": SevCapability.SEV_SNP,
    "PVALIDATE": SevCapability.SEV_SNP,
    "RMPADJUST": SevCapability.SEV_SNP,
    "RMPQUERY": SevCapability.RMPQUERY,
    "RMPREAD": SevCapability.RMPREAD,
}
"""The instructions on the RMP and the capability that brings each."""

ADDRESS_SIZES = Layout(
    "CpuidAddressSizes",
    4,
    Cite("APM2", "CPUID Fn8000_0008 EAX"),
    [
        bits("physical", 0, 4, 0, 8, note="bits of a system physical address"),
        bits("linear", 0, 4, 8, 8),
        bits("guest_physical", 0, 4, 16, 8, note="0: as physical"),
    ],
)

ENCRYPTED_MEMORY = Layout(
    "CpuidEncryptedMemory",
    16,
    Cite("APM2", "CPUID Fn8000_001F"),
    [
        uint("capabilities", 0, 4, note="see SevCapability"),
        bits("c_bit", 4, 4, 0, 6, note="position of the C-bit in a page-table entry"),
        bits("address_reduction", 4, 4, 6, 6, note="physical address bits lost while encryption is on"),
        bits("vmpls", 4, 4, 12, 4, note="number of VMPLs"),
        bits("coherency_sfw_no", 4, 4, 31, note="no software eviction of cache lines when validating"),
        uint("asid_limit", 8, 4, note="highest ASID that can be encrypted"),
        uint("min_sev_asid", 12, 4, note="lowest ASID for SEV without ES; a BIOS setting"),
    ],
)

SEGMENTED_RMP = Layout(
    "CpuidSegmentedRmp",
    16,
    Cite("LINUX", "arch/x86/virt/svm/sev.c, segmented RMP (mainline after 6.12)"),
    [
        bits("min_segment_size", 0, 4, 0, 6, note="log2 of bytes"),
        bits("max_segment_size", 0, 4, 6, 6, note="log2 of bytes"),
        bits("cached_segments", 4, 4, 0, 10, note="segment definitions that the hardware caches"),
        bits("cached_only", 4, 4, 10, note="1: at most the cached segments, 0: up to 512"),
    ],
)
