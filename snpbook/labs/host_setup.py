"""The chapter on the host's set-up: a desk with every option, the checklist, and hosts that somebody has broken."""

from __future__ import annotations

import errno

from snpbook.exercises.host_faults import Findings, broken_hosts, findings, verdict
from snpbook.host.checklist import checklist as look_over
from snpbook.host.refusal import KernelError
from snpbook.views import host_state
from snpbook.views.checklist import checklist
from snpbook.views.static import Static
from snpbook.widgets.host_setup import HostDesk


class Lab:
    """A host to set up: `desk` boots it, the other methods look at the host that was booted last."""

    def __init__(self, product: str = "milan", seed: str = "host set-up") -> None:
        self.desk = HostDesk(product, seed)

    def __repr__(self) -> str:
        return f"Lab({self.desk.kernel!r})"

    def checklist(self) -> Static:
        """The rows of the checklist."""
        return checklist(look_over(self.desk.kernel))

    def msrs(self) -> Static:
        """The registers that decide on SNP."""
        return host_state.msrs(self.desk.kernel)

    def cpuid(self) -> Static:
        """The leaves that decide on SNP."""
        return host_state.cpuid(self.desk.kernel)

    def cat(self, path: str) -> str:
        """A file under /proc or /sys."""
        return self.desk.kernel.cat(path).rstrip()

    def verdict(self) -> str:
        """Whether the host makes SNP guests."""
        return verdict(self.desk.kernel)

    def create_vm(self) -> str:
        """What comes of an attempt to create an SNP guest: the guest, or the error number of KVM."""
        try:
            return repr(self.desk.system.create_vm())
        except KernelError as error:
            return errno.errorcode[error.errno or errno.EIO]

    def broken(self, number: int, seed: str = "host_setup.4") -> Findings:
        """What can be found out about one of the broken hosts, counted from 1."""
        return findings(list(broken_hosts(seed).values())[number - 1].boot())
