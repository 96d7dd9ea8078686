"""A guest on which things are tried: a program runs after the boot, and a hand changes what the host answers to it.

The hand is the host's, between KVM's answer and the guest's next step, and touches the shared GHCB page alone. What
each side left in that page is kept. Every run begins where the boot ended.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any

from snpbook.attacks.ghcb import Action, Moment, tamper
from snpbook.attacks.ghcb import Stage as At
from snpbook.guest import msr_protocol, page_tables
from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu, Program, ProgramFailure
from snpbook.spec.ghcb import GHCB
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.uapi_kvm import Exit
from snpbook.system import System
from snpbook.trace import Event
from snpbook.views.ghcb_page import Exchange

INSTALLED = 128 << 20
MEMORY = "12 MiB"
PATIENCE = 64
"""How many answers a guest waits for before it counts as hung."""

Act = Callable[[Kernel], Coroutine[Any, Any, Any]]
"""What a kernel that has booted does."""
Hand = Callable[[int, Record], Record]
"""What the host makes of an answer: from its number, counted from 0, and the page, to the page that the guest finds."""
Happening = Event | Record | Exchange
"""An event of the trace; a request, as the guest left it in the page; an exchange, which an answer completes."""


def honest(number: int, answer: Record) -> Record:
    """A hand that changes nothing."""
    return answer


class Withheld(ProgramFailure):
    """The guest asks again and again: its host does not serve it."""


@dataclass(frozen=True, slots=True)
class Run:
    """A program's run: what it returned or the failure that ended it, and what happened, in order."""

    outcome: Any
    happened: tuple[Happening, ...]

    @property
    def exchanges(self) -> list[Exchange]:
        """The requests by the page, each with its answer."""
        return [one for one in self.happened if isinstance(one, Exchange)]

    @property
    def failed(self) -> bool:
        return isinstance(self.outcome, ProgramFailure)


class TriedGuest:
    """A guest that has booted on a host of its own, and done what `prepare` says."""

    def __init__(
        self, kind: str = "snp", era: str = "mainline", *, vcpus: int = 1, prepare: Program | None = None
    ) -> None:
        self.system = System("milan", "inside the guest", installed=INSTALLED, cores=2)
        self.system.host.boot(era)
        self.guest = self.system.create_vm(kind=kind, memory=MEMORY, vcpus=vcpus)
        self.guest.launch()
        self.guest.boot()
        if prepare is not None:
            self.guest.run(prepare)
        self.place = Layout.of(self.guest.vmm.image)
        self._snapshot = self.system.snapshot()

    def __repr__(self) -> str:
        return f"TriedGuest({self.guest!r})"

    def run(self, act: Act, hand: Hand = honest, vcpu: int = 0, *, also: Action | None = None) -> Run:
        """Run what `act` does with the kernel of the guest that has just booted, on one vCPU.

        `also` is what the host does besides at each moment.
        """
        self._snapshot.restore()
        watch, vmm = _Watch(hand, also), self.guest.vmm
        tamper(self.guest, watch)
        executor = vmm.vcpus[vcpu].executor

        async def program(cpu: GuestCpu) -> Any:
            kernel = await Kernel.attach(cpu, self.place)
            if vcpu:
                await page_tables.use(cpu, self.place, kernel.protections.c_bit)
                await msr_protocol.register(cpu, self.place.ghcb)
            watch.looks = True
            try:
                return await act(kernel)
            finally:
                watch.looks = False

        executor.start(program)
        forget = self.system.trace.subscribe(watch.follow)
        try:
            if vmm.run(vcpu) is Exit.SYSTEM_EVENT:
                vmm.run(vcpu)
            outcome = executor.outcome
        except Withheld as withheld:
            outcome = withheld
        finally:
            forget()
        return Run(outcome, tuple(watch.happened))


class _Watch:
    """Sees what happens while it `looks`, and lets every answer in the page pass through the hand."""

    def __init__(self, hand: Hand, also: Action | None) -> None:
        self.looks = False
        self.happened: list[Happening] = []
        self._hand, self._also, self._answers = hand, also, 0

    def follow(self, event: Event) -> None:
        if self.looks:
            self.happened.append(event)

    def __call__(self, moment: Moment) -> None:
        if not self.looks:
            return
        if self._also is not None:
            self._also(moment)
        if moment.page is None:
            return
        if moment.stage is At.EXIT:
            self.happened.append(moment.page)
            return
        answered = GHCB.unpack(moment.read(moment.value, PAGE_SIZE))
        found = self._hand(self._answers, answered)
        if found != answered:
            moment.write(moment.value, bytes(found))
        self._answers += 1
        self.happened.append(Exchange(moment.page, answered, found))
        if self._answers > PATIENCE:
            raise Withheld(f"{PATIENCE} answers, and the guest still asks")


@cache
def tried_guest(kind: str = "snp", era: str = "mainline") -> TriedGuest:
    """Such a guest: each is made once."""
    return TriedGuest(kind, era)
