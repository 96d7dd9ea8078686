"""Events that come between any two instructions: #HV with its doorbell page, NMIs, and vectors that are an attack.

Under restricted injection the host can inject #HV alone, and what it is about stands in a page that the host writes:
the guest takes the word once, in one step, and believes of it that an interrupt came, never that an exception did.
Without it the host injects what it likes; Linux then ends where int 0x80 comes from outside. The series of December
2022 (v7) left all of this out. Sources: Linux patches for #HV; Linux arch/x86/entry/common.c (int 0x80),
arch/x86/kernel/nmi.c, arch/x86/coco/sev/core.c (backup GHCB).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

from snpbook.guest.ghcb import Ghcb
from snpbook.guest.protections import Protections
from snpbook.guest.termination import terminate
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.spec.ghcb import Doorbell, Nae
from snpbook.spec.injection import DOORBELL, EOI_MSR, FIRST_INTERRUPT, PENDING_SIZE, SYSTEM_CALL
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.termination import GeneralReason
from snpbook.spec.vmcb import Vector
from snpbook.spec.vmsa import RFLAGS_IF

Act = Callable[[GuestCpu, int], Awaitable[None]]
"""What a kernel does with a vector."""
_NO_EOI = DOORBELL.offset("no_eoi_required")
_IDLE, _BUSY = DOORBELL.record(), DOORBELL.record(no_further_signal=1)


async def nothing(cpu: GuestCpu, vector: int) -> None:
    """A kernel that has nothing to do for an interrupt."""


@asynccontextmanager
async def kept(ghcb: Ghcb) -> AsyncIterator[None]:
    """Keep a GHCB and its MSR, which the interrupted code may be using, while a handler uses them (backup GHCB)."""
    page, value = await ghcb.cpu.read(ghcb.gpa, PAGE_SIZE), await ghcb.cpu.rdmsr(Msr.GHCB)
    yield
    await ghcb.cpu.write(ghcb.gpa, page)
    await ghcb.cpu.wrmsr(Msr.GHCB, value)


@dataclass(slots=True)
class HvHandler:
    """The handler of vector 28 on one processor, whose doorbell page is the shared page at `page`.

    Interrupts go to `act`, and wait while RFLAGS.IF is clear; `taken` has their vectors. `dropped` are vectors of
    exceptions and of system calls, which are no interrupts.
    """

    ghcb: Ghcb
    page: int
    act: Act = nothing
    taken: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    async def __call__(self, cpu: GuestCpu, exception: GuestException) -> bool:
        if not (await _protections(cpu)).features & SevFeatures.RESTRICTED_INJECTION:
            await _panic(cpu, "#HV, in a guest without restricted injection")
        await self.look(cpu)
        return True

    async def look(self, cpu: GuestCpu) -> None:
        """Take what is pending, until nothing is; the host need not ring meanwhile."""
        (rflags,) = await cpu.look("rflags")
        async with kept(self.ghcb):
            while rflags & RFLAGS_IF:
                found = await self._swap(cpu, _BUSY)
                if not (found.vector or found.nmi or found.machine_check):
                    found = await self._swap(cpu, _IDLE)
                    if not (found.vector or found.nmi or found.machine_check):
                        return
                await self._urgent(cpu, found)
                if found.vector:
                    await self._interrupt(cpu, found.vector)
            waiting = _read(await cpu.read(self.page, PENDING_SIZE))
            await self._urgent(cpu, await self._swap(cpu, waiting.replace(nmi=0, machine_check=0)))

    async def enable(self, cpu: GuestCpu) -> None:
        """Let interrupts come: RFLAGS.IF, and a look at those that have come while it was clear."""
        (rflags,) = await cpu.look("rflags")
        await cpu.load(rflags=rflags | RFLAGS_IF)
        await self.look(cpu)

    async def disable(self, cpu: GuestCpu) -> None:
        """Let interrupts wait."""
        (rflags,) = await cpu.look("rflags")
        await cpu.load(rflags=rflags & ~RFLAGS_IF)

    async def _swap(self, cpu: GuestCpu, pending: Record) -> Record:
        """Leave another word, and take the one that was there."""
        return _read(await cpu.exchange(self.page, bytes(pending)[:PENDING_SIZE]))

    async def _urgent(self, cpu: GuestCpu, found: Record) -> None:
        """What does not ask for RFLAGS.IF."""
        if found.machine_check:
            await terminate(cpu, GeneralReason.GENERAL, "a machine check")
        if found.nmi:
            await self.act(cpu, Vector.NMI)

    async def _interrupt(self, cpu: GuestCpu, vector: int) -> None:
        if vector < FIRST_INTERRUPT or vector == SYSTEM_CALL:
            self.dropped.append(vector)
            return
        self.taken.append(vector)
        await self.act(cpu, vector)
        if not (await cpu.exchange(self.page + _NO_EOI, b"\0"))[0] & 1:
            await self.ghcb.call(Nae.MSR, 1, rcx=EOI_MSR, rax=0, rdx=0)


def install(ghcb: Ghcb, doorbell: int | None = None) -> None:
    """The handlers of a processor's kernel, before anything can come in: they find out themselves what the guest is.

    A processor without a doorbell page of its own takes no #HV.
    """
    rung = no_doorbell if doorbell is None else HvHandler(ghcb, doorbell)
    ghcb.cpu.set_handler(Vector.HV, rung)
    ghcb.cpu.set_handler(Vector.NMI, NmiHandler(ghcb))
    ghcb.cpu.set_handler(SYSTEM_CALL, external_system_call)


async def listen(ghcb: Ghcb, page: int) -> None:
    """Register a shared page as the doorbell; the hypervisor must name the very same."""
    answer = await ghcb.call(Nae.HV_DOORBELL, Doorbell.SET, page)
    if answer.sw_exit_info_2 != page:
        await terminate(ghcb.cpu, GeneralReason.GENERAL, f"the doorbell page is answered {answer.sw_exit_info_2:#x}")


@dataclass(frozen=True, slots=True)
class NmiHandler:
    """The handler of NMIs for a guest without restricted injection: a #VC in it must not cost another's GHCB."""

    ghcb: Ghcb
    act: Act = nothing

    async def __call__(self, cpu: GuestCpu, exception: GuestException) -> bool:
        if not (await _protections(cpu)).sev_es:
            await self.act(cpu, Vector.NMI)
            return True
        async with kept(self.ghcb):
            await self.act(cpu, Vector.NMI)
            await self.ghcb.nmi_complete()
        return True


async def no_doorbell(cpu: GuestCpu, exception: GuestException) -> bool:
    """#HV where nobody has registered a page: it is not told what it is about."""
    await _panic(cpu, "#HV, on a processor without a doorbell page")


async def external_system_call(cpu: GuestCpu, exception: GuestException) -> bool:
    """The handler of int 0x80 since Linux 6.7: no program of the model raises it itself, and so the kernel ends."""
    await _panic(cpu, "an interrupt from outside came in as system call 0x80")


async def _panic(cpu: GuestCpu, why: str) -> NoReturn:
    if (await _protections(cpu)).sev_es:
        await terminate(cpu, GeneralReason.GENERAL, why)
    raise ProgramFailure(why)


async def _protections(cpu: GuestCpu) -> Protections:
    return Protections(await cpu.rdmsr(Msr.SEV_STATUS))


def _read(word: bytes) -> Record:
    return DOORBELL.unpack(word.ljust(DOORBELL.size, b"\0"))
