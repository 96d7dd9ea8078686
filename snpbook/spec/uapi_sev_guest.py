"""/dev/sev-guest: numbers and structures of its ioctls, and the attributes of the attestation directory beside it.

Sources: Linux include/uapi/linux/sev-guest.h, drivers/virt/coco/sev-guest, drivers/virt/coco/tsm.c (6.12).
"""

from __future__ import annotations

from enum import IntEnum

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, sub, uint
from snpbook.spec.payloads import REPORT_REQUEST

DEVICE = "/dev/sev-guest"
REPORT_DIRECTORY = "/sys/kernel/config/tsm/report"
_CITE = Cite("LINUX", "include/uapi/linux/sev-guest.h")


class GuestIoctl(IntEnum):
    """Numbers of the three calls."""

    GET_REPORT = 0xC0205300
    GET_DERIVED_KEY = 0xC0205301
    GET_EXT_REPORT = 0xC0205302


REQUEST_IOCTL = Layout(
    "SnpGuestRequestIoctl",
    32,
    _CITE,
    [
        uint("msg_version", 0, 1),
        uint("req_data", 8, 8),
        uint("resp_data", 16, 8),
        uint("fw_error", 24, 4),
        uint("vmm_error", 28, 4),
    ],
)
"""The last two together are `exitinfo2`."""
EXT_REPORT_REQUEST = Layout(
    "SnpExtReportRequest",
    112,
    _CITE,
    [sub("data", 0, REPORT_REQUEST), uint("certs_address", 96, 8), uint("certs_len", 104, 4)],
)
REPORT_RESPONSE_SIZE, KEY_RESPONSE_SIZE = 4000, 64
CERTIFICATES_LIMIT = 0x4000
NO_FIRMWARE_CALL = 0xFFFFFFFF
"""`fw_error` while no call has been made (SEV_RET_NO_FW_CALL)."""
INITIAL_ERROR = 0xFF
"""`exitinfo2` as the ioctl begins."""
SEQUENCE_LIMIT = 0xFFFFFFFF
"""From here on the counter of 32 bits in the secrets page has no number left."""
RETRY_SECONDS, RETRY_LIMIT_SECONDS = 2, 60
"""A busy hypervisor is asked again after so long, for so long at most."""

TSM_INBLOB_LIMIT, TSM_INBLOB_SNP = 64, 64
"""Bytes that `inblob` takes, and that SNP wants."""
TSM_PROVIDER = "sev_guest"
VMPL_LIMIT = 4
