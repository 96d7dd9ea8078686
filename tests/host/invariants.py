"""What holds of a host at every moment, whoever runs: told from the tables in memory and from KVM's own lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from snpbook.host.kernel import Kernel
from snpbook.host.kvm.vm import Vm

ASSIGNED = 1
PRESENT, PAGE_SIZE_BIT, RESERVED, ADDRESS = 1, 1 << 7, 1 << 50, (1 << 50) - 1 & ~0xFFF


def check(kernel: Kernel) -> None:
    """All invariants; `AssertionError` names the page."""
    check_free_pages(kernel)
    check_asids(kernel)
    for vm in kernel.kvm.vms:
        check_mappings(kernel, vm)


def check_free_pages(kernel: Kernel) -> None:
    """A free page is the hypervisor's, and on no leak list."""
    leaked = {page for run in (*kernel.ccp.leaks.listed, *kernel.ccp.leaks.forgotten) for page in run}
    for run in kernel.memory._free:
        assigned = np.flatnonzero(kernel.cpu.rmp_words(run)[:, 0] & np.uint64(ASSIGNED))
        assert not len(assigned), f"page {run[int(assigned[0])]:#x} is free and assigned"
        assert not leaked.intersection(run), "a leaked page is free"


def check_asids(kernel: Kernel) -> None:
    """Taken are the ASIDs of living guests and those that wait for a flush, and no guest has one of the latter."""
    asids = kernel.kvm.asids
    live = {vm.sev.asid for vm in kernel.kvm.vms if vm.sev is not None}
    waiting = set(np.flatnonzero(asids.reclaimable).tolist())
    taken = set(np.flatnonzero(asids.taken).tolist())
    assert taken == live | waiting
    assert not live & waiting
    owners = [vm.sev.asid for vm in kernel.kvm.vms if vm.sev is not None and vm.sev.mirror_of is None]
    assert len(owners) == len(set(owners)) == sum(asids.charged.values())


def check_mappings(kernel: Kernel, vm: Vm) -> None:
    """What a guest reaches by its nested tables is what its slots have on the side of the attribute."""
    for gfn, frame, large in leaves(kernel, vm.mmu.tables.root, 3):
        where = f"gfn {gfn:#x} -> page {frame:#x}"
        slot = vm.slots.of(gfn)
        assert slot is not None, f"{where}: mapped without a slot"
        private = vm.has_private_memory and bool(vm.is_private(range(gfn, gfn + 1))[0])
        expected = private_frame(slot, gfn) if private else shared_frame(vm, slot, gfn)
        assert frame == expected != 0, f"{where}: the {'private' if private else 'shared'} page is {expected:#x}"
        if private and vm.snp:
            entry = kernel.cpu.rmp_entry(frame)
            if kernel.era.rmp_at_attributes and not entry.assigned:
                continue  # the v7 series changes the RMP after the attribute, and a failure is only logged
            assert (entry.assigned, entry.asid, entry.gfn) == (1, vm.asid, gfn), f"{where}: {entry!r}"
            head = kernel.cpu.rmp_entry(frame - frame % 512)
            assert bool(head.assigned and head.page_size) == large, f"{where}: {entry!r} under a leaf of another size"


def leaves(kernel: Kernel, table: int, level: int, first: int = 0) -> Iterator[tuple[int, int, bool]]:
    """The leaves of nested tables as they stand in memory: guest page, page, and whether the leaf has 2 MB."""
    entries = np.frombuffer(kernel.cpu.read(table, 4096), "<u8")
    for index in np.flatnonzero(entries & np.uint64(PRESENT)).tolist():
        entry, gfn = int(entries[index]), first + (index << 9 * level)
        if entry & RESERVED:
            continue  # how KVM has hardware tell MMIO
        if level and not entry & PAGE_SIZE_BIT:
            yield from leaves(kernel, entry & ADDRESS, level - 1, gfn)
            continue
        for page in range(1 << 9 * level):
            yield gfn + page, ((entry & ADDRESS) >> 12) + page, level > 0


def private_frame(slot: Any, gfn: int) -> int:
    assert slot.private is not None, f"gfn {gfn:#x}: private, and its slot has no file"
    pages = slot.private.pages if hasattr(slot.private, "pages") else slot.private.file.pages
    return int(pages.peek(slot.offsets(range(gfn, gfn + 1)))[0])


def shared_frame(vm: Vm, slot: Any, gfn: int) -> int:
    ((file, offsets),) = vm.process.space.files(slot.user_pages(range(gfn, gfn + 1)))
    return int(file.peek(offsets)[0])


def held(kernel: Kernel) -> int:
    """Pages in use that no leak list names."""
    leaks = kernel.ccp.leaks
    return kernel.memory.allocated - leaks.count - sum(map(len, leaks.forgotten))
