"""Alternate injection: software at VMPL0 gives a VMPL below it its interrupts and exceptions, in that one's save area.

The host's own injections into such a VMPL are dropped by hardware. How the host tells VMPL0 of interrupts, and the
events CONFIGURE_INJECTION, DISABLE_ALTERNATE_INJECTION and SPECIFIC_EOI, are not modelled: KVM refuses them by name
(unconfirmed, no published kernel has any). Sources: APM2 15.36.16; COCONUT-SVSM.
"""

from __future__ import annotations

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import EVENT, VINTR_CTRL, EventKind
from snpbook.spec.vmsa import VMSA

_SIZE = 8


async def interrupt(cpu: GuestCpu, vmsa: int, vector: int) -> bool:
    """Have the VMPL with the save area at `vmsa` take an interrupt once it lets one through; False while one waits.

    `ValueError` for a save area without alternate injection.
    """
    control = VINTR_CTRL.unpack(await _field(cpu, vmsa, "vintr_ctrl"))
    if control.irq:
        return False
    await _store(cpu, vmsa, "vintr_ctrl", bytes(control.replace(irq=1, vector=vector, ignore_tpr=1)))
    return True


async def exception(cpu: GuestCpu, vmsa: int, vector: int, error: int | None = None) -> bool:
    """Have it take an exception as it is entered next; False while one waits. `ValueError` as for an interrupt."""
    if EVENT.unpack(await _field(cpu, vmsa, "eventinj")).valid:
        return False
    code = {} if error is None else {"has_error": 1, "error": error}
    await _store(cpu, vmsa, "eventinj", EVENT.pack(vector=vector, kind=EventKind.EXCEPTION, valid=1, **code))
    return True


async def _field(cpu: GuestCpu, vmsa: int, name: str) -> bytes:
    features = await cpu.read(vmsa + VMSA.offset("sev_features"), _SIZE)
    if not int.from_bytes(features, "little") & SevFeatures.ALTERNATE_INJECTION:
        raise ValueError(f"the save area at {vmsa:#x} takes events from the host: it has no alternate injection")
    data: bytes = await cpu.read(vmsa + VMSA.offset(name), _SIZE)
    return data


async def _store(cpu: GuestCpu, vmsa: int, name: str, data: bytes) -> None:
    await cpu.write(vmsa + VMSA.offset(name), data)
