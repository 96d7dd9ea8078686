"""The mailbox of the AMD-SP: ids of the commands, and the registers through which a host issues them.

The buffers that commands take are in `snp_buffers` and `legacy_buffers`, how they are treated in `dispatch`.
Sources: SNP ABI and SEV API (commands), Linux include/linux/psp-sev.h and drivers/crypto/ccp.
"""

from enum import IntEnum, IntFlag

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits


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
    TIO_STATUS = 0xD0
    TIO_INIT = 0xD1
    TIO_DEV_CREATE = 0xD2
    TIO_DEV_RECLAIM = 0xD3
    TIO_DEV_CONNECT = 0xD4
    TIO_DEV_DISCONNECT = 0xD5


class MailboxRegister(IntEnum):
    """Offsets of the mailbox registers in the PSP's BAR (second generation: Rome, Milan, Genoa)."""

    COMMAND = 0x10980
    ADDRESS_LOW = 0x109E0
    ADDRESS_HIGH = 0x109E4


class FirstMailboxRegister(IntEnum):
    """The same registers in the first generation (Naples)."""

    COMMAND = 0x10580
    ADDRESS_LOW = 0x105E0
    ADDRESS_HIGH = 0x105E4


class PspRegister(IntEnum):
    """Other registers in the PSP's BAR, of the second generation.

    A bit of INTERRUPT_STATUS raises the interrupt where INTERRUPT_ENABLE has it too, and is cleared by writing 1 to it.
    """

    INTERRUPT_ENABLE = 0x10690
    INTERRUPT_STATUS = 0x10694
    FEATURES = 0x109FC


class FirstPspRegister(IntEnum):
    """The same registers in the first generation."""

    FEATURES = 0x105FC
    INTERRUPT_ENABLE = 0x10610
    INTERRUPT_STATUS = 0x10614


INTERRUPT_DONE = 1 << 1
"""Of INTERRUPT_STATUS: a command that asked for an interrupt is done."""


class PspCapability(IntFlag):
    """FEATURES: what this secure processor can do; all ones where the register cannot be read."""

    SEV = 1 << 0
    TEE = 1 << 1


MAILBOX_COMMAND = Layout(
    "MailboxCommand",
    4,
    Cite("LINUX", "drivers/crypto/ccp/sev-dev.h"),
    [
        bits("interrupt", 0, 4, 0, note="interrupt on completion; a status while `response` is set"),
        bits("command", 0, 4, 16, 11, note="the firmware decodes 23:16"),
        bits("response", 0, 4, 31, note="set by the firmware when done"),
    ],
)
MAILBOX_RESPONSE = Layout(
    "MailboxResponse",
    4,
    Cite("LINUX", "drivers/crypto/ccp/sev-dev.h"),
    [bits("status", 0, 4, 0, 16), bits("recovery", 0, 4, 30), bits("response", 0, 4, 31)],
)
RESPONSE_DONE = 1 << 31
STATUS_MASK = 0xFFFF
COMMAND_SHIFT = MAILBOX_COMMAND.fields["command"].lo
DECODED_COMMAND_BITS = 8
LOCATION_BITS = 10
"""Bits of each location id in the stack that the address registers hold after a command: AMD's own debugging aid."""
LOCATION_DEFAULT_PAGE = 0x3FF
"""Pushed by each look-up of a Default page; a refusal pushes its status. The real ids are not published (MODEL)."""
