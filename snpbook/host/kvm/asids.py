"""KVM's ASIDs: which guest has which, which wait for a flush, and what the misc cgroup counts.

SEV-ES and SNP guests have those below the minimum of plain SEV, of which a BIOS setting decides; the lowest free one
wins. A used ASID serves again only after WBINVD on all cores and DF_FLUSH, which KVM does when it runs out. Source:
Linux arch/x86/kvm/svm/sev.c (sev_asid_new, sev_flush_asids, __sev_recycle_asids).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from snpbook.host.refusal import KernelError, check
from snpbook.spec.commands import Command

if TYPE_CHECKING:
    from snpbook.host.kernel import Kernel

SEV, SEV_ES = "sev", "sev_es"
"""The keys of the misc cgroup; SNP guests count as SEV-ES."""


class AsidPool:
    """The two bitmaps, and the charges of the misc cgroup, of which all processes share one (MODEL)."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        size = kernel.cpu.product.asid_limit + 1
        self.taken = np.zeros(size, bool)
        """ASIDs of living guests, of those that wait for a flush, and of guests that could not be decommissioned."""
        self.reclaimable = np.zeros(size, bool)
        """ASIDs that no guest has any more, and that wait for a flush."""
        self.charged = {SEV: 0, SEV_ES: 0}
        """misc.current."""
        self.limits: dict[str, int] = {}
        """misc.max, where there is one."""

    def __repr__(self) -> str:
        live = int(self.taken.sum() - self.reclaimable.sum())
        return f"AsidPool({live} of {len(self.taken) - 1} taken, {int(self.reclaimable.sum())} to flush)"

    def range_of(self, *, es: bool) -> range:
        """The ASIDs of guests with encrypted registers, or of those without."""
        product = self._kernel.cpu.product
        return range(1, product.min_sev_asid) if es else range(product.min_sev_asid, product.asid_limit + 1)

    def take(self, *, es: bool) -> int:
        """An ASID for a new guest.

        ENOTTY where the BIOS leaves none to its kind; EBUSY where the cgroup is full, all are in use or a flush fails.
        """
        asids = self.range_of(es=es)
        check(bool(asids), errno.ENOTTY, "ASIDs for guests of this kind", "a range that is not empty", asids)
        key = SEV_ES if es else SEV
        limit, charged = self.limits.get(key), self.charged[key]
        check(limit is None or charged < limit, errno.EBUSY, f"misc.max of {key}", limit, charged)
        asid = self._lowest(asids)
        if asid is None and self.reclaimable[asids.start : asids.stop].any():
            self._recycle()
            asid = self._lowest(asids)
        if asid is None:
            raise KernelError(errno.EBUSY, "an ASID is free", f"one of {asids.start} to {asids.stop - 1}", "none")
        self.taken[asid] = True
        self.charge(asid, 1)
        return asid

    def give_back(self, asid: int) -> None:
        """The guest is gone: its ASID waits for the next flush, and no core remembers its VMCB."""
        self.reclaimable[asid] = True
        last = self._kernel.kvm.last_vmcb
        for key in [key for key in last if key[1] == asid]:
            del last[key]
        self.charge(asid, -1)

    def charge(self, asid: int, count: int) -> None:
        """Count an ASID for its kind, or no more."""
        self.charged[SEV_ES if asid in self.range_of(es=True) else SEV] += count

    def _lowest(self, asids: range) -> int | None:
        free = np.flatnonzero(~self.taken[asids.start : asids.stop])
        return asids[int(free[0])] if len(free) else None

    def _recycle(self) -> None:
        """Flush, and free all that waited, of both kinds. A failed flush is logged and leaves everything as it is.

        Nobody can cut in, so that no guest is deactivated meanwhile: Linux holds a lock for that.
        """
        kernel = self._kernel
        kernel.cpu.wbinvd()
        try:
            kernel.ccp.submit(Command.SNP_DF_FLUSH if kernel.kvm.snp else Command.DF_FLUSH)
        except KernelError as error:
            kernel.log(f"SEV: DF_FLUSH failed, ret=-{error.errno}, error={error.firmware or 0:#x}")
            return
        self.taken &= ~self.reclaimable
        self.reclaimable[:] = False
