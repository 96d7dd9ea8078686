"""What KVM has mapped for a guest, and the sequence by which a fault notices that the ground moved under it.

A change of memory opens an invalidation, unmaps, and closes it; a fault that began before or runs into it starts again.
Sources: Linux virt/kvm/kvm_main.c (mmu_invalidate_begin, _end), include/linux/kvm_host.h (mmu_invalidate_retry_gfn).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snpbook.hardware.ports import HostCpu
from snpbook.host.memory import PageAllocator
from snpbook.host.npt import NestedTables
from snpbook.host.steps import Step, Steps


class Mmu:
    """The nested tables of one guest, and the invalidations in progress."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator) -> None:
        self.tables = NestedTables(cpu, memory)
        self.sequence = 0
        self._open: list[range] = []

    def __repr__(self) -> str:
        return f"Mmu({self.tables!r}, sequence {self.sequence})"

    def busy(self, gfns: range) -> bool:
        """Whether an invalidation of one of these guest pages is in progress."""
        return any(part.start < gfns.stop and gfns.start < part.stop for part in self._open)

    def unmap(self, gfns: range) -> None:
        """Invalidate at once: nobody runs between beginning and end."""
        with self._invalidation(gfns):
            self.tables.zap(gfns.start, len(gfns))

    def invalidate(self, gfns: range) -> Steps[None]:
        """Begin an invalidation and unmap, with a place before and after where faults may run into it.

        The caller does its change and then `end`s it.
        """
        yield Step("invalidation begins")
        self.begin(gfns)
        self.tables.zap(gfns.start, len(gfns))
        yield Step("unmapped")

    def begin(self, gfns: range) -> None:
        self._open.append(gfns)

    def end(self, gfns: range) -> None:
        self.sequence += 1
        self._open.remove(gfns)

    @contextmanager
    def _invalidation(self, gfns: range) -> Iterator[None]:
        self.begin(gfns)
        try:
            yield
        finally:
            self.end(gfns)
