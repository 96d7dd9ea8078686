"""The host kernel: one boot, its command line, its modules, and what they have made of the machine.

The steps themselves stand in `bringup` and `sev_setup`; here the modules are loaded in their order, and the failures of
the secure processor's driver are met. Everything is done through one `HostCpu`. Sources: Linux drivers/crypto/ccp,
arch/x86/kvm/svm; RFC v7 patch 25.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from snpbook.hardware.ports import HostCpu
from snpbook.host.bringup import Platform
from snpbook.host.ccp import Ccp, Parameters
from snpbook.host.ccp.device import SevDevice
from snpbook.host.cmdline import Cmdline, words
from snpbook.host.e820 import free_frames
from snpbook.host.files import File
from snpbook.host.kvm.device import Kvm
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator
from snpbook.host.modules import Value, load
from snpbook.host.process import Process
from snpbook.host.pseudo_files import pseudo_files
from snpbook.host.refusal import KernelError
from snpbook.host.sev_setup import SevSetup, SevSupport
from snpbook.spec.bring_up import (
    BRING_UP,
    COMMAND_LINE,
    BringUp,
)
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.eras import Era
from snpbook.spec.eras import era as find_era
from snpbook.spec.kernel_parameters import MODULES

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Kernel:
    """A host that runs one kernel; `ccp` and `kvm` are its drivers once `boot` has loaded them."""

    def __init__(self, cpu: HostCpu) -> None:
        self.cpu = cpu
        self.memory = PageAllocator(free_frames(cpu))
        self.log = KernelLog(cpu.trace)
        self.ccp = Ccp(cpu, self.memory, self.log)
        self.kvm = Kvm(self)
        self.booted = False
        self.era: Era = find_era("rfc-v7")
        """The kernel that runs; `boot` chooses it."""
        self.devices: dict[str, Callable[[int], File]] = {
            "/dev/sev": lambda flags: SevDevice(self.ccp, self.era, flags),
        }
        """What open(2) finds: how to make the file of a path, given its flags."""
        self._inodes = 0
        self.shmem_huge = False
        """/sys/kernel/mm/transparent_hugepage/shmem_enabled: `always`, or `never` as by default."""
        self.registered_snp = False
        """Whether SNP guests without private slots are served as series v6 served them (MODEL)."""
        self.step_pages: int | None = None
        """How many pages a path does between two places where others may run; None: all at once."""
        self.rows: BringUp = BRING_UP[self.era.name]
        self.cmdline = Cmdline.parse("")
        self.platform = Platform(cpu, self.cmdline, self.rows, self.log)
        """What the bring-up has found; before `boot` what CPUID says."""
        self.modules: dict[str, dict[str, Value]] = {}
        """The modules that are loaded, with what their parameters read."""
        self.sev = SevSupport()
        self._options: Mapping[str, str] = _NOTHING

    def __repr__(self) -> str:
        return f"Kernel({'booted' if self.booted else 'not booted'}, {self.memory.allocated} pages in use)"

    def boot(self, era: str = "rfc-v7", *, cmdline: str = "", modules: Mapping[str, str] = _NOTHING) -> None:
        """Come up, with SNP or without: a machine that is not fit is no error, and the log says what is wrong.

        `modules` are options by module, as lines of modprobe.d have them ("sev_snp=0 npt=1"). `ValueError` for an
        era or a module that is not modelled, `KernelError` EBUSY for a second boot.
        """
        known = find_era(era)
        strange = sorted(set(modules) - set(MODULES))
        if strange:
            raise ValueError(f"modules: {strange[0]!r} is not modelled: one of {', '.join(MODULES)}")
        if self.booted:
            raise KernelError(errno.EBUSY, "the host boots once", "not booted", "booted")
        self.era, self.rows, self.cmdline = known, BRING_UP[known.name], Cmdline.parse(cmdline)
        self._options = modules
        if cmdline:
            self.log(COMMAND_LINE.format(text=cmdline))
        for line in self.cmdline.complaints:
            self.log(line)
        self.platform = Platform(self.cpu, self.cmdline, self.rows, self.log)
        self.platform.bring_up()
        self._load_ccp()
        self._load_kvm()
        self.booted = True

    @property
    def dmesg(self) -> str:
        """The log since boot."""
        return "\n".join(self.log.lines)

    def cat(self, path: str) -> str:
        """The text of a file under /proc or /sys; `KernelError` ENOENT for none."""
        files = pseudo_files(self)
        if path not in files:
            raise KernelError(errno.ENOENT, "the file exists", ", ".join(sorted(files)), path)
        return files[path]

    def _load(self, module: str) -> bool:
        """Load a module with its parameters; False where one of them is bad."""
        given = (*words(self._options.get(module, "")), *self.cmdline.module(module))
        values = load(module, given, self.era.name, self.log)
        if values is not None:
            self.modules[module] = values
        return values is not None

    def _load_ccp(self) -> None:
        if not self._load("ccp"):
            return
        parameters: dict[str, Any] = dict(self.modules["ccp"])
        sev = SevCapability.SEV in self.platform.features
        self.ccp.probe(Parameters(**parameters), self.rows, sev=sev, snp=self.platform.snp)
        if self.rows.psp_at_probe:
            self._initialise_psp()

    def _load_kvm(self) -> None:
        """kvm_amd needs kvm and the symbols of ccp."""
        if "ccp" not in self.modules or not (self._load("kvm") and self._load("kvm_amd")):
            return
        parameters = self.modules["kvm_amd"]
        setup = SevSetup(self.cpu, self.platform, self.rows, self.log, parameters)
        caching = bool(self.modules["kvm"]["mmio_caching"])
        self.sev = setup.run(mmio_caching=caching, initialise=self._initialise_psp, snp_up=self._snp_is_up)
        for name in set(parameters) & {"sev", "sev_es", "sev_snp", "debug_swap"}:
            parameters[name] = getattr(self.sev, name)
        snp = self.sev.sev_snp and self.ccp.snp_initialised
        self.kvm.load(sev=self.sev.sev, sev_es=self.sev.sev_es, snp=snp, debug_swap=self.sev.debug_swap)

    def _initialise_psp(self) -> bool:
        """Have the CCP driver initialise the secure processor; whether that succeeded.

        This is where each failure of the driver ends: it has told it, and the kernel goes on.
        """
        try:
            self.ccp.platform_init(probe=True)
        except KernelError:
            return False
        return True

    def _snp_is_up(self) -> bool:
        """What the firmware itself says; where an earlier kernel left it up, it refuses to tell this one."""
        try:
            return bool(self.ccp.platform_status().state)
        except KernelError:
            return False

    def process(self, **rights: Any) -> Process:
        """A new process; `rights` are options of `Process`."""
        return Process(self, **rights)

    def new_inode(self) -> int:
        """The number of a new inode."""
        self._inodes += 1
        return self._inodes
