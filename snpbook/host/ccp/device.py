"""/dev/sev: the file, and the one ioctl from the caller's structure to its copy back.

What a sub-command does stands in `calls`. All calls run one at a time; the structure is copied back whenever a
sub-command was reached, also one that failed. Source: Linux 6.12 drivers/crypto/ccp/sev-dev.c (sev_ioctl).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from snpbook.host.ccp.calls import HANDLERS, IssuedCommand
from snpbook.host.ccp.platform import Ccp
from snpbook.host.files import Argument, Call, File
from snpbook.host.refusal import KernelError, check
from snpbook.host.steps import Step, Steps
from snpbook.spec.eras import Era
from snpbook.spec.uapi_psp import CMD, ISSUE_CMD

if TYPE_CHECKING:
    from snpbook.host.process import Process


class SevDevice(File):
    """An open /dev/sev."""

    device = "sev"

    def __init__(self, ccp: Ccp, era: Era, flags: int) -> None:
        super().__init__(flags)
        self.ccp, self.era = ccp, era

    def __repr__(self) -> str:
        return f"SevDevice({self.ccp!r})"

    def calls(self) -> Mapping[int, Call]:
        return _CALLS

    def unknown(self) -> int:
        return errno.EINVAL if self.ccp.present else errno.ENODEV


def _issue(file: SevDevice, process: Process, argument: Argument) -> Steps[int]:
    """SEV_ISSUE_CMD. ENODEV without a SEV device, EINVAL for a number beyond the era's table."""
    ccp = file.ccp
    check(ccp.present, errno.ENODEV, "a SEV device", "one", "none")
    asked = argument.record(CMD)
    known = file.era.psp_commands
    check(asked.cmd in known, errno.EINVAL, "a sub-command of /dev/sev", f"0..{max(known)}", asked.cmd)
    command = known[asked.cmd]
    argument.fields["cmd"] = command.name
    with (yield from ccp.lock.hold()):
        yield Step(f"/dev/sev {command.name}")
        writable = bool(file.flags & (os.O_WRONLY | os.O_RDWR))
        call = IssuedCommand(ccp, process.space, asked.data, writable, asked.error)
        try:
            HANDLERS[command](call)
        except KernelError:
            argument.store(asked.replace(error=call.error))
            raise
        argument.store(asked.replace(error=call.error))
    return 0


_CALLS = {ISSUE_CMD: Call("SEV_ISSUE_CMD", _issue)}
