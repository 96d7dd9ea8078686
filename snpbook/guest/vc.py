"""The #VC handler: what a guest does where an instruction would have told the hypervisor its registers.

The exit code comes from outside, so it counts only where the instruction at RIP is one that can cause it; every other
is an attack or a bug, and ends the guest. A handler asks through the GHCB with the fields that the event needs, puts
checked results into the registers, and the instruction is done. A page that is not validated is never validated here.
Sources: Linux arch/x86/coco/sev/core.c and shared.c (vc_handle_exitcode, vc_check_opcode_bytes); GHCB specification.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from snpbook.guest import cpuid, msr_protocol, vc_io
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.process import Signal
from snpbook.guest.termination import terminate
from snpbook.guest.vc_io import Registers, Result
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec import cpuid as leaves
from snpbook.spec.ghcb import Nae
from snpbook.spec.msr import Msr, StateMsr
from snpbook.spec.opcodes import CallInstruction, Opcode
from snpbook.spec.sev_features import SEV_STATUS_SHIFT, SevFeatures
from snpbook.spec.termination import GeneralReason, Reason
from snpbook.spec.vmcb import ExitCode, Vector
from snpbook.spec.vmsa import CR4_OSXSAVE, DR7_RESET

_SAVED = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi")
_FOUR = ("rax", "rbx", "rcx", "rdx")
_LOW = (1 << 32) - 1
_FORWARDED = {ExitCode.DB_EXCEPTION: Vector.DB, ExitCode.AC_EXCEPTION: Vector.AC}
"""Exceptions that are handed on before the GHCB is touched."""


@dataclass(slots=True)
class VcHandler:
    """The handler of one processor, called with the exception.

    Without a GHCB it serves CPUID alone, as a reset vector does: from the page, or by the MSR protocol. DR7 is kept
    here, as the guest believes it to be.
    """

    place: Layout
    c_bit: int | None = None
    ghcb: Ghcb | None = None
    dr7: int = DR7_RESET
    status: int = 0
    """SEV_STATUS, as read when it was first needed."""

    async def __call__(self, cpu: GuestCpu, exception: GuestException) -> bool | GuestException:
        """Do the interrupted instruction: True, or the exception that it raises. Terminates where it cannot."""
        if exception.error in _FORWARDED:
            return GuestException(_FORWARDED[ExitCode(exception.error)], 0, exception.address)
        known = _HANDLERS.get(exception.error)
        if exception.cpl:
            _check_user(exception, known)
        if known is None:
            await terminate(cpu, GeneralReason.GENERAL, f"#VC {exception.error:#x} is none that a guest handles")
        instructions, act = known
        if exception.instruction not in instructions:
            found = exception.instruction.hex(" ") or "none"
            await terminate(cpu, GeneralReason.GENERAL, f"#VC {exception.error:#x} at the instruction {found}")
        if exception.cpl and exception.error == ExitCode.IOIO:
            return GuestException(Vector.GP, 0, 0)
        if self.ghcb is None and exception.error != ExitCode.CPUID:
            await terminate(cpu, GeneralReason.GENERAL, f"#VC {exception.error:#x} before there is a GHCB")
        registers = dict(zip(_SAVED, await cpu.look(*_SAVED), strict=True))
        outcome: bool | GuestException = True
        self.status = self.status or await cpu.rdmsr(Msr.SEV_STATUS)
        try:
            registers |= await act(self, cpu, exception, registers)
        except GuestException as refused:
            outcome = refused
        await cpu.load(**registers)
        return outcome

    def has(self, feature: SevFeatures) -> bool:
        """Whether SEV_STATUS has a feature on."""
        return bool(self.status >> SEV_STATUS_SHIFT & feature)

    @property
    def channel(self) -> Ghcb:
        """The GHCB, where a handler is only reached with one."""
        assert self.ghcb is not None
        return self.ghcb


def _check_user(exception: GuestException, known: Known | None) -> None:
    """A program of the user is no reason to end the guest: it gets SIGBUS for what a kernel's code would end for.

    It has no I/O bitmap, so that ports are #GP; MMIO is the kernel's alone.
    """
    mine = known is not None and exception.instruction in known[0]
    if not mine or exception.error == ExitCode.NPF:
        raise Signal(f"SIGBUS: #VC {exception.error:#x} at CPL {exception.cpl}")


async def _cpuid(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    leaf, subleaf = registers["rax"] & _LOW, registers["rcx"] & _LOW

    async def ask(number: int, index: int) -> leaves.Registers:
        if vc.ghcb is None:
            return await msr_protocol.cpuid(cpu, number)
        return await _cpuid_by_page(vc.ghcb, number, index)

    if vc.has(SevFeatures.SNP_ACTIVE):
        found = await cpuid.look_up(cpu, await cpuid.read_table(cpu, vc.place.cpuid), leaf, subleaf, ask)
    elif vc.ghcb is None and subleaf:
        await terminate(cpu, GeneralReason.GENERAL, f"CPUID {leaf:#x} subleaf {subleaf} before there is a GHCB")
    else:
        found = await ask(leaf, subleaf)
    if vc.ghcb is None and cpuid.hides_sev(leaf, found.eax):
        await terminate(cpu, GeneralReason.GENERAL, f"CPUID {leaf:#x} denies SEV, in a guest that takes #VC")
    return dict(zip(_FOUR, found, strict=True))


async def _cpuid_by_page(ghcb: Ghcb, leaf: int, subleaf: int) -> leaves.Registers:
    """The hypervisor's answer; it gets XCR0 where the answer depends on it."""
    more = {}
    if leaf == leaves.XSAVE_LEAF:
        cr4, xcr0 = await ghcb.cpu.look("cr4", "xcr0")
        more["xcr0"] = xcr0 if cr4 & CR4_OSXSAVE else leaves.XCR0_BASIC[0]
    answer = await ghcb.call(Nae.CPUID, rax=leaf, rcx=subleaf, needs=_FOUR, reason=Reason.CPUID_HV, **more)
    return leaves.Registers(*(getattr(answer, name) & _LOW for name in _FOUR))


async def _msr(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    """RDMSR and WRMSR; the address of a calling area is answered without the hypervisor, and never written.

    So is the time-stamp counter under Secure TSC, by RDTSC.
    """
    number, write = registers["rcx"] & _LOW, exception.instruction == Opcode.WRMSR.value
    if number == Msr.SVSM_CAA:
        area = vc.channel.area
        gpa = area.gpa if area else 0
        return {} if write else {"rax": gpa & _LOW, "rdx": gpa >> 32}
    if vc.has(SevFeatures.SECURE_TSC) and number == StateMsr.TSC:
        now = 0 if write else await cpu.rdtsc()
        return {} if write else {"rax": now & _LOW, "rdx": now >> 32}
    if vc.has(SevFeatures.SECURE_TSC) and number == Msr.GUEST_TSC_FREQ:
        await terminate(cpu, Reason.SECURE_TSC, f"MSR {number:#x} is intercepted in spite of Secure TSC")
    if write:
        await vc.channel.call(Nae.MSR, 1, rcx=number, rax=registers["rax"] & _LOW, rdx=registers["rdx"] & _LOW)
        return {}
    answer = await vc.channel.call(Nae.MSR, 0, rcx=number, needs=("rax", "rdx"))
    return {"rax": answer.rax & _LOW, "rdx": answer.rdx & _LOW}


async def _port(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    return await vc_io.port(vc.channel, exception.instruction, registers)


async def _mmio(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    assert vc.c_bit is not None
    return await vc_io.mmio(vc.channel, vc.c_bit, exception.instruction, exception.address, registers)


async def _time(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    """RDTSC, RDTSCP: with Secure TSC the hypervisor must not intercept them."""
    if vc.has(SevFeatures.SECURE_TSC):
        await terminate(cpu, Reason.SECURE_TSC, "the time-stamp counter is intercepted in spite of Secure TSC")
    event = Nae(exception.error)
    names = ("rax", "rdx", "rcx") if event is Nae.RDTSCP else ("rax", "rdx")
    answer = await vc.channel.call(event, needs=names)
    return {name: getattr(answer, name) & _LOW for name in names}


async def _rdpmc(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    answer = await vc.channel.call(Nae.RDPMC, rcx=registers["rcx"] & _LOW, needs=("rax", "rdx"))
    return {"rax": answer.rax & _LOW, "rdx": answer.rdx & _LOW}


async def _vmmcall(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    """A hypercall with KVM's registers: its number in RAX, arguments in RBX, RCX, RDX and RSI."""
    arguments = {name: registers[name] for name in ("rax", "rbx", "rcx", "rdx", "rsi")}
    fields: dict[str, Any] = {"cpl": exception.cpl, **arguments}
    answer = await vc.channel.call(Nae.VMMCALL, needs=("rax",), **fields)
    return {"rax": answer.rax}


async def _wbinvd(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    await vc.channel.call(Nae.WBINVD)
    return {}


async def _nothing(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    """MONITOR, MWAIT: as if they had been done; the hypervisor hears of no address."""
    return {}


async def _read_dr7(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    await _require_no_debug_swap(vc, cpu)
    return {"rax": vc.dr7}


async def _write_dr7(vc: VcHandler, cpu: GuestCpu, exception: GuestException, registers: Registers) -> Result:
    await _require_no_debug_swap(vc, cpu)
    value = registers["rax"]
    if value > _LOW:
        raise GuestException(Vector.GP, 0, 0)
    await vc.channel.call(Nae.WRITE_DR7, 0, rax=value | DR7_RESET)
    vc.dr7 = value | DR7_RESET
    return {}


async def _require_no_debug_swap(vc: VcHandler, cpu: GuestCpu) -> None:
    if vc.has(SevFeatures.DEBUG_VIRTUALIZATION):
        await terminate(cpu, GeneralReason.GENERAL, "DR7 is intercepted though the processor swaps it")


Act = Callable[[VcHandler, GuestCpu, GuestException, Registers], Awaitable[Result]]
Known = tuple[Collection[bytes], Act]
_HANDLERS: Mapping[int, Known] = {
    ExitCode.READ_DR7: ({Opcode.READ_DR7.value}, _read_dr7),
    ExitCode.WRITE_DR7: ({Opcode.WRITE_DR7.value}, _write_dr7),
    ExitCode.RDTSC: ({Opcode.RDTSC.value}, _time),
    ExitCode.RDPMC: ({Opcode.RDPMC.value}, _rdpmc),
    ExitCode.CPUID: ({Opcode.CPUID.value}, _cpuid),
    ExitCode.IOIO: (vc_io.PORT_INSTRUCTIONS, _port),
    ExitCode.MSR: ({Opcode.RDMSR.value, Opcode.WRMSR.value}, _msr),
    ExitCode.VMMCALL: ({CallInstruction.VMMCALL.value}, _vmmcall),
    ExitCode.RDTSCP: ({Opcode.RDTSCP.value}, _time),
    ExitCode.WBINVD: ({Opcode.WBINVD.value}, _wbinvd),
    ExitCode.MONITOR: ({Opcode.MONITOR.value}, _nothing),
    ExitCode.MWAIT: ({Opcode.MWAIT.value}, _nothing),
    ExitCode.NPF: (vc_io.MMIO_INSTRUCTIONS, _mmio),
}
"""Exit codes with the instructions that cause them. INVD and PAGE_NOT_VALIDATED are not among them."""
