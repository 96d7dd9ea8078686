"""Status codes of the AMD-SP firmware, all of them in numerical order, and how commands refuse.

`FirmwareRefusal` is a value before it is an exception: it says which check failed, what the check
wanted and what it found, and where the rule stands. Source: SNP ABI and SEV API status tables.
"""

from enum import IntEnum

from snpbook.spec.refusal import Refusal


class Status(IntEnum):
    """What the firmware answers in bits 15:0 of the command register."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DF_FLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    # 0x1E is unassigned.
    RING_BUFFER_EXIT = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27
    SHUTDOWN_INCOMPLETE = 0x28
    # Trusted I/O (Linux include/uapi/linux/psp-sev.h), which is out of the model's scope.
    INCORRECT_BUFFER_LENGTH = 0x30
    EXPAND_BUFFER_LENGTH_REQUEST = 0x31
    SPDM_REQUEST = 0x32
    SPDM_ERROR = 0x33
    ERR_IN_DEV_CONN = 0x35
    INVALID_DEV_CTX = 0x36
    INVALID_TDI_CTX = 0x37
    INVALID_TDI = 0x38
    RECLAIM_REQUIRED = 0x39
    IN_USE = 0x3A
    INVALID_DEV_STATE = 0x3B
    INVALID_TDI_STATE = 0x3C
    DEV_CERT_CHANGED = 0x3D
    RESYNC_REQ = 0x3E
    RESPONSE_TOO_LARGE = 0x3F
    # Quirk of firmware 1.55.25: INVALID_PAGE_STATE of a command buffer, plus 64. The name is this model's.
    INVALID_BUFFER_STATE = 0x5A


class FirmwareRefusal(Refusal):
    """A command that the firmware refused: `status` is what the mailbox answers."""

    status: Status

    def __init__(self, status: Status, rule: str, expected: object = "", found: object = "", cite: str = "SNP") -> None:
        super().__init__(rule, expected, found, cite)
        self.status = status

    def __str__(self) -> str:
        return f"{self.status.name} ({self.status:#04x}): {super().__str__()}"


def require(
    condition: bool, status: Status, rule: str, expected: object = "", found: object = "", cite: str = "SNP"
) -> None:
    """One check of a command: refuse with `status` unless `condition` holds."""
    if not condition:
        raise FirmwareRefusal(status, rule, expected, found, cite)
