"""How a guest ends itself: it tells its hypervisor why, and never goes on, whatever that does.

The reasons are those of the GHCB specification and of Linux. Sources: GHCB specification (termination request); Linux
arch/x86/coco/sev (sev_es_terminate).
"""

from __future__ import annotations

from typing import NoReturn

from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec import ghcb as spec
from snpbook.spec.ghcb import MsrCode
from snpbook.spec.msr import Msr
from snpbook.spec.termination import GENERAL_SET, GUEST_SET, GeneralReason, Reason


class Terminated(ProgramFailure):
    """The guest gave up; `reason` is what it told the hypervisor. Where that runs it again, it just halts."""

    def __init__(self, reason: Reason | GeneralReason, detail: str) -> None:
        super().__init__(f"{reason.name}: {detail}")
        self.reason = reason


async def terminate(cpu: GuestCpu, reason: Reason | GeneralReason, detail: str) -> NoReturn:
    """Ask by the MSR protocol to be ended, and never come back."""
    reason_set = GUEST_SET if isinstance(reason, Reason) else GENERAL_SET
    value = spec.TERMINATE.pack(code=MsrCode.TERMINATE, reason_set=reason_set, reason=reason)
    await cpu.wrmsr(Msr.GHCB, int.from_bytes(value, "little"))
    await cpu.vmgexit()
    raise Terminated(reason, detail)
