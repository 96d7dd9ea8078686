"""Guests that accept their memory all at once or as they use it, followed from the first instruction to the last."""

from __future__ import annotations

from functools import cache

from snpbook.guest.boot import Acceptance, Kernel
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.vmcb import ExitCode
from snpbook.system import System
from snpbook.trace import Event, VmExit
from snpbook.views.acceptance_course import Course, Point

_MIB = 1 << 20
_HOST = 96
"""MiB that the host needs beside its guest."""
_REGION_MIB = 2
_TAKEN = (0, 4)
"""Regions of 2 MB that the boot accepts in any case: they hold shared pages, and what the image brings."""


@cache
def followed(acceptance: str, memory: int) -> Course:
    """A guest of `memory` MiB that boots, and then uses all its memory, 2 MB after 2 MB."""
    system = System("milan", "acceptance", installed=(memory + _HOST) * _MIB, cores=2)
    system.host.boot("mainline")
    guest = system.create_vm(memory=memory * _MIB)
    guest.launch()
    counts, place = system.counts, Layout.of(guest.vmm.image)
    validated, exits, requests = counts.pages_validated, 0, 0
    points: list[Point] = []

    def follow(event: Event) -> None:
        nonlocal exits, requests
        if isinstance(event, VmExit):
            exits += event.count
            requests += event.count * (event.reason == ExitCode.VMGEXIT.name)

    def note(used: int) -> None:
        accepted = (counts.pages_validated - validated << PAGE_SHIFT) / _MIB
        points.append(Point(used * _REGION_MIB, accepted, exits, requests))

    async def work(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        free = [region for region in range(memory // _REGION_MIB) if region not in _TAKEN]
        for number, region in enumerate(free, 1):
            first = region * PAGES_PER_LARGE
            if acceptance == Acceptance.LAZY:
                await kernel.unaccepted.accept(range(first, first + 1))
            await cpu.write(first << PAGE_SHIFT, b"used")
            note(number)

    forget = system.trace.subscribe(follow)
    guest.boot(acceptance)
    note(0)
    guest.run(work)
    forget()
    return Course(acceptance, tuple(points))
