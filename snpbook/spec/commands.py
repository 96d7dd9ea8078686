"""Mailbox commands of the AMD-SP: ids, registers, and the command buffers of the SNP commands.

Sources: SNP ABI (commands, buffers), Linux include/linux/psp-sev.h and drivers/crypto/ccp.
"""

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, raw, uint
from snpbook.spec.pages import PAGE_SIZE, LaunchPage, PageSize


class Command(IntEnum):
    """Command ids as written to bits 26:16 of the command register."""

    INIT = 0x01
    SHUTDOWN = 0x02
    PLATFORM_RESET = 0x03
    PLATFORM_STATUS = 0x04
    PEK_GEN = 0x05
    PEK_CSR = 0x06
    PEK_CERT_IMPORT = 0x07
    PDH_CERT_EXPORT = 0x08
    PDH_GEN = 0x09
    DF_FLUSH = 0x0A
    DOWNLOAD_FIRMWARE = 0x0B
    GET_ID = 0x0C
    INIT_EX = 0x0D
    NOP = 0x0E
    RING_BUFFER = 0x0F
    DECOMMISSION = 0x20
    ACTIVATE = 0x21
    DEACTIVATE = 0x22
    GUEST_STATUS = 0x23
    COPY = 0x24
    ACTIVATE_EX = 0x25
    LAUNCH_START = 0x30
    LAUNCH_UPDATE_DATA = 0x31
    LAUNCH_UPDATE_VMSA = 0x32
    LAUNCH_MEASURE = 0x33
    LAUNCH_SECRET = 0x34
    LAUNCH_FINISH = 0x35
    ATTESTATION = 0x36
    SEND_START = 0x40
    SEND_UPDATE_DATA = 0x41
    SEND_UPDATE_VMSA = 0x42
    SEND_FINISH = 0x43
    SEND_CANCEL = 0x44
    RECEIVE_START = 0x50
    RECEIVE_UPDATE_DATA = 0x51
    RECEIVE_UPDATE_VMSA = 0x52
    RECEIVE_FINISH = 0x53
    DBG_DECRYPT = 0x60
    DBG_ENCRYPT = 0x61
    SWAP_OUT = 0x70
    SWAP_IN = 0x71
    SNP_INIT = 0x81
    SNP_SHUTDOWN = 0x82
    SNP_PLATFORM_STATUS = 0x83
    SNP_DF_FLUSH = 0x84
    SNP_INIT_EX = 0x85
    SNP_SHUTDOWN_EX = 0x86
    SNP_DECOMMISSION = 0x90
    SNP_ACTIVATE = 0x91
    SNP_GUEST_STATUS = 0x92
    SNP_GCTX_CREATE = 0x93
    SNP_GUEST_REQUEST = 0x94
    SNP_ACTIVATE_EX = 0x95
    SNP_LAUNCH_START = 0xA0
    SNP_LAUNCH_UPDATE = 0xA1
    SNP_LAUNCH_FINISH = 0xA2
    SNP_DBG_DECRYPT = 0xB0
    SNP_DBG_ENCRYPT = 0xB1
    SNP_VERIFY_MITIGATION = 0xB2
    SNP_PAGE_SWAP_OUT = 0xC0
    SNP_PAGE_SWAP_IN = 0xC1
    SNP_PAGE_MOVE = 0xC2
    SNP_PAGE_MD_INIT = 0xC3
    SNP_PAGE_SET_STATE = 0xC6
    SNP_PAGE_RECLAIM = 0xC7
    SNP_PAGE_UNSMASH = 0xC8
    SNP_CONFIG = 0xC9
    SNP_DOWNLOAD_FIRMWARE_EX = 0xCA
    SNP_COMMIT = 0xCB
    SNP_VLEK_LOAD = 0xCD
    SNP_FEATURE_INFO = 0xCE


class MailboxRegister(IntEnum):
    """Offsets of the mailbox registers in the PSP's BAR (second generation: Rome, Milan, Genoa)."""

    COMMAND = 0x10980
    ADDRESS_LOW = 0x109E0
    ADDRESS_HIGH = 0x109E4


MAILBOX_COMMAND = Layout(
    "MailboxCommand",
    4,
    Cite("LINUX", "drivers/crypto/ccp/sev-dev.h"),
    [
        bits("interrupt", 0, 4, 0, note="interrupt on completion; a status while `response` is set"),
        bits("command", 0, 4, 16, 11),
        bits("response", 0, 4, 31, note="set by the firmware when done"),
    ],
)
RESPONSE_DONE = 1 << 31
STATUS_MASK = 0xFFFF
COMMAND_SHIFT = MAILBOX_COMMAND.fields["command"].lo


def _buffer(command: str, size: int, *fields: object) -> Layout:
    return Layout(f"{command}_BUFFER", size, Cite("SNP", command), list(fields))  # type: ignore[arg-type]


SNP_PLATFORM_STATUS = _buffer("SNP_PLATFORM_STATUS", 0x08, uint("status_paddr", 0, 8))
SNP_INIT_EX = _buffer(
    "SNP_INIT_EX",
    0x40,
    bits("init_rmp", 0, 4, 0),
    bits("list_paddr_en", 0, 4, 1),
    uint("list_paddr", 8, 8),
)
SNP_DECOMMISSION = _buffer("SNP_DECOMMISSION", 0x08, uint("gctx_paddr", 0, 8))
SNP_ACTIVATE = _buffer("SNP_ACTIVATE", 0x0C, uint("gctx_paddr", 0, 8), uint("asid", 8, 4))
SNP_GCTX_CREATE = _buffer("SNP_GCTX_CREATE", 0x08, uint("gctx_paddr", 0, 8))
SNP_GUEST_REQUEST = _buffer(
    "SNP_GUEST_REQUEST",
    0x18,
    uint("gctx_paddr", 0x00, 8),
    uint("request_paddr", 0x08, 8),
    uint("response_paddr", 0x10, 8),
)
SNP_LAUNCH_START = _buffer(
    "SNP_LAUNCH_START",
    0x30,
    uint("gctx_paddr", 0x00, 8),
    uint("policy", 0x08, 8),
    uint("ma_gctx_paddr", 0x10, 8),
    bits("ma_en", 0x18, 4, 0),
    bits("imi_en", 0x18, 4, 1),
    uint("desired_tsc_khz", 0x1C, 4),
    raw("gosvw", 0x20, 16),
)
SNP_LAUNCH_UPDATE = _buffer(
    "SNP_LAUNCH_UPDATE",
    0x20,
    uint("gctx_paddr", 0x00, 8),
    bits("page_size", 0x08, 4, 0, enum=PageSize),
    bits("page_type", 0x08, 4, 1, 3, enum=LaunchPage),
    bits("imi_page", 0x08, 4, 4),
    uint("page_paddr", 0x10, 8),
    uint("vmpl1_perms", 0x19, 1),
    uint("vmpl2_perms", 0x1A, 1),
    uint("vmpl3_perms", 0x1B, 1),
)
SNP_LAUNCH_FINISH = _buffer(
    "SNP_LAUNCH_FINISH",
    0x40,
    uint("gctx_paddr", 0x00, 8),
    uint("id_block_paddr", 0x08, 8),
    uint("id_auth_paddr", 0x10, 8),
    bits("id_block_en", 0x18, 8, 0),
    bits("auth_key_en", 0x18, 8, 1),
    bits("vcek_dis", 0x18, 8, 2),
    raw("host_data", 0x20, 32),
)
SNP_PAGE_RECLAIM = _buffer(
    "SNP_PAGE_RECLAIM", 0x08, bits("page_size", 0, 8, 0, enum=PageSize), bits("page", 0, 8, 12, 52)
)
PLATFORM_STATUS = Layout(
    "SnpPlatformStatus",
    0x20,
    Cite("SNP", "SNP_PLATFORM_STATUS"),
    [
        uint("api_major", 0x00, 1),
        uint("api_minor", 0x01, 1),
        uint("state", 0x02, 1),
        bits("is_rmp_init", 0x03, 1, 0),
        bits("alias_check_complete", 0x03, 1, 1),
        uint("build", 0x04, 4),
        bits("mask_chip_id", 0x08, 4, 0),
        bits("mask_chip_key", 0x08, 4, 1),
        bits("vlek_en", 0x08, 4, 2),
        bits("feature_info", 0x08, 4, 3),
        uint("guest_count", 0x0C, 4),
        uint("current_tcb", 0x10, 8),
        uint("reported_tcb", 0x18, 8),
    ],
)

RANGE_ENTRY = Layout("RangeListEntry", 16, Cite("SNP", "RANGE_LIST"), [uint("base", 0, 8), uint("page_count", 8, 4)])
RANGE_LIST_HEADER = Layout("RangeListHeader", 8, Cite("SNP", "RANGE_LIST"), [uint("count", 0, 4)])
RANGE_LIST_LIMIT = (PAGE_SIZE - RANGE_LIST_HEADER.size) // RANGE_ENTRY.size
"""255 ranges fit the one page of the list."""
