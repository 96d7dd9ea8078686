"""Pages that can never be given out again: the firmware or the RMP did not let go of them.

The kernel lists them, so that a page is either free and the hypervisor's, in use, or named here. Sources: Linux 6.12
arch/x86/virt/svm/sev.c (snp_leak_pages, dump_rmpentry), RFC v7 patch 27.
"""

from __future__ import annotations

import numpy as np

from snpbook.hardware.dram import page_numbers
from snpbook.hardware.ports import HostCpu
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator
from snpbook.spec.pages import PAGES_PER_LARGE
from snpbook.spec.rmp import ASSIGNED


class LeakedPages:
    """The kernel's list, and what it loses without listing it."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, log: KernelLog) -> None:
        self._cpu, self._memory, self._log = cpu, memory, log
        self.listed: list[range] = []
        """Runs of frames in the order in which they were leaked."""
        self.forgotten: list[range] = []
        """Runs that stay allocated although nobody holds them and no list of Linux's names them."""

    def __repr__(self) -> str:
        return f"LeakedPages({self.count} listed, {sum(map(len, self.forgotten))} forgotten)"

    @property
    def count(self) -> int:
        """snp_nr_leaked_pages."""
        return sum(map(len, self.listed))

    def leak(self, pages: range) -> None:
        """List a run of pages: they are never free again, whoever still gives them back."""
        self._log(f"SEV-SNP: Leaking PFN range {pages.start:#x}-{pages.stop:#x}")
        self.listed.append(pages)
        self._memory.pin(page_numbers(pages))
        for page, (low, high) in zip(pages, self._cpu.rmp_words(pages).tolist(), strict=True):
            if low & ASSIGNED:
                self._log(f"SEV-SNP: PFN {page:#x}, RMP entry: [0x{low:016x} - 0x{high:016x}]")
            else:
                self._dump_region(page)

    def forget(self, pages: range) -> None:
        """The holder of a block gives up on it: what the list does not name of it is lost as well."""
        self._memory.pin(page_numbers(pages))
        start = pages.start
        for run in sorted((run for run in self.listed if run.start < pages.stop and pages.start < run.stop),
                          key=lambda run: run.start):  # fmt: skip
            if start < run.start:
                self.forgotten.append(range(start, run.start))
            start = max(start, run.stop)
        if start < pages.stop:
            self.forgotten.append(range(start, pages.stop))

    def _dump_region(self, page: int) -> None:
        """An entry that is assigned to nobody tells little: those of its 2 MB that are not zero are shown instead."""
        first = page // PAGES_PER_LARGE * PAGES_PER_LARGE
        region = range(first, first + PAGES_PER_LARGE)
        self._log(
            f"SEV-SNP: PFN {page:#x} unassigned, dumping non-zero entries in 2M PFN region:"
            f" [{region.start:#x} - {region.stop:#x}]"
        )
        words = self._cpu.rmp_words(region)
        for index in np.flatnonzero(words.any(axis=1)).tolist():
            low, high = words[index].tolist()
            self._log(f"SEV-SNP: PFN: {first + index:#x}, [0x{low:016x} - 0x{high:016x}]")
