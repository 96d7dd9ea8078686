"""Rows G: SNP guests from start to stop on a host of 1 TiB, with Debian's firmware (package ovmf).

A guest of 256 MiB is launched, accepts a twentieth of its memory, writes a page in each 2 MB of that, and is stopped.
The VMM gives the shared copy of the firmware back once it is launched. Time per page is that of making pages private,
of the faults that bring them, and of their acceptance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from snpbook.guest.acceptance import accept
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.page_tables import enable_paging
from snpbook.guest.vc import VcHandler
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.vmm.guest import Vmm
from snpbook.spec.image import FOUR_GIB, Image
from snpbook.spec.kvm import LOW_RAM_END
from snpbook.spec.pages import PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.process import Advice
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.vmcb import Vector
from snpbook.system import System
from snpbook.tools.bench.digest import OVMF
from snpbook.tools.bench.launch import hash_floor
from snpbook.tools.bench.measure import (
    Comparison,
    NotMeasurableError,
    Row,
    Usage,
    Work,
    at_most,
    megabytes_at_most,
    resident,
)

MEMORY = 256 << 20
TOUCHED = MEMORY // 20 >> PAGE_SHIFT
"""Pages that a guest accepts."""
_FIRST = 32 << 20 >> PAGE_SHIFT
_GUESTS = 64


class Fleet:
    """A host of 1 TiB, and the image that its guests begin with. `NotMeasurableError` without Debian's firmware."""

    def __init__(self) -> None:
        if not Path(OVMF).is_file():
            raise NotMeasurableError(f"there is no {OVMF}: on Debian, apt install ovmf")
        self.system = System("genoa", "bench", installed=1 << 40)
        self.system.host.boot("mainline")
        self.image = Image.parse(Path(OVMF).read_bytes())

    def __repr__(self) -> str:
        return f"Fleet({self.system!r})"

    def start(self, memory: int = MEMORY) -> Vmm:
        """Launch a guest whose program has not begun."""
        product = self.system.product
        vmm = Vmm(self.system.host, self.image, memory=memory, vcpus=1, vcpu_signature=product.vcpu_signature)
        vmm.launch()
        vmm.process.madvise(vmm.user(self.image.gpa), len(self.image.data), Advice.DONTNEED)
        return vmm

    def touch(self, vmm: Vmm, pages: range) -> None:
        """Have a guest accept a run of its pages, which it has not accepted, and write the first of each 2 MB."""
        place, c_bit = Layout.of(self.image), self.system.product.c_bit

        async def program(cpu: GuestCpu) -> int:
            cpu.set_handler(Vector.VC, VcHandler(place))
            await enable_paging(cpu, place, c_bit)
            await accept(await Ghcb.register(cpu, place.ghcb), pages)
            for page in pages[::PAGES_PER_LARGE]:
                await cpu.write(page << PAGE_SHIFT, b"touched")
            return len(pages)

        executor = vmm.vcpus[0].executor
        executor.start(program)
        if vmm.run() is not Exit.HLT or executor.outcome != len(pages):
            raise RuntimeError(f"the guest did not accept its memory: {executor.outcome!r}")

    @contextmanager
    def guests(self, count: int) -> Iterator[list[Vmm]]:
        """So many guests at once, a twentieth of their memory touched, until the block ends."""
        running: list[Vmm] = []
        try:
            for _ in range(count):
                running.append(self.start())
                self.touch(running[-1], range(_FIRST, _FIRST + TOUCHED))
            yield running
        finally:
            for vmm in running:
                vmm.close()


def _start_to_stop() -> Comparison:
    fleet = Fleet()

    def one() -> None:
        with fleet.guests(1):
            pass

    return Comparison(partial(hash_floor, fleet.image.data), one)


def _resident() -> Usage:
    """What the process holds while all guests run."""
    with Fleet().guests(_GUESTS):
        return Usage(resident())


def _acceptance(fleet: Fleet, count: int, turns: int) -> Work:
    """A guest that makes so many pages private and accepts them: others in each turn, as each is accepted once."""
    start = FOUR_GIB >> PAGE_SHIFT
    vmm = fleet.start(LOW_RAM_END + (turns * count << PAGE_SHIFT))
    parts = iter(range(start, start + turns * count, count))

    def run() -> None:
        first = next(parts)
        fleet.touch(vmm, range(first, first + count))

    return run


def _per_page() -> Comparison:
    fleet, few, many = Fleet(), 1 << 10, 1 << 18
    return Comparison(_acceptance(fleet, few, 64), _acceptance(fleet, many, 4), few, many, rounds=1)


ROWS = [
    Row("G1", "a guest from start to stop : hash floor", at_most(1000), _start_to_stop, True, True, "guests"),
    Row("G2", "a page of 2^18 : a page of 2^10, each in a guest", at_most(1), _per_page, False, True, "pages"),
    Row("G3", "64 guests of 256 MiB: whole process", megabytes_at_most(400), _resident, optional=True),
]
