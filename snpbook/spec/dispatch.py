"""How the mailbox treats each command's buffer and the pages that the command writes: data for the dispatcher.

The numbered rules are those that hold for legacy commands while SNP is initialised: pages that they write must be
Firmware or Default. Source: firmware 1.55.25 (dispatch); quirks of that build are named so.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from snpbook.spec import legacy_buffers as legacy
from snpbook.spec import snp_buffers as snp
from snpbook.spec.commands import Command
from snpbook.spec.layout import Layout
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.swap import LEGACY_MDATA

_C = Command
TIO_COMMANDS = frozenset(command for command in Command if command.name.startswith("TIO_"))
"""Trusted I/O is out of the model's scope: its commands have names and no buffers."""

BUFFERS: Mapping[Command, Layout | None] = MappingProxyType(
    {command: getattr(snp if command.name.startswith("SNP_") else legacy, command.name, None) for command in Command}
)
"""The layout of each command's buffer, None where there is no buffer (or, for trusted I/O, no model of it)."""

NOT_MODELLED: Mapping[Command, str] = MappingProxyType(
    {**dict.fromkeys(TIO_COMMANDS, "trusted I/O"), _C.RING_BUFFER: "ring buffer mode"}
)
"""Commands that the model refuses by name (MODEL)."""

RESERVED_FIRST = frozenset(command for command in Command if command.name.startswith("SNP_")) - {
    _C.SNP_SHUTDOWN_EX, _C.SNP_PAGE_SET_STATE, _C.SNP_DOWNLOAD_FIRMWARE_EX,
}  # fmt: skip
"""Commands that look at the reserved bits of their buffer before anything else.

The three left out look later; that legacy commands do not look at all is unconfirmed.
"""


class BufferClass(Enum):
    """What the firmware does with a command buffer; a refusal leaves it untouched but where its class says so."""

    IGNORE = "there is none"
    IN = "read"
    OUT = "written"
    IN_OUT = "read, and written back on success"
    IN_OUT_LENGTH = "read, and written back on success and, with the length needed, on INVALID_LENGTH"


_OTHER_CLASSES = {
    BufferClass.OUT: {_C.PLATFORM_STATUS},
    BufferClass.IN_OUT: {_C.GUEST_STATUS, _C.LAUNCH_START, _C.RECEIVE_START},
    BufferClass.IN_OUT_LENGTH: {
        _C.PEK_CSR, _C.PDH_CERT_EXPORT, _C.GET_ID, _C.LAUNCH_MEASURE, _C.ATTESTATION, _C.SEND_START,
        _C.SEND_UPDATE_DATA, _C.SEND_UPDATE_VMSA, _C.SWAP_OUT,
    },
}  # fmt: skip
BUFFER_CLASSES: Mapping[Command, BufferClass] = MappingProxyType(
    {
        command: next(
            (kind for kind, commands in _OTHER_CLASSES.items() if command in commands),
            BufferClass.IN if BUFFERS[command] else BufferClass.IGNORE,
        )
        for command in Command
        if command not in TIO_COMMANDS
    }
)
"""By command. No SNP command writes its command buffer."""

WRITES_COMMAND_BUFFER = frozenset(
    command
    for command, kind in BUFFER_CLASSES.items()
    if kind not in (BufferClass.IGNORE, BufferClass.IN) and command is not _C.ATTESTATION
)
"""Rule 3: each page of the buffer must be Firmware or Default, and the first is Reclaim afterwards, refused or not.

ATTESTATION writes its length back without the rule (quirk); a wrong state is INVALID_BUFFER_STATE (quirk).
"""

_PACKET = (("hdr_paddr", "hdr_len"), ("trans_paddr", "trans_len"))
WRITTEN_PAGES: Mapping[Command, tuple[tuple[str, str | int], ...]] = MappingProxyType(
    {
        _C.INIT: (("tmr_paddr", "tmr_len"),),
        _C.INIT_EX: (("nv_paddr", "nv_len"), ("tmr_paddr", "tmr_len")),
        _C.PEK_CSR: (("paddr", "len"),),
        _C.PDH_CERT_EXPORT: (("pdh_cert_paddr", "pdh_cert_len"), ("cert_chain_paddr", "cert_chain_len")),
        _C.GET_ID: (("paddr", "len"),),
        _C.COPY: (("dst_paddr", "len"),),
        _C.LAUNCH_UPDATE_DATA: (("paddr", "len"),),
        _C.LAUNCH_UPDATE_VMSA: (("paddr", "len"),),
        _C.LAUNCH_MEASURE: (("paddr", "len"),),
        _C.LAUNCH_SECRET: (("guest_paddr", "guest_len"),),
        _C.ATTESTATION: (("paddr", "len"),),
        _C.SEND_START: (("session_paddr", "session_len"),),
        _C.SEND_UPDATE_DATA: _PACKET,
        _C.SEND_UPDATE_VMSA: _PACKET,
        _C.RECEIVE_UPDATE_DATA: (("guest_paddr", "guest_len"),),
        _C.RECEIVE_UPDATE_VMSA: (("guest_paddr", "guest_len"),),
        _C.DBG_DECRYPT: (("dst_paddr", "len"),),
        _C.DBG_ENCRYPT: (("dst_paddr", "len"),),
        _C.SWAP_OUT: (("dst_paddr", "page_size"), ("mdata_paddr", LEGACY_MDATA.size)),
        _C.SWAP_IN: (("dst_paddr", "page_size"),),
        _C.RING_BUFFER: (("queue_lo_sts_paddr", PAGE_SIZE), ("queue_hi_sts_paddr", PAGE_SIZE)),
    }
)
"""Rule 4: what a legacy command writes beside its buffer, as (field of the address, field of the length or bytes).

Those pages must be Firmware or Default, else INVALID_PAGE_STATE; they keep their state. INIT_EX with an NV address
of 0 tests the range at address 0 all the same (quirk).
"""

RUN_BOUNDARY = 64 << 20
"""COPY and SNP_PAGE_MOVE refuse a range that crosses a multiple of it (INVALID_PARAM)."""
