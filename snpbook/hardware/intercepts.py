"""Who answers an instruction or event of a guest: the core, the guest's own #VC handler, or the hypervisor.

The VMCB's bits and maps say what is intercepted. Without SEV-ES that is an exit; with it the hypervisor sees the
automatic exits alone, and everything else becomes #VC with the exit code as error code: the guest decides what to
tell. Sources: APM2 15.9 to 15.12, 15.35; the maps' formats are from memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpbook.hardware.exits import Exit, GuestException, Hlt, Intercepted, Npf
from snpbook.spec.encryption import KeyId
from snpbook.spec.vmcb import (
    ADVANCED_EXITS,
    ALWAYS_INTERCEPTED_IN_SNP,
    AUTOMATIC_EXITS,
    EXCEPTION_EXITS,
    MSR_MAP_COUNT,
    MSR_MAP_RANGES,
    WRITE_TRAPS,
    ExitCode,
    FaultError,
    Vector,
)

if TYPE_CHECKING:
    from snpbook.hardware.core import GuestCore

Stop = GuestException | Exit
"""What comes instead of an instruction, or right after it (`is_behind`)."""


def intercept(core: GuestCore, code: int, info_1: int = 0, info_2: int = 0) -> Stop | None:
    """What an event becomes by the VMCB's bit for its exit code; None where it is not intercepted."""
    if core.snp and code in ALWAYS_INTERCEPTED_IN_SNP:
        return GuestException(Vector.VC, code, 0, info_1)
    if not int.from_bytes(core.vmcb.intercepts, "little") >> code & 1:
        return None
    if core.sev_es and code not in AUTOMATIC_EXITS:
        return GuestException(Vector.VC, code, 0, info_1)
    return Hlt() if code == ExitCode.HLT else Intercepted(ExitCode(code), info_1, info_2)


def intercept_msr(core: GuestCore, msr: int, *, write: bool) -> Stop | None:
    """RDMSR or WRMSR by the permission map: two bits for each MSR; MSRs outside its ranges are intercepted."""
    for first, offset in MSR_MAP_RANGES:
        if first <= msr < first + MSR_MAP_COUNT and not _bit(
            core, core.vmcb.msrpm_base_pa + offset, 2 * (msr - first) + write
        ):
            return None
    return intercept(core, ExitCode.MSR, int(write))


def intercept_port(core: GuestCore, port: int, size: int, info_1: int) -> Stop | None:
    """IN or OUT by the permission map: one bit for each port that the access touches."""
    if core.snp or any(_bit(core, core.vmcb.iopm_base_pa, number) for number in range(port, port + size)):
        return intercept(core, ExitCode.IOIO, info_1)
    return None


def intercept_exception(core: GuestCore, exception: GuestException) -> Stop:
    """An exception that an instruction raised: itself, noted in the registers, or what its intercept makes of it.

    An intercept of #VC itself is not looked at (MODEL).
    """
    if exception.vector != Vector.VC:
        stop = intercept(core, EXCEPTION_EXITS + exception.vector, exception.error, exception.address)
        if stop is not None:
            return stop
    core.deliver(exception)
    return exception


def nested_fault(core: GuestCore, fault: Npf, address: int) -> Npf | GuestException:
    """A nested page fault on the page at guest virtual `address`: with SEV-ES a reserved bit (MMIO) makes it #VC."""
    if core.sev_es and fault.error & FaultError.RESERVED:
        return GuestException(Vector.VC, ExitCode.NPF, address, int(fault.error))
    return fault


def is_behind(core: GuestCore, exit_: Exit) -> bool:
    """Whether RIP stands behind the instruction that led to an exit: the instruction is done."""
    return exit_.code in ADVANCED_EXITS and (core.sev_es or exit_.code in WRITE_TRAPS)


def _bit(core: GuestCore, base: int, number: int) -> bool:
    """One bit of a permission map in memory."""
    return bool(core.machine.memory.read(KeyId.UNENCRYPTED, base + number // 8, 1)[0] >> number % 8 & 1)
