"""/dev/sev: the one ioctl of the CCP driver, its sub-commands and the packed structure that each takes.

Two numbers mean one thing in the RFC series and another in Linux (`snpbook.spec.eras` chooses). The firmware's codes
are `snpbook.spec.status.Status`. Sources: Linux 6.12 uapi linux/psp-sev.h, RFC v7 patch 31.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Field, Layout, bits, raw, uint

_LINUX = Cite("LINUX", "include/uapi/linux/psp-sev.h")

ISSUE_CMD = 0xC0105300
"""SEV_ISSUE_CMD; any other number is EINVAL."""
NO_FW_CALL = 0xFFFFFFFF
"""SEV_RET_NO_FW_CALL, -1 in `error`: the firmware was not called."""
BLOB_LIMIT = 0x4000
"""SEV_FW_BLOB_MAX_SIZE: certificates and signing requests larger than this are refused."""
STATUS_FLAG_ES = 0x100
"""SEV_STATUS_FLAGS_CONFIG_ES in `flags` of PLATFORM_STATUS: initialised for SEV-ES."""


ENOTSUPP = 524
"""What GET_ID fails with on firmware that is too old: an errno of the kernel's own, which no C library knows."""


class PspCommand(Enum):
    """What `cmd` of SEV_ISSUE_CMD asks for, by name: SEV_* up to GET_ID2, the SNP ones as they are called here."""

    FACTORY_RESET = auto()
    PLATFORM_STATUS = auto()
    PEK_GEN = auto()
    PEK_CSR = auto()
    PDH_GEN = auto()
    PDH_CERT_EXPORT = auto()
    PEK_CERT_IMPORT = auto()
    GET_ID = auto()
    GET_ID2 = auto()
    SNP_PLATFORM_STATUS = auto()
    SNP_COMMIT = auto()
    SNP_SET_CONFIG = auto()
    SNP_VLEK_LOAD = auto()
    SNP_SET_EXT_CONFIG = auto()
    SNP_GET_EXT_CONFIG = auto()

    def __repr__(self) -> str:
        return self.name


COMMANDS: Mapping[int, PspCommand] = {
    0: PspCommand.FACTORY_RESET,
    1: PspCommand.PLATFORM_STATUS,
    2: PspCommand.PEK_GEN,
    3: PspCommand.PEK_CSR,
    4: PspCommand.PDH_GEN,
    5: PspCommand.PDH_CERT_EXPORT,
    6: PspCommand.PEK_CERT_IMPORT,
    7: PspCommand.GET_ID,
    8: PspCommand.GET_ID2,
    9: PspCommand.SNP_PLATFORM_STATUS,
}
"""The same in every era."""
MAINLINE_COMMANDS: Mapping[int, PspCommand] = {
    10: PspCommand.SNP_COMMIT,
    11: PspCommand.SNP_SET_CONFIG,
    12: PspCommand.SNP_VLEK_LOAD,
}
V7_COMMANDS: Mapping[int, PspCommand] = {10: PspCommand.SNP_SET_EXT_CONFIG, 11: PspCommand.SNP_GET_EXT_CONFIG}


def _struct(name: str, size: int, *fields: Field) -> Layout:
    return Layout(name, size, _LINUX, fields)


CMD = _struct("sev_issue_cmd", 0x10, uint("cmd", 0x00, 4), uint("data", 0x04, 8), uint("error", 0x0C, 4, note="out"))
STATUS = _struct(
    "sev_user_data_status",
    0x0C,
    uint("api_major", 0x00, 1),
    uint("api_minor", 0x01, 1),
    uint("state", 0x02, 1),
    uint("flags", 0x03, 4),
    uint("build", 0x07, 1),
    uint("guest_count", 0x08, 4),
)
PEK_CSR = _struct("sev_user_data_pek_csr", 0x0C, uint("address", 0x00, 8), uint("length", 0x08, 4, note="in/out"))
PEK_CERT_IMPORT = _struct(
    "sev_user_data_pek_cert_import",
    0x18,
    uint("pek_cert_address", 0x00, 8),
    uint("pek_cert_len", 0x08, 4),
    uint("oca_cert_address", 0x0C, 8),
    uint("oca_cert_len", 0x14, 4),
)
PDH_CERT_EXPORT = _struct(
    "sev_user_data_pdh_cert_export",
    0x18,
    uint("pdh_cert_address", 0x00, 8),
    uint("pdh_cert_len", 0x08, 4, note="in/out"),
    uint("cert_chain_address", 0x0C, 8),
    uint("cert_chain_len", 0x14, 4, note="in/out"),
)
GET_ID = _struct("sev_user_data_get_id", 0x80, raw("socket1", 0x00, 64), raw("socket2", 0x40, 64))
GET_ID2 = _struct("sev_user_data_get_id2", 0x0C, uint("address", 0x00, 8), uint("length", 0x08, 4, note="in/out"))
SNP_STATUS = _struct(
    "sev_user_data_snp_status",
    0x20,
    uint("api_major", 0x00, 1),
    uint("api_minor", 0x01, 1),
    uint("state", 0x02, 1),
    bits("is_rmp_initialized", 0x03, 1, 0),
    uint("build_id", 0x04, 4),
    bits("mask_chip_id", 0x08, 4, 0),
    bits("mask_chip_key", 0x08, 4, 1),
    bits("vlek_en", 0x08, 4, 2),
    uint("guest_count", 0x0C, 4),
    uint("current_tcb_version", 0x10, 8),
    uint("reported_tcb_version", 0x18, 8),
)
SNP_CONFIG = _struct(
    "sev_user_data_snp_config",
    0x40,
    uint("reported_tcb", 0x00, 8),
    bits("mask_chip_id", 0x08, 4, 0),
    bits("mask_chip_key", 0x08, 4, 1),
)
SNP_VLEK_LOAD = _struct(
    "sev_user_data_snp_vlek_load",
    0x10,
    uint("len", 0x00, 4, note="of this structure"),
    uint("vlek_wrapped_version", 0x04, 1, note="0"),
    uint("vlek_wrapped_address", 0x08, 8),
)
SNP_WRAPPED_VLEK_HASHSTICK = _struct("sev_user_data_snp_wrapped_vlek_hashstick", 0x1B0, raw("data", 0x000, 0x1B0))
SNP_EXT_CONFIG_V7 = Layout(
    "sev_user_data_ext_snp_config",
    0x18,
    Cite("V7", "patch 31"),
    [
        uint("config_address", 0x00, 8, note="of a structure as SNP_CONFIG; 0: none"),
        uint("certs_address", 0x08, 8, note="0 on SET removes the blob"),
        uint("certs_len", 0x10, 4),
    ],
)
PAYLOADS: Mapping[PspCommand, Layout] = {
    PspCommand.PLATFORM_STATUS: STATUS,
    PspCommand.PEK_CSR: PEK_CSR,
    PspCommand.PDH_CERT_EXPORT: PDH_CERT_EXPORT,
    PspCommand.PEK_CERT_IMPORT: PEK_CERT_IMPORT,
    PspCommand.GET_ID: GET_ID,
    PspCommand.GET_ID2: GET_ID2,
    PspCommand.SNP_PLATFORM_STATUS: SNP_STATUS,
    PspCommand.SNP_SET_CONFIG: SNP_CONFIG,
    PspCommand.SNP_VLEK_LOAD: SNP_VLEK_LOAD,
    PspCommand.SNP_SET_EXT_CONFIG: SNP_EXT_CONFIG_V7,
    PspCommand.SNP_GET_EXT_CONFIG: SNP_EXT_CONFIG_V7,
}
"""The others take no structure."""
