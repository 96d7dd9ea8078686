"""/dev/sev-guest: reports, derived keys and reports with certificates for programs of the guest's user.

What the user gets wrong is answered with the errno of the real driver, and costs no message. Certificates come into
pages that become shared when they are first wanted. Source: Linux drivers/virt/coco/sev-guest/sev-guest.c (6.12).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from snpbook.guest import page_tables
from snpbook.guest.boot import Kernel
from snpbook.guest.conversions import make_shared
from snpbook.guest.layout import CERTIFICATE_PAGES
from snpbook.guest.messages import Channel, RequestFailed
from snpbook.guest.process import Process, SystemCallFailed
from snpbook.spec import uapi_sev_guest as spec
from snpbook.spec.layout import Record
from snpbook.spec.messages import TAG_SIZE, MessageType
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.payloads import KEY_REQUEST, REPORT_REQUEST
from snpbook.spec.uapi_sev_guest import EXT_REPORT_REQUEST, REQUEST_IOCTL, GuestIoctl


@dataclass(frozen=True, slots=True)
class SevGuest:
    """The driver of a guest at VMPL `vmpl`, whose message key it uses.

    `buffers` are private pages for what an SVSM answers, where there is one.
    """

    kernel: Kernel
    vmpl: int = 0
    buffers: range = range(0)

    @property
    def channel(self) -> Channel:
        return Channel(self.kernel.channel, self.kernel.place, self.vmpl)

    async def ioctl(self, process: Process, number: int, argument: bytearray) -> None:
        """One of the three calls; `exitinfo2` in the structure tells what hypervisor and firmware said.

        EFAULT, EINVAL for what the user passes, ENOTTY for another number or a wiped key; `RequestFailed` else.
        """
        if len(argument) < REQUEST_IOCTL.size:
            raise SystemCallFailed(errno.EFAULT, "the structure is readable", REQUEST_IOCTL.size, len(argument))
        asked = REQUEST_IOCTL.unpack(bytes(argument[: REQUEST_IOCTL.size]))
        if not asked.msg_version:
            raise SystemCallFailed(errno.EINVAL, "a message version", "1 or more", 0)
        if not await self.channel.usable():
            raise SystemCallFailed(errno.ENOTTY, f"VMPCK{self.vmpl} is there", "a key", "zeros")
        if number not in _CALLS:
            raise SystemCallFailed(errno.ENOTTY, "an ioctl of sev-guest", sorted(map(hex, _CALLS)), hex(number))
        told = spec.INITIAL_ERROR
        try:
            if not asked.req_data or not asked.resp_data:
                raise SystemCallFailed(errno.EINVAL, "addresses of request and response", "both", asked)
            await _CALLS[number](self, process, asked)
            told = 0
        except RequestFailed as failure:
            told = failure.exitinfo2 or spec.NO_FIRMWARE_CALL
            raise
        finally:
            if told:
                error = REQUEST_IOCTL.fields["fw_error"].offset
                argument[error : error + 8] = told.to_bytes(8, "little")

    async def certificates(self, pages: int) -> None:
        """Share the pages for certificates, once, and wipe those that are wanted."""
        kernel, start = self.kernel, self.kernel.place.certificates
        c_bit = kernel.protections.c_bit
        assert c_bit is not None
        entry, _ = await page_tables.leaf(kernel.cpu, start)
        if entry >> c_bit & 1:
            first = start >> PAGE_SHIFT
            await make_shared(kernel.channel, kernel.place, c_bit, range(first, first + CERTIFICATE_PAGES))
        await kernel.cpu.write(start, bytes(pages * PAGE_SIZE))


async def _report(driver: SevGuest, process: Process, asked: Record) -> None:
    body = await process.load(asked.req_data, REPORT_REQUEST.size)
    answer = await driver.channel.exchange(
        MessageType.REPORT_REQ, body, version=asked.msg_version, limit=spec.REPORT_RESPONSE_SIZE
    )
    await process.store(asked.resp_data, answer.ljust(spec.REPORT_RESPONSE_SIZE, b"\0"))


async def _key(driver: SevGuest, process: Process, asked: Record) -> None:
    body = await process.load(asked.req_data, KEY_REQUEST.size)
    answer = await driver.channel.exchange(
        MessageType.KEY_REQ, body, version=asked.msg_version, limit=spec.KEY_RESPONSE_SIZE + TAG_SIZE
    )
    await process.store(asked.resp_data, answer[: spec.KEY_RESPONSE_SIZE].ljust(spec.KEY_RESPONSE_SIZE, b"\0"))


async def _extended_report(driver: SevGuest, process: Process, asked: Record) -> None:
    """A report and certificates. Where their buffer is too small, `certs_len` tells what they need."""
    wanted = EXT_REPORT_REQUEST.unpack(await process.load(asked.req_data, EXT_REPORT_REQUEST.size))
    length = wanted.certs_len if wanted.certs_address else 0
    if length > spec.CERTIFICATES_LIMIT or length % PAGE_SIZE:
        limit = f"whole pages up to {spec.CERTIFICATES_LIMIT:#x}"
        raise SystemCallFailed(errno.EINVAL, "the length of the certificates' buffer", limit, length)
    if length:
        process.check(wanted.certs_address, length)
    pages = length >> PAGE_SHIFT
    await driver.certificates(pages)
    try:
        answer = await driver.channel.exchange(
            MessageType.REPORT_REQ,
            bytes(wanted.data),
            version=asked.msg_version,
            limit=spec.REPORT_RESPONSE_SIZE,
            certificate_pages=pages,
        )
    except RequestFailed as failure:
        if failure.pages:
            needed = min(failure.pages << PAGE_SHIFT, EXT_REPORT_REQUEST.fields["certs_len"].limit)
            await process.store(asked.req_data, bytes(wanted.replace(certs_len=needed)))
        raise
    if length:
        table = await driver.kernel.cpu.read(driver.kernel.place.certificates, length)
        await process.store(wanted.certs_address, table)
    await process.store(asked.resp_data, answer.ljust(spec.REPORT_RESPONSE_SIZE, b"\0"))


_CALLS: Mapping[int, Callable[[SevGuest, Process, Record], Awaitable[None]]] = {
    GuestIoctl.GET_REPORT: _report,
    GuestIoctl.GET_DERIVED_KEY: _key,
    GuestIoctl.GET_EXT_REPORT: _extended_report,
}
