"""What SNP asks of the legacy commands' memory: which of it the firmware writes, and so must own meanwhile.

Once SNP is up, output goes through bounce buffers of Firmware pages, but for memory that is a guest's, which is turned
where it is; and the command buffer itself is lent for commands that write it. Source: Linux 6.12
drivers/crypto/ccp/sev-dev.c (snp_populate_cmd_buf_desc_list, sev_cmd_buf_writable).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS

_C = Command
ADDRESS_SIZE = 8
"""Bytes of an address in a command buffer."""


@dataclass(frozen=True, slots=True)
class Output:
    """Memory that a command writes: the fields of its address and length; `guest` where it is a guest's own."""

    address: str
    length: str
    guest: bool = False


_GUEST_RANGE = (Output("paddr", "len", guest=True),)
_GUEST_PACKET = (Output("guest_paddr", "guest_len", guest=True),)
_GUEST_TARGET = (Output("dst_paddr", "len", guest=True),)
_PACKET = (Output("hdr_paddr", "hdr_len"), Output("trans_paddr", "trans_len"))
_BLOB = (Output("paddr", "len"),)
OUTPUTS: Mapping[Command, tuple[Output, ...]] = {
    _C.PDH_CERT_EXPORT: (Output("pdh_cert_paddr", "pdh_cert_len"), Output("cert_chain_paddr", "cert_chain_len")),
    _C.GET_ID: _BLOB,
    _C.PEK_CSR: _BLOB,
    _C.LAUNCH_MEASURE: _BLOB,
    _C.ATTESTATION: _BLOB,
    _C.SEND_START: (Output("session_paddr", "session_len"),),
    _C.SEND_UPDATE_DATA: _PACKET,
    _C.SEND_UPDATE_VMSA: _PACKET,
    _C.LAUNCH_UPDATE_DATA: _GUEST_RANGE,
    _C.LAUNCH_UPDATE_VMSA: _GUEST_RANGE,
    _C.LAUNCH_SECRET: _GUEST_PACKET,
    _C.RECEIVE_UPDATE_DATA: _GUEST_PACKET,
    _C.RECEIVE_UPDATE_VMSA: _GUEST_PACKET,
    _C.DBG_DECRYPT: _GUEST_TARGET,
    _C.DBG_ENCRYPT: _GUEST_TARGET,
}
"""By command. An output of length 0 is none."""

WRITES_ITS_BUFFER = frozenset({
    _C.PLATFORM_STATUS, _C.GUEST_STATUS, _C.LAUNCH_START, _C.RECEIVE_START, _C.LAUNCH_MEASURE, _C.SEND_START,
    _C.SEND_UPDATE_DATA, _C.SEND_UPDATE_VMSA, _C.PEK_CSR, _C.PDH_CERT_EXPORT, _C.GET_ID, _C.ATTESTATION,
})  # fmt: skip
"""The commands whose buffer becomes a Firmware page."""


@dataclass(frozen=True, slots=True)
class Lent:
    """Memory that is the firmware's during one command: its pages, and of a bounce buffer where its bytes belong."""

    field: str
    pages: range
    size: int
    origin: int | None
    """The address that the caller named, or None for guest memory that was turned in place."""

    def with_origin(self, answer: bytes, command: Command) -> bytes:
        """The command's buffer with that address in its field again."""
        if self.origin is None:
            return answer
        layout = BUFFERS[command]
        assert layout is not None, command
        at = layout.offset(self.field)
        return answer[:at] + self.origin.to_bytes(ADDRESS_SIZE, "little") + answer[at + ADDRESS_SIZE :]
