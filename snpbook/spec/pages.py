"""Pages: sizes, the states of a page in the RMP, and the types of pages that a launch adds.

Sources: SNP ABI (page states, PAGE_TYPE), KVM and QEMU for the OVMF section types.
"""

from enum import IntEnum, IntFlag

PAGE_SIZE = 0x1000
PAGE_SHIFT = 12
LARGE_PAGE_SIZE = 0x200000
PAGES_PER_LARGE = 512


class PageSize(IntEnum):
    """The page size bit of RMP entries and of the RMP instructions."""

    SIZE_4K = 0
    SIZE_2M = 1


class PageState(IntEnum):
    """The state of a page as the firmware reads it from the RMP entry (SNP ABI, page states)."""

    INVALID = 0x0
    DEFAULT = 0x1
    HYPERVISOR = 0x2
    HV_FIXED = 0x3
    FIRMWARE = 0x4
    FIRMWARE_IOMMU = 0x5
    RECLAIM = 0x6
    CONTEXT = 0x7
    METADATA = 0x8
    PRE_GUEST = 0x9
    PRE_SWAP = 0xA
    GUEST_INVALID = 0xB
    GUEST_VALID = 0xC


class LaunchPage(IntEnum):
    """PAGE_TYPE of SNP_LAUNCH_UPDATE."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


class VmplPermission(IntFlag):
    """One VMPL's permission byte in the RMP entry."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE_USER = 4
    EXECUTE_SUPERVISOR = 8
    SUPERVISOR_SHADOW_STACK = 16
    ALL = READ | WRITE | EXECUTE_USER | EXECUTE_SUPERVISOR
