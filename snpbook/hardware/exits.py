"""How a guest leaves guest mode, and the exceptions that it takes without leaving.

Exits are what the hypervisor gets; an exit may stand for a run of pages. Sources: APM2 15.35 and
appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.spec.refusal import Refusal
from snpbook.spec.vmcb import ExitCode, FaultError


@dataclass(frozen=True, slots=True)
class Npf:
    """A nested page fault at `gpa`; `count` consecutive pages would fault alike."""

    gpa: int
    error: FaultError
    count: int = 1
    code: ExitCode = ExitCode.NPF


@dataclass(frozen=True, slots=True)
class Vmgexit:
    """The guest asks its hypervisor: the request is in the GHCB MSR or in the GHCB."""

    code: ExitCode = ExitCode.VMGEXIT


@dataclass(frozen=True, slots=True)
class Hlt:
    """The vCPU waits."""

    code: ExitCode = ExitCode.HLT


@dataclass(frozen=True, slots=True)
class Shutdown:
    """An exception that the guest did not handle."""

    reason: str
    code: ExitCode = ExitCode.SHUTDOWN


@dataclass(frozen=True, slots=True)
class Invalid:
    """VMRUN refused: `rule` is the consistency check that failed."""

    rule: str
    code: ExitCode = ExitCode.INVALID


Exit = Npf | Vmgexit | Hlt | Shutdown | Invalid


class GuestException(Exception):
    """An exception delivered inside the guest: #GP (13), #PF (14) or #VC (29), with its error code and address."""

    def __init__(self, vector: int, error: int, address: int) -> None:
        super().__init__(f"vector {vector}, error {error:#x}, address {address:#x}")
        self.vector, self.error, self.address = vector, error, address


class HostPageFault(Refusal):
    """#PF on the host: a write to a page that the hypervisor does not own (error bit 31)."""

    def __init__(self, spa: int, rule: str, expected: object, found: object) -> None:
        super().__init__(rule, expected, found, "APM2 15.36.10")
        self.spa = spa
        self.error = FaultError.PRESENT | FaultError.WRITE | FaultError.RMP

    def __str__(self) -> str:
        return f"#PF at {self.spa:#x}, error {int(self.error):#x}: {super().__str__()}"


class GeneralProtection(Refusal):
    """#GP(0) on the host."""


class InvalidOpcode(Refusal):
    """#UD on the host: the instruction does not exist in this mode."""
