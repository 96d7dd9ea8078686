"""The ledger: what a host has spent on its guests, counted exactly from the trace and from nothing else.

It keeps pages by the files, RMP entries and nested tables that the events tell of, so it must listen from the start.
`snpbook.host.recount` counts the same in memory itself, and the two must agree at any time. Counts have no times.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import as_slice
from snpbook.host.attributes import PrivatePages
from snpbook.host.kvm.vm import Vm
from snpbook.host.memory import Flags, PageFile
from snpbook.host.npt import GFN_LIMIT
from snpbook.host.recount import Pages, sides
from snpbook.spec import rmp
from snpbook.spec.launch import PAGE_INFO
from snpbook.spec.pages import PAGE_SIZE, PAGES_PER_LARGE, LaunchPage
from snpbook.spec.rmp import RmpCode
from snpbook.trace import (
    CachesWrittenBack,
    Event,
    FirmwareCommand,
    Instruction,
    Ioctl,
    NestedMapping,
    PagesCopied,
    PagesMoved,
    PagesPinned,
    Trace,
    VmExit,
)

_CONTENT_HASHED = (LaunchPage.NORMAL, LaunchPage.VMSA)
"""Of other pages the firmware hashes their description alone."""


@dataclass(frozen=True, slots=True)
class Work:
    """What was done, from the beginning on: calls, instructions by 4 KB or 2 MB page, bytes."""

    rmpupdates: int
    psmashes: int
    wbinvds: int
    exits: int
    ioctls: int
    firmware_commands: int
    copied: int
    """Bytes that a launch copied from the shared to the private side."""
    encrypted: int
    """Bytes that the firmware encrypted in a launch."""
    hashed: int
    """Bytes that went into a launch digest."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A point of a guest's life."""

    label: str
    pages: Pages
    work: Work


class Ledger:
    """A listener that counts. `sample` notes where a guest stands."""

    def __init__(self, trace: Trace) -> None:
        self.samples: list[Sample] = []
        self._done: Counter[str] = Counter()
        self._resident: dict[PageFile, Flags] = {}
        self._mapped: dict[int, PrivatePages] = {}
        self._assigned: Counter[int] = Counter()
        self._large: Counter[int] = Counter()
        self._pinned: dict[Any, Counter[int]] = {}
        trace.subscribe(self)

    def __repr__(self) -> str:
        return f"Ledger({len(self.samples)} samples)"

    def __call__(self, event: Event) -> None:
        match event:
            case Instruction(name="RMPUPDATE"):
                self._done["rmpupdates"] += event.count
                self._entries(event)
            case Instruction(name="PSMASH"):
                self._done["psmashes"] += event.count
                self._split(event)
            case CachesWrittenBack():
                self._done["wbinvds"] += 1
            case VmExit():
                self._done["exits"] += event.count
            case Ioctl():
                self._done["ioctls"] += 1
            case FirmwareCommand():
                self._done["firmware_commands"] += event.count
                self._launch(event)
            case PagesCopied():
                self._done["copied"] += PAGE_SIZE * event.pages
            case PagesMoved():
                self._move(event)
            case PagesPinned():
                self._pin(event)
            case NestedMapping():
                self._map(event)

    def pages(self, vm: Vm) -> Pages:
        """The pages of a guest as the events tell."""
        shared, private, held = sides(vm, self._told)
        pinned = self._pinned.get(vm, Counter())
        mapped = self._mapped.get(vm.mmu.tables.root)
        return Pages(
            shared=int(shared.sum()),
            private=int(private.sum()),
            doubled=int((shared & private).sum()),
            pinned=len(pinned) + held,
            assigned=self._assigned[vm.asid] if vm.snp else 0,
            large=self._large[vm.asid] if vm.snp else 0,
            mapped=mapped.count if mapped else 0,
        )

    @property
    def work(self) -> Work:
        return Work(**{name: self._done[name] for name in Work.__slots__})

    def sample(self, label: str, vm: Vm) -> Sample:
        """Note where a guest stands."""
        self.samples.append(Sample(label, self.pages(vm), self.work))
        return self.samples[-1]

    def _told(self, file: PageFile, offsets: range) -> Flags:
        found, result = self._resident.get(file), np.zeros(len(offsets), bool)
        if found is not None:
            part = found[offsets.start : offsets.stop]
            result[: len(part)] = part
        return result

    def _move(self, event: PagesMoved) -> None:
        flags = self._resident.get(event.file, np.zeros(0, bool))
        if len(flags) < event.offsets.stop:
            flags = np.concatenate([flags, np.zeros(event.offsets.stop - len(flags), bool)])
            self._resident[event.file] = flags
        flags[as_slice(event.offsets)] = event.resident

    def _pin(self, event: PagesPinned) -> None:
        counts = self._pinned.setdefault(event.owner, Counter())
        frames = Counter(event.frames.tolist())
        counts.update(frames) if event.pinned else counts.subtract(frames)
        self._pinned[event.owner] = +counts

    def _map(self, event: NestedMapping) -> None:
        if len(event.gfns) == GFN_LIMIT:
            self._mapped.pop(event.root, None)
        else:
            self._mapped.setdefault(event.root, PrivatePages()).mark(event.gfns, event.mapped)

    def _entries(self, event: Instruction) -> None:
        """Entries by ASID before and after; one of 2 MB counts 512 pages."""
        done = event.status == RmpCode.SUCCESS
        for words, sign in ((event.before[done], -1), (event.after[done], 1)):
            self._count_entries(words[:, 0], sign)

    def _split(self, event: Instruction) -> None:
        """Large entries fewer; as many pages are assigned as before."""
        low = event.before[event.status == RmpCode.SUCCESS][:, 0]
        low = low[low & np.uint64(rmp.LARGE) != 0]
        for asid in ((low & np.uint64(rmp.ASID)) >> np.uint64(rmp.ASID_SHIFT)).tolist():
            self._large[asid] -= 1

    def _count_entries(self, low: NDArray[np.uint64], sign: int) -> None:
        mine = low[low & np.uint64(rmp.ASSIGNED) != 0]
        asids = (mine & np.uint64(rmp.ASID)) >> np.uint64(rmp.ASID_SHIFT)
        large = mine & np.uint64(rmp.LARGE) != 0
        for asid in np.unique(asids).tolist():
            here = asids == asid
            many = int((here & large).sum())
            self._large[asid] += sign * many
            self._assigned[asid] += sign * (int(here.sum()) + (PAGES_PER_LARGE - 1) * many)

    def _launch(self, event: FirmwareCommand) -> None:
        if event.status:
            return
        given, count = event.arguments, event.count
        if event.name == "SNP_LAUNCH_UPDATE":
            contents, kind = PAGE_SIZE * count, given["page_type"]
            self._done["encrypted"] += contents
            self._done["hashed"] += PAGE_INFO.size * count + contents * (kind in _CONTENT_HASHED)
        elif event.name in ("LAUNCH_UPDATE_DATA", "LAUNCH_UPDATE_VMSA"):
            self._done["encrypted"] += int(given["len"])
            self._done["hashed"] += int(given["len"])
