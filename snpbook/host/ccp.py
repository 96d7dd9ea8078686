"""The CCP driver: firmware commands through the mailbox, and pages lent to the firmware and taken back.

Nobody else writes the mailbox. A non-zero status becomes EIO, as in Linux drivers/crypto/ccp/sev-dev.c,
with the status beside it. Donated pages are Firmware pages while the firmware has them.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np

from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR
from snpbook.hardware.ports import HostCpu
from snpbook.host.memory import PageAllocator
from snpbook.host.refusal import KernelError
from snpbook.host.rmp import rmpupdate
from snpbook.spec import snp_buffers as buffers
from snpbook.spec.commands import (
    COMMAND_SHIFT,
    RESPONSE_DONE,
    STATUS_MASK,
    Command,
    MailboxRegister,
)
from snpbook.spec.layout import Layout, Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, LaunchPage
from snpbook.spec.platform import PLATFORM_STATUS
from snpbook.spec.status import Status

_LOW_HALF = (1 << 32) - 1


class Ccp:
    """The driver of one secure processor, with its command buffer in host memory."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator) -> None:
        self._cpu, self._memory = cpu, memory
        self._buffer = memory.allocate(1)[0] << PAGE_SHIFT
        self.snp_initialised = False

    def __repr__(self) -> str:
        return f"Ccp({'SNP initialised' if self.snp_initialised else 'SNP not initialised'})"

    def initialise(self) -> None:
        """Bring the firmware up: clear VM_HSAVE_PA, flush, SNP_INIT_EX, flush, SNP_DF_FLUSH."""
        for core in self._cpu.cores:
            self._cpu.wrmsr(Msr.VM_HSAVE_PA, 0, core)
        self._cpu.wbinvd()
        self.command(Command.SNP_INIT_EX, buffers.SNP_INIT_EX, init_rmp=1)
        self.flush()
        self.snp_initialised = True

    def flush(self) -> None:
        """WBINVD on all cores and SNP_DF_FLUSH: dirty ASIDs become clean."""
        self._cpu.wbinvd()
        self.command(Command.SNP_DF_FLUSH, None)

    def command(self, command: Command, layout: Layout | None, **fields: Any) -> None:
        """Issue one command; `KernelError` EIO with the firmware's status where it refuses."""
        self._prepare(layout, fields)
        self._cpu.mailbox_write(MailboxRegister.COMMAND, command << COMMAND_SHIFT)
        self._finish(command)

    def command_run(self, command: Command, layout: Layout, pages: range, **fields: Any) -> None:
        """Issue one command for each page of a run; EIO at the first that is refused."""
        self._prepare(layout, fields)
        self._cpu.mailbox_repeat(command, pages)
        self._finish(command)

    def _prepare(self, layout: Layout | None, fields: dict[str, Any]) -> None:
        address = 0
        if layout is not None:
            address = self._buffer
            self._cpu.write(address, layout.pack(**fields))
        self._cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, address & _LOW_HALF)
        self._cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, address >> 32)

    def _finish(self, command: Command) -> None:
        answer = self._cpu.mailbox_read(MailboxRegister.COMMAND)
        if not answer & RESPONSE_DONE:
            raise KernelError(errno.ETIMEDOUT, f"{command.name}: the secure processor answers", "a response", "none")
        status = Status(answer & STATUS_MASK)
        if status is not Status.SUCCESS:
            raise KernelError(errno.EIO, command.name, Status.SUCCESS.name, status.name, "SNP", status)

    # Pages between the kernel and the firmware.

    def donate(self, count: int) -> range:
        """Allocate pages and make them the firmware's."""
        pages = self._memory.allocate(count)
        rmpupdate(self._cpu, pages, np.zeros(count, np.uint64), FIRMWARE)
        return pages

    def take_back(self, pages: range) -> None:
        """Reclaim pages from the firmware, make them the hypervisor's and free them."""
        self.reclaim(pages)
        self._memory.release(pages)

    def reclaim(self, pages: range) -> None:
        """SNP_PAGE_RECLAIM, then RMPUPDATE to hypervisor pages."""
        self.command_run(Command.SNP_PAGE_RECLAIM, buffers.SNP_PAGE_RECLAIM, pages)
        rmpupdate(self._cpu, pages, np.zeros(len(pages), np.uint64), HYPERVISOR)

    # Commands that the rest of the kernel uses.

    def platform_status(self) -> Record:
        """SNP_PLATFORM_STATUS, through a firmware page once SNP is up."""
        if not self.snp_initialised:
            pages = self._memory.allocate(1)
            self.command(Command.SNP_PLATFORM_STATUS, buffers.SNP_PLATFORM_STATUS, status_paddr=pages[0] << PAGE_SHIFT)
            status = self._cpu.read(pages[0] << PAGE_SHIFT, PLATFORM_STATUS.size)
            self._memory.release(pages)
            return PLATFORM_STATUS.unpack(status)
        pages = self.donate(1)
        try:
            self.command(Command.SNP_PLATFORM_STATUS, buffers.SNP_PLATFORM_STATUS, status_paddr=pages[0] << PAGE_SHIFT)
        finally:
            self.take_back(pages)
        return PLATFORM_STATUS.unpack(self._cpu.read(pages[0] << PAGE_SHIFT, PLATFORM_STATUS.size))

    def create_context(self) -> int:
        """SNP_GCTX_CREATE on a donated page: the page's address."""
        pages = self.donate(1)
        gctx = pages[0] << PAGE_SHIFT
        try:
            self.command(Command.SNP_GCTX_CREATE, buffers.SNP_GCTX_CREATE, gctx_paddr=gctx)
        except KernelError:
            self.take_back(pages)
            raise
        return gctx

    def decommission(self, gctx: int) -> None:
        """SNP_DECOMMISSION, and the context page back to the kernel."""
        self.command(Command.SNP_DECOMMISSION, buffers.SNP_DECOMMISSION, gctx_paddr=gctx)
        page = gctx >> PAGE_SHIFT
        self.take_back(range(page, page + 1))

    def activate(self, gctx: int, asid: int) -> None:
        self.command(Command.SNP_ACTIVATE, buffers.SNP_ACTIVATE, gctx_paddr=gctx, asid=asid)

    def launch_start(self, gctx: int, policy: int, gosvw: bytes) -> None:
        self.command(Command.SNP_LAUNCH_START, buffers.SNP_LAUNCH_START, gctx_paddr=gctx, policy=policy, gosvw=gosvw)

    def launch_update(self, gctx: int, pages: range, kind: LaunchPage) -> None:
        """SNP_LAUNCH_UPDATE for a run of 4 KB pages."""
        self.command_run(Command.SNP_LAUNCH_UPDATE, buffers.SNP_LAUNCH_UPDATE, pages, gctx_paddr=gctx, page_type=kind)

    def launch_finish(self, gctx: int, host_data: bytes) -> None:
        self.command(Command.SNP_LAUNCH_FINISH, buffers.SNP_LAUNCH_FINISH, gctx_paddr=gctx, host_data=host_data)

    def guest_request(self, gctx: int, request: bytes) -> bytes:
        """SNP_GUEST_REQUEST through bounce pages: the response page.

        `KernelError` EIO carries the firmware's status for the guest.
        """
        asking = self._memory.allocate(1)
        answering = self.donate(1)
        self._cpu.write(asking[0] << PAGE_SHIFT, request)
        try:
            self.command(
                Command.SNP_GUEST_REQUEST,
                buffers.SNP_GUEST_REQUEST,
                gctx_paddr=gctx,
                request_paddr=asking[0] << PAGE_SHIFT,
                response_paddr=answering[0] << PAGE_SHIFT,
            )
            return self._cpu.read(answering[0] << PAGE_SHIFT, PAGE_SIZE)
        finally:
            self.take_back(answering)
            self._memory.release(asking)
