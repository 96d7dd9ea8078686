"""Command buffers of the legacy SEV and SEV-ES commands, named like the commands.

A guest's `handle` is a number that the firmware gave, 1 to 1024. Sources: SEV API (commands), Linux
include/linux/psp-sev.h; rows that Linux lacks (COPY, ACTIVATE_EX, swap) are those of firmware 1.55.25.
"""

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Field, Layout, bits, raw, uint
from snpbook.spec.pages import PageSize
from snpbook.spec.swap import SwapType


def _buffer(command: str, size: int, *fields: Field) -> Layout:
    return Layout(f"{command}_BUFFER", size, Cite("SEV", command), fields)


def _guest(command: str, size: int, *fields: Field) -> Layout:
    return _buffer(command, size, uint("handle", 0x00, 4), *fields)


INIT = _buffer(
    "INIT",
    0x14,
    bits("es", 0x00, 2, 0, note="SEV-ES as well"),
    uint("tmr_paddr", 0x08, 8),
    uint("tmr_len", 0x10, 4),
)
INIT_EX = _buffer(
    "INIT_EX",
    0x24,
    uint("length", 0x00, 4, note="of this buffer"),
    bits("es", 0x04, 2, 0, note="SEV-ES as well"),
    uint("tmr_paddr", 0x08, 8),
    uint("tmr_len", 0x10, 4),
    uint("nv_paddr", 0x18, 8, note="0: persistent data stays in flash"),
    uint("nv_len", 0x20, 4),
)
PLATFORM_STATUS = _buffer(
    "PLATFORM_STATUS",
    0x0C,
    uint("api_major", 0x00, 1),
    uint("api_minor", 0x01, 1),
    uint("state", 0x02, 1),
    bits("owner", 0x03, 1, 0, note="externally owned"),
    bits("es", 0x04, 2, 0, note="initialised for SEV-ES"),
    uint("build", 0x07, 1),
    uint("guest_count", 0x08, 4),
)
PEK_CSR = _buffer("PEK_CSR", 0x0C, uint("paddr", 0x00, 8), uint("len", 0x08, 4))
PEK_CERT_IMPORT = _buffer(
    "PEK_CERT_IMPORT",
    0x1C,
    uint("pek_cert_paddr", 0x00, 8),
    uint("pek_cert_len", 0x08, 4),
    uint("oca_cert_paddr", 0x10, 8),
    uint("oca_cert_len", 0x18, 4),
)
PDH_CERT_EXPORT = _buffer(
    "PDH_CERT_EXPORT",
    0x1C,
    uint("pdh_cert_paddr", 0x00, 8),
    uint("pdh_cert_len", 0x08, 4),
    uint("cert_chain_paddr", 0x10, 8, note="PEK, OCA, CEK"),
    uint("cert_chain_len", 0x18, 4),
)
DOWNLOAD_FIRMWARE = _buffer("DOWNLOAD_FIRMWARE", 0x0C, uint("paddr", 0x00, 8), uint("len", 0x08, 4))
GET_ID = _buffer("GET_ID", 0x0C, uint("paddr", 0x00, 8), uint("len", 0x08, 4))
RING_BUFFER = _buffer(
    "RING_BUFFER",
    0x28,
    uint("queue_lo_cmd_paddr", 0x00, 8, note="order of the four pages unconfirmed"),
    uint("queue_lo_sts_paddr", 0x08, 8),
    uint("queue_hi_cmd_paddr", 0x10, 8),
    uint("queue_hi_sts_paddr", 0x18, 8),
    uint("queue_lo_size", 0x20, 1),
    uint("queue_hi_size", 0x21, 1),
    uint("queue_lo_threshold", 0x22, 2),
    uint("queue_hi_threshold", 0x24, 2),
)

DECOMMISSION = _guest("DECOMMISSION", 0x04)
ACTIVATE = _guest("ACTIVATE", 0x08, uint("asid", 0x04, 4))
DEACTIVATE = _guest("DEACTIVATE", 0x04)
GUEST_STATUS = _guest("GUEST_STATUS", 0x0D, uint("policy", 0x04, 4), uint("asid", 0x08, 4), uint("state", 0x0C, 1))
COPY = _guest("COPY", 0x18, uint("len", 0x04, 4), uint("src_paddr", 0x08, 8), uint("dst_paddr", 0x10, 8))
ACTIVATE_EX = _buffer(
    "ACTIVATE_EX",
    0x18,
    uint("length", 0x00, 4, note="of this buffer"),
    uint("handle", 0x04, 4),
    uint("asid", 0x08, 4),
    uint("numids", 0x0C, 4),
    uint("ids_paddr", 0x10, 8, note="u32 APIC ids"),
)

LAUNCH_START = _guest(
    "LAUNCH_START",
    0x24,
    uint("policy", 0x04, 4),
    uint("dh_cert_paddr", 0x08, 8, note="0: no owner, TIK and TEK are zero"),
    uint("dh_cert_len", 0x10, 4),
    uint("session_paddr", 0x18, 8),
    uint("session_len", 0x20, 4),
)
LAUNCH_UPDATE_DATA = _guest("LAUNCH_UPDATE_DATA", 0x14, uint("paddr", 0x08, 8), uint("len", 0x10, 4))
LAUNCH_UPDATE_VMSA = _guest("LAUNCH_UPDATE_VMSA", 0x14, uint("paddr", 0x08, 8), uint("len", 0x10, 4))
LAUNCH_MEASURE = _guest("LAUNCH_MEASURE", 0x14, uint("paddr", 0x08, 8), uint("len", 0x10, 4))
LAUNCH_FINISH = _guest("LAUNCH_FINISH", 0x04)
ATTESTATION = _guest("ATTESTATION", 0x24, uint("paddr", 0x08, 8), raw("mnonce", 0x10, 16), uint("len", 0x20, 4))


def _packet(command: str) -> Layout:
    """A packet: its header, the guest's memory, and the memory in transport form."""
    return _guest(
        command,
        0x34,
        uint("hdr_paddr", 0x08, 8),
        uint("hdr_len", 0x10, 4),
        uint("guest_paddr", 0x18, 8),
        uint("guest_len", 0x20, 4),
        uint("trans_paddr", 0x28, 8),
        uint("trans_len", 0x30, 4),
    )


LAUNCH_SECRET = _packet("LAUNCH_SECRET")
SEND_UPDATE_DATA = _packet("SEND_UPDATE_DATA")
SEND_UPDATE_VMSA = _packet("SEND_UPDATE_VMSA")
"""Linux's struct lacks the padding at 4, which the firmware expects."""
RECEIVE_UPDATE_DATA = _packet("RECEIVE_UPDATE_DATA")
RECEIVE_UPDATE_VMSA = _packet("RECEIVE_UPDATE_VMSA")

SEND_START = _guest(
    "SEND_START",
    0x44,
    uint("policy", 0x04, 4, note="written by the firmware"),
    uint("pdh_cert_paddr", 0x08, 8, note="of the receiver"),
    uint("pdh_cert_len", 0x10, 4),
    uint("plat_certs_paddr", 0x18, 8, note="PEK, OCA, CEK of the receiver"),
    uint("plat_certs_len", 0x20, 4),
    uint("amd_certs_paddr", 0x28, 8, note="ASK, ARK"),
    uint("amd_certs_len", 0x30, 4),
    uint("session_paddr", 0x38, 8),
    uint("session_len", 0x40, 4),
)
SEND_FINISH = _guest("SEND_FINISH", 0x04)
SEND_CANCEL = _guest("SEND_CANCEL", 0x04)
RECEIVE_START = _guest(
    "RECEIVE_START",
    0x24,
    uint("policy", 0x04, 4),
    uint("pdh_cert_paddr", 0x08, 8, note="of the sender"),
    uint("pdh_cert_len", 0x10, 4),
    uint("session_paddr", 0x18, 8),
    uint("session_len", 0x20, 4),
)
RECEIVE_FINISH = _guest("RECEIVE_FINISH", 0x04)

_DEBUG = (uint("src_paddr", 0x08, 8), uint("dst_paddr", 0x10, 8), uint("len", 0x18, 4))
DBG_DECRYPT = _guest("DBG_DECRYPT", 0x1C, *_DEBUG)
DBG_ENCRYPT = _guest("DBG_ENCRYPT", 0x1C, *_DEBUG)

_SWAP = (
    bits("page_size", 0x04, 4, 0, enum=PageSize),
    bits("page_type", 0x04, 4, 1, 2, enum=SwapType),
    bits("swap_in_place", 0x04, 4, 3),
    uint("src_paddr", 0x08, 8),
    uint("dst_paddr", 0x10, 8),
    uint("mdata_paddr", 0x18, 8),
)
SWAP_OUT = _guest("SWAP_OUT", 0x28, *_SWAP, uint("software_data", 0x20, 8))
SWAP_IN = _guest("SWAP_IN", 0x20, *_SWAP)
"""That it ends before the software data, which only SWAP_OUT stores, is inferred."""
