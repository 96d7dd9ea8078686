"""The VMCB's control area, injected events, exit codes and who sees them, and the error bits of page faults.

Sources: APM2 appendix B and C, 15.20, 15.35, 15.36.10; Linux struct vmcb_control_area and kvm_host.h (PFERR).
"""

from enum import IntEnum, IntFlag

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE

INTERCEPT_BYTES = 24

VMCB = Layout(
    "Vmcb",
    PAGE_SIZE,
    Cite("APM2", "VMCB layout, control area"),
    [
        raw("intercepts", 0x000, INTERCEPT_BYTES, note="bit n: the event of exit code n, below 0xC0"),
        uint("iopm_base_pa", 0x040, 8, note="I/O permission map"),
        uint("msrpm_base_pa", 0x048, 8, note="MSR permission map"),
        uint("tsc_offset", 0x050, 8),
        uint("asid", 0x058, 4),
        uint("tlb_control", 0x05C, 1),
        uint("virtual_interrupt", 0x060, 8, note="see VINTR_CTRL"),
        bits("interrupt_shadow", 0x068, 8, 0),
        uint("exit_code", 0x070, 8),
        uint("exit_info_1", 0x078, 8),
        uint("exit_info_2", 0x080, 8),
        uint("exit_int_info", 0x088, 8, note="an event whose delivery the exit interrupted"),
        bits("nested_paging", 0x090, 8, 0),
        bits("sev", 0x090, 8, 1),
        bits("sev_es", 0x090, 8, 2),
        bits("sss_check", 0x090, 8, 4, note="supervisor shadow stacks in nested tables"),
        bits("vte", 0x090, 8, 5, note="virtual transparent encryption"),
        uint("avic_apic_bar", 0x098, 8),
        uint("ghcb_gpa", 0x0A0, 8, note="the guest's GHCB MSR"),
        uint("event_injection", 0x0A8, 8, note="see EVENT"),
        uint("nested_cr3", 0x0B0, 8),
        bits("lbr_virtualization", 0x0B8, 8, 0),
        uint("clean_bits", 0x0C0, 4, note="with SEV-ES bits 10:5 are ignored"),
        uint("next_rip", 0x0C8, 8),
        raw("instruction_bytes", 0x0D0, 16, note="count and up to 15 bytes; never filled for SEV-ES"),
        uint("avic_backing_page", 0x0E0, 8),
        uint("avic_logical_table", 0x0F0, 8),
        uint("avic_physical_table", 0x0F8, 8),
        uint("vmsa_pa", 0x108, 8, note="system physical address without C-bit"),
        uint("vmgexit_rax", 0x110, 8),
        uint("vmgexit_cpl", 0x118, 1),
        bits("allowed_sev_features", 0x138, 8, 0, 63),
        bits("allowed_sev_features_enable", 0x138, 8, 63),
        uint("guest_sev_features", 0x140, 8),
    ],
)
"""The bits of SSSCheckEn and AVIC, and the clean bits' place, are those of Linux and of the APM from memory."""

SAVE_AREA_OFFSET = 0x400
"""Where the VMCB keeps the registers of a guest without SEV-ES (`SAVE_AREA`)."""

VINTR_CTRL = Layout(
    "VintrCtrl",
    8,
    Cite("APM2", "VMCB layout, offset 0x60; VMSA layout, VINTR_CTRL"),
    [
        bits("tpr", 0, 8, 0, 8),
        bits("irq", 0, 8, 8),
        bits("gif", 0, 8, 9),
        bits("int_shadow", 0, 8, 10, note="in the VMSA"),
        bits("nmi", 0, 8, 11),
        bits("nmi_mask", 0, 8, 12),
        bits("priority", 0, 8, 16, 4),
        bits("ignore_tpr", 0, 8, 20),
        bits("nmi_enable", 0, 8, 26),
        bits("avic_enable", 0, 8, 31, note="in the VMCB"),
        bits("vector", 0, 8, 32, 8),
        bits("busy", 0, 8, 63, note="in the VMSA: VMRUN answers BUSY"),
    ],
)
"""Virtual interrupts: in the VMCB, and for guests with AlternateInjection in the VMSA."""

EVENT = Layout(
    "EventInjection",
    8,
    Cite("APM2", "EVENTINJ, 15.20"),
    [
        bits("vector", 0, 8, 0, 8),
        bits("kind", 0, 8, 8, 3, note="see EventKind"),
        bits("has_error", 0, 8, 11),
        bits("valid", 0, 8, 31),
        bits("error", 0, 8, 32, 32),
    ],
)


class EventKind(IntEnum):
    """The types of an injected event; others do not exist."""

    INTERRUPT = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4


class Vector(IntEnum):
    """Exception vectors that the model names; #HV is injected, never raised by hardware."""

    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    UD = 6
    DF = 8
    GP = 13
    PF = 14
    AC = 17
    MC = 18
    HV = 28
    VC = 29


EXCEPTION_VECTORS = 32


class ExitCode(IntEnum):
    """Why a guest left guest mode, or what a #VC tells the guest; the last four are negative numbers of 64 bits.

    Those that the model can meet, and every automatic one; BUSLOCK (no operation locks the bus) and NOT_RESTARTABLE
    (Secure AVIC) never arise here.
    """

    READ_CR0 = 0x00
    READ_CR3 = 0x03
    READ_CR4 = 0x04
    READ_CR8 = 0x08
    WRITE_CR0 = 0x10
    WRITE_CR3 = 0x13
    WRITE_CR4 = 0x14
    WRITE_CR8 = 0x18
    READ_DR0 = 0x20
    READ_DR1 = 0x21
    READ_DR2 = 0x22
    READ_DR3 = 0x23
    READ_DR6 = 0x26
    READ_DR7 = 0x27
    WRITE_DR0 = 0x30
    WRITE_DR1 = 0x31
    WRITE_DR2 = 0x32
    WRITE_DR3 = 0x33
    WRITE_DR6 = 0x36
    WRITE_DR7 = 0x37
    DB_EXCEPTION = 0x41
    BP_EXCEPTION = 0x43
    OF_EXCEPTION = 0x44
    UD_EXCEPTION = 0x46
    DF_EXCEPTION = 0x48
    GP_EXCEPTION = 0x4D
    PF_EXCEPTION = 0x4E
    AC_EXCEPTION = 0x51
    MC_EXCEPTION = 0x52
    HV_EXCEPTION = 0x5C
    VC_EXCEPTION = 0x5D
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    IOIO = 0x7B
    MSR = 0x7C
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    RDTSCP = 0x87
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    EFER_WRITE_TRAP = 0x8F
    CR0_WRITE_TRAP = 0x90
    CR3_WRITE_TRAP = 0x93
    CR4_WRITE_TRAP = 0x94
    CR8_WRITE_TRAP = 0x98
    CR15_WRITE_TRAP = 0x9F
    BUSLOCK = 0xA5
    IDLE_HLT = 0xA6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_NOACCEL = 0x402
    VMGEXIT = 0x403
    PAGE_NOT_VALIDATED = 0x404
    NOT_RESTARTABLE = 0x406
    INVALID_PMC = (1 << 64) - 4
    IDLE_REQUIRED = (1 << 64) - 3
    BUSY = (1 << 64) - 2
    INVALID = (1 << 64) - 1


WRITE_TRAPS = range(ExitCode.EFER_WRITE_TRAP, ExitCode.CR15_WRITE_TRAP + 1)
"""Exits after a write of EFER (0x8F) or of CRn (0x90 + n); EXITINFO1 is the value."""

AUTOMATIC_EXITS = frozenset(
    [
        ExitCode.MC_EXCEPTION, ExitCode.INTR, ExitCode.NMI, ExitCode.SMI, ExitCode.INIT, ExitCode.VINTR, ExitCode.PAUSE,
        ExitCode.HLT, ExitCode.SHUTDOWN, *WRITE_TRAPS, ExitCode.BUSLOCK, ExitCode.IDLE_HLT, ExitCode.NPF,
        ExitCode.VMGEXIT, ExitCode.INVALID, ExitCode.BUSY, ExitCode.IDLE_REQUIRED, ExitCode.INVALID_PMC,
    ]
)  # fmt: skip
"""Exits of a SEV-ES or SNP guest that its hypervisor sees (APM2 15.35, table of automatic exits).

Everything else that is intercepted becomes #VC in the guest, and so does an NPF of a reserved bit.
"""

EXCEPTION_EXITS = 0x40
"""The exit code of an intercepted exception is this and its vector."""

ADVANCED_EXITS = frozenset(
    [ExitCode.PAUSE, ExitCode.HLT, *WRITE_TRAPS, ExitCode.IDLE_HLT, ExitCode.VMGEXIT],
)
"""Automatic exits after which RIP stands behind the instruction."""

ALWAYS_INTERCEPTED_IN_SNP = frozenset([ExitCode.CPUID, ExitCode.IOIO])
"""What is #VC in an SNP guest whatever the VMCB says."""


def intercept_bits(*codes: int) -> bytes:
    """The VMCB's `intercepts` with the bits of these exit codes set."""
    return sum(1 << code for code in set(codes)).to_bytes(INTERCEPT_BYTES, "little")


MSR_MAP_RANGES = ((0x00000000, 0x0000), (0xC0000000, 0x0800), (0xC0010000, 0x1000))
"""First MSR of each 8192 that the permission map covers, and the range's first byte in the map (from memory).

Each MSR has two bits, read and write; MSRs outside the ranges are always intercepted (APM2 15.11).
"""
MSR_MAP_COUNT = 0x2000
IOPM_SIZE = 0x3000
"""The I/O permission map: a bit for each of 65536 ports, and a page for accesses that reach beyond (from memory)."""


class FaultError(IntFlag):
    """Error bits of #PF and of EXITINFO1 for #NPF.

    Never set here: SHADOW_STACK and SUPERVISOR_SHADOW_STACK, as shadow stacks are not modelled, and NOT_RESTARTABLE,
    which is Secure AVIC's.
    """

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RESERVED = 1 << 3
    FETCH = 1 << 4
    SHADOW_STACK = 1 << 6
    RMP = 1 << 31
    FINAL_GPA = 1 << 32
    PAGE_TABLE_WALK = 1 << 33
    ENCRYPTED = 1 << 34
    SIZE_MISMATCH = 1 << 35
    VMPL = 1 << 36
    SUPERVISOR_SHADOW_STACK = 1 << 37
    NOT_RESTARTABLE = 1 << 63


PTE_PRESENT, PTE_WRITE, PTE_USER = 1 << 0, 1 << 1, 1 << 2
PTE_ACCESSED, PTE_DIRTY = 1 << 5, 1 << 6
PTE_LARGE = 1 << 7
PTE_GLOBAL = 1 << 8
PTE_NO_EXECUTE = 1 << 63
PTE_ADDRESS = ((1 << 52) - 1) & ~0xFFF
"""Bits 51:12 of a page-table entry, among which is the C-bit: bit 51 on Milan and Genoa, 47 before."""
PTE_LARGE_RESERVED = (0, 0x1FE000, 0x3FFFE000, PTE_LARGE)
"""Bits that must be 0 in an entry with PTE_LARGE, by level from 4 KB on: the leaf's low address bits except PAT.

Level 0 has PAT in the place of PTE_LARGE, level 3 no large leaves.
"""
PTES_PER_TABLE = 512
MMIO_ENTRY = 1 << 50 | PTE_PRESENT | PTE_WRITE | PTE_USER
"""What KVM puts into nested tables for a page that no memory is behind: it leads nowhere, as a reserved bit does."""

PTE_SIZE = 8
PAGE_TABLE_LEVELS = 4


class TlbControl(IntEnum):
    """TLB_CONTROL of the VMCB: what VMRUN flushes."""

    NOTHING = 0
    ALL = 1
    ASID = 3
    ASID_NOT_GLOBAL = 7
