"""How a guest leaves guest mode, and the exceptions that it takes without leaving.

Exits are what the hypervisor gets; an exit may stand for a run of pages. Sources: APM2 15.35 and
appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.refusal import Refusal
from snpbook.spec.vmcb import ExitCode, FaultError


@dataclass(frozen=True, slots=True)
class Npf:
    """A nested page fault at `gpa`, which stands for `count` faults: of the pages of a run, one every `step`, that have
    no fault of another kind among them. `span` counts them with those that have none; 0 where all fault.
    """

    gpa: int
    error: FaultError
    count: int = 1
    step: int = 1
    """1 for consecutive pages, 512 for the first ones of 2 MB each."""
    span: int = 0
    code: ExitCode = ExitCode.NPF

    @property
    def gfns(self) -> range:
        """The guest pages of the run."""
        first = self.gpa >> PAGE_SHIFT
        return range(first, first + (self.span or self.count) * self.step, self.step)


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
class Intercepted:
    """Any other intercepted instruction, event or exception, with what EXITINFO1 and 2 say of it."""

    code: ExitCode
    info_1: int = 0
    info_2: int = 0


@dataclass(frozen=True, slots=True)
class Invalid:
    """VMRUN refused: `rule` is the check that failed. With code BUSY or IDLE_REQUIRED another try may succeed."""

    rule: str
    code: ExitCode = ExitCode.INVALID


Exit = Npf | Vmgexit | Hlt | Shutdown | Intercepted | Invalid


class GuestException(Exception):
    """An exception or event delivered inside the guest, with its error code and address.

    Raised by the core: #UD (6), #GP (13), #PF (14), #VC (29). Injected by the hypervisor: whatever it names. `info`
    is what decoding its instruction tells a #VC handler, in the form of EXITINFO1; `instruction` are the bytes at the
    interrupted RIP, which a handler finds in the guest's own memory, and `cpl` is what its code segment said.
    """

    instruction: bytes = b""
    cpl: int = 0

    def __init__(self, vector: int, error: int, address: int, info: int = 0) -> None:
        super().__init__(vector, error, address, info)
        self.vector, self.error, self.address, self.info = vector, error, address, info

    def __str__(self) -> str:
        return f"vector {self.vector}, error {self.error:#x}, address {self.address:#x}"


class NotModelled(ValueError):
    """A state that a guest may reach and the model cannot run: it ends the vCPU, and LIMITATIONS.md names it."""


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
