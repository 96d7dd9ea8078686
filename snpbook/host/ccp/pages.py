"""Pages between the kernel and the firmware: lent, taken back, and leaked where that fails.

A page that the firmware has is a Firmware page: assigned, ASID 0, immutable, 4 KB. To take it back is a firmware
command and an RMPUPDATE; the first page that fails is leaked with all behind it. Source: Linux 6.12
drivers/crypto/ccp/sev-dev.c (rmp_mark_pages_firmware, snp_reclaim_pages).
"""

from __future__ import annotations

import errno
from contextlib import suppress

import numpy as np

from snpbook.hardware.dram import page_numbers
from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR
from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp.mailbox import CommandRefused, Mailbox
from snpbook.host.leaks import LeakedPages
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator, runs
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.rmp import RmpCode
from snpbook.spec.snp_buffers import SNP_PAGE_RECLAIM
from snpbook.spec.status import Status


class FirmwarePages(Mailbox):
    """What the driver lends to the firmware."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, log: KernelLog) -> None:
        super().__init__(cpu, memory, log)
        self.leaks = LeakedPages(cpu, memory, log)
        self.snp_initialised = False
        """Whether pages need a state: what the driver believes of the firmware."""

    def convert(self, pages: range) -> None:
        """Make pages the firmware's; where one fails (EFAULT) those that were turned are taken back.

        All pages are tried (MODEL: a real loop stops at the first that fails).
        """
        codes = self.cpu.rmpupdate(pages, np.zeros(len(pages), np.uint64), FIRMWARE)
        if codes.any():
            for _, run in runs(page_numbers(pages)[codes == RmpCode.SUCCESS]):
                with suppress(KernelError):  # the leak list names what does not come back
                    self.reclaim(run)
            raise _failed(pages, codes)

    def reclaim(self, pages: range) -> None:
        """SNP_PAGE_RECLAIM and RMPUPDATE: hypervisor pages again, still allocated.

        Where that fails the failing page and all behind it are leaked; those before it are the hypervisor's.
        """
        done = 0
        failure: KernelError | None = None
        try:
            done, status = self.send_run(Command.SNP_PAGE_RECLAIM, SNP_PAGE_RECLAIM.pack(), pages)
            if status is not Status.SUCCESS:
                failure = CommandRefused(Command.SNP_PAGE_RECLAIM, status)
        except KernelError as error:
            failure = error
        if done:
            codes = self.cpu.rmpupdate(pages[:done], np.zeros(done, np.uint64), HYPERVISOR)
            if codes.any():
                failure = _failed(pages, codes)
                done = int(np.argmax(codes != RmpCode.SUCCESS))
        if failure is not None:
            self.leaks.leak(pages[done:])
            raise failure

    def make_shared_or_leak(self, pages: range) -> bool:
        """RMPUPDATE to hypervisor pages; where one fails, it is leaked with all behind it."""
        codes = self.cpu.rmpupdate(pages, np.zeros(len(pages), np.uint64), HYPERVISOR)
        if codes.any():
            self.leaks.leak(pages[int(np.argmax(codes != RmpCode.SUCCESS)) :])
        return not codes.any()

    def donate(self, count: int, align: int = 1) -> range:
        """Allocate pages that the firmware can write; a block that cannot be turned whole is lost whole (ENOMEM)."""
        pages = self.memory.allocate(count, align)
        if self.snp_initialised:
            self._convert_or_lose(pages)
        return pages

    def take_back(self, pages: range) -> None:
        """Take donated pages back and free them, or leak them."""
        if self.snp_initialised:
            try:
                self.reclaim(pages)
            except KernelError:
                self.leaks.forget(pages)
                return
        self.memory.release(pages)

    def _convert_or_lose(self, pages: range) -> None:
        try:
            self.convert(pages)
        except KernelError as error:
            self.leaks.forget(pages)
            rule, expected = "pages for the firmware", f"{len(pages)} Firmware pages"
            raise KernelError(errno.ENOMEM, rule, expected, str(error)) from error


def _failed(pages: range, codes: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> KernelError:
    """EFAULT for the first page that RMPUPDATE refused."""
    index = int(np.argmax(codes != RmpCode.SUCCESS))
    found = RmpCode(int(codes[index])).name
    return KernelError(errno.EFAULT, f"RMPUPDATE of page {pages[index]:#x}", "SUCCESS", found, "APM2 15.36.5")
