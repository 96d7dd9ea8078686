"""Events that a guest meets as it is entered: who may inject them, and which of them comes.

Without further features the VMCB names any event, and its virtual interrupt. RestrictedInjection leaves #HV alone,
AlternateInjection takes both from the VMSA, where a more privileged VMPL of the same guest put them. A virtual
interrupt is looked at on entry only (MODEL). Sources: APM2 15.20, 15.21.4, 15.36.15, 15.36.16.
"""

from __future__ import annotations

from typing import Any

from snpbook.hardware.exits import GuestException
from snpbook.spec.layout import Record
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import EVENT, VINTR_CTRL, EventKind, Vector
from snpbook.spec.vmsa import RFLAGS_IF


def take_event(vmcb: Record, registers: dict[str, Any]) -> tuple[GuestException | None, dict[str, int]]:
    """The event to deliver, and what its delivery changes in the VMCB; in the VMSA it is changed at once.

    An event is valid once: what was injected is cleared, a virtual interrupt that was taken no longer pending.
    """
    features = registers["sev_features"] if vmcb.sev_es else 0
    if features & SevFeatures.ALTERNATE_INJECTION:
        event, control = _event(registers["eventinj"]), registers["vintr_ctrl"]
        registers["eventinj"] = 0
        if event is None:
            event, registers["vintr_ctrl"] = _virtual_interrupt(control, registers["rflags"])
        return event, {}
    event = _event(vmcb.event_injection)
    if event is not None or features & SevFeatures.RESTRICTED_INJECTION:
        return event, {"event_injection": 0}
    event, control = _virtual_interrupt(vmcb.virtual_interrupt, registers["rflags"])
    return event, {} if event is None else {"virtual_interrupt": control}


def _event(word: int) -> GuestException | None:
    event = EVENT.unpack(word.to_bytes(EVENT.size, "little"))
    if not event.valid:
        return None
    vector = Vector.NMI if event.kind == EventKind.NMI else event.vector
    return GuestException(vector, event.error if event.has_error else 0, 0)


def _virtual_interrupt(word: int, rflags: int) -> tuple[GuestException | None, int]:
    """The pending virtual interrupt, if RFLAGS and the task priority let it through, and the control word after."""
    control = VINTR_CTRL.unpack(word.to_bytes(VINTR_CTRL.size, "little"))
    over = control.ignore_tpr or control.priority > control.tpr >> 4
    if not control.irq or not over or control.int_shadow or not rflags & RFLAGS_IF:
        return None, word
    return GuestException(control.vector, 0, 0), word & ~(1 << VINTR_CTRL.fields["irq"].lo)
