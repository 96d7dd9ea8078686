"""The explorer against the core itself: on random tables both must end alike, and the steps must lead to that end."""

from typing import Any

import numpy as np
import pytest

from snpbook.hardware.checks import AccessKind
from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import GuestException, HostPageFault, Npf
from snpbook.hardware.explorer import explain_device, explain_guest, explain_host
from snpbook.hardware.iommu import DmaBlocked
from snpbook.hardware.snapshot import Snapshot
from snpbook.hardware.workbench import PLAY, SHARED_WINDOW, BareGuest, Workbench
from snpbook.spec.rmp import RMP_ENTRY
from tests.sampling import sampled

KINDS = [AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH, AccessKind.WALK]
GFNS = range(0x10, 0x30)
PRESENT, WRITE, USER, NO_EXECUTE = 1 << 0, 1 << 1, 1 << 2, 1 << 63


def scene(seed: int) -> tuple[Workbench, BareGuest, np.random.Generator]:
    """A guest with random entries behind its pages, random rights in its tables, and random nested leaves."""
    rng, bench = np.random.default_rng(seed), Workbench("genoa" if seed % 2 else "milan")
    guest = bench.guest(1)
    for number, gfn in enumerate(GFNS):
        page = PLAY.start + number
        guest.map(gfn, range(page, page + 1))
        odd = rng.random() < 0.6
        fields = {
            "assigned": 1, "asid": 1, "gfn": gfn, "validated": 1, "vmpl0": 15, "vmpl1": int(rng.integers(16)),
            "vmpl2": int(rng.integers(16)),
        }  # fmt: skip
        if odd:
            name, value = [
                ("assigned", 0), ("asid", 2), ("gfn", gfn + 1), ("immutable", 1), ("page_size", 1), ("validated", 0),
                ("vmpl0", 1),
            ][rng.integers(7)]  # fmt: skip
            fields[name] = value
        raw = np.frombuffer(RMP_ENTRY.pack(**fields), "<u8").reshape(1, 2)
        bench.machine.rmp.store(range(page, page + 1), raw)
        if rng.random() < 0.3:
            flag = [PRESENT, WRITE, USER][rng.integers(3)]
            guest.protect(gfn, clear=flag) if rng.random() < 0.7 else guest.protect(gfn, add=NO_EXECUTE)
        if rng.random() < 0.25:
            spoil(guest, gfn, -1, [WRITE, USER, NO_EXECUTE][rng.integers(3)])
        if rng.random() < 0.2:
            guest.unmap(gfn)
    guest.map(0x200, range(PLAY.start + 512, PLAY.start + 513), large=True)
    if rng.random() < 0.2:  # a table of the guest that the host has mapped read-only
        spoil(guest, GFNS.stop, 3, WRITE)
    if rng.random() < 0.5:  # VMPL1 may read the guest's tables but not set bits in them
        tables = range(0x1001, 0x100A)
        words = bench.machine.rmp.load(tables).copy()
        words[:, 1] &= np.uint64(0xFFFF00FF)
        words[:, 1] |= np.uint64(0x100)
        bench.machine.rmp.store(tables, words)
    return bench, guest, rng


def spoil(guest: BareGuest, gfn: int, visit: int, flag: int) -> None:
    """Flip a bit of the nested leaf of a page, or of the table that a visit on the way to it concerns."""
    told = explain_guest(guest.core(), gfn << 12, AccessKind.READ)
    if len(told.visits) == 5:
        leaf = told.visits[visit].nested[-1]
        guest.bench.host.write(leaf.spa, (leaf.entry ^ flag).to_bytes(8, "little"))
        guest.machine.cores[0].tlb.flush(guest.asid)


def answered(core: GuestCore, address: int, kind: AccessKind) -> Any:
    """The core's own answer."""
    return core.translate(np.array([address >> 12], np.uint64), kind)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, GuestException):
        return isinstance(other, GuestException) and one.args == other.args
    return bool(one == other)


def fits(step: Any, fault: Any) -> bool:
    """Whether a fault is one that a failed check of that name leads to."""
    if step.name.startswith("Guest tables"):
        return isinstance(fault, GuestException) and fault.vector == 14
    if step.name == "Validated":
        return isinstance(fault, GuestException) and fault.error == 0x404
    rmp, vmpl = bool(fault.error >> 31 & 1), bool(fault.error >> 36 & 1)
    if step.name.startswith("Nested tables"):
        return isinstance(fault, Npf) and rmp == step.name.endswith("Owned")
    return isinstance(fault, Npf) and rmp and vmpl == step.name.startswith("VMPL")


@pytest.mark.parametrize("seed", sampled(range(60), 6))
def test_explanations_end_as_the_core_does(seed: int) -> None:
    bench, guest, rng = scene(seed)
    before, ends, explained = Snapshot(machine=bench.machine), set(), []
    for _ in range(40):
        gfn = int(rng.choice([*GFNS, 0x205, 0x31]))
        address = (gfn << 12) + SHARED_WINDOW * int(rng.random() < 0.25)
        core, kind = guest.core(int(rng.integers(3)), 3 * int(rng.integers(2))), KINDS[rng.integers(len(KINDS))]
        explained.append((core, address, kind, explain_guest(core, address, kind)))
    assert Snapshot(machine=bench.machine) == before, "explaining changes nothing"
    for core, address, kind, told in explained:
        before.restore()
        found = answered(core, address, kind)
        assert same(told.fault, found.fault), (told, found.fault)
        assert (told.failed is None) == (found.fault is None), (told, found.fault)
        if found.fault is None:
            assert told.page == int(found.pages[0])
        else:
            assert told.failed is not None
            assert fits(told.failed, found.fault), (told, found.fault)
        unmet = [step for visit in told.visits for step in visit.checks if step.met is False]
        assert len(unmet) <= 1
        ends.add(told.failed.name if told.failed else "")
    assert len(ends) >= 2, ends


@pytest.mark.parametrize("kind", [AccessKind.READ, AccessKind.WRITE])
def test_host_and_device_by_system_address(kind: AccessKind) -> None:
    bench, _, _ = scene(3)
    for page in range(PLAY.start - 2, PLAY.start + 20):
        owned = bool(int(bench.host.rmp_words(range(page, page + 1))[0, 0]) & 1)
        refused = owned and kind is AccessKind.WRITE
        host, device = explain_host(bench.machine, page << 12, kind), explain_device(bench.machine, page << 12, kind)
        assert isinstance(host.fault, HostPageFault) == isinstance(device.fault, DmaBlocked) == refused
        assert (host.failed is not None) == (device.failed is not None) == refused
        assert host.page == (None if refused else page)


def test_explaining_a_host_write_stores_nothing() -> None:
    bench = Workbench()
    before = Snapshot(machine=bench.machine)
    assert explain_host(bench.machine, 0x80_0000, AccessKind.WRITE).fault is None
    assert Snapshot(machine=bench.machine) == before


def test_a_guest_without_snp_is_checked_as_the_host() -> None:
    bench = Workbench()
    plain, guest = bench.guest(3, snp=False), bench.guest(1)
    for number, asid in ((0, 0), (1, 1)):
        page = PLAY.start + number
        plain.map(0x10 + number, range(page, page + 1))
        if asid:
            raw = np.frombuffer(RMP_ENTRY.pack(assigned=1, asid=guest.asid, gfn=0x11), "<u8").reshape(1, 2)
            bench.machine.rmp.store(range(page, page + 1), raw)
    free, owned = (explain_guest(plain.core(), gpa, AccessKind.WRITE) for gpa in (0x10000, 0x11000))
    assert (free.fault, free.page) == (None, PLAY.start)
    assert isinstance(owned.fault, Npf)
    assert owned.failed is not None
    assert owned.failed.name == "Hypervisor-Owned"
    assert explain_guest(plain.core(), 0x11000, AccessKind.READ).fault is None


def test_the_walk_is_told_entry_by_entry() -> None:
    bench = Workbench()
    guest = bench.guest(1)
    guest.map(0x10, range(PLAY.start, PLAY.start + 1))
    told = explain_guest(guest.core(), 0x10000, AccessKind.READ)
    assert [visit.what for visit in told.visits] == [
        "PML4", "page-directory pointers", "page directory", "page table", "the page",
    ]  # fmt: skip
    assert [[level.level for level in visit.nested] for visit in told.visits] == [[3, 2, 1, 0]] * 5
    leaf = told.visits[3].entry
    assert leaf is not None
    assert leaf.entry & ~0xFFF == 0x10000 | 1 << 51
    assert leaf.says == "4 KB page at 0x10000; user, writable, executable, C"
    spa = told.visits[4].nested[3].spa
    assert int.from_bytes(bench.host.read(spa, 8), "little") & ~0xFFF == PLAY.start << 12
    assert told.failed is not None
    assert (told.failed.name, told.failed.expected, told.failed.found) == (
        "Guest-Owned", "assigned to ASID 1", "not assigned",
    )  # fmt: skip
