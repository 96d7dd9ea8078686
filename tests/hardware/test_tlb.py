"""The TLB: what stays usable until it is flushed, and what flushes it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.hardware.snapshot import Snapshot
from snpbook.hardware.tlb import ENTRIES, ENTRY, Tlb
from snpbook.hardware.vmrun import vmrun
from snpbook.spec.msr import Msr
from snpbook.spec.vmcb import FaultError, TlbControl
from tests.hardware.guests import ASID, LONG_MODE, PAGE, RIGHTS, VMCB_PAGE, VMSA_PAGE, Bench

GLOBAL, C = 0x100, 1 << 51
OLD, NEW = 0xA00, 0xA01
"""Two system pages with guest page 100: the nested tables name the first."""


def paged(*, leaf: int = RIGHTS | C, **registers: int) -> tuple[Bench, GuestCore]:
    """A guest in long mode whose virtual pages 7 and 8 are guest pages 100 and 101."""
    bench = Bench()
    for gfn in range(4):
        bench.give(gfn, 0x900 + gfn)
    for table in range(3):
        put(bench, 0x900 + table, 0, (table + 1) * PAGE | RIGHTS)
    for index, gfn in ((7, 100), (8, 101)):
        put(bench, 0x903, index, gfn * PAGE | leaf)
    bench.map(100, OLD)
    bench.give(101, 0xA08)
    for page in (OLD, NEW):
        bench.assign(page, 100)
        bench.machine.encryption.write(ASID, page * PAGE, page.to_bytes(8, "little"))
    return bench, bench.core(None, **{**LONG_MODE, "cr4": 0xA0, "cr3": 0, **registers})


def put(bench: Bench, page: int, index: int, word: int) -> None:
    bench.machine.encryption.write(ASID, page * PAGE + 8 * index, word.to_bytes(8, "little"))


def seen(core: GuestCore) -> int:
    """The page that is behind virtual page 7."""
    found = core.read(0x7000, 8)
    assert isinstance(found, bytes)
    return int.from_bytes(found, "little")


def stale(bench: Bench, core: GuestCore) -> None:
    """The hypervisor maps another page and does not flush: the guest still uses the old one."""
    assert seen(core) == OLD
    bench.map(100, NEW)
    assert seen(core) == OLD


FLUSHES: dict[str, Callable[[Bench, GuestCore], Any]] = {
    "RMPUPDATE of any page": lambda bench, core: bench.cpu.rmpupdate(
        range(0x50, 0x51), range(1), NewState(assigned=True, asid=9)
    ),
    "a change of the table by the firmware": lambda bench, core: bench.machine.rmp.fill(range(0x60, 0x61), 4),
    "INVLPG": lambda bench, core: core.invlpg(0x7ABC),
    "MOV CR3, the same value": lambda bench, core: core.load("cr3", 0),
    "MOV CR0": lambda bench, core: core.load("cr0", 0x80010011),
    "MOV CR4": lambda bench, core: core.load("cr4", 0x20),
    "EFER": lambda bench, core: core.load("efer", 0x1500),
    "TLB_CONTROL 1": lambda bench, core: core.physical.tlb.enter(9, TlbControl.ALL, None),
    "TLB_CONTROL 3": lambda bench, core: core.physical.tlb.enter(ASID, TlbControl.ASID, None),
    "TLB_CONTROL 7": lambda bench, core: core.physical.tlb.enter(ASID, TlbControl.ASID_NOT_GLOBAL, None),
}


@pytest.mark.parametrize("name", FLUSHES)
def test_a_stale_translation_until(name: str) -> None:
    bench, core = paged()
    stale(bench, core)
    FLUSHES[name](bench, core)
    assert seen(core) == NEW


KEEPS: dict[str, Callable[[Bench, GuestCore], Any]] = {
    "INVLPG of another page": lambda bench, core: core.invlpg(0x8000),
    "another ASID": lambda bench, core: core.physical.tlb.enter(6, TlbControl.ASID, None),
    "TLB_CONTROL 0": lambda bench, core: core.physical.tlb.enter(ASID, TlbControl.NOTHING, None),
    "another core": lambda bench, core: bench.machine.cores[1].tlb.flush(),
    "other registers": lambda bench, core: core.load("rax", 0),
    "a write of the GHCB's MSR": lambda bench, core: core.msrs.wrmsr(0xC0010130, 0),
    "a mapped page is read again": lambda bench, core: core.read(0x8000, 8),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_does_not_flush(name: str) -> None:
    bench, core = paged()
    stale(bench, core)
    KEEPS[name](bench, core)
    assert seen(core) == OLD


def test_another_table_flushes() -> None:
    bench, core = paged()
    assert seen(core) == OLD
    machine = bench.machine
    machine.cores[0].set_by_bios({Msr.RMP_BASE: 0, Msr.RMP_END: 0x3FFF})
    machine.locate_rmp(machine.cores[0])
    assert isinstance(core.read(0x7000, 8), Npf)


def test_a_guests_own_tables_need_invlpg() -> None:
    bench, core = paged()
    assert seen(core) == OLD
    put(bench, 0x903, 7, 0)
    assert seen(core) == OLD
    core.invlpg(0x7000)
    fault = core.read(0x7000, 8)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 0)


def test_the_places_of_a_guests_tables_are_held_too() -> None:
    """Another page by the same table, which the hypervisor has taken away without a flush."""
    bench, core = paged()
    put(bench, 0x903, 8, 101 * PAGE | RIGHTS | C | 0x20)
    assert seen(core) == OLD
    bench.map(3, 0, 0)
    assert isinstance(core.read(0x8000, 1), bytes)
    core.flush_tlb()
    assert core.read(0x8000, 1) == Npf(3 * PAGE, FaultError(0x6_0000_0006))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("MOV CR3, the same value", True),
        ("TLB_CONTROL 7", True),
        ("TLB_CONTROL 3", False),
        ("MOV CR4", False),
        ("INVLPG", False),
    ],
)
def test_global_pages(name: str, kept: bool) -> None:
    bench, core = paged(leaf=RIGHTS | C | GLOBAL)
    stale(bench, core)
    FLUSHES[name](bench, core)
    assert seen(core) == (OLD if kept else NEW)
    bench, core = paged(leaf=RIGHTS | C | GLOBAL, cr4=0x20)  # CR4.PGE off: no page is global
    stale(bench, core)
    FLUSHES[name](bench, core)
    assert seen(core) == NEW


def test_a_write_of_virtual_tom_flushes() -> None:
    bench = Bench("genoa")
    bench.give(0, OLD)
    bench.assign(NEW, 0)
    core = bench.core(sev_features=3, virtual_tom=0)
    before = core.read(0, 8)
    bench.map(0, NEW)
    assert core.read(0, 8) == before
    core.msrs.wrmsr(Msr.VIRTUAL_TOM, 1 << 21)
    assert core.read(0, 8) != before


# What a translation was checked for.


def test_each_vmpl_cpl_and_kind_is_checked_for_itself() -> None:
    bench, core = paged(leaf=3 | C)  # the supervisor's
    for page in range(0x900, 0x904):
        bench.assign(page, page - 0x900, vmpl=0x0101010F)
    assert seen(core) == OLD
    core.registers["vmpl"] = 1
    assert isinstance(core.read(0x7000, 1), Npf)
    core.registers.update(vmpl=0, cpl=3)
    fault = core.read(0x7000, 1)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 5)
    core.registers["cpl"] = 0
    bench.map(100, OLD, flags=5)
    assert seen(core) == OLD
    assert isinstance(core.write(0x7000, b"x"), Npf)
    assert isinstance(core.fetch(0x7000, 1), bytes)


def test_smap_and_rflags_ac() -> None:
    """With SMAP the supervisor reaches the user's data with RFLAGS.AC alone, and code not at all with SMEP."""
    _, core = paged(cr4=0xA0 | 3 << 20)
    for _ in range(2):
        for flags, allowed in ((0, False), (1 << 18, True)):
            core.registers["rflags"] = flags
            fault = core.read(0x7000, 1)
            assert isinstance(fault, bytes) == allowed
            if isinstance(fault, GuestException):
                assert (fault.vector, fault.error) == (14, 1)
            fault = core.fetch(0x7000, 1)
            assert isinstance(fault, GuestException)
            assert (fault.vector, fault.error) == (14, 0x11)
    core.registers["cpl"] = 3
    assert isinstance(core.read(0x7000, 1), bytes)
    assert isinstance(core.fetch(0x7000, 1), bytes)


def test_a_hit_sets_no_bits() -> None:
    bench, core = paged()
    seen(core)
    assert word(bench, 100) & 0x60 == 0x20
    bench.map(100, OLD)
    seen(core)
    assert word(bench, 100) & 0x60 == 0
    core.write(0x7008, b"x")
    assert word(bench, 100) & 0x60 == 0x60


def word(bench: Bench, gfn: int) -> int:
    """The nested leaf of a guest page."""
    return int.from_bytes(bench.machine.dram.read(bench.leaf(gfn), 8), "little")


def test_a_run_of_which_some_pages_are_held() -> None:
    bench = Bench()
    for gfn in range(8):
        bench.give(gfn, 0x900 + gfn)
    core = bench.core()
    core.translate(np.array([1, 3, 6], np.uint64))
    bench.map(3, 0x900)
    for gfn in (4, 5):
        bench.map(gfn, 0, 0)
    found = core.translate(np.arange(8, dtype=np.uint64))
    assert found.virtual.tolist() == [0, 1, 2, 3]
    assert found.pages.tolist() == [0x900, 0x901, 0x902, 0x903]
    assert isinstance(found.fault, Npf)
    assert (found.fault.gpa, found.fault.count) == (4 * PAGE, 2)
    assert core.translate(np.array([3, 3, 0], np.uint64)).pages.tolist() == [0x903, 0x903, 0x900]


def test_more_pages_than_places() -> None:
    bench = Bench()
    count = ENTRIES + 5
    for gfn in range(count):
        bench.map(gfn, 0x900 + gfn)
    core = bench.core({"sev": 0, "sev_es": 0})
    for _ in range(2):
        assert core.translate(np.arange(count, dtype=np.uint64)).pages.tolist() == list(range(0x900, 0x900 + count))


# What VMRUN flushes by the VMSA.


def test_pcpu_id_and_tlb_id() -> None:
    """A vCPU goes on with its translations on the core that it ran on, unless another of its ASID ran in between."""
    tlb, other = Tlb(0), Tlb(1)
    first, second = {"pcpu_id": 0, "tlb_id": 0}, {"pcpu_id": 0, "tlb_id": 0}

    def enters(where: Tlb, registers: dict[str, Any]) -> bool:
        """Whether the vCPU finds what it left."""
        where.enter(ASID, TlbControl.NOTHING, registers)
        _, hits = where.lookup(0, ASID, 0, np.array([7], np.uint64))
        entry = np.zeros(1, ENTRY)
        entry["virtual"] = 7
        where.fill(ASID, 0, entry)
        return bool(hits[0])

    assert [enters(tlb, first) for _ in range(3)] == [False, True, True]
    assert (first["pcpu_id"], first["tlb_id"]) != (0, 0)
    assert [enters(tlb, second), enters(tlb, first), enters(tlb, first)] == [False, False, True]
    assert [enters(other, first), enters(other, first), enters(tlb, first)] == [False, True, False]
    first["pcpu_id"] = 0  # the guest asks for a flush
    assert [enters(tlb, first), enters(tlb, first)] == [False, True]


def test_vmrun_writes_the_vmsa() -> None:
    async def program(cpu: Any) -> None:
        for _ in range(4):
            await cpu.read(0, 1)
            await cpu.hlt()

    bench = Bench()
    bench.give(0, OLD)
    bench.start(program)
    tlb = bench.machine.cores[0].tlb
    bench.run()
    ids = (bench.read_vmsa().pcpu_id, bench.read_vmsa().tlb_id)
    assert ids == (1, 1)
    bench.run()
    assert (bench.read_vmsa().pcpu_id, bench.read_vmsa().tlb_id) == ids
    place = VMSA_PAGE * PAGE + 0x3D8
    bench.machine.encryption.write(ASID, place, bytes(8))
    assert repr(tlb) == "Tlb(1 entries)"
    bench.set_vmcb(tlb_control=TlbControl.NOTHING)
    bench.run()
    assert (bench.read_vmsa().pcpu_id, bench.read_vmsa().tlb_id) == (1, 2)
    vmrun(bench.machine, VMCB_PAGE * PAGE, bench.executor, "vcpu0", core=1)
    assert (bench.read_vmsa().pcpu_id, repr(bench.machine.cores[1].tlb)) == (2, "Tlb(1 entries)")


# Against a dictionary.


@given(rng=st.randoms(use_true_random=False))
def test_random_operations(rng: random.Random) -> None:
    random_operations(rng)


def random_operations(rng: random.Random) -> None:
    """What the TLB holds is what was filled last and not flushed since; what it has lost is no error."""
    tlb, model, changes = Tlb(0), dict[tuple[int, int, int], tuple[int, bool]](), 0
    for step in range(60):
        asid, tag, kind = rng.randrange(1, 4), rng.randrange(3), rng.randrange(12)
        virtual = np.array(sorted(rng.sample(range(40), rng.randrange(1, 9))), np.uint64)
        if kind == 0:
            changes += 1
            model.clear()
        elif kind == 1:
            keep = rng.random() < 0.5
            tlb.flush(asid, keep_global=keep)
            model = {key: held for key, held in model.items() if key[0] != asid or (keep and held[1])}
        elif kind == 2:
            tlb.flush_page(asid, int(virtual[0]))
            model = {key: held for key, held in model.items() if (key[0], key[2]) != (asid, int(virtual[0]))}
        elif kind == 3:
            state = Snapshot(tlb=tlb)
            tlb.flush()
            assert repr(tlb) == "Tlb(0 entries)"
            state.restore()
            assert Snapshot(tlb=tlb) == state
        elif kind < 8:
            tlb.lookup(changes, asid, tag, virtual)
            entries = np.zeros(len(virtual), ENTRY)
            entries["virtual"], entries["page"], entries["is_global"] = virtual, step, rng.random() < 0.3
            tlb.fill(asid, tag, entries)
            model.update({(asid, tag, int(number)): (step, bool(entries["is_global"][0])) for number in virtual})
        found, hits = tlb.lookup(changes, asid, tag, virtual)
        for number, page, hit in zip(virtual.tolist(), found["page"].tolist(), hits.tolist(), strict=True):
            held = model.get((asid, tag, number))
            assert not hit or (held is not None and held[0] == page), (asid, tag, number)


def test_a_program_drops_a_page_by_invlpg() -> None:
    """The guest changes its own table: until INVLPG it goes on with what was."""
    bench, _ = paged()
    bench.give(102, 0xA09)
    bench.machine.encryption.write(ASID, 0xA09 * PAGE, (0xA09).to_bytes(8, "little"))
    found: list[int] = []

    async def program(cpu: GuestCpu) -> None:
        found.append(int.from_bytes(await cpu.read(0x7000, 8), "little"))
        put(bench, 0x903, 7, 102 * PAGE | RIGHTS | C)
        for drop in (None, 0x8000, 0x7FFF):
            if drop is not None:
                await cpu.invlpg(drop)
            found.append(int.from_bytes(await cpu.read(0x7000, 8), "little"))

    bench.set_vmsa(**{**LONG_MODE, "cr4": 0xA0, "cr3": 0})
    bench.start(program)
    bench.run()
    assert found == [OLD, OLD, OLD, 0xA09]
