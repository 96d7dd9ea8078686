"""Restricted injection: what waits for a vCPU is told by its doorbell page, and #HV is all that is injected.

One vector at a time stands in the page; the next comes when the guest has ended that. `send` and `send_nmi` are where
devices of this host come in: no interrupt controller routes anything (MODEL), and guests without restricted injection
get nothing. No kernel that is published upstream has this: unconfirmed, as all of the era svsm-host. Source: GHCB
specification (through Linux patches).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snpbook.host.refusal import KernelError, check
from snpbook.spec.injection import DOORBELL, FIRST_INTERRUPT
from snpbook.spec.layout import Record
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.vmcb import EVENT, EventKind, Vector

if TYPE_CHECKING:
    from snpbook.host.kvm.vcpu import Vcpu

_VECTORS = 256
_HEAD = DOORBELL.offset("no_eoi_required") + 1


@dataclass(slots=True)
class Interrupts:
    """What waits for a vCPU, and what its guest has been shown and has not ended."""

    waiting: set[int] = field(default_factory=set)
    nmi: bool = False
    in_service: int | None = None
    quietly: bool = False
    """Whether the guest ends it in its page alone."""


def send(vcpu: Vcpu, vector: int) -> None:
    """An interrupt for a vCPU. EINVAL for a vector of exceptions, EOPNOTSUPP without restricted injection."""
    _check(vcpu)
    good = FIRST_INTERRUPT <= vector < _VECTORS
    check(good, errno.EINVAL, "the vector of an interrupt", f"{FIRST_INTERRUPT} to {_VECTORS - 1}", vector)
    vcpu.interrupts.waiting.add(vector)


def send_nmi(vcpu: Vcpu) -> None:
    """An NMI for a vCPU. EOPNOTSUPP without restricted injection."""
    _check(vcpu)
    vcpu.interrupts.nmi = True


def end(vcpu: Vcpu) -> None:
    """The guest ends the interrupt in service."""
    vcpu.interrupts.in_service = None


def present(vcpu: Vcpu) -> None:
    """Before an entry: show the guest what waits, and ring, unless it has been told and has not looked yet."""
    queue = vcpu.interrupts
    if vcpu.doorbell is None or not (queue.waiting or queue.nmi):
        return
    try:
        page = DOORBELL.unpack(vcpu.vm.read(vcpu.doorbell, _HEAD).ljust(DOORBELL.size, b"\0"))
    except KernelError as error:
        vcpu.vm.kernel.log(f"#HV doorbell page [{vcpu.doorbell:#x}]: {error}")
        return
    shown = _shown(queue, page)
    if shown == page:
        return
    if not page.no_further_signal:
        event = EVENT.pack(vector=Vector.HV, kind=EventKind.EXCEPTION, valid=1)
        vcpu.set_control("event_injection", int.from_bytes(event, "little"))
    vcpu.vm.write(vcpu.doorbell, bytes(shown.replace(no_further_signal=1))[:_HEAD])


def _shown(queue: Interrupts, page: Record) -> Record:
    """The page with what can be added to it: an NMI, and the highest vector when none is in service.

    While one is in service and others wait, its end must be told.
    """
    if queue.nmi and not page.nmi:
        page, queue.nmi = page.replace(nmi=1), False
    if queue.quietly:
        queue.in_service = queue.in_service if page.no_eoi_required else None
        page, queue.quietly = page.replace(no_eoi_required=0), False
    if queue.waiting and queue.in_service is None and not page.vector:
        queue.in_service = max(queue.waiting)
        queue.waiting.remove(queue.in_service)
        queue.quietly = not queue.waiting
        page = page.replace(vector=queue.in_service, no_eoi_required=int(queue.quietly))
    return page


def _check(vcpu: Vcpu) -> None:
    sev = vcpu.vm.sev
    restricted = sev is not None and bool(sev.vmsa_features & SevFeatures.RESTRICTED_INJECTION)
    check(restricted, errno.EOPNOTSUPP, "interrupts are delivered (MODEL)", "restricted injection", vcpu.vm.type.name)
