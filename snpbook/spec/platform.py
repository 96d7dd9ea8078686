"""What SNP platform commands read and write in memory beside their buffers: status, features, range list, VLEK.

Sources: SNP ABI (SNP_PLATFORM_STATUS, SNP_GUEST_STATUS, SNP_FEATURE_INFO, SNP_VLEK_LOAD, RANGE_LIST), Linux psp-sev.h.
"""

from enum import Enum, IntEnum, IntFlag

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.states import GuestState, PlatformState

PLATFORM_STATUS = Layout(
    "SnpPlatformStatus",
    0x20,
    Cite("SNP", "SNP_PLATFORM_STATUS"),
    [
        uint("api_major", 0x00, 1),
        uint("api_minor", 0x01, 1),
        uint("state", 0x02, 1, enum=PlatformState),
        bits("is_rmp_init", 0x03, 1, 0),
        bits("alias_check_complete", 0x03, 1, 1, note="Milan from 1.55.22, Genoa from 1.55.38"),
        bits("is_tio_en", 0x03, 1, 3),
        uint("build", 0x04, 4),
        bits("mask_chip_id", 0x08, 4, 0),
        bits("mask_chip_key", 0x08, 4, 1),
        bits("vlek_en", 0x08, 4, 2),
        bits("feature_info", 0x08, 4, 3, note="SNP_FEATURE_INFO exists"),
        bits("rapl_dis", 0x08, 4, 4),
        bits("ciphertext_hiding_cap", 0x08, 4, 5),
        bits("ciphertext_hiding_en", 0x08, 4, 6),
        bits("tio_en", 0x08, 4, 7),
        uint("guest_count", 0x0C, 4, note="guests past SNP_LAUNCH_START"),
        uint("current_tcb", 0x10, 8),
        uint("reported_tcb", 0x18, 8),
    ],
)

GUEST_STATUS = Layout(
    "SnpGuestStatus",
    0x20,
    Cite("SNP", "SNP_GUEST_STATUS"),
    [
        uint("policy", 0x00, 8),
        uint("asid", 0x08, 4, note="0: none"),
        uint("state", 0x0C, 1, enum=GuestState),
        bits("vcek_dis", 0x10, 4, 0),
    ],
)

FEATURE_INFO = Layout(
    "FeatureInfo",
    0x10,
    Cite("SNP", "SNP_FEATURE_INFO"),
    [uint("eax", 0x00, 4), uint("ebx", 0x04, 4), uint("ecx", 0x08, 4), uint("edx", 0x0C, 4)],
)
"""As CPUID answers: of index 0, EAX is the highest index; of index 1, EAX has a bit for each guest message."""
FEATURE_INFO_ALIGNMENT = 4


class FeatureIndex(IntEnum):
    """ECX_IN of SNP_FEATURE_INFO."""

    FEATURES = 0
    MESSAGES = 1


class FeatureEbx(IntFlag):
    """EBX of index 0."""

    LEGACY_SEV = 1 << 0
    TIO = 1 << 1


class FeatureEcx(IntFlag):
    """ECX of index 0."""

    VLEK = 1 << 0
    X86_SNP_SHUTDOWN = 1 << 1
    RAPL_DISABLE = 1 << 2
    CIPHERTEXT_HIDING = 1 << 3
    AES_256_XTS_POLICY = 1 << 4
    CXL_POLICY = 1 << 5
    VERIFY_MITIGATION = 1 << 13


class FeatureMessage(IntFlag):
    """EAX of index 1: which guest messages the firmware answers."""

    CPUID = 1 << 0
    KEY = 1 << 1
    REPORT = 1 << 2
    EXPORT = 1 << 3
    IMPORT = 1 << 4
    ABSORB = 1 << 5
    VMRK = 1 << 6
    ABSORB_NOMA = 1 << 7
    TSC_INFO = 1 << 8


RANGE_ENTRY = Layout("RangeListEntry", 16, Cite("SNP", "RANGE_LIST"), [uint("base", 0, 8), uint("page_count", 8, 4)])
RANGE_LIST_HEADER = Layout("RangeListHeader", 8, Cite("SNP", "RANGE_LIST"), [uint("count", 0, 4)])
RANGE_LIST_LIMIT = (PAGE_SIZE - RANGE_LIST_HEADER.size) // RANGE_ENTRY.size
"""255 ranges fit the one page of the list."""

WRAPPED_VLEK = Layout(
    "WrappedVlekHashstick",
    0x1B0,
    Cite("SNP", "SNP_VLEK_LOAD"),
    [
        raw("iv", 0x000, 12),
        raw("wrapped", 0x010, 0x180, note="eight hashsticks of 48 bytes, sealed with AES-256-GCM"),
        uint("tcb", 0x190, 8),
        raw("tag", 0x1A0, 16),
    ],
)
WRAPPED_VLEK_AAD = WRAPPED_VLEK.offset("tcb"), WRAPPED_VLEK.offset("tag")
"""The bytes from the TCB to the tag are authenticated as well."""

MITIGATION_STATUS = Layout(
    "MitigationStatus",
    0x14,
    Cite("SNP", "SNP_VERIFY_MITIGATION"),
    [uint("verified", 0x00, 8), uint("supported", 0x08, 8), uint("failure", 0x10, 4)],
)


class Fault(Enum):
    """What may be wrong with a part that no register shows: the causes of some refusals, for whoever tries them out."""

    DIAGNOSTIC_MODE = "the part is in diagnostic mode"
    OLD_BOOT_LOADER = "the boot loader is too old for SNP"
    UNLOCKED_PART = "the part is unlocked for debugging"
    NO_UMC_ENCRYPTION = "a memory controller does not encrypt"
    NO_ANSWER = "another processor does not acknowledge"
    NO_RESTORE = "the old firmware cannot be brought back"
    NO_ACTIVATE_EX = "the part cannot activate an ASID on some core complexes alone"
    UNSAFE_HARDWARE = "the hardware does not reach a safe state"


SUPPORTED_MITIGATIONS = 0x1
"""The vulnerabilities that SNP_VERIFY_MITIGATION can verify to be mitigated. What each bit means is MODEL."""


class MitigationSubcommand(IntEnum):
    """What SNP_VERIFY_MITIGATION does."""

    STATUS = 0
    VERIFY = 1
