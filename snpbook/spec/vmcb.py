"""The VMCB's control area as SNP guests use it, exit codes, and the error bits of page faults.

Sources: APM2 appendix B and C, 15.36.10; Linux struct vmcb_control_area and kvm_host.h (PFERR).
"""

from enum import IntEnum, IntFlag

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, uint
from snpbook.spec.pages import PAGE_SIZE

VMCB = Layout(
    "Vmcb",
    PAGE_SIZE,
    Cite("APM2", "VMCB layout, control area"),
    [
        uint("asid", 0x058, 4),
        uint("exit_code", 0x070, 8),
        uint("exit_info_1", 0x078, 8),
        uint("exit_info_2", 0x080, 8),
        bits("nested_paging", 0x090, 8, 0),
        bits("sev", 0x090, 8, 1),
        bits("sev_es", 0x090, 8, 2),
        uint("ghcb_gpa", 0x0A0, 8, note="the guest's GHCB MSR"),
        uint("nested_cr3", 0x0B0, 8),
        uint("vmsa_pa", 0x108, 8),
    ],
)


class ExitCode(IntEnum):
    """Why a guest left guest mode; the last two are negative numbers of 64 bits."""

    VC_EXCEPTION = 0x5D
    CPUID = 0x72
    HLT = 0x78
    IOIO = 0x7B
    MSR = 0x7C
    SHUTDOWN = 0x7F
    NPF = 0x400
    VMGEXIT = 0x403
    PAGE_NOT_VALIDATED = 0x404
    INVALID = (1 << 64) - 1


class FaultError(IntFlag):
    """Error bits of #PF and of EXITINFO1 for #NPF."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RESERVED = 1 << 3
    FETCH = 1 << 4
    RMP = 1 << 31
    FINAL_GPA = 1 << 32
    PAGE_TABLE_WALK = 1 << 33
    ENCRYPTED = 1 << 34
    SIZE_MISMATCH = 1 << 35
    VMPL = 1 << 36


PTE_PRESENT, PTE_WRITE, PTE_USER = 1 << 0, 1 << 1, 1 << 2
PTE_LARGE = 1 << 7
PTE_ADDRESS = ((1 << 51) - 1) & ~0xFFF
"""Bits 50:12 of a page-table entry; bit 51 is the C-bit on Milan and Genoa."""
PTES_PER_TABLE = 512
PTE_SIZE = 8
