"""The file of persistent data: the OCA, PEK and PDH of SEV on the host's disk, for INIT_EX, instead of in flash.

Read once when the platform is initialised, written after each command that changes the data. Source: Linux 6.12
drivers/crypto/ccp/sev-dev.c (sev_read_init_ex_file, sev_write_init_ex_file).
"""

from __future__ import annotations

import errno
from collections.abc import MutableMapping

from snpbook.hardware.ports import HostCpu
from snpbook.host.log import KernelLog
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.legacy_launch import NV_SIZE
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.status import Status

CHANGING = frozenset({
    Command.PLATFORM_RESET, Command.INIT_EX, Command.PDH_GEN, Command.PEK_CERT_IMPORT, Command.PEK_GEN,
})  # fmt: skip
"""The commands after which the file is written."""
Disk = MutableMapping[str, bytes]
"""The root file system as far as the kernel itself uses it; an `OSError` of it is that of opening the file."""


class PersistentData:
    """The area of 32 KB in host memory, and the file behind it."""

    def __init__(self, cpu: HostCpu, log: KernelLog, disk: Disk, path: str, pages: range) -> None:
        self._cpu, self._log, self._disk, self._path = cpu, log, disk, path
        self.pages = pages

    @property
    def spa(self) -> int:
        return self.pages.start << PAGE_SHIFT

    def load(self) -> None:
        """Read the file into the area. One that is missing is made later, one that is short fills a part.

        The errno of opening it where that fails otherwise.
        """
        try:
            data = self._disk[self._path][:NV_SIZE]
        except KeyError:
            self._log.psp(f"SEV: {self._path} does not exist and will be created later.")
            return
        except OSError as error:
            number = error.errno or errno.EIO
            self._log.psp(f"SEV: could not open {self._path} for read, error -{number}")
            raise KernelError(number, f"{self._path} can be read", "a file", str(error)) from error
        if len(data) != NV_SIZE:
            self._log.psp(f"SEV: could not read {NV_SIZE} bytes to non volatile memory area, ret {len(data)}")
        self._cpu.write(self.spa, data)

    def store(self) -> None:
        """Write the area to the file; the errno of opening it where that fails. The command itself has succeeded."""
        try:
            self._disk[self._path] = self._cpu.read(self.spa, NV_SIZE)
        except OSError as error:
            number = error.errno or errno.EIO
            self._log.psp(f"SEV: could not open file for write, error -{number}")
            rule = f"{self._path} can be written"
            raise KernelError(number, rule, "a file", str(error), firmware=Status.SUCCESS) from error
