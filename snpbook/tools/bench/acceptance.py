"""Rows P: pages that a guest accepts, on each back end and in entries of both sizes, in lists of 253.

Time per page of 2^18 pages is held against that of 2^10: runs of lists, of faults and of PVALIDATEs are one operation
each. What is told are pages a second: 2^18 by that is the time for 1 GiB.
"""

from __future__ import annotations

from functools import partial
from itertools import product

from snpbook.guest import acceptance
from snpbook.guest.boot import Kernel, start
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.regimes.acceptance import BACKENDS
from snpbook.spec.image import FOUR_GIB
from snpbook.spec.kvm import LOW_RAM_END
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.private_memory import Backend, cell
from snpbook.system import System
from snpbook.tools.bench.measure import Comparison, Row, Work, at_most

FEW, MANY = 1 << 10, 1 << 18
_TURNS = {FEW: 64, MANY: 4}
"""How many portions a guest has memory for: each page is accepted once."""


def _portions(backend: Backend, large: bool, count: int) -> Work:
    """A guest that accepts so many pages, others in each turn."""
    system = System("genoa", "bench", installed=16 << 30)
    system.host.boot(cell("snp", backend).era)
    first, pages = FOUR_GIB >> PAGE_SHIFT, _TURNS[count] * count
    guest = system.create_vm(memory=LOW_RAM_END + (pages << PAGE_SHIFT))
    guest.launch()
    place, parts = Layout.of(guest.vmm.image), iter(range(first, first + pages, count))

    async def begin(cpu: GuestCpu) -> None:
        await start(cpu, place)

    async def go_on(cpu: GuestCpu) -> None:
        begins, kernel = next(parts), await Kernel.attach(cpu, place)
        await acceptance.accept(kernel.channel, range(begins, begins + count), large=large)

    guest.run(begin)
    return partial(guest.run, go_on)


def _per_page(backend: Backend, large: bool) -> Comparison:
    return Comparison(_portions(backend, large, FEW), _portions(backend, large, MANY), FEW, MANY, rounds=1)


ROWS = [
    Row(
        f"P{number}", f"acceptance by {'2 MB' if large else '4 KB'}, {backend}: a page of 2^18 : of 2^10",
        at_most(0.2), partial(_per_page, backend, large), units="pages",
    )
    for number, (backend, large) in enumerate(product(BACKENDS, (False, True)), 1)
]  # fmt: skip
