"""What a guest asks the firmware for by itself: a report over 64 bytes of its choice, and keys that only it can derive.

The same requests go through the driver for programs of the guest (`sev_guest`). Sources: SNP ABI, MSG_REPORT_REQ and
MSG_KEY_REQ.
"""

from __future__ import annotations

import errno

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.messages import Channel, RequestFailed
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.messages import MessageType
from snpbook.spec.payloads import KEY_REQUEST, KEY_RESPONSE, REPORT_REQUEST, REPORT_RESPONSE
from snpbook.spec.status import Status


async def request_report(cpu: GuestCpu, place: Layout, report_data: bytes, vmpl: int = 0) -> bytes:
    """The 1184 bytes of an attestation report; `RequestFailed` where the firmware refuses it."""
    body = REPORT_REQUEST.pack(report_data=report_data, vmpl=vmpl)
    channel = Channel(Ghcb(cpu, place.ghcb), place)
    answer = REPORT_RESPONSE.unpack(await channel.exchange(MessageType.REPORT_REQ, body))
    if answer.status != Status.SUCCESS:
        raise RequestFailed(errno.EIO, "MSG_REPORT_REQ is answered", Status.SUCCESS, f"status {answer.status:#x}")
    report: bytes = answer.report
    return report


async def derive_key(cpu: GuestCpu, place: Layout, **fields: int) -> bytes:
    """32 bytes that depend on the chip or the VM's root key and on what `fields` of `KEY_REQUEST` mix in."""
    channel = Channel(Ghcb(cpu, place.ghcb), place)
    answer = KEY_RESPONSE.unpack(await channel.exchange(MessageType.KEY_REQ, KEY_REQUEST.pack(**fields)))
    if answer.status != Status.SUCCESS:
        raise RequestFailed(errno.EIO, "MSG_KEY_REQ is answered", Status.SUCCESS, f"status {answer.status:#x}")
    key: bytes = answer.derived_key
    return key
