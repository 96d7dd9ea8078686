"""Rows C: pages of a guest made private, used, and made shared again, on each back end that the host takes part in.

Used means that the back end is asked for their frames, as a fault asks: they get memory and, where the RMP follows the
first use, their entries. Going back to shared frees them. Time per page of 2^18 pages is held against that of 2^10:
nothing grows with the size of a conversion.
"""

from __future__ import annotations

from functools import partial

from snpbook.host.kvm import registered
from snpbook.host.vmm.exits import convert
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.private_memory import Backend, cell
from snpbook.system import System
from snpbook.tools.bench.measure import Comparison, Row, Work, at_most

FEW, MANY = 1 << 10, 1 << 18
_FIRST = 16 << 20 >> PAGE_SHIFT
"""Behind all that a launch measures."""
_CELLS = (
    ("snp", Backend.REGISTERED),
    ("sev", Backend.LAZY),
    ("snp", Backend.RESTRICTED),
    ("snp", Backend.GUEST_MEMFD),
    ("plain", Backend.NULL),
)


def _back_and_forth(kind: str, backend: Backend) -> Comparison:
    system = System("genoa", "bench", installed=8 << 30)
    system.host.registered_snp = (kind, backend) == ("snp", Backend.REGISTERED)
    system.host.boot(cell(kind, backend).era)
    guest = system.create_vm(memory=(_FIRST + MANY) << PAGE_SHIFT, kind=kind, backend=backend)
    guest.launch()
    vm = guest.vmm.vm
    slot = vm.slots.of(_FIRST)
    assert slot is not None

    def work(count: int) -> Work:
        gfns = range(_FIRST, _FIRST + count)

        def run() -> None:
            for private in (True, False):
                if slot.private is None:
                    registered.convert(vm, gfns, private=private)
                    continue
                convert(guest.vmm, _FIRST << PAGE_SHIFT, count << PAGE_SHIFT, private=private)
                if private:
                    slot.private.frames(slot, gfns)

        return run

    return Comparison(work(FEW), work(MANY), 2 * FEW, 2 * MANY)


ROWS = [
    Row(
        f"C{number}", f"conversion of 2^18 pages : of 2^10, {kind} {backend}", at_most(1.3),
        partial(_back_and_forth, kind, backend), units="pages",
    )
    for number, (kind, backend) in enumerate(_CELLS, 1)
]  # fmt: skip
