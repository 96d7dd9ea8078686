"""The structures that pass through the ioctls of /dev/kvm, and the page that a vCPU shares with its VMM.

A layout carries the kernel's name; elements of an array of words are numbered fields (`arg0`, `data0`). What a layout
does not name is padding, which KVM does not look at. Sources: Linux 6.12 uapi headers, UPM v10, RFC v7.
"""

from __future__ import annotations

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Field, Layout, raw, sub, uint
from snpbook.spec.uapi_kvm import Exit, InternalError, IoDirection, MpState, SystemEvent

_LINUX = Cite("LINUX", "include/uapi/linux/kvm.h")
_X86 = Cite("LINUX", "arch/x86/include/uapi/asm/kvm.h")


def _words(name: str, offset: int, count: int) -> list[Field]:
    """An array of 64-bit words as numbered fields."""
    return [uint(f"{name}{i}", offset + 8 * i, 8) for i in range(count)]


def _row(names: str, offset: int = 0, size: int = 8) -> list[Field]:
    """Integers of one size one after another."""
    return [uint(name, offset + size * i, size) for i, name in enumerate(names.split())]


# Memory.

_REGION = [
    uint("slot", 0x00, 4, note="address space in the upper half"),
    uint("flags", 0x04, 4),
    uint("guest_phys_addr", 0x08, 8),
    uint("memory_size", 0x10, 8, note="0 deletes the slot"),
    uint("userspace_addr", 0x18, 8),
]
USERSPACE_MEMORY_REGION = Layout("kvm_userspace_memory_region", 0x20, _LINUX, _REGION)
USERSPACE_MEMORY_REGION2 = Layout(
    "kvm_userspace_memory_region2",
    0xA0,
    _LINUX,
    [*_REGION, uint("guest_memfd_offset", 0x20, 8), uint("guest_memfd", 0x28, 4)],
)
USERSPACE_MEMORY_REGION_EXT = Layout(
    "kvm_userspace_memory_region_ext",
    0xA0,
    Cite("UPM", "KVM_SET_USER_MEMORY_REGION with KVM_MEM_PRIVATE"),
    [*_REGION, uint("restricted_offset", 0x20, 8), uint("restricted_fd", 0x28, 4)],
)
MEMORY_ATTRIBUTES = Layout("kvm_memory_attributes", 0x20, _LINUX, _row("address size attributes flags"))
"""The same in every era; UPM v10 writes `address` and `size` back."""
CREATE_GUEST_MEMFD = Layout("kvm_create_guest_memfd", 0x40, _LINUX, _row("size flags"))
PRE_FAULT_MEMORY = Layout("kvm_pre_fault_memory", 0x40, _LINUX, _row("gpa size flags"))
ENC_REGION = Layout("kvm_enc_region", 0x10, _LINUX, _row("addr size"))
ENABLE_CAP = Layout(
    "kvm_enable_cap", 0x68, _LINUX, [uint("cap", 0x00, 4), uint("flags", 0x04, 4), *_words("arg", 0x08, 4)]
)
DEVICE_ATTR = Layout(
    "kvm_device_attr",
    0x18,
    _LINUX,
    [uint("flags", 0x00, 4), uint("group", 0x04, 4), *_row("attr addr", 0x08)],
)

# Registers of a vCPU.

REGS = Layout(
    "kvm_regs",
    0x90,
    _X86,
    _row("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"),
)
SEGMENT = Layout(
    "kvm_segment",
    0x18,
    _X86,
    [
        uint("base", 0x00, 8),
        uint("limit", 0x08, 4),
        uint("selector", 0x0C, 2),
        *_row("type present dpl db s l g avl unusable", 0x0E, 1),
    ],
)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
DTABLE = Layout("kvm_dtable", 0x10, _X86, [uint("base", 0x00, 8), uint("limit", 0x08, 2)])
SREGS = Layout(
    "kvm_sregs",
    0x138,
    _X86,
    [
        *(sub(name, SEGMENT.size * i, SEGMENT) for i, name in enumerate(_SEGMENTS)),
        sub("gdt", 0xC0, DTABLE),
        sub("idt", 0xD0, DTABLE),
        *_row("cr0 cr2 cr3 cr4 cr8 efer apic_base", 0xE0),
        raw("interrupt_bitmap", 0x118, 32),
    ],
)
DEBUGREGS = Layout("kvm_debugregs", 0x80, _X86, _row("db0 db1 db2 db3 dr6 dr7 flags"))
XSAVE = Layout("kvm_xsave", 0x1000, _X86, [raw("region", 0x000, 0x1000)])
XCR = Layout("kvm_xcr", 0x10, _X86, [uint("xcr", 0x00, 4), uint("value", 0x08, 8)])
XCRS = Layout(
    "kvm_xcrs", 0x188, _X86, [uint("nr_xcrs", 0x00, 4), uint("flags", 0x04, 4), sub("xcrs", 0x08, XCR, count=16)]
)
MSR_ENTRY = Layout("kvm_msr_entry", 0x10, _X86, [uint("index", 0x00, 4), uint("data", 0x08, 8)])
MSRS = Layout("kvm_msrs", 0x08, _X86, [uint("nmsrs", 0x00, 4, note="that many entries follow")])
CPUID_ENTRY2 = Layout("kvm_cpuid_entry2", 0x28, _X86, _row("function index flags eax ebx ecx edx", 0x00, 4))
CPUID2 = Layout("kvm_cpuid2", 0x08, _X86, [uint("nent", 0x00, 4, note="that many entries follow")])
CPUID_ENTRIES = 256
"""KVM_MAX_CPUID_ENTRIES: more are E2BIG."""
MP_STATE = Layout("kvm_mp_state", 0x04, _LINUX, [uint("mp_state", 0x00, 4, enum=MpState)])
GUEST_DEBUG = Layout("kvm_guest_debug", 0x48, _X86, [uint("control", 0x00, 4), *_words("debugreg", 0x08, 8)])
TRANSLATION = Layout(
    "kvm_translation",
    0x18,
    _LINUX,
    [
        *_row("linear_address physical_address"),
        *_row("valid writeable usermode", 0x10, 1),
    ],
)

# The page that a vCPU shares with its VMM, and the parts of its union.

RUN = Layout(
    "kvm_run",
    0x930,
    _LINUX,
    [
        uint("request_interrupt_window", 0x00, 1),
        uint("immediate_exit", 0x01, 1),
        uint("exit_reason", 0x08, 4, enum=Exit),
        uint("ready_for_interrupt_injection", 0x0C, 1),
        uint("if_flag", 0x0D, 1),
        uint("flags", 0x0E, 2),
        uint("cr8", 0x10, 8),
        uint("apic_base", 0x18, 8),
        raw("exit", 0x20, 0x100, note="a union: which part of it, `exit_reason` says"),
        uint("kvm_valid_regs", 0x120, 8),
        uint("kvm_dirty_regs", 0x128, 8),
        raw("s", 0x130, 0x800, note="registers in step with KVM_RUN"),
    ],
)
RUN_EXIT = RUN.offset("exit")


def _exit(name: str, size: int, fields: list[Field], cite: Cite = _LINUX) -> Layout:
    """A part of the union at `RUN_EXIT`."""
    return Layout(f"kvm_run.{name}", size, cite, fields)


EXIT_FAIL_ENTRY = _exit("fail_entry", 0x10, [uint("hardware_entry_failure_reason", 0x00, 8), uint("cpu", 0x08, 4)])
EXIT_EX = _exit("ex", 0x08, [uint("exception", 0x00, 4), uint("error_code", 0x04, 4)])
EXIT_IO = _exit(
    "io",
    0x10,
    [
        uint("direction", 0x00, 1, enum=IoDirection),
        uint("size", 0x01, 1),
        uint("port", 0x02, 2),
        uint("count", 0x04, 4),
        uint("data_offset", 0x08, 8, note="from the beginning of kvm_run"),
    ],
)
EXIT_MMIO = _exit(
    "mmio",
    0x18,
    [uint("phys_addr", 0x00, 8), raw("data", 0x08, 8), uint("len", 0x10, 4), uint("is_write", 0x14, 1)],
)
EXIT_HYPERCALL = _exit(
    "hypercall",
    0x48,
    [uint("nr", 0x00, 8), *_words("arg", 0x08, 6), uint("ret", 0x38, 8), uint("flags", 0x40, 8)],
)
EXIT_INTERNAL = _exit(
    "internal",
    0x88,
    [uint("suberror", 0x00, 4, enum=InternalError), uint("ndata", 0x04, 4), *_words("data", 0x08, 16)],
)
EXIT_SYSTEM_EVENT = _exit(
    "system_event",
    0x88,
    [uint("type", 0x00, 4, enum=SystemEvent), uint("ndata", 0x04, 4), *_words("data", 0x08, 16)],
)
EXIT_MSR = _exit(
    "msr",
    0x18,
    [uint("error", 0x00, 1), uint("reason", 0x08, 4), uint("index", 0x0C, 4), uint("data", 0x10, 8)],
)
EXIT_MEMORY_FAULT = _exit("memory_fault", 0x18, _row("flags gpa size"))
"""The same in every era; the flag for a private access differs."""
EXIT_VMGEXIT = _exit(
    "vmgexit", 0x10, [uint("ghcb_msr", 0x00, 8), uint("error", 0x08, 1)], Cite("V7", "patch 46, KVM_EXIT_VMGEXIT")
)
EXIT_SNP_REQ_CERTS = _exit("snp_req_certs", 0x18, _row("gpa npages ret"), Cite("LINUX", "kernels of 2026"))
