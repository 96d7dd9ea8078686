"""Instructions of a guest that its hypervisor may have intercepted, on raw registers: operands in, results out.

A program and machine code execute them alike. Each returns None when it is done, else the exception or exit that
came instead of it, or for the automatic exits right after it. Where nothing is intercepted the core answers,
with what the model has: the product's CPUID leaves, a counter for the time, no devices behind ports (MODEL).
Sources: APM3 (instructions), APM2 15.9 to 15.12, 15.34.10, 15.35.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.hardware.cache import Cache
from snpbook.hardware.exits import GeneralProtection, GuestException, Vmgexit
from snpbook.hardware.intercepts import Stop, intercept, intercept_msr, intercept_port
from snpbook.spec.ghcb import IOIO
from snpbook.spec.msr import MSR_FACTS, Msr
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import ExitCode, Vector
from snpbook.spec.vmsa import EFER_SVME

if TYPE_CHECKING:
    from snpbook.hardware.core import GuestCore

_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1
_CONTROL = {"cr0": 0, "cr3": 3, "cr4": 4}
_DEBUG = {f"dr{i}": i for i in (0, 1, 2, 3, 6, 7)}


def cpuid(core: GuestCore) -> Stop | None:
    """CPUID of EAX and ECX."""
    stop = intercept(core, ExitCode.CPUID)
    if stop is None:
        leaf, subleaf = core.registers["rax"] & _LOW, core.registers["rcx"] & _LOW
        found = core.machine.product.cpuid(leaf, subleaf)
        core.registers.update(rax=found.eax, rbx=found.ebx, rcx=found.ecx, rdx=found.edx)
    return stop


def rdmsr(core: GuestCore) -> Stop | None:
    """RDMSR of ECX into EDX:EAX: the guest's own register, or, where no intercept forbids it, the core's."""
    msr = core.registers["rcx"] & _LOW
    own = _own(msr)
    stop = _privileged(core) or (None if own else intercept_msr(core, msr, write=False))
    if stop is not None:
        return stop
    try:
        value = core.msrs.rdmsr(msr) if own else core.physical.rdmsr(msr)
    except GeneralProtection:
        return GuestException(Vector.GP, 0, 0)
    core.registers.update(rax=value & _LOW, rdx=value >> 32)
    return None


def wrmsr(core: GuestCore) -> Stop | None:
    """WRMSR of EDX:EAX to ECX, likewise."""
    msr = core.registers["rcx"] & _LOW
    own = _own(msr)
    stop = _privileged(core) or (None if own else intercept_msr(core, msr, write=True))
    if stop is not None:
        return stop
    value = (core.registers["rdx"] & _LOW) << 32 | core.registers["rax"] & _LOW
    try:
        (core.msrs if own else core.physical).wrmsr(msr, value)
    except GeneralProtection:
        return GuestException(Vector.GP, 0, 0)
    return None


def port_in(core: GuestCore, size: int) -> Stop | None:
    """IN of `size` bytes from port DX: no device answers, the bus reads as ones."""
    stop = _port(core, size, is_in=1)
    if stop is None:
        core.registers["rax"] = (1 << 8 * size) - 1
    return stop


def port_out(core: GuestCore, size: int) -> Stop | None:
    """OUT of `size` bytes of RAX to port DX: no device listens."""
    return _port(core, size, is_in=0)


def _port(core: GuestCore, size: int, is_in: int) -> Stop | None:
    port = core.registers["rdx"] & IOIO.fields["port"].limit
    info = IOIO.pack(port=port, is_in=is_in, address_64=1, **{f"size_{8 * size}": 1})
    return intercept_port(core, port, size, int.from_bytes(info, "little"))


def rdtsc(core: GuestCore) -> Stop | None:
    """RDTSC into EDX:EAX: the machine's counter, scaled and offset for a guest with Secure TSC by its own VMSA."""
    stop = intercept(core, ExitCode.RDTSC)
    if stop is None:
        value = time_stamp(core)
        core.registers.update(rax=value & _LOW, rdx=value >> 32)
    return stop


def time_stamp(core: GuestCore) -> int:
    """The guest's time-stamp counter. With Secure TSC the VMSA scales it (a number of 8.32 bits) and moves it."""
    if core.registers["sev_features"] & SevFeatures.SECURE_TSC and core.sev_es:
        scaled = core.machine.tsc * int(core.registers["guest_tsc_scale"]) >> 32
        return scaled + int(core.registers["guest_tsc_offset"]) & _ALL
    return core.machine.tsc + int(core.vmcb.tsc_offset) & _ALL


def wbinvd(core: GuestCore) -> Stop | None:
    """WBINVD: write back and drop all lines."""
    stop = _privileged(core) or intercept(core, ExitCode.WBINVD)
    if stop is None and isinstance(core.machine.memory, Cache):
        core.machine.memory.wbinvd()
    return stop


def hlt(core: GuestCore) -> Stop | None:
    """HLT: where nobody intercepts it, an interrupt wakes the core at once (MODEL)."""
    return _privileged(core) or intercept(core, ExitCode.HLT)


def pause(core: GuestCore) -> Stop | None:
    """PAUSE; the hypervisor's filter counts are not modelled: an intercept takes each."""
    return intercept(core, ExitCode.PAUSE)


def monitor(core: GuestCore) -> Stop | None:
    """MONITOR; the address range is not watched (MODEL)."""
    return _privileged(core) or intercept(core, ExitCode.MONITOR)


def mwait(core: GuestCore) -> Stop | None:
    """MWAIT: where nobody intercepts it, the wait is over at once (MODEL)."""
    return _privileged(core) or intercept(core, ExitCode.MWAIT)


def vmgexit(core: GuestCore) -> Stop:
    """VMGEXIT; in a guest without SEV-ES the same bytes are VMMCALL."""
    return Vmgexit() if core.sev_es else vmmcall(core)


def vmmcall(core: GuestCore) -> Stop:
    """VMMCALL, which only a hypervisor implements: #UD where none intercepts it."""
    return intercept(core, ExitCode.VMMCALL) or GuestException(Vector.UD, 0, 0)


def read_dr7(core: GuestCore) -> Stop | None:
    """MOV RAX, DR7."""
    stop = _privileged(core) or intercept(core, ExitCode.READ_DR7)
    if stop is None:
        core.registers["rax"] = core.registers["dr7"]
    return stop


def load(core: GuestCore, name: str, value: int) -> Stop | None:
    """Load a register by its own instruction. Writes of CRn and DRn may be intercepted, those of EFER and CRn trapped.

    A SEV-ES guest cannot clear EFER.SVME.
    """
    code = ExitCode.WRITE_CR0 + _CONTROL[name] if name in _CONTROL else None
    if name in _DEBUG:
        code = ExitCode.WRITE_DR0 + _DEBUG[name]
    stop = None if code is None else intercept(core, code)
    if stop is not None:
        core.registers["rax"] = value  # MOV CRn, RAX or MOV DRn, RAX: who emulates it finds the value there
        return stop
    if name == "dr7" and value >> 32:
        return GuestException(Vector.GP, 0, 0)
    core.load(name, value | EFER_SVME if name == "efer" and core.sev_es else value)
    if name == "efer":
        return intercept(core, ExitCode.EFER_WRITE_TRAP, value)
    return intercept(core, ExitCode.CR0_WRITE_TRAP + _CONTROL[name], value) if name in _CONTROL else None


def _privileged(core: GuestCore) -> GuestException | None:
    """#GP(0) above CPL 0, which comes before any intercept."""
    return GuestException(Vector.GP, 0, 0) if core.registers["cpl"] else None


def _own(msr: int) -> bool:
    """Whether a guest has this register for itself and reaches it without its hypervisor."""
    return msr in MSR_FACTS and MSR_FACTS[Msr(msr)].guest
