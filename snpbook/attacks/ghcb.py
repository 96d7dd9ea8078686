"""A hypervisor that looks at every exit of its guest, and changes what it likes before the guest goes on.

It sits around VMRUN, where KVM has done and the guest has not begun, and has what a host has: shared pages, the VMCB,
nested tables and RMPUPDATE. What it does with them is an action, called at each `Moment`. Sources: GHCB specification;
APM2 15.36 (what a hypervisor may do).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from snpbook.hardware.exits import Exit, Vmgexit
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.ports import HostCpu
from snpbook.hardware.vmrun import Executor
from snpbook.host.kvm.vcpu import Vcpu
from snpbook.spec.ghcb import GHCB, MSR_CODE_MASK, MsrCode, Nae, valid_bitmap
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.vmcb import EVENT, EventKind
from snpbook.system import Guest


class Stage(Enum):
    """EXIT: the guest has left, and KVM has not looked yet. ENTRY: KVM has answered, the guest is about to go on."""

    EXIT = "exit"
    ENTRY = "entry"


@dataclass(slots=True)
class Moment:
    """The guest is out: why, and what the host can do about it.

    `value` is the GHCB MSR, `page` the GHCB as the guest left it (None for a request by the MSR, and for other exits).
    """

    vcpu: Vcpu
    stage: Stage
    exit: Exit
    value: int
    page: Record | None
    kept: bool = field(default=False)
    """Whether KVM is not to hear of the exit; only at EXIT."""

    @property
    def event(self) -> Nae | None:
        """What the guest asks for by its GHCB page."""
        known = self.page is not None and self.page.sw_exit_code in Nae._value2member_map_
        return Nae(self.page.sw_exit_code) if known and self.page else None

    @property
    def code(self) -> MsrCode | None:
        """What the guest asks for by the MSR."""
        code = self.value & MSR_CODE_MASK if isinstance(self.exit, Vmgexit) else 0
        return MsrCode(code) if code in MsrCode._value2member_map_ else None

    def keep(self) -> None:
        """Answer the exit without KVM."""
        self.kept = True

    # Shared memory and registers.

    def read(self, gpa: int, size: int) -> bytes:
        """The guest's shared memory."""
        return self.vcpu.vm.read(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        """Store into the guest's shared memory."""
        self.vcpu.vm.write(gpa, data)

    def put(self, **fields: int | bytes) -> None:
        """Fields of the GHCB page, by their names in `spec.ghcb.GHCB`."""
        for name, value in fields.items():
            place = GHCB.fields[name]
            data = value if isinstance(value, bytes) else (value % (1 << 8 * place.size)).to_bytes(place.size, "little")
            self.write(self.value + place.offset, data)

    def mark(self, *names: str) -> None:
        """Say that just these fields are filled in."""
        self.put(valid_bitmap=valid_bitmap(*names))

    def answer_msr(self, value: int) -> None:
        """The GHCB MSR as the guest will read it."""
        self.vcpu.set_control("ghcb_gpa", value)

    def inject(self, vector: int, error: int | None = None, kind: int = EventKind.EXCEPTION) -> None:
        """Have the guest take an event as it is entered."""
        event = EVENT.pack(vector=vector, kind=kind, valid=1, has_error=int(error is not None), error=error or 0)
        self.vcpu.set_control("event_injection", int.from_bytes(event, "little"))

    # Pages.

    def frame(self, gpa: int) -> int | None:
        """The system page that holds a private page of the guest; None where it has none."""
        slot = self.vcpu.vm.slots.of(gpa >> PAGE_SHIFT)
        if slot is None or slot.private is None or not self.vcpu.vm.is_private(_page(gpa))[0]:
            return None
        return int(slot.private.frames(slot, _page(gpa))[0])

    def map(self, gpa: int, frame: int) -> None:
        """Have the nested tables lead a guest page to a system page."""
        self.vcpu.vm.mmu.tables.map(gpa >> PAGE_SHIFT, np.array([frame], np.uint64))

    def fresh(self, gpa: int) -> int:
        """Another system page that the RMP gives to the guest at the same address, mapped there. Not validated."""
        vm = self.vcpu.vm
        frames = vm.kernel.memory.take(1)
        state = NewState(assigned=True, asid=vm.asid)
        vm.kernel.cpu.rmpupdate(frames, np.array([gpa >> PAGE_SHIFT], np.uint64), state)
        self.map(gpa, int(frames[0]))
        return int(frames[0])

    def take_away(self, frame: int) -> None:
        """RMPUPDATE: a page of the guest becomes the hypervisor's, and what was in it is gone."""
        pages = range(frame, frame + 1)
        self.vcpu.vm.kernel.cpu.rmpupdate(pages, np.zeros(1, np.uint64), HYPERVISOR)

    def unmap(self, pages: range) -> None:
        """Drop mappings: the guest faults at its next access, and the host is asked again."""
        self.vcpu.vm.mmu.unmap(pages)


Action = Callable[[Moment], None]
"""What a host does at a moment."""


class HostileCpu(HostCpu):
    """The host's CPU with an action around VMRUN."""

    def __init__(self, guest: Guest, action: Action) -> None:
        super().__init__(guest.system.machine)
        self._vcpus, self._action = {vcpu.vmcb: vcpu for vcpu in guest.vmm.vcpus}, action
        self._left: dict[int, Moment] = {}

    def vmrun(self, vmcb_spa: int, executor: Executor, vcpu: str, core: int = 0) -> Exit:
        """VMRUN again and again while the action keeps the exits."""
        if vmcb_spa not in self._vcpus:
            return super().vmrun(vmcb_spa, executor, vcpu, core)
        moment = self._left.pop(vmcb_spa, None)
        while True:
            if moment is not None:
                moment.stage = Stage.ENTRY
                self._action(moment)
            exit_ = super().vmrun(vmcb_spa, executor, vcpu, core)
            moment = self._moment(self._vcpus[vmcb_spa], exit_)
            self._action(moment)
            if not moment.kept:
                self._left[vmcb_spa] = moment
                return exit_

    def _moment(self, vcpu: Vcpu, exit_: Exit) -> Moment:
        value, page = vcpu.control().ghcb_gpa, None
        if isinstance(exit_, Vmgexit) and value and not value & MSR_CODE_MASK:
            page = GHCB.unpack(vcpu.vm.read(value, PAGE_SIZE))
        return Moment(vcpu, Stage.EXIT, exit_, value, page)


def tamper(guest: Guest, action: Action) -> None:
    """Have the guest's host act so from now on; restoring a snapshot from before ends it."""
    guest.system.host.cpu = HostileCpu(guest, action)


def _page(gpa: int) -> range:
    return range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1)
