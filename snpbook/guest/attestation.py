"""What a guest asks the firmware for by itself: a report over 64 bytes of its choice, and keys that only it can derive.

The same requests go through the driver for programs of the guest (`sev_guest`). Sources: SNP ABI, MSG_REPORT_REQ and
MSG_KEY_REQ.
"""

from __future__ import annotations

import errno

from snpbook.guest.calling_area import attached
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.messages import Channel, RequestFailed
from snpbook.guest.protections import Protections
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.messages import MessageType
from snpbook.spec.msr import Msr
from snpbook.spec.payloads import KEY_REQUEST, KEY_RESPONSE, REPORT_REQUEST, REPORT_RESPONSE
from snpbook.spec.status import Status


async def request_report(cpu: GuestCpu, place: Layout, report_data: bytes, vmpl: int | None = None) -> bytes:
    """The 1184 bytes of an attestation report, for the guest's own VMPL; `RequestFailed` where it is refused."""
    channel = await _channel(cpu, place)
    body = REPORT_REQUEST.pack(report_data=report_data, vmpl=channel.vmpck if vmpl is None else vmpl)
    answer = REPORT_RESPONSE.unpack(await channel.exchange(MessageType.REPORT_REQ, body))
    if answer.status != Status.SUCCESS:
        raise RequestFailed(errno.EIO, "MSG_REPORT_REQ is answered", Status.SUCCESS, f"status {answer.status:#x}")
    report: bytes = answer.report
    return report


async def derive_key(cpu: GuestCpu, place: Layout, **fields: int) -> bytes:
    """32 bytes that depend on the chip or the VM's root key and on what `fields` of `KEY_REQUEST` mix in."""
    channel = await _channel(cpu, place)
    answer = KEY_RESPONSE.unpack(await channel.exchange(MessageType.KEY_REQ, KEY_REQUEST.pack(**fields)))
    if answer.status != Status.SUCCESS:
        raise RequestFailed(errno.EIO, "MSG_KEY_REQ is answered", Status.SUCCESS, f"status {answer.status:#x}")
    key: bytes = answer.derived_key
    return key


async def _channel(cpu: GuestCpu, place: Layout) -> Channel:
    """The way to the firmware; ENODEV for a guest without SNP, which has none."""
    found = Protections(await cpu.rdmsr(Msr.SEV_STATUS))
    if not found.snp:
        raise RequestFailed(errno.ENODEV, "an SNP guest asks the firmware", "SEV-SNP active", str(found))
    area = await attached(cpu, place)
    return Channel(Ghcb(cpu, place.ghcb), place, area.vmpl if area else 0)
