"""A replay against a guest: its host keeps a page, gives another one, and brings the old one back.

What comes of it depends on one thing: whether the guest validates a page where it faults.
"""

from __future__ import annotations

from typing import Any

from snpbook.attacks.ghcb import Moment, Stage
from snpbook.exercises.tried_guest import tried_guest
from snpbook.guest.boot import Kernel
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.cpuid import SIGNATURE_LEAF
from snpbook.spec.ghcb import Nae
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.vmcb import ExitCode, Vector

_PAGE = (3 * PAGES_PER_LARGE // 2) << PAGE_SHIFT
OLD, NEW = b"balance: 100", b"balance: 000"


def replayed(*, validates_at_faults: bool) -> str:
    """What the guest's program finds at the end, or what the guest ended with."""
    kept: list[int] = []

    def swap(moment: Moment) -> None:
        """At the program's first exit another page takes the place of its page, at the second the old one is back."""
        if moment.stage is not Stage.ENTRY or moment.event is not Nae.CPUID:
            return
        if kept:
            moment.map(_PAGE, kept[0])
            return
        kept.append(moment.frame(_PAGE) or 0)
        moment.fresh(_PAGE)

    async def program(kernel: Kernel) -> Any:
        cpu = kernel.cpu
        if validates_at_faults:
            _be_helpful(cpu)
        await cpu.write(_PAGE, OLD)
        await cpu.cpuid(SIGNATURE_LEAF)
        await cpu.write(_PAGE, NEW)
        await cpu.cpuid(SIGNATURE_LEAF)
        return await cpu.read(_PAGE, len(OLD))

    found = tried_guest().run(program, also=swap)
    return str(found.outcome) if found.failed else f"the program reads {found.outcome.decode()!r}"


def _be_helpful(cpu: GuestCpu) -> None:
    """Put a handler before the kernel's that validates a page where it faults, and has the access made again."""
    kernels = cpu.handlers[Vector.VC]

    async def handler(cpu: GuestCpu, exception: GuestException) -> bool | GuestException:
        if exception.error != ExitCode.PAGE_NOT_VALIDATED:
            return await kernels(cpu, exception)
        await cpu.pvalidate(exception.address & -PAGE_SIZE, 1)
        return False

    cpu.set_handler(Vector.VC, handler)
