"""The core: reads, writes and fetches of a guest, and which fault comes first (random walks: test_walks)."""

import numpy as np
import pytest

from snpbook.hardware.checks import AccessKind
from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.spec.vmcb import FaultError
from tests.hardware.guests import ASID, LONG_MODE, PAGE, RIGHTS, Bench

C_BIT = 51
LARGE_PAGE = 0x600
FINAL, PRIVATE, SHARED = FaultError.FINAL_GPA, FaultError.ENCRYPTED, FaultError(0)


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
    error = FaultError.USER | FaultError.WRITE | FaultError.PAGE_TABLE_WALK | PRIVATE  # a walk counts as a write
    assert core.read(0x7010, 4) == Npf(2 * PAGE, error)


def test_supervisor_writes_obey_read_only_pages_with_write_protect() -> None:
    bench, core = paged(guest=5)
    bench.give(100, 0xA00)
    assert core.write(0x7000, b"x") is None
    core.load("cr0", core.registers["cr0"] | 0x10000)
    fault = core.write(0x7000, b"x")
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 3)


def test_nested_tables_are_pages_of_the_hypervisor() -> None:
    """A table that is not is an #NPF with the bit RMP, whatever it says."""
    bench, core = paged()
    bench.give(100, 0xA00)
    bench.assign(bench.nested_root // PAGE, 0, asid=6)
    error = FaultError.PRESENT | FaultError.RMP | FaultError.USER | FaultError.WRITE | PRIVATE
    assert core.read(0x7000, 1) == Npf(0, error | FaultError.PAGE_TABLE_WALK)
    other = bench.core(cr0=0x10)
    assert other.write(0x3000, b"x") == Npf(3 * PAGE, error | FINAL)


def test_users_obey_read_only_pages_without_write_protect() -> None:
    bench, core = paged(guest=5)
    bench.give(100, 0xA00)
    core.registers["cpl"] = 3
    fault = core.write(0x7000, b"x")
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 7)


def test_no_execute_needs_its_feature() -> None:
    """Without EFER.NXE the bit is a reserved one."""
    bench, core = paged(guest=RIGHTS | 1 << 63)
    bench.give(100, 0xA00)
    fault = core.read(0x7000, 1)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 9)
    core.load("efer", 0x1D00)
    assert isinstance(core.read(0x7000, 1), bytes)
    fault = core.fetch(0x7000, 1)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error) == (14, 0x11)


def test_virtual_top_of_memory() -> None:
    """Below it data is private, from there on shared; a C-bit is a reserved bit, but without SNP it is the C-bit."""
    bench, _ = paged()
    for index, word in ((8, 100 * PAGE | RIGHTS), (9, 512 * PAGE | RIGHTS)):
        bench.machine.encryption.write(ASID, 0x903 * PAGE + 8 * index, word.to_bytes(8, "little"))
    bench.give(100, 0xA00)
    bench.map(512, 0xB00)
    core = bench.core(**LONG_MODE, cr3=0, sev_features=3, virtual_tom=0x200000)
    assert core.write(0x8000, b"private") is None
    assert core.write(0x9000, b"shared") is None
    assert (bench.plain(0xA00)[:7], bench.machine.dram.read(0xB00 * PAGE, 6)) == (b"private", b"shared")
    fault = core.read(0x7000, 1)
    assert isinstance(fault, GuestException)
    assert (fault.vector, fault.error, fault.address) == (14, 9, 0x7000)


def test_virtual_top_of_memory_is_for_snp_guests() -> None:
    """To others the bit in SEV_FEATURES means nothing."""
    bench = Bench()
    for gfn in range(4):
        bench.map(gfn, 0x900 + gfn)
        word = (gfn + 1) * PAGE | RIGHTS if gfn < 3 else 100 * PAGE | RIGHTS | 1 << C_BIT
        bench.machine.encryption.write(ASID, (0x900 + gfn) * PAGE, word.to_bytes(8, "little"))
    bench.map(100, 0xA00)
    core = bench.core(**LONG_MODE, cr3=0, sev_features=2)
    assert core.translate(np.zeros(1, np.uint64)).private.tolist() == [True]


@pytest.mark.parametrize("registers", [{"efer": 0x1000}, {"cr4": 0x1020}])
def test_other_paging_is_refused_by_name(registers: dict[str, int]) -> None:
    _, core = paged()
    core.registers.update(registers)
    with pytest.raises(ValueError, match="long mode with four levels"):
        core.read(0x7000, 1)


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
    for name, value in {"cr3": 0, **LONG_MODE}.items():
        core.load(name, value)
    assert isinstance(core.write(0x1000, b"shared"), Npf)  # page 5 is assigned
    bench.cpu.rmpupdate(range(0x90A, 0x90B), range(1), HYPERVISOR)
    assert core.write(0x0FF0, data[: PAGE + 32]) is None
    assert core.read(0x0FF0, PAGE + 32) == data[: PAGE + 32]
    assert bench.machine.dram.read(0x90A * PAGE, PAGE) == data[16 : PAGE + 16]
    assert bench.plain(0x908)[-16:] + bench.plain(0x90C)[:16] == data[:16] + data[PAGE + 16 : PAGE + 32]


@pytest.mark.parametrize(
    ("control", "features", "c_bit", "host_c", "data", "code"),
    [
        ({}, 1, False, False, 0, None),
        ({}, 1, False, True, 1023, None),
        ({"sev_es": 1}, 0, False, True, 1023, ASID),
        ({"sev_es": 1, "vte": 1}, 0, False, False, 0, ASID),
        ({"sev_es": 0}, 0, False, False, 0, ASID),
        ({"sev_es": 0}, 0, True, True, ASID, ASID),
        ({"sev_es": 0, "vte": 1}, 0, False, True, ASID, ASID),
        ({"sev": 0, "sev_es": 0}, 0, False, False, 0, 0),
        ({"sev": 0, "sev_es": 0}, 0, False, True, 1023, 1023),
    ],
)
def test_who_decides_encryption(
    control: dict[str, int], features: int, c_bit: bool, host_c: bool, data: int, code: int | None
) -> None:
    """The key of a page of the hypervisor, as data and as code; code of an SNP guest would need a page of its own."""
    bench = Bench()
    memory, key = bench.machine.encryption, ASID * control.get("sev", 1)
    for gfn in range(4):
        bench.map(gfn, 0x900 + gfn)
        if features:
            bench.assign(0x900 + gfn, gfn)
    for table in range(4):
        word = (table + 1) * PAGE | RIGHTS if table < 3 else 100 * PAGE | RIGHTS | c_bit << C_BIT
        memory.write(key, (0x900 + table) * PAGE, word.to_bytes(8, "little"))
    bench.map(100, 0xA00, RIGHTS | host_c << C_BIT)
    core = bench.core(control, **LONG_MODE, cr3=0, sev_features=features)
    assert core.write(0x10, b"sixteen bytes ..") is None
    assert memory.read(data, 0xA00 * PAGE + 0x10, 16) == b"sixteen bytes .."
    assert core.read(0x10, 16) == b"sixteen bytes .."
    fetched = core.fetch(0x10, 16)
    if code is None:
        assert isinstance(fetched, Npf)
        assert fetched.error & (PRIVATE | FaultError.FETCH) == PRIVATE | FaultError.FETCH
    else:
        assert fetched == memory.read(code, 0xA00 * PAGE + 0x10, 16)


def test_before_snp_is_on_nobody_asks_the_table() -> None:
    """Neither for the guest's pages and tables nor for the nested tables."""
    bench = Bench(snp=False)
    for gfn in range(5):
        bench.map(gfn, 0x900 + gfn)
    for table in range(4):
        word = (table + 1) * PAGE | RIGHTS | 1 << C_BIT
        bench.machine.encryption.write(ASID, (0x900 + table) * PAGE, word.to_bytes(8, "little"))
    for page in (*range(0x900, 0x905), *bench.table_pages):
        bench.assign(page, 0, asid=9)
    core = bench.core({"sev_es": 0}, **LONG_MODE, cr3=0)
    assert core.write(0x10, b"x") is None


def test_one_access_over_pages_with_all_three_keys() -> None:
    bench, core = paged()
    bench.give(100, 0xA00)
    bench.map(101, 0xA01)
    bench.map(102, 0xA02, RIGHTS | 1 << C_BIT)
    for index, private in enumerate((1, 0, 0)):
        leaf = (100 + index) * PAGE | RIGHTS | private << C_BIT
        bench.machine.encryption.write(ASID, 0x903 * PAGE + 8 * (16 + index), leaf.to_bytes(8, "little"))
    data = bytes(range(256)) * 48
    assert core.write(0x10000, data) is None
    assert core.read(0x10000, len(data)) == data
    for key, page in ((ASID, 0), (0, 1), (1023, 2)):
        stored = bench.machine.encryption.read(key, (0xA00 + page) * PAGE, PAGE)
        assert stored == data[page * PAGE : (page + 1) * PAGE]


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
        fault = core.translate(virtual, AccessKind.WRITE).fault
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


def test_the_address_of_an_exception_goes_to_cr2() -> None:
    core = Bench().core()
    for exception, cr2 in ((GuestException(14, 2, 0x1234), 0x1234), (GuestException(29, 0x404, 0x77), 0x77)):
        core.deliver(exception)
        assert core.registers["cr2"] == cr2
    core.deliver(GuestException(29, 0x7C, 0x99))
    core.deliver(GuestException(13, 0, 0x99))
    assert core.registers["cr2"] == 0x77
