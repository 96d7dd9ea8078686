"""The core: translation of random guests against a page-by-page reference; accesses, PVALIDATE, the order of faults."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpbook.hardware.core import WINDOW, GuestCore
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.instructions import HYPERVISOR, NewState
from snpbook.spec.vmcb import FaultError
from snpbook.trace import Instruction
from tests.hardware.guests import ASID, LONG_MODE, PAGE, RIGHTS, Bench
from tests.reference.paging import ReferenceGuest
from tests.reference.rmp import Entry, ReferenceRmp

C_BIT = 51
GFNS = 48
"""Small guest pages of a random guest; 2 MB more begin at guest page 512."""
LARGE_PAGE, FIRST_PAGE = 0x600, 0x900
"""Where its 2 MB page and its small pages lie in memory."""
FINAL, PRIVATE, SHARED = FaultError.FINAL_GPA, FaultError.ENCRYPTED, FaultError(0)


class RandomGuest:
    """Nested tables, RMP entries and guest tables drawn at random, in the library and in the reference."""

    def __init__(self, rng: random.Random) -> None:
        self.bench = Bench()
        machine = self.bench.machine
        self.model = ReferenceRmp(machine.rmp.entries)
        places = rng.sample(range(FIRST_PAGE, FIRST_PAGE + GFNS), GFNS)
        for gfn, page in enumerate(places):
            table = gfn < 5  # the guest's tables are mostly sound
            if rng.random() < (0.99 if table else 0.97):
                page = rng.choice((page,) * 19 + (0x9000,)) if not table else page
                self.bench.map(gfn, page, rng.choice((7,) * (60 if table else 30) + (5, 3, 6)))
            if rng.random() < (0.98 if table else 0.75):
                self.model.table[page] = self.entry(rng, gfn, table)
        self.bench.map(512, LARGE_PAGE, level=rng.choice((0, 1, 1, 1)))
        kind = rng.randrange(4)
        if kind == 0:
            self.model.table[LARGE_PAGE] = Entry(**self.owned(512), large=True)
            self.model.table.update({LARGE_PAGE + i: Entry(assigned=True) for i in range(1, 512)})
        elif kind == 1:
            self.model.table.update({LARGE_PAGE + i: Entry(**self.owned(512 + i)) for i in range(5)})
        elif kind == 2:
            self.model.table[LARGE_PAGE + rng.choice((0, 77))] = Entry(**self.owned(512))
        self.model.recount()
        for page, entry in self.model.table.items():
            machine.rmp.store(range(page, page + 1), np.array([entry.raw()], np.uint64))
        self.tables(rng, places)
        self.vmpl, self.write_protect = rng.choice((0, 0, 1)), rng.random() < 0.5
        self.core = self.bench.core(
            **{**LONG_MODE, "cr0": 0x80000011 | self.write_protect << 16}, cr3=1 << C_BIT, vmpl=self.vmpl
        )
        self.reference = ReferenceGuest(
            read=lambda spa: int.from_bytes(machine.dram.read(spa, 8), "little"),
            plain=lambda spa: int.from_bytes(machine.encryption.read(ASID, spa, 8), "little"),
            rmp=self.model,
            top=machine.dram.size,
            nested_root=self.bench.nested_root,
            asid=ASID,
            c_bit=C_BIT,
            cr3=1 << C_BIT,
            vmpl=self.vmpl,
            write_protect=self.write_protect,
        )

    @staticmethod
    def owned(gfn: int) -> dict[str, Any]:
        return {"assigned": True, "asid": ASID, "gfn": gfn, "validated": True, "vmpl": [15, 3, 0, 0]}

    def entry(self, rng: random.Random, gfn: int, table: bool) -> Entry:
        odd = rng.random() < (0.02 if table else 0.2)
        wrong = [{"validated": False}, {"asid": 6}, {"gfn": gfn + 1}, {"immutable": True}, {"vmpl": [15, 1, 0, 0]}]
        wrong.append({"vmpl": [2, 2, 2, 2]})
        return Entry(**{**self.owned(gfn), **(rng.choice(wrong) if odd else {})})

    def tables(self, rng: random.Random, places: list[int]) -> None:
        """PML4, PDPT, PD and two page tables in guest pages 0 to 4, encrypted where they lie."""

        def put(table: int, index: int, gfn: int, flags: int) -> None:
            page = places[gfn] if gfn < GFNS else LARGE_PAGE
            private = (page in self.model.table) ^ (rng.random() < 0.07)
            word = gfn * PAGE | flags | private << C_BIT
            self.bench.machine.encryption.write(ASID, places[table] * PAGE + 8 * index, word.to_bytes(8, "little"))

        for table in range(5):
            self.bench.machine.encryption.write(ASID, places[table] * PAGE, bytes(PAGE))
        put(0, 0, 1, RIGHTS)
        put(0, 511, 1, RIGHTS)
        put(1, 0, 2, RIGHTS)
        put(2, 0, 3, rng.choice((7, 7, 7, 5)))
        put(2, 1, 4, RIGHTS)
        put(2, 2, 512, RIGHTS | 0x80)
        for index in range(80):
            gfn = rng.choice((rng.randrange(GFNS), 5 + index // 2))
            put(3 + index // 40, index % 40, gfn, rng.choice((7,) * 20 + (5, 0)))

    def virtual(self, rng: random.Random) -> list[int]:
        """A run of virtual pages over the two page tables, the 2 MB page, the upper half, and beyond."""
        start = rng.choice((rng.randrange(40), 508 + rng.randrange(40), 1020, 1024, 0xFFFFFF8000000 + rng.randrange(8)))
        start = rng.choice((start,) * 9 + (0x7FFFFFFFE,))
        return [(start + i) % 2**52 for i in range(rng.choice((1, 3, 20)))]


@given(rng=st.randoms(use_true_random=False))
def test_translations_of_random_guests(rng: random.Random) -> None:
    guest = RandomGuest(rng)
    for _ in range(20):
        virtual, write = guest.virtual(rng), rng.random() < 0.4
        outcomes = [guest.reference.access(number, write) for number in virtual]
        stop = next((i for i, outcome in enumerate(outcomes) if len(outcome) != 2), len(virtual))
        found = guest.core.translate(np.array(virtual, np.uint64), write=write)
        assert list(zip(found.pages.tolist(), found.private.tolist(), strict=True)) == outcomes[:stop]
        if stop == len(virtual):
            assert found.fault is None
        elif isinstance(found.fault, Npf):
            fault = found.fault
            run = [("npf", fault.gpa + i * PAGE, int(fault.error)) for i in range(fault.count)]
            assert outcomes[stop : stop + fault.count] == run
        else:
            assert found.fault is not None
            shown = ("exception", found.fault.vector, int(found.fault.error), found.fault.address)
            assert shown == outcomes[stop]


# The order of faults, one page.


def paged(**mapping: int) -> tuple[Bench, GuestCore]:
    """A guest in long mode whose virtual page 7 is guest page 100, by the flags given."""
    bench = Bench()
    for gfn in range(4):
        bench.give(gfn, 0x900 + gfn)
    for table in range(3):
        bench.machine.encryption.write(
            ASID, (0x900 + table) * PAGE, ((table + 1) * PAGE | RIGHTS).to_bytes(8, "little")
        )
    leaf = 100 * PAGE | mapping.get("guest", RIGHTS) | 1 << C_BIT
    bench.machine.encryption.write(ASID, 0x903 * PAGE + 8 * 7, leaf.to_bytes(8, "little"))
    core = bench.core(**LONG_MODE, cr3=0)
    return bench, core


def test_guest_table_then_nested_table_then_rmp_then_validation_then_vmpl() -> None:
    bench, core = paged(guest=0)
    fault = core.read(0x7010, 4)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error, fault.address) == (14, 0, 0x7010)

    bench, core = paged()
    assert core.read(0x7010, 4) == Npf(100 * PAGE, FaultError.USER | FINAL | PRIVATE)
    bench.map(100, 0xA00)
    rmp = FaultError.PRESENT | FaultError.RMP | FaultError.USER | FINAL | PRIVATE
    assert core.read(0x7010, 4) == Npf(100 * PAGE, rmp)
    bench.assign(0xA00, 100, validated=0, vmpl=0)
    fault = core.read(0x7010, 4)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error, fault.address) == (29, 0x404, 0x7010)
    bench.assign(0xA00, 100, vmpl=0)
    assert core.write(0x7010, b"x") == Npf(100 * PAGE, rmp | FaultError.WRITE | FaultError.VMPL)
    bench.assign(0xA00, 100)
    assert core.write(0x7010, b"x") is None
    assert bench.plain(0xA00)[0x10:0x11] == b"x"


def test_a_guest_table_that_is_not_validated() -> None:
    """#VC with the address that was asked for; a table that is missing is a fault of the walk."""
    bench, core = paged()
    bench.assign(0x902, 2, validated=0)
    fault = core.read(0x7010, 4)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error, fault.address) == (29, 0x404, 0x7010)
    bench.map(2, 0x902, 0)
    assert core.read(0x7010, 4) == Npf(2 * PAGE, FaultError.USER | FaultError.PAGE_TABLE_WALK | PRIVATE)


def test_supervisor_writes_obey_read_only_pages_with_write_protect() -> None:
    bench, core = paged(guest=5)
    bench.give(100, 0xA00)
    assert core.write(0x7000, b"x") is None
    core.registers["cr0"] |= 0x10000
    fault = core.write(0x7000, b"x")
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 3)


def test_addresses_that_are_not_canonical() -> None:
    _, core = paged()
    fault = core.read(1 << 47, 8)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (13, 0)


# Reads and writes.


@pytest.mark.parametrize("name", ["milan", "genoa"])
@pytest.mark.parametrize("mapping", [True, False], ids=["map", "dict"])
def test_private_and_shared_memory(name: str, mapping: bool) -> None:
    """Before paging everything is private; in long mode the C-bit decides, page by page in one access."""
    bench = Bench(name, mapping=mapping)
    for gfn in range(8):
        bench.give(gfn, 0x900 + 2 * gfn)
    core = bench.core()
    data = bytes(range(256)) * 33
    assert core.write(0x10F0, data) is None
    assert core.read(0x10F0, len(data)) == data
    assert core.read(0x1000, 0x10) == bench.plain(0x902)[:16]
    assert bench.machine.dram.read(0x902 * PAGE, PAGE) != bench.plain(0x902)
    assert core.read(0x10F0, 0) == b""
    assert core.write(0x9000, b"") is None

    words = {0: PAGE | RIGHTS, PAGE: 2 * PAGE | RIGHTS, 2 * PAGE: 3 * PAGE | RIGHTS}
    words |= {3 * PAGE + 8 * i: (4 + i) * PAGE | RIGHTS | (1 << C_BIT) * (i != 1) for i in range(3)}
    for address in range(4):
        assert core.write(address * PAGE, bytes(PAGE)) is None
    for address, word in words.items():
        assert core.write(address, word.to_bytes(8, "little")) is None
    core.registers.update(LONG_MODE, cr3=0)
    assert isinstance(core.write(0x1000, b"shared"), Npf)  # page 5 is assigned
    bench.cpu.rmpupdate(range(0x90A, 0x90B), range(1), HYPERVISOR)
    assert core.write(0x0FF0, data[: PAGE + 32]) is None
    assert core.read(0x0FF0, PAGE + 32) == data[: PAGE + 32]
    assert bench.machine.dram.read(0x90A * PAGE, PAGE) == data[16 : PAGE + 16]
    assert bench.plain(0x908)[-16:] + bench.plain(0x90C)[:16] == data[:16] + data[PAGE + 16 : PAGE + 32]


def test_a_fault_at_the_last_page_writes_nothing() -> None:
    bench = Bench()
    bench.give(0, 0x900)
    bench.give(1, 0x901, validated=0)
    before = bench.machine.dram.read(0x900 * PAGE, 2 * PAGE)
    fault = bench.core().write(0x0F00, bytes(0x200))
    assert isinstance(fault, GuestException)
    assert fault.address == 0x1000
    assert bench.machine.dram.read(0x900 * PAGE, 2 * PAGE) == before


@pytest.mark.parametrize(
    ("permissions", "vmpl", "may_read", "may_write"),
    [
        (0x0F, 0, True, True),
        (0x010F, 1, True, False),
        (0x030F, 1, True, True),
        (0x0F, 2, False, False),
        (0x02, 0, False, False),
    ],
)
def test_the_vmpl_that_runs_needs_its_own_rights(permissions: int, vmpl: int, may_read: bool, may_write: bool) -> None:
    """The right to write without that to read is none."""
    bench = Bench()
    bench.give(0, 0x900, vmpl=permissions)
    core = bench.core(vmpl=vmpl)
    for result, granted in ((core.read(0, 1), may_read), (core.write(0, b"x"), may_write)):
        assert isinstance(result, Npf) != granted
        if isinstance(result, Npf):
            assert result.error & FaultError.VMPL


def test_a_fault_stands_for_pages_that_fault_alike_only() -> None:
    bench, core = paged()
    for index, (gfn, private) in enumerate([(100, 1), (101, 1), (102, 0), (103, 0), (104, 0), (106, 0)]):
        leaf = gfn * PAGE | RIGHTS | private << C_BIT
        bench.machine.encryption.write(ASID, 0x903 * PAGE + 8 * (16 + index), leaf.to_bytes(8, "little"))
    bench.map(104, 0xA00, flags=5)  # present, and not writable
    virtual = np.arange(16, 22, dtype=np.uint64)
    counts = []
    while len(virtual):
        fault = core.translate(virtual, write=True).fault
        assert isinstance(fault, Npf)
        counts.append(
            (fault.gpa // PAGE, fault.count, bool(fault.error & PRIVATE), bool(fault.error & FaultError.PRESENT))
        )
        virtual = virtual[fault.count :]
    assert counts == [(100, 2, True, False), (102, 2, False, False), (104, 1, False, True), (106, 1, False, False)]


def test_one_page_by_two_names() -> None:
    """A write over both names lands in the order of the addresses."""
    bench, core = paged()
    bench.give(100, 0xA00)
    leaf = (100 * PAGE | RIGHTS | 1 << C_BIT).to_bytes(8, "little")
    bench.machine.encryption.write(ASID, 0x903 * PAGE + 8 * 8, leaf)
    assert core.write(0x7FF0, b"a" * 16 + b"b" * 4) is None
    assert (bench.plain(0xA00)[:4], bench.plain(0xA00)[-16:]) == (b"bbbb", b"a" * 16)


def test_shared_writes_into_a_2mb_mapping_need_all_its_pages() -> None:
    bench, core = paged()
    leaf = (512 * PAGE | RIGHTS).to_bytes(8, "little")
    bench.machine.encryption.write(ASID, 0x903 * PAGE + 8 * 7, leaf)
    bench.map(512, LARGE_PAGE, level=1)
    assert core.write(0x7000, b"x") is None
    bench.cpu.rmpupdate(range(LARGE_PAGE + 9, LARGE_PAGE + 10), range(1), NewState(assigned=True, asid=6))
    error = FaultError.PRESENT | FaultError.RMP | FaultError.USER | FINAL | FaultError.WRITE
    assert core.write(0x7000, b"x") == Npf(512 * PAGE, error)
    assert isinstance(core.read(0x7000, 1), bytes)


# PVALIDATE.


def assigned(count: int, **bits: Any) -> tuple[Bench, GuestCore]:
    bench = Bench()
    for gfn in range(count):
        bench.give(gfn, 0x900 + gfn, validated=0, **bits)
    return bench, bench.core()


def test_pvalidate_up_to_the_first_fault() -> None:
    bench, core = assigned(6)
    bench.assign(0x904, 4, asid=7, validated=0)
    bench.assign(0x905, 5, asid=7, validated=0)
    codes, unchanged, fault = core.pvalidate(0, 6, True, False)
    rmp = FaultError.PRESENT | FaultError.RMP | FaultError.USER | FINAL | PRIVATE
    assert (codes.tolist(), unchanged.tolist(), fault) == ([0] * 4, [False] * 4, Npf(4 * PAGE, rmp, 2))
    (event,) = bench.log.of(Instruction, "PVALIDATE")
    assert (event.pages, event.actor) == (range(0x900, 0x904), "vcpu0")
    assert (event.after ^ event.before).tolist() == [[1 << 62, 0]] * 4
    assert (bench.counts.pvalidates, bench.counts.pages_validated) == (4, 4)
    codes, unchanged, fault = core.pvalidate(0, 2, False, False)
    assert (codes.tolist(), unchanged.tolist(), fault) == ([0, 0], [False, False], None)


def test_pvalidate_of_pages_that_are_not_mapped() -> None:
    bench, core = assigned(2)
    _, _, fault = core.pvalidate(0, 5, True, False)
    assert fault == Npf(2 * PAGE, FaultError.USER | FINAL | PRIVATE, 3)
    bench.map(2, bench.machine.rmp.entries)  # out of DRAM: the nested tables are wrong
    _, _, fault = core.pvalidate(2 * PAGE, 1, True, False)
    assert isinstance(fault, Npf)
    assert fault.error == FaultError.PRESENT | FaultError.RESERVED | FaultError.USER | FINAL | PRIVATE


def test_pvalidate_sizes() -> None:
    bench, core = assigned(1)
    bench.map(512, LARGE_PAGE)
    bench.assign(LARGE_PAGE, 512, large=True, validated=0)
    error = FaultError.PRESENT | FaultError.RMP | FaultError.USER | FINAL | PRIVATE | FaultError.SIZE_MISMATCH
    assert core.pvalidate(512 * PAGE, 1, True, False)[2] == Npf(512 * PAGE, error)
    codes, unchanged, fault = core.pvalidate(0, 2, True, True)
    assert (codes.tolist(), unchanged.tolist(), fault) == ([6, 0], [False, False], None)
    assert bench.counts.pages_validated == 512
    codes, _, fault = core.pvalidate(PAGE, 3, True, True)
    assert (codes.tolist(), fault) == ([1, 1, 1], None)


@pytest.mark.parametrize("registers", [{"vmpl": 1}, {"cpl": 3}])
def test_pvalidate_is_for_vmpl0_and_cpl0(registers: dict[str, int]) -> None:
    bench, _ = assigned(1)
    core = bench.core(**registers)
    codes, _, fault = core.pvalidate(1, 1, True, True)  # before the operand is looked at
    assert isinstance(fault, GuestException)
    assert (len(codes), fault.vector, fault.error) == (0, 13, 0)


def test_a_long_run_in_windows() -> None:
    count = WINDOW + 3
    bench, core = assigned(count)
    codes, unchanged, fault = core.pvalidate(0, count, True, False)
    assert (len(codes), codes.any(), unchanged.any(), fault) == (count, False, False, None)
    assert core.pvalidate(0, 0, True, False)[2] is None
    assert bench.counts.pages_validated == count


def test_the_address_of_an_exception_goes_to_cr2() -> None:
    core = Bench().core()
    for exception, cr2 in ((GuestException(14, 2, 0x1234), 0x1234), (GuestException(29, 0x404, 0x77), 0x77)):
        core.deliver(exception)
        assert core.registers["cr2"] == cr2
    core.deliver(GuestException(29, 0x7C, 0x99))
    core.deliver(GuestException(13, 0, 0x99))
    assert core.registers["cr2"] == 0x77
