"""The SNP commands as KVM issues them: contexts and launch; and SNP_PLATFORM_STATUS.

Sources: Linux 6.12 arch/x86/kvm/svm/sev.c, drivers/crypto/ccp/sev-dev.c (sev_ioctl_do_snp_platform_status).
"""

from __future__ import annotations

import errno

from snpbook.host.ccp.driver import Driver
from snpbook.host.ccp.mailbox import answered
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, LaunchPage
from snpbook.spec.platform import PLATFORM_STATUS
from snpbook.spec.status import Status


class GuestCommands(Driver):
    """What KVM asks of the firmware. A legacy command needs no more than its buffer: it is issued with `command`."""

    def platform_status(self) -> Record:
        """SNP_PLATFORM_STATUS, through a Firmware page once SNP is up. EFAULT where that page does not come back."""
        pages, failure = self.memory.allocate(1), None
        if self.snp_initialised:
            try:
                self.convert(pages)
            except KernelError:
                self.memory.release(pages)
                raise
        try:
            self.command(Command.SNP_PLATFORM_STATUS, status_paddr=pages.start << PAGE_SHIFT)
        except KernelError as error:
            failure = error
        if self.snp_initialised:
            try:
                self.reclaim(pages)
            except KernelError as error:
                status = Status.SUCCESS if failure is None else answered(failure)
                rule = "the status page comes back"
                raise KernelError(errno.EFAULT, rule, "a hypervisor page", str(error), firmware=status) from error
        data = self.cpu.read(pages.start << PAGE_SHIFT, PLATFORM_STATUS.size)
        self.memory.release(pages)
        if failure is not None:
            raise failure
        return PLATFORM_STATUS.unpack(data)

    def create_context(self) -> int:
        """SNP_GCTX_CREATE on a donated page: the page's address."""
        pages = self.donate(1)
        gctx = pages.start << PAGE_SHIFT
        try:
            self.command(Command.SNP_GCTX_CREATE, gctx_paddr=gctx)
        except KernelError:
            self.take_back(pages)
            raise
        return gctx

    def decommission(self, gctx: int) -> None:
        """SNP_DECOMMISSION, and the context page back to the kernel."""
        self.command(Command.SNP_DECOMMISSION, gctx_paddr=gctx)
        page = gctx >> PAGE_SHIFT
        self.take_back(range(page, page + 1))

    def activate(self, gctx: int, asid: int) -> None:
        """Bind a guest to an ASID."""
        self.command(Command.SNP_ACTIVATE, gctx_paddr=gctx, asid=asid)

    def launch_start(self, gctx: int, policy: int, gosvw: bytes) -> None:
        """Open a launch."""
        self.command(Command.SNP_LAUNCH_START, gctx_paddr=gctx, policy=policy, gosvw=gosvw)

    def launch_update(self, gctx: int, pages: range, kind: LaunchPage) -> None:
        """SNP_LAUNCH_UPDATE for a run of 4 KB pages."""
        self.command_run(Command.SNP_LAUNCH_UPDATE, pages, gctx_paddr=gctx, page_type=kind)

    def launch_finish(
        self,
        gctx: int,
        host_data: bytes,
        *,
        id_block: bytes = b"",
        id_auth: bytes = b"",
        auth_key: bool = False,
        vcek_disabled: bool = False,
    ) -> None:
        """Close a launch; with `id_block`, of an owner whose signatures are in the page `id_auth`."""
        blobs = self.memory.allocate(2) if id_block else range(0)
        fields = {}
        try:
            if blobs:
                block, auth = (page << PAGE_SHIFT for page in blobs)
                self.cpu.write(block, id_block)
                self.cpu.write(auth, id_auth)
                fields = {"id_block_en": 1, "id_block_paddr": block, "id_auth_paddr": auth, "auth_key_en": auth_key}
            self.command(
                Command.SNP_LAUNCH_FINISH, gctx_paddr=gctx, host_data=host_data, vcek_dis=vcek_disabled, **fields
            )
        finally:
            if blobs:
                self.memory.release(blobs)
