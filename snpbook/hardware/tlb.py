"""The TLB of one core: translations with the result of their checks, which count until something flushes them.

Software that changes a table must flush; what it forgets stays usable. Every change of an RMP entry flushes all of it,
and so do the host's TLB_CONTROL, an SNP guest's PCPU_ID and the guest's own control registers, each its part. Sources:
APM2 5.5, 15.16, 15.36.10; Bagia et al., "A Close Look at RMP Entry Caching" (every RMP change flushes every core).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Words
from snpbook.spec.vmcb import TlbControl

ENTRIES = 2048
"""As in the second level of Zen 3's; a page has one place, by its number and what else tags it (MODEL)."""
_SPREAD = 2654435761
"""Takes the places of different tags apart."""

ENTRY = np.dtype(
    [
        ("asid", "<u2"),
        ("tag", "<u2"),
        ("virtual", "<u8"),
        ("gfn", "<u8"),
        ("page", "<u8"),
        ("key", "<u2"),
        ("private", "?"),
        ("large", "?"),
        ("is_global", "?"),
    ]
)
"""What lies behind one virtual page of 4 KB, whatever size the tables have.

`large` tells a 2 MB or 1 GB nested leaf, `is_global` a global page of the guest's tables. ASID 0, the host's, marks an
empty place of the TLB; `tag` is a number for what else the checks depended on.
"""
Entries = NDArray[np.void]


class Tlb:
    """The translations of guests that one core holds; `number` is the core's."""

    def __init__(self, number: int) -> None:
        self._pcpu_id = number + 1  # 0 asks for a flush
        self._entries: Entries = np.zeros(ENTRIES, ENTRY)
        self._changes = 0
        """The number of RMP changes up to which the entries count."""
        self._runs: dict[int, int] = {}
        """By ASID, the TLB_ID of the vCPU that ran last."""
        self._next_id = 1

    def __repr__(self) -> str:
        return f"Tlb({np.count_nonzero(self._entries['asid'])} entries)"

    def lookup(self, changes: int, asid: int, tag: int, virtual: Words) -> tuple[Entries, NDArray[np.bool_]]:
        """Copies of the entries for virtual pages, and which of them are there; `changes` is `Rmp.changes`."""
        if changes != self._changes:
            self.flush()
            self._changes = changes
        found = self._entries[self._places(asid, tag, virtual)]
        return found, (found["virtual"] == virtual) & (found["tag"] == tag) & (found["asid"] == asid)

    def fill(self, asid: int, tag: int, entries: Entries) -> None:
        """Hold translations, in the places of others where need be. `lookup` has come before."""
        entries["asid"], entries["tag"] = asid, tag
        self._entries[self._places(asid, tag, entries["virtual"])] = entries

    def flush(self, asid: int | None = None, *, keep_global: bool = False) -> None:
        """Forget all translations, or those of an ASID, perhaps without those of global pages."""
        gone = self._entries["asid"] != 0 if asid is None else self._entries["asid"] == asid
        if keep_global:
            gone &= ~self._entries["is_global"]
        self._entries[gone] = np.zeros((), ENTRY)

    def flush_page(self, asid: int, virtual: int) -> None:
        """INVLPG and INVLPGA: forget one virtual page of an ASID, also where it is global."""
        gone = (self._entries["asid"] == asid) & (self._entries["virtual"] == virtual)
        self._entries[gone] = np.zeros((), ENTRY)

    def enter(self, asid: int, control: int, registers: MutableMapping[str, Any] | None) -> None:
        """What VMRUN flushes: as TLB_CONTROL says, and for an SNP guest, whose `registers` are given, by its VMSA.

        A PCPU_ID of 0, which is how a guest asks for it, or of another core flushes the ASID, and so does a TLB_ID that
        is not that of the vCPU that ran last here under the ASID; VMRUN then writes both fields (their values and
        this use of TLB_ID are inferred). Reserved values of TLB_CONTROL do nothing (MODEL).
        """
        match control:
            case TlbControl.ALL:
                self.flush()
            case TlbControl.ASID:
                self.flush(asid)
            case TlbControl.ASID_NOT_GLOBAL:
                self.flush(asid, keep_global=True)
        if registers is None:
            return
        if registers["pcpu_id"] != self._pcpu_id or registers["tlb_id"] != self._runs.get(asid):
            self.flush(asid)
            self._runs[asid] = self._next_id
            registers.update(pcpu_id=self._pcpu_id, tlb_id=self._next_id)
            self._next_id += 1

    def snapshot(self) -> tuple[bytes, int, tuple[tuple[int, int], ...], int]:
        """The entries, as bytes, and the counters."""
        held = self._entries.tobytes() if self._entries["asid"].any() else b""
        return held, self._changes, tuple(sorted(self._runs.items())), self._next_id

    def restore(self, state: tuple[bytes, int, tuple[tuple[int, int], ...], int]) -> None:
        """Hold a snapshot's entries again."""
        held, self._changes, runs, self._next_id = state
        self._entries = np.frombuffer(held, ENTRY).copy() if held else np.zeros(ENTRIES, ENTRY)
        self._runs = dict(runs)

    def _places(self, asid: int, tag: int, virtual: Words) -> NDArray[np.int64]:
        spread = np.uint64((asid << 16 | tag) * _SPREAD >> 16)
        return ((virtual + spread) % np.uint64(ENTRIES)).astype(np.int64)
