"""KVM's ASIDs for SNP guests: lowest free first; used ones need a flush before they serve again.

Source: Linux arch/x86/kvm/svm/sev.c (sev_asid_new, sev_flush_asids).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from snpbook.host.refusal import KernelError, check


class AsidPool:
    """ASIDs 1 .. `limit` - 1; `flush` is WBINVD on all cores and SNP_DF_FLUSH."""

    def __init__(self, limit: int, flush: Callable[[], None]) -> None:
        self._limit, self._flush = limit, flush
        self._taken: set[int] = set()
        self._reclaimable: set[int] = set()

    def __repr__(self) -> str:
        return f"AsidPool({len(self._taken)} of {self._limit - 1} taken, {len(self._reclaimable)} to flush)"

    def take(self) -> int:
        """An ASID for a new guest; EBUSY where all belong to living guests or the flush failed."""
        if not self._free() and self._reclaimable:
            try:
                self._flush()
            except KernelError as error:
                raise KernelError(errno.EBUSY, "used ASIDs can be flushed", "a flush", str(error)) from error
            self._reclaimable.clear()
        free = self._free()
        check(bool(free), errno.EBUSY, "an SNP ASID is free", f"1..{self._limit - 1}", "none")
        self._taken.add(free[0])
        return free[0]

    def give_back(self, asid: int) -> None:
        """The guest is gone; its ASID waits for the next flush."""
        self._taken.remove(asid)
        self._reclaimable.add(asid)

    def _free(self) -> list[int]:
        return [asid for asid in range(1, self._limit) if asid not in self._taken | self._reclaimable]
