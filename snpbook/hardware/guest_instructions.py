"""Instructions of a guest that its hypervisor may have intercepted, on raw registers: operands in, results out.

A program and machine code execute them alike. Each returns None when it is done, else the exception or exit that
came instead of it, or for the automatic exits right after it. Where nothing is intercepted the core answers,
with what the model has: the product's CPUID leaves, a counter for the time, no devices behind ports (MODEL). No
instruction locks the bus, so that the exit BUSLOCK never arises.
Sources: APM3 (instructions), APM2 15.9 to 15.12, 15.34.10, 15.35.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.hardware.cache import Cache
from snpbook.hardware.checks import USER_CPL
from snpbook.hardware.exits import GeneralProtection, GuestException, Vmgexit
from snpbook.hardware.intercepts import Stop, intercept, intercept_msr, intercept_port
from snpbook.spec.cpuid import IDLE_HLT_INTERCEPT, SVM_LEAF
from snpbook.spec.ghcb import IOIO
from snpbook.spec.msr import CANONICAL_MSRS, MSR_FACTS, PAT_TYPES, SAVED_REGISTERS, SEGMENT_BASES, Msr, StateMsr
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import VINTR_CTRL, ExitCode, Vector
from snpbook.spec.vmsa import CR0_PG, CR4_PAE, EFER_LME, EFER_SVME, VMSA

if TYPE_CHECKING:
    from snpbook.hardware.core import GuestCore
    from snpbook.hardware.msr import GuestMsrs, Msrs

_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1
_LOWER_HALF = 1 << 47
"""The size of each half of the canonical addresses."""
_CONTROL = {"cr0": 0, "cr3": 3, "cr4": 4}
_DEBUG = {f"dr{i}": i for i in (0, 1, 2, 3, 6, 7)}
_STATE = frozenset(StateMsr)
_DS = 3
"""The number of the segment that OUTS reads from."""


def cpuid(core: GuestCore) -> Stop | None:
    """CPUID of EAX and ECX."""
    stop = intercept(core, ExitCode.CPUID)
    if stop is None:
        leaf, subleaf = core.registers["rax"] & _LOW, core.registers["rcx"] & _LOW
        found = core.machine.product.cpuid(leaf, subleaf)
        core.registers.update(rax=found.eax, rbx=found.ebx, rcx=found.ecx, rdx=found.edx)
    return stop


def rdmsr(core: GuestCore) -> Stop | None:
    """RDMSR of ECX into EDX:EAX: the guest's own register; where no intercept forbids, its state's or the core's."""
    msr = core.registers["rcx"] & _LOW
    stop = _privileged(core) or (None if _own(msr) else intercept_msr(core, msr, write=False))
    if stop is not None:
        return stop
    try:
        value = _saved(core, StateMsr(msr)) if msr in _STATE else _msrs(core, msr).rdmsr(msr)
    except GeneralProtection:
        return GuestException(Vector.GP, 0, 0)
    core.registers.update(rax=value & _LOW, rdx=value >> 32)
    return None


def wrmsr(core: GuestCore) -> Stop | None:
    """WRMSR of EDX:EAX to ECX, likewise."""
    msr = core.registers["rcx"] & _LOW
    stop = _privileged(core) or (None if _own(msr) else intercept_msr(core, msr, write=True))
    if stop is not None:
        return stop
    value = (core.registers["rdx"] & _LOW) << 32 | core.registers["rax"] & _LOW
    if msr in _STATE:
        return _save(core, StateMsr(msr), value)
    try:
        _msrs(core, msr).wrmsr(msr, value)
    except GeneralProtection:
        return GuestException(Vector.GP, 0, 0)
    return None


def _saved(core: GuestCore, msr: StateMsr) -> int:
    """The value of a register of the guest's state."""
    if msr is StateMsr.TSC:
        return time_stamp(core)
    held = core.registers[SAVED_REGISTERS[msr]]
    return int(held.base if msr in SEGMENT_BASES else held)


def _save(core: GuestCore, msr: StateMsr, value: int) -> Stop | None:
    """Write a register of the guest's state.

    The upper half of TSC_AUX is dropped (Linux arch/x86/kvm/x86.c). A write of TSC has no effect: the model has one
    counter for all cores, and a guest does not move it (MODEL).
    """
    wild = msr in CANONICAL_MSRS and (value + _LOWER_HALF & _ALL) >= 2 * _LOWER_HALF
    if wild or (msr is StateMsr.PAT and not PAT_TYPES.issuperset(value.to_bytes(8, "little"))):
        return GuestException(Vector.GP, 0, 0)
    if msr is StateMsr.EFER:
        return load(core, "efer", value)
    if msr is not StateMsr.TSC:
        name = SAVED_REGISTERS[msr]
        held = core.registers[name]
        core.registers[name] = held.replace(base=value) if msr in SEGMENT_BASES else value & VMSA.fields[name].limit
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


def port_string(core: GuestCore, size: int, is_in: int) -> Stop | None:
    """REP INS or OUTS of RCX elements at RDI or RSI: no device, what comes in reads as ones."""
    port, registers = core.registers["rdx"] & IOIO.fields["port"].limit, core.registers
    info = IOIO.pack(
        port=port, is_in=is_in, is_string=1, rep=1, address_64=1, segment=0 if is_in else _DS, **{f"size_{8 * size}": 1}
    )
    if not registers["rcx"]:
        return None
    stop = intercept_port(core, port, size, int.from_bytes(info, "little"))
    if stop is not None:
        return stop
    data = b"\xff" * (size * registers["rcx"])
    found = core.write(registers["rdi"], data) if is_in else core.read(registers["rsi"], len(data))
    return None if found is None or isinstance(found, bytes) else found


def rdtsc(core: GuestCore) -> Stop | None:
    """RDTSC into EDX:EAX: the machine's counter, scaled and offset for a guest with Secure TSC by its own VMSA."""
    stop = intercept(core, ExitCode.RDTSC)
    if stop is None:
        value = time_stamp(core)
        core.registers.update(rax=value & _LOW, rdx=value >> 32)
    return stop


def rdtscp(core: GuestCore) -> Stop | None:
    """RDTSCP: the counter likewise, and TSC_AUX into ECX."""
    stop = intercept(core, ExitCode.RDTSCP)
    if stop is None:
        value = time_stamp(core)
        core.registers.update(rax=value & _LOW, rdx=value >> 32, rcx=core.registers["tsc_aux"])
    return stop


def rdpmc(core: GuestCore) -> Stop | None:
    """RDPMC: no counter exists (MODEL), #GP where nobody intercepts it."""
    return _privileged(core) or intercept(core, ExitCode.RDPMC) or GuestException(Vector.GP, 0, 0)


def rdrand(core: GuestCore) -> None:
    """RDRAND of 64 bits into RAX; its intercept is not modelled."""
    core.registers["rax"] = int.from_bytes(core.machine.random(8), "little")


def invd(core: GuestCore) -> Stop | None:
    """INVD: where nobody intercepts it, as WBINVD (MODEL: no line is lost)."""
    stop = _privileged(core) or intercept(core, ExitCode.INVD)
    if stop is None and isinstance(core.machine.memory, Cache):
        core.machine.memory.wbinvd()
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


def invlpg(core: GuestCore, address: int) -> Stop | None:
    """INVLPG of a virtual address."""
    stop = _privileged(core) or intercept(core, ExitCode.INVLPG)
    if stop is None:
        core.invlpg(address)
    return stop


def hlt(core: GuestCore) -> Stop | None:
    """HLT: where nobody intercepts it, an interrupt wakes the core at once (MODEL).

    The intercept IDLE_HLT, where the processor has it, takes a HLT without a virtual interrupt or NMI pending, and that
    of HLT itself comes before it (unconfirmed).
    """
    stop = _privileged(core) or intercept(core, ExitCode.HLT)
    idle = core.machine.product.cpuid(SVM_LEAF).edx & IDLE_HLT_INTERCEPT and not _interrupt_pending(core)
    return intercept(core, ExitCode.IDLE_HLT) if stop is None and idle else stop


def _interrupt_pending(core: GuestCore) -> bool:
    """Whether a virtual interrupt or NMI waits, masked or not, in the word that this guest has them in."""
    alternate = core.sev_es and core.registers["sev_features"] & SevFeatures.ALTERNATE_INJECTION
    word = int(core.registers["vintr_ctrl"] if alternate else core.vmcb.virtual_interrupt)
    control = VINTR_CTRL.unpack(word.to_bytes(VINTR_CTRL.size, "little"))
    return bool(control.irq or control.nmi)


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


def sysret(core: GuestCore) -> Stop | None:
    """SYSRET: on at CPL 3; segments and EFER.SCE are left alone (MODEL)."""
    stop = _privileged(core)
    if stop is None:
        core.registers["cpl"] = USER_CPL
    return stop


def syscall(core: GuestCore) -> None:
    """SYSCALL: on at CPL 0, in the same program, which stands for the kernel too (MODEL)."""
    core.registers["cpl"] = 0


def read_dr7(core: GuestCore) -> Stop | None:
    """MOV RAX, DR7."""
    stop = _privileged(core) or intercept(core, ExitCode.READ_DR7)
    if stop is None:
        core.registers["rax"] = core.registers["dr7"]
    return stop


def load(core: GuestCore, name: str, value: int) -> Stop | None:
    """Load a register by its own instruction. Writes of CRn and DRn may be intercepted, those of EFER and CRn trapped.

    A SEV-ES guest cannot clear EFER.SVME. A write that makes long mode with paging and without CR4.PAE is #GP(0).
    """
    code = ExitCode.WRITE_CR0 + _CONTROL[name] if name in _CONTROL else None
    if name in _DEBUG:
        code = ExitCode.WRITE_DR0 + _DEBUG[name]
    stop = None if code is None else intercept(core, code)
    if stop is not None:
        core.registers["rax"] = value  # MOV CRn, RAX or MOV DRn, RAX: who emulates it finds the value there
        return stop
    if (name == "dr7" and value >> 32) or _is_long_without_pae(core, name, value):
        return GuestException(Vector.GP, 0, 0)
    core.load(name, value | EFER_SVME if name == "efer" and core.sev_es else value)
    if name == "efer":
        return intercept(core, ExitCode.EFER_WRITE_TRAP, value)
    return intercept(core, ExitCode.CR0_WRITE_TRAP + _CONTROL[name], value) if name in _CONTROL else None


def _is_long_without_pae(core: GuestCore, name: str, value: int) -> bool:
    efer, cr0, cr4 = (value if name == held else core.registers[held] for held in ("efer", "cr0", "cr4"))
    return bool(name in ("efer", "cr0", "cr4") and efer & EFER_LME and cr0 & CR0_PG and not cr4 & CR4_PAE)


def _privileged(core: GuestCore) -> GuestException | None:
    """#GP(0) above CPL 0, which comes before any intercept."""
    return GuestException(Vector.GP, 0, 0) if core.registers["cpl"] else None


def _own(msr: int) -> bool:
    """Whether a guest has this register for itself and reaches it without its hypervisor."""
    return msr in MSR_FACTS and MSR_FACTS[Msr(msr)].guest


def _msrs(core: GuestCore, msr: int) -> GuestMsrs | Msrs:
    """Who holds a register that is none of the guest's state."""
    return core.msrs if _own(msr) else core.physical
