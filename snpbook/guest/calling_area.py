"""The calling area: how a guest at a less privileged VMPL has its SVSM do what only VMPL0 may.

A call counts as served only where the SVSM has taken `call_pending` back: a host that does not run it cannot answer in
its place, and what the registers then hold is nobody's word. Sources: Secure VM Service Module for SEV-SNP Guests
(58019), chapter 5; Linux arch/x86/coco/sev/core.c (svsm_perform_call_protocol, svsm_setup), shared.c.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.guest.layout import Layout
from snpbook.guest.termination import terminate
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec.ghcb import MSR_CODE_MASK, MSR_RUN_VMPL, MsrCode
from snpbook.spec.launch import SECRETS_PAGE
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.svsm import CALLING_AREA, PROTOCOL_SHIFT, Core, Protocol, SvsmCode
from snpbook.spec.termination import GeneralReason, Reason

_RUN_VMPL0 = int.from_bytes(MSR_RUN_VMPL.pack(code=MsrCode.RUN_VMPL_REQUEST, vmpl=0), "little")
_RETRY = (SvsmCode.BUSY, SvsmCode.INCOMPLETE)
_AGAIN = 15
"""How often a call is made again (MODEL: Linux leaves that to who calls)."""


class SvsmRefused(ProgramFailure):
    """The SVSM answered a call with an error, and the registers beside it."""

    def __init__(self, answer: Answer, protocol: Protocol, number: int) -> None:
        super().__init__(f"{protocol.name} call {number} answered {answer.code:#x}")
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Answer:
    """RAX and the registers beside it after a call."""

    code: int
    rcx: int
    rdx: int
    r8: int


@dataclass(frozen=True, slots=True)
class CallingArea:
    """The page at guest address `gpa`, private, by which a processor calls; `vmpl` is its own."""

    cpu: GuestCpu
    gpa: int
    vmpl: int

    async def ask(
        self, protocol: Protocol, number: int, rcx: int = 0, rdx: int = 0, r8: int = 0, r9: int = 0
    ) -> Answer:
        """One call, a few times again where the SVSM has no time: its answer, whatever that is.

        Ends the guest where the host does not run the SVSM, or something else than it.
        """
        registers = {"rax": protocol << PROTOCOL_SHIFT | number, "rcx": rcx, "rdx": rdx, "r8": r8, "r9": r9}
        found = await self._once(registers)
        for _ in range(_AGAIN):
            if found.code not in _RETRY:
                break
            found = await self._once(registers)
        return found

    async def _once(self, registers: dict[str, int]) -> Answer:
        await self.cpu.write(self.gpa, b"\1")
        await self.cpu.wrmsr(Msr.GHCB, _RUN_VMPL0)
        await self.cpu.load(**registers)
        await self.cpu.vmgexit()
        found = Answer(*await self.cpu.look("rax", "rcx", "rdx", "r8"))
        pending = await self.cpu.exchange(self.gpa, b"\0")
        told = await self.cpu.rdmsr(Msr.GHCB)
        if pending != b"\0" or told & MSR_CODE_MASK != MsrCode.RUN_VMPL or told >> MSR_RUN_VMPL.fields["vmpl"].lo:
            await terminate(self.cpu, GeneralReason.GENERAL, f"the host does not run the SVSM: {told:#x}")
        return found

    async def call(self, protocol: Protocol, number: int, *registers: int) -> Answer:
        """A call that is to succeed; `SvsmRefused` where it does not."""
        found = await self.ask(protocol, number, *registers)
        if found.code != SvsmCode.SUCCESS:
            raise SvsmRefused(found, protocol, number)
        return found

    @property
    def buffer(self) -> int:
        """Where in the page the guest puts what a call is about."""
        return self.gpa + CALLING_AREA.offset("buffer")


async def find(cpu: GuestCpu, place: Layout) -> CallingArea | None:
    """The calling area of a guest that does not run at VMPL0: None for one that does, which has no SVSM.

    Only VMPL0 may change what VMPL1 can do with a page. Ends the guest where the secrets page tells of no SVSM, or of
    one that cannot be.
    """
    codes = await cpu.rmpadjust(place.tables, 1, vmpl=1, permissions=0)
    if codes[0] == RmpCode.SUCCESS:
        return None
    secrets = SECRETS_PAGE.unpack(await cpu.read(place.secrets, PAGE_SIZE))
    if not secrets.svsm_size:
        await terminate(cpu, Reason.NO_SVSM, f"RMPADJUST answered {RmpCode(codes[0]).name}, and there is no SVSM")
    if not secrets.svsm_guest_vmpl:
        await terminate(cpu, Reason.SVSM_VMPL0, "the SVSM says that the guest runs at VMPL0")
    if secrets.svsm_caa % PAGE_SIZE:
        await terminate(cpu, Reason.SVSM_CAA, f"the calling area at {secrets.svsm_caa:#x} is no page")
    return CallingArea(cpu, secrets.svsm_caa, secrets.svsm_guest_vmpl)


async def attached(cpu: GuestCpu, place: Layout) -> CallingArea | None:
    """The calling area of a kernel that has booted, at the page that it chose; None for one without an SVSM."""
    secrets = SECRETS_PAGE.unpack(await cpu.read(place.secrets, PAGE_SIZE))
    return CallingArea(cpu, place.calling_area, secrets.svsm_guest_vmpl) if secrets.svsm_size else None


async def remapped(area: CallingArea, gpa: int) -> CallingArea:
    """The same at a page of the kernel's own choice, as a kernel wants it; ends the guest where that is refused."""
    found = await area.ask(Protocol.CORE, Core.REMAP_CA, gpa)
    if found.code != SvsmCode.SUCCESS:
        await terminate(area.cpu, Reason.SVSM_CA_REMAP_FAIL, f"REMAP_CA answered {found.code:#x}")
    return CallingArea(area.cpu, gpa, area.vmpl)
