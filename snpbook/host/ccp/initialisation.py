"""The secure processor brought up: SNP, and then SEV with SEV-ES.

SNP comes first, for it refuses once the legacy platform is up. What the driver believes of the firmware is its own:
where a flush fails they part. Sources: Linux 6.12 drivers/crypto/ccp/sev-dev.c, RFC v7 patches 25 and 28.
"""

from __future__ import annotations

import errno

from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp.guests import GuestCommands
from snpbook.host.ccp.mailbox import answered, rc
from snpbook.host.ccp.persistent import Disk, PersistentData
from snpbook.host.ccp.resources import listed_ranges, reserved_memory
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator
from snpbook.host.refusal import KernelError, check
from snpbook.spec.bring_up import BRING_UP, SNP_API, SNP_VERSION, BringUp
from snpbook.spec.commands import Command
from snpbook.spec.legacy_buffers import INIT_EX
from snpbook.spec.legacy_launch import NV_SIZE, TMR_SIZE, TMR_SIZE_SNP
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.platform import RANGE_ENTRY, RANGE_LIST_HEADER, RANGE_LIST_LIMIT
from snpbook.spec.snp_buffers import SNP_INIT_EX
from snpbook.spec.states import LegacyPlatformState
from snpbook.spec.status import Status
from snpbook.spec.uapi_psp import NO_FW_CALL

INIT_EX_API = (1, 52)
"""The oldest firmware that has SNP_INIT_EX."""
RETRYING = "SEV: retrying INIT command because of SECURE_DATA_INVALID error. Retrying once to reset PSP SEV state."


class Initialisation(GuestCommands):
    """What the driver knows of the platform, and how it brings it up."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, log: KernelLog) -> None:
        super().__init__(cpu, memory, log)
        self.rows: BringUp = BRING_UP["mainline"]
        self.disk: Disk = {}
        """Where the file of persistent data is, and firmware to be loaded."""
        self.resources = reserved_memory(cpu, edges=self.rows.aligns_e820)
        """The lines of /proc/iomem from which the list for SNP_INIT_EX is made."""
        self.present = True
        """Whether there is a SEV device: without one every call is ENODEV."""
        self.host_snp = True
        """Whether the kernel has turned SNP on in the processor."""
        self.kdump = False
        """Whether this is a crash kernel, which leaves the secure processor as it is."""
        self.version: tuple[int, int, int] | None = None
        """API version and build, once they have been asked for."""
        self.state = LegacyPlatformState.UNINIT
        """The legacy platform, as the driver believes it to be."""
        self.panic_notifier = False
        """Whether a panic shuts the platform down."""
        self.tmr: range | None = None
        """The trusted memory region of SEV-ES."""
        self.range_list: range | None = None
        """The page with the list for SNP_INIT_EX."""

    def read_version(self) -> tuple[int, int, int]:
        """Ask PLATFORM_STATUS for the API version, the build and the state."""
        status = self.command(Command.PLATFORM_STATUS)
        self.state = LegacyPlatformState(status.state)
        self.version = status.api_major, status.api_minor, status.build
        return self.version

    def at_least(self, api: tuple[int, int]) -> bool:
        """Whether the firmware's API is that or newer."""
        return (self.version or self.read_version())[:2] >= api

    def platform_init(self, *, probe: bool = False) -> None:
        """SNP, then SEV and SEV-ES. `probe`: the kernel loads, and psp_init_on_probe may put the second part off.

        Any failure of SNP but ENODEV (the host has none) ends it: no legacy INIT then, but in v7.
        """
        check(self.present, errno.ENODEV, "a SEV device", "one", "none")
        if self.kdump or self.state is LegacyPlatformState.INIT:
            return
        try:
            self.initialise()
        except KernelError as error:
            if error.errno != errno.ENODEV and not self.rows.sev_without_snp:
                raise
        if not probe or self.parameters.psp_init_on_probe:
            self._initialise_sev()

    def initialise(self) -> None:
        """SNP alone. ENODEV where the host has none, EOPNOTSUPP for a firmware that is too old."""
        check(self.host_snp, errno.ENODEV, "SNP is on in the processor", "SYSCFG.SNPEn", "off")
        if self.snp_initialised:
            return
        if not self.at_least(SNP_API):
            self.log.psp(self.rows.snp_too_old)
            raise KernelError(errno.EOPNOTSUPP, "the firmware's API", SNP_API, self.version)
        for core in self.cpu.cores:
            self.cpu.wrmsr(Msr.VM_HSAVE_PA, 0, core)
        command, data = Command.SNP_INIT, b""
        if self.at_least(INIT_EX_API):
            command, data = Command.SNP_INIT_EX, self._init_ex_buffer()
        self.cpu.wbinvd()
        try:
            self.submit(command, data)
            command = Command.SNP_DF_FLUSH
            self.flush()
        except KernelError as error:
            line = self.rows.snp_failed
            self.log.psp(line.format(command=command.name, rc=rc(error), error=answered(error) or 0))
            raise
        self.snp_initialised = self.panic_notifier = True
        major, minor, build = self.version or self.read_version()
        self.log.psp(SNP_VERSION.format(major=major, minor=minor, build=build))

    def _init_ex_buffer(self) -> bytes:
        """The buffer of SNP_INIT_EX, with a page of memory to be HV-Fixed: ENOMEM without one, E2BIG for too much."""
        if self.range_list is None:
            try:
                self.range_list = self.memory.allocate(1)
            except KernelError:
                self.log.psp("SEV: SNP_INIT_EX range list memory allocation failed")
                raise
        ranges = listed_ranges(self.resources)
        if len(ranges) > RANGE_LIST_LIMIT:
            self.log.psp(f"SEV: SNP_INIT_EX walk_iomem_res_desc failed rc = -{errno.E2BIG}")
            raise KernelError(errno.E2BIG, "ranges in the list for SNP_INIT_EX", RANGE_LIST_LIMIT, len(ranges))
        entries = [RANGE_ENTRY.pack(base=pages.start << PAGE_SHIFT, page_count=len(pages)) for pages in ranges]
        address = self.range_list.start << PAGE_SHIFT
        self.cpu.write(address, RANGE_LIST_HEADER.pack(count=len(ranges)) + b"".join(entries))
        return SNP_INIT_EX.pack(init_rmp=1, list_paddr_en=1, list_paddr=address)

    @property
    def tmr_size(self) -> int:
        """Bytes of the trusted memory region: twice as many once SNP is up."""
        return TMR_SIZE_SNP if self.snp_initialised else TMR_SIZE

    def _initialise_sev(self) -> None:
        """INIT or INIT_EX, once more where the persistent data was bad, and the first flush."""
        self._prepare_tmr()
        self._prepare_persistent()
        try:
            try:
                self._init()
            except KernelError as error:
                if error.firmware is not Status.SECURE_DATA_INVALID:
                    raise
                self.log.psp(RETRYING)
                self._init()
        except KernelError as error:
            name = "INIT_EX" if self.persistent else "INIT"
            self.log.psp(self.rows.sev_failed.format(command=name, error=_code(error), rc=rc(error)))
            raise
        self.state = LegacyPlatformState.INIT
        self.cpu.wbinvd()
        try:
            self.submit(Command.DF_FLUSH)
        except KernelError as error:
            self.log.psp(f"SEV: DF_FLUSH failed {_code(error):#x}, rc {rc(error)}")
            raise
        major, minor, build = self.version or self.read_version()
        if self.rows.versions_apart or not self.snp_initialised:
            self.log.psp(f"SEV API:{major}.{minor} build:{build}")

    def _prepare_tmr(self) -> None:
        """Memory for SEV-ES: without it SEV alone is initialised."""
        if self.tmr is not None:
            return
        count = self.tmr_size >> PAGE_SHIFT
        try:
            self.tmr = self.donate(count, align=count)
        except KernelError:
            self.log.psp("SEV: TMR allocation failed, SEV-ES support unavailable")
            return
        if not self.snp_initialised:
            self.cpu.clflush(self.tmr.start << PAGE_SHIFT, self.tmr_size)

    def _prepare_persistent(self) -> None:
        """The area for INIT_EX, read from its file. Where that fails the area stays, and is not read again."""
        if not self.parameters.init_ex_path or self.persistent is not None:
            return
        count = NV_SIZE >> PAGE_SHIFT
        try:
            pages = self.memory.allocate(count, align=count)
        except KernelError:
            self.log.psp("SEV: INIT_EX NV memory allocation failed")
            raise
        self.persistent = PersistentData(self.cpu, self.log, self.disk, self.parameters.init_ex_path, pages)
        self.persistent.load()
        if self.snp_initialised:
            try:
                self.convert(pages)
            except KernelError as error:
                self.log.psp("SEV: INIT_EX NV memory page state change failed.")
                raise KernelError(errno.ENOMEM, "the NV area is the firmware's", "Firmware", str(error)) from error

    def _init(self) -> None:
        fields = {}
        if self.tmr is not None:
            fields = {"es": 1, "tmr_paddr": self.tmr.start << PAGE_SHIFT, "tmr_len": len(self.tmr) << PAGE_SHIFT}
        if self.persistent is None:
            self.command(Command.INIT, **fields)
        else:
            area = {"length": INIT_EX.size, "nv_paddr": self.persistent.spa, "nv_len": NV_SIZE}
            self.command(Command.INIT_EX, **area, **fields)


def _code(error: KernelError) -> int:
    """The firmware's code as the driver prints it: -1 where the firmware was not called."""
    code = answered(error)
    return NO_FW_CALL if code is None else code
