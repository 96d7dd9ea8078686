"""The driver as a module of the kernel: its probe, and the shutdown of everything that it has brought up.

The shutdown goes the other way round than the initialisation: SEV, its memory, SNP, and the IOMMU's buffers, which the
firmware gives back then. Sources: Linux 6.12 drivers/crypto/ccp/sev-dev.c, drivers/iommu/amd/init.c.
"""

from __future__ import annotations

import errno
from contextlib import suppress

import numpy as np

from snpbook.hardware.dram import page_numbers
from snpbook.hardware.host_instructions import HYPERVISOR
from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp.initialisation import Initialisation
from snpbook.host.ccp.mailbox import Parameters, answered, rc
from snpbook.host.ccp.resources import reserved_memory
from snpbook.host.ccp.update import update_firmware
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator
from snpbook.host.refusal import KernelError
from snpbook.host.rmp import rmpupdate
from snpbook.host.steps import Mutex
from snpbook.spec.bring_up import NO_SEV, PSP_ENABLED, SEV_ENABLED, BringUp
from snpbook.spec.commands import Command, PspCapability, PspRegister
from snpbook.spec.pages import PAGES_PER_LARGE
from snpbook.spec.rmp import ASSIGNED, LARGE
from snpbook.spec.snp_buffers import SNP_SHUTDOWN_EX
from snpbook.spec.states import LegacyPlatformState
from snpbook.spec.status import Status


class Ccp(Initialisation):
    """The driver `ccp` of one secure processor, and what /dev/sev stands on."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, log: KernelLog) -> None:
        super().__init__(cpu, memory, log)
        self.lock = Mutex("sev_cmd_mutex")
        """One call of /dev/sev at a time."""
        self.iommu_buffers: list[range] = []
        """Event log, PPR log and semaphore of the IOMMU: Reclaim pages after the shutdown of SNP."""
        self.certificates = b""
        """The blob for extended guest requests that SNP_SET_EXT_CONFIG has left (v7)."""
        self.config = b""
        """What SNP_SET_EXT_CONFIG has last passed on (v7)."""

    def __repr__(self) -> str:
        return f"Ccp({'SNP initialised' if self.snp_initialised else 'SNP not initialised'}, SEV {self.state.name})"

    def probe(
        self, parameters: Parameters, rows: BringUp, *, sev: bool = True, snp: bool = True, kdump: bool = False
    ) -> None:
        """Find the device, read the firmware's version, and load another firmware if the disk has one.

        `sev` and `snp` are what the kernel has found of the processor. A failure is told in the log and leaves no SEV
        device.
        """
        self.parameters, self.rows, self.host_snp, self.kdump = parameters, rows, snp, kdump
        self.timeout = parameters.psp_probe_timeout
        self.resources = reserved_memory(self.cpu, edges=rows.aligns_e820)
        able = PspCapability.SEV in PspCapability(self.cpu.mailbox_read(PspRegister.FEATURES))
        self.present = sev and able
        if able:
            self.log.psp(SEV_ENABLED if sev else NO_SEV)
        self.log.psp(PSP_ENABLED)
        if not self.present:
            return
        try:
            old = new = self.read_version()
            if update_firmware(self, self.disk, old):
                new = self.read_version()
        except KernelError as error:
            self.log.psp(f"SEV: failed to get status. Error: {answered(error) or 0:#x}")
            self.present = False
            return
        if new != old:
            self.log.psp("SEV firmware updated from {}.{}.{} to {}.{}.{}".format(*old, *new))

    def shutdown_sev(self) -> None:
        """SHUTDOWN of the legacy platform, where the driver knows of one."""
        if self.state is LegacyPlatformState.UNINIT:
            return
        try:
            self.submit(Command.SHUTDOWN)
        except KernelError as error:
            self.log.psp(f"SEV: failed to SHUTDOWN error {answered(error) or 0:#x}, rc {rc(error)}")
            raise
        self.state = LegacyPlatformState.UNINIT

    def shutdown(self) -> None:
        """All of it: when kvm_amd or the driver is unloaded, after a temporary INIT, on a panic.

        A failure of SEV's SHUTDOWN is ignored; one of SNP's (`KernelError`) leaves SNP up.
        """
        with suppress(KernelError):
            self.shutdown_sev()
        if self.tmr is not None:
            self.cpu.wbinvd()
            self.take_back(self.tmr)
            self.tmr = None
        if self.persistent is not None:
            self.take_back(self.persistent.pages)
            self.persistent = None
        if self.range_list is not None:
            self.memory.release(self.range_list)
            self.range_list = None
        if self.snp_initialised:
            self._shutdown_snp()

    def panic(self) -> None:
        """The panic notifier: the same, polling, for no interrupt is served; nothing while a command is in flight."""
        if not self.panic_notifier or self.lock.held:
            return
        self.polling = True
        with suppress(KernelError):
            self.shutdown()

    def _shutdown_snp(self) -> None:
        self.cpu.wbinvd()
        self._snp_shutdown_ex()
        try:
            for pages in self.iommu_buffers:
                self._release_iommu_buffer(pages)
        except KernelError:
            self.log.psp("SNP IOMMU shutdown failed")
            raise
        self.snp_initialised, self.certificates = False, b""
        self.panic_notifier = self.polling  # a panic cannot unregister what it runs in

    def _snp_shutdown_ex(self) -> None:
        """SNP_SHUTDOWN_EX, a second time after a flush where the firmware asks for one."""
        data = SNP_SHUTDOWN_EX.pack(length=SNP_SHUTDOWN_EX.size, iommu_snp_shutdown=1)
        for last in (False, True):
            try:
                self.submit(Command.SNP_SHUTDOWN_EX, data)
                return
            except KernelError as error:
                if last or error.firmware is not Status.DF_FLUSH_REQUIRED:
                    code = answered(error) or 0
                    self.log.psp(f"SEV-SNP firmware shutdown failed, rc {rc(error)}, error {code:#x}")
                    raise
            try:
                self.submit(Command.SNP_DF_FLUSH)
            except KernelError as error:
                self.log.psp(f"SEV-SNP DF_FLUSH failed, ret = {rc(error)}, error = {answered(error) or 0:#x}")
                raise

    def _release_iommu_buffer(self, pages: range) -> None:
        """Reclaim pages become the hypervisor's; a 2 MB entry is split first, where one begins (EINVAL: it is free)."""
        numbers, low = page_numbers(pages), self.cpu.rmp_words(pages)[:, 0]
        heads = numbers % np.uint64(PAGES_PER_LARGE) == 0
        free = numbers[heads & (low & np.uint64(ASSIGNED) == 0)]
        if len(free):
            self.log(f"AMD-Vi: IOMMU PFN {int(free[0]):x} not assigned in RMP table")
            raise KernelError(errno.EINVAL, "a buffer of the IOMMU is assigned", "Reclaim", f"page {int(free[0]):#x}")
        large = numbers[heads & (low & np.uint64(LARGE) != 0)]
        if len(large):
            self.cpu.psmash(large)
        rmpupdate(self.cpu, pages, np.zeros(len(pages), np.uint64), HYPERVISOR)
