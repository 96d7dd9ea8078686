"""Acceptance of much memory: a guest makes the RAM above 4 GiB private and validates it, and the work is counted.

How long its lists of page state changes are and whether it asks for 2 MB pages is the guest's choice; what the host
keeps private pages in decides what a PVALIDATE of 2 MB finds. Sources: GHCB specification, SNP page state change; Linux
arch/x86/coco/sev (lists of 64), edk2 OvmfPkg (lists of 253).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from snpbook.guest import acceptance
from snpbook.guest.boot import Kernel, start
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import PSC_ENTRIES
from snpbook.spec.image import FOUR_GIB
from snpbook.spec.kvm import LOW_RAM_END
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGES_PER_LARGE
from snpbook.spec.private_memory import Backend, cell
from snpbook.spec.rmp import RmpCode
from snpbook.spec.sizes import parse_size
from snpbook.spec.vmcb import ExitCode
from snpbook.system import System
from snpbook.trace import Event, Instruction, VmExit

LENGTHS = (64, PSC_ENTRIES)
"""Entries of a list: as many as Linux makes, and as many as the buffer holds."""
BACKENDS = (Backend.RESTRICTED, Backend.GUEST_MEMFD)
_SPARE = 4 << 30
"""What a host has beside the guest's memory above 4 GiB and the tables for it, which take less than a 32nd."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What it took to accept `pages` of 4 KB: a VMGEXIT for each of the `lists` and an #NPF for each of the `faults`.

    `mismatches` are PVALIDATEs of 2 MB that were answered with FAIL_SIZEMISMATCH.
    """

    backend: Backend
    entries: int
    large: bool
    lists: int
    faults: int
    rmpupdates: int
    pvalidates: int
    mismatches: int
    pages: int


def accept(
    backend: str, memory: int | str, *, entries: int = PSC_ENTRIES, large: bool = False, huge: bool = False
) -> Acceptance:
    """Have an SNP guest accept `memory` (bytes, or a text such as "64 GiB") in lists of `entries`, of 2 MB if `large`.

    `huge`: restricted files may have huge pages. `ValueError` for memory that is no whole 2 MB.
    """
    where, size = cell("snp", backend), parse_size(memory)
    if size % LARGE_PAGE_SIZE:
        raise ValueError(f"memory = {memory!r}: a multiple of 2 MB")
    system = System("genoa", "acceptance", installed=size + size // LARGE_PAGE_SIZE // 32 * LARGE_PAGE_SIZE + _SPARE)
    system.host.shmem_huge = huge
    system.host.boot(where.era)
    guest = system.create_vm(memory=LOW_RAM_END + size)
    guest.launch()
    place, pages = Layout.of(guest.vmm.image), range(FOUR_GIB >> PAGE_SHIFT, FOUR_GIB + size >> PAGE_SHIFT)

    async def begin(cpu: GuestCpu) -> None:
        kernel = await start(cpu, place)
        await kernel.channel.features()  # the GHCB's own page is not to be counted

    async def go_on(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        await acceptance.accept(kernel.channel, pages, entries, large=large)

    guest.run(begin)
    before, counted = replace(system.counts), _Exits()
    system.trace.subscribe(counted)
    guest.run(go_on)
    return Acceptance(
        where.backend,
        entries,
        large,
        lists=counted.by_reason[ExitCode.VMGEXIT.name],
        faults=counted.by_reason[ExitCode.NPF.name],
        rmpupdates=system.counts.rmpupdates - before.rmpupdates,
        pvalidates=system.counts.pvalidates - before.pvalidates,
        mismatches=counted.mismatches,
        pages=system.counts.pages_validated - before.pages_validated,
    )


def table(memory: int | str) -> list[Acceptance]:
    """Every combination of back end, size of the entries and length of the lists."""
    rows = product(BACKENDS, (False, True), LENGTHS)
    return [accept(backend, memory, entries=entries, large=large) for backend, large, entries in rows]


def lists_of(pages: int, entries: int, *, large: bool = False) -> int:
    """How many lists of page state changes so many pages of 4 KB take."""
    return -(-pages // (PAGES_PER_LARGE if large else 1) // entries)


class _Exits:
    """A listener that counts exits by their reason, and PVALIDATEs that find pages of another size."""

    def __init__(self) -> None:
        self.by_reason: Counter[str] = Counter()
        self.mismatches = 0

    def __call__(self, event: Event) -> None:
        match event:
            case VmExit(reason=reason):
                self.by_reason[reason] += event.count
            case Instruction(name="PVALIDATE", status=status):
                self.mismatches += int(np.count_nonzero(status == RmpCode.FAIL_SIZEMISMATCH))
