"""The numbers of /dev/kvm: ioctls, capabilities, exit reasons, VM types, flags of memory slots and attributes.

Names are the kernel's without `KVM_`; those that only UPM v10 and the v7 series have carry `_V10` where a later kernel
uses the name for another number. Which era knows which is in `snpbook.spec.eras`, the structures are in
`uapi_kvm_structs`. Sources: Linux 6.12 uapi headers, UPM v10, RFC v7.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

API_VERSION = 12
NR_MEMSLOTS = 32764
"""KVM_CAP_NR_MEMSLOTS of x86: slots of one address space (unconfirmed)."""
VCPU_MMAP_PAGES = 3
"""What KVM_GET_VCPU_MMAP_SIZE tells: the page of `kvm_run`, the port data page, the ring of coalesced MMIO."""
PIO_PAGE = 1
"""KVM_PIO_PAGE_OFFSET: the page of the vCPU's mapping that `kvm_run.io.data_offset` points into."""


class Ioctl(IntEnum):
    """Direction, size, 0xAE and number, as userspace passes them."""

    # On /dev/kvm.
    GET_API_VERSION = 0xAE00
    CREATE_VM = 0xAE01
    CHECK_EXTENSION = 0xAE03
    GET_VCPU_MMAP_SIZE = 0xAE04
    GET_SUPPORTED_CPUID = 0xC008AE05
    # On a VM.
    CREATE_VCPU = 0xAE41
    SET_USER_MEMORY_REGION = 0x4020AE46
    SET_USER_MEMORY_REGION2 = 0x40A0AE49
    CREATE_IRQCHIP = 0xAE60
    ENABLE_CAP = 0x4068AEA3
    MEMORY_ENCRYPT_OP = 0xC008AEBA
    MEMORY_ENCRYPT_REG_REGION = 0x8010AEBB
    MEMORY_ENCRYPT_UNREG_REGION = 0x8010AEBC
    GET_SUPPORTED_MEMORY_ATTRIBUTES_V10 = 0x8008AED2
    SET_MEMORY_ATTRIBUTES_V10 = 0xC020AED3
    SET_MEMORY_ATTRIBUTES = 0x4020AED2
    CREATE_GUEST_MEMFD = 0xC040AED4
    # On /dev/kvm, a VM or a vCPU, by group.
    SET_DEVICE_ATTR = 0x4018AEE1
    GET_DEVICE_ATTR = 0x4018AEE2
    HAS_DEVICE_ATTR = 0x4018AEE3
    # On a vCPU.
    RUN = 0xAE80
    GET_REGS = 0x8090AE81
    SET_REGS = 0x4090AE82
    GET_SREGS = 0x8138AE83
    SET_SREGS = 0x4138AE84
    TRANSLATE = 0xC018AE85
    GET_MSRS = 0xC008AE88
    SET_MSRS = 0x4008AE89
    SET_CPUID2 = 0x4008AE90
    GET_CPUID2 = 0xC008AE91
    GET_MP_STATE = 0x8004AE98
    SET_MP_STATE = 0x4004AE99
    SET_GUEST_DEBUG = 0x4048AE9B
    GET_DEBUGREGS = 0x8080AEA1
    SET_DEBUGREGS = 0x4080AEA2
    GET_XSAVE = 0x9000AEA4
    SET_XSAVE = 0x5000AEA5
    GET_XCRS = 0x8188AEA6
    SET_XCRS = 0x4188AEA7
    PRE_FAULT_MEMORY = 0xC040AED5


class Cap(IntEnum):
    """What CHECK_EXTENSION answers and ENABLE_CAP switches on."""

    IRQCHIP = 0
    USER_MEMORY = 3
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    DESTROY_MEMORY_REGION_WORKS = 21
    SET_GUEST_DEBUG = 23
    INTERNAL_ERROR_DATA = 40
    DEBUGREGS = 50
    ENABLE_CAP = 54
    XSAVE = 55
    XCRS = 56
    MAX_VCPUS = 66
    READONLY_MEM = 81
    ENABLE_CAP_VM = 98
    CHECK_EXTENSION_VM = 105
    MAX_VCPU_ID = 128
    IMMEDIATE_EXIT = 136
    X86_USER_SPACE_MSR = 188
    VM_COPY_ENC_CONTEXT_FROM = 197
    EXIT_HYPERCALL = 201
    VM_MOVE_ENC_CONTEXT_FROM = 206
    SYS_ATTRIBUTES = 209
    DISABLE_QUIRKS2 = 213
    SYSTEM_EVENT_DATA = 215
    MEMORY_ATTRIBUTES_V10 = 225
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    UNMAPPED_PRIVATE_MEM = 240


class Exit(IntEnum):
    """`kvm_run.exit_reason`."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    X86_RDMSR = 29
    X86_WRMSR = 30
    AP_RESET_HOLD = 32
    MEMORY_FAULT_V10 = 38
    MEMORY_FAULT = 39
    SNP_REQ_CERTS = 42
    VMGEXIT = 50


class VmType(IntEnum):
    """The argument of CREATE_VM; bit *n* of KVM_CAP_VM_TYPES says that type *n* is there."""

    DEFAULT_VM = 0
    SW_PROTECTED_VM = 1
    SEV_VM = 2
    SEV_ES_VM = 3
    SNP_VM = 4


class MemFlag(IntFlag):
    """Flags of a memory slot. UPM v10 calls bit 2 KVM_MEM_PRIVATE: the slot has a file for private pages behind it."""

    LOG_DIRTY_PAGES = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2


class MemoryAttribute(IntFlag):
    """Attributes of a guest page. UPM v10 numbers all four; PRIVATE is the only one that a kernel takes."""

    READ = 1 << 0
    WRITE = 1 << 1
    EXECUTE = 1 << 2
    PRIVATE = 1 << 3


MEMORY_FAULT_PRIVATE_V10 = 1 << 0
MEMORY_FAULT_PRIVATE = 1 << 3
"""KVM_MEMORY_EXIT_FLAG_PRIVATE in `kvm_run.memory_fault.flags`: the guest's access was a private one."""


class IoDirection(IntEnum):
    """`kvm_run.io.direction`."""

    IN = 0
    OUT = 1


class InternalError(IntEnum):
    """`kvm_run.internal.suberror`."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class SystemEvent(IntEnum):
    """`kvm_run.system_event.type`."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class MsrExitReason(IntFlag):
    """`kvm_run.msr.reason`."""

    INVAL = 1 << 0
    UNKNOWN = 1 << 1
    FILTER = 1 << 2


class MpState(IntEnum):
    """`kvm_mp_state`, what x86 has of it."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class CpuidFlag(IntFlag):
    """`kvm_cpuid_entry2.flags`."""

    SIGNIFCANT_INDEX = 1 << 0
    STATEFUL_FUNC = 1 << 1
    STATE_READ_NEXT = 1 << 2


HC_VAPIC_POLL_IRQ = 1
"""A hypercall that does nothing: the one that every guest may make."""
HC_MAP_GPA_RANGE = 12
"""The hypercall by which pages change sides; bit 12 of KVM_CAP_EXIT_HYPERCALL sends it to userspace."""


HC_ENOSYS, HC_EINVAL, HC_EPERM = 1000, 22, 1
"""What a hypercall answers, negative, in RAX (linux/kvm_para.h)."""
HYPERCALL_LONG_MODE = 1 << 0
"""`kvm_run.hypercall.flags`: the guest's registers count with 64 bits."""


class MapGpaRange(IntFlag):
    """The third argument of HC_MAP_GPA_RANGE; no size bit: 4 KiB pages. The second argument counts 4 KiB always."""

    PAGE_SZ_2M = 1 << 0
    PAGE_SZ_1G = 1 << 1
    ENCRYPTED = 1 << 4


QUIRK_SLOT_ZAP_ALL = 1 << 7
"""The quirk of KVM_CAP_DISABLE_QUIRKS2 by which deleting a slot drops all mappings of the guest (unconfirmed)."""

MEMFD_RESTRICTED = 451
"""The system call of UPM v10 that makes a file for private memory, on x86-64."""

EHWPOISON = 133
"""The errno of a page with a memory error, on x86-64: Python's `errno` lacks it."""
