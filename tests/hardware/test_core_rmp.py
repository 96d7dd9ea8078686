"""PVALIDATE, RMPADJUST and RMPQUERY in a running guest: who may, where a run stops, what fault and trace tell."""

from collections.abc import Callable
from typing import Any

import pytest

from snpbook.hardware.core import GuestCore
from snpbook.hardware.core_rmp import adjust_rights, query_rights, validate_pages
from snpbook.hardware.exits import Npf, Shutdown
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.rmp_operations import LEAST, Rmpquery
from snpbook.hardware.snapshot import Snapshot
from snpbook.trace import Instruction
from tests.hardware.guests import ASID, PAGE, Bench

LARGE_PAGE, FIRST_PAGE = 0x600, 0x900
PRESENT, USER, RMP, FINAL, ENCRYPTED, SIZE = 1 << 0, 1 << 2, 1 << 31, 1 << 32, 1 << 34, 1 << 35
NOT_MAPPED = USER | FINAL | ENCRYPTED
REFUSED = NOT_MAPPED | PRESENT | RMP


def assigned(count: int, name: str = "genoa", **bits: Any) -> tuple[Bench, GuestCore]:
    """Guest pages 0 to `count` - 1, and a 2 MB page at 512, none validated unless told."""
    bench = Bench(name)
    for gfn in range(count):
        bench.give(gfn, FIRST_PAGE + gfn, **{"validated": 0, **bits})
    bench.map(512, LARGE_PAGE)
    bench.assign(LARGE_PAGE, 512, large=True, **{"validated": 0, **bits})
    return bench, bench.core()


def entry(bench: Bench, gfn: int) -> Any:
    return bench.machine.rmp.entry(FIRST_PAGE + gfn if gfn < 512 else LARGE_PAGE + gfn - 512)


def codes(outcomes: list[Any]) -> list[int]:
    return [int(code) for outcome in outcomes for code in outcome.codes]


def validate(core: GuestCore, address: int, count: int, value: bool = True, large: bool = False) -> Any:
    outcomes, fault = validate_pages(core, address, count, value, large)
    return codes(outcomes), [bool(flag) for outcome in outcomes for flag in outcome.unchanged], fault


def adjust(core: GuestCore, address: int, count: int, rights: int = 1, large: bool = False, **operands: Any) -> Any:
    outcomes, fault = adjust_rights(
        core, address, count, operands.get("target", 1), rights, operands.get("vmsa", False), large
    )
    return codes(outcomes), fault


def test_pvalidate_up_to_the_first_fault() -> None:
    bench, core = assigned(6)
    bench.assign(0x904, 4, asid=7, validated=0)
    bench.assign(0x905, 5, asid=7, validated=0)
    assert validate(core, 0, 6) == ([0] * 4, [False] * 4, Npf(4 * PAGE, REFUSED, 2))
    (event,) = bench.log.of(Instruction, "PVALIDATE")
    assert (event.pages, event.actor) == (range(0x900, 0x904), "vcpu0")
    assert (event.after ^ event.before).tolist() == [[1 << 62, 0]] * 4
    assert (bench.counts.pvalidates, bench.counts.pages_validated) == (4, 4)
    assert validate(core, 0, 2, False) == ([0, 0], [False, False], None)


def test_pages_that_are_not_mapped() -> None:
    bench, core = assigned(2)
    assert validate(core, 0, 5)[2] == Npf(2 * PAGE, NOT_MAPPED, 3)
    assert adjust(core, 0, 5) == ([0, 0], Npf(2 * PAGE, NOT_MAPPED, 3))
    assert query_rights(core, 3 * PAGE, 1, 1)[1] == Npf(3 * PAGE, NOT_MAPPED)
    bench.map(2, bench.machine.rmp.entries)  # out of DRAM: a reserved bit in the nested tables
    fault = validate(core, 2 * PAGE, 1)[2]
    assert (fault.vector, fault.error, fault.address) == (29, 0x400, 2 * PAGE)


def test_sizes() -> None:
    bench, core = assigned(1)
    mismatch = Npf(512 * PAGE, REFUSED | SIZE)
    assert validate(core, 512 * PAGE, 1)[2] == mismatch
    assert adjust(core, 512 * PAGE, 1) == ([], mismatch)  # before the page's validation is looked at
    assert validate(core, 0, 2, large=True) == ([6, 0], [False, False], None)
    assert bench.counts.pages_validated == 512
    assert validate(core, PAGE, 3, large=True) == ([1, 1, 1], [False] * 3, None)
    assert adjust(core, PAGE, 3, large=True) == ([1, 1, 1], None)
    fault = adjust(core, 0, 2, large=True)[1]
    assert (fault.vector, fault.error, fault.address) == (29, 0x404, 0)  # not validated, and only then the size
    assert validate(core, 0, 1) == ([0], [False], None)
    assert adjust(core, 0, 2, large=True) == ([6, 0], None)
    assert (entry(bench, 0).vmpl1, entry(bench, 512).vmpl1) == (0, 1)


RUNS: dict[str, Callable[[GuestCore, int, int], Any]] = {
    "PVALIDATE": lambda core, address, count: validate_pages(core, address, count, True, False),
    "RMPADJUST": lambda core, address, count: adjust_rights(core, address, count, 3, 1, False, False),
    "RMPQUERY": lambda core, address, count: query_rights(core, address, count, 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_where_they_do_not_exist(name: str) -> None:
    """No SNP guest, SNP off, or a processor without the instruction: #UD, before #GP."""
    lacking = Bench("genoa").core(sev_features=0, cpl=3), Bench("genoa", snp=False).core(cpl=3)
    for core in lacking if name != "RMPQUERY" else (*lacking, Bench("milan").core(cpl=3)):
        outcomes, fault = RUNS[name](core, 1, 1)
        assert (outcomes, fault.vector, fault.error) == ([], 6, 0)


@pytest.mark.parametrize("name", RUNS)
def test_privilege(name: str) -> None:
    """CPL 0 alone; PVALIDATE at VMPL0 alone. Both come before the operands."""
    bench, _ = assigned(1, validated=1)
    for registers in ({"cpl": 3}, {"cpl": 1}, {"vmpl": 2}):
        outcomes, fault = RUNS[name](bench.core(**registers), 0, 1)
        if name == "PVALIDATE" or "cpl" in registers:
            assert (outcomes, fault.vector, fault.error) == ([], 13, 0)
        else:
            assert codes(outcomes) == [0 if name == "RMPQUERY" else 2]  # VMPL2 itself may not read
            assert fault is None


def test_a_long_run_in_windows() -> None:
    """Each window is twice as long as what was done before it."""
    count = 3 * LEAST + 3
    bench = Bench("genoa")
    for gfn in range(count):
        bench.give(gfn, 0x900 + gfn, validated=0)
    core = bench.core()
    done, unchanged, fault = validate(core, 0, count)
    assert (len(done), any(done), any(unchanged), fault) == (count, False, False, None)
    assert validate(core, 0, 0) == ([], [], None)
    assert bench.counts.pages_validated == count
    assert adjust(core, 0, count) == ([0] * count, None)
    query = Rmpquery(0, count, False, 1)
    assert query.step(core) is None
    assert [len(outcome.codes) for outcome in query.outcomes] == [LEAST, 2 * LEAST, 3]
    assert (query.column("permissions") == 1).all()


def test_rmpadjust_changes_one_byte_and_at_vmpl0_the_vmsa_bit() -> None:
    bench, core = assigned(3, vmpl=0x0102030F, validated=1)
    assert adjust(core, 0, 2, 7, target=2, vmsa=True) == ([0, 0], None)
    (event,) = bench.log.of(Instruction, "RMPADJUST")
    assert (event.after ^ event.before).tolist() == [[1 << 61, 0x050000]] * 2
    deputy = bench.core(vmpl=1)
    assert adjust(deputy, 0, 1, 2, target=2) == ([0], None)  # VMPL1 holds 3
    assert adjust(deputy, 0, 1, 4, target=2) == ([2], None)
    assert (entry(bench, 0).vmsa, entry(bench, 0).vmpl2) == (1, 2)
    assert adjust(core, 0, 1, 0, target=2) == ([0], None)
    assert (entry(bench, 0).vmsa, entry(bench, 1).vmsa) == (0, 1)


@pytest.mark.parametrize(("vmpl", "target", "code"), [(0, 0, 2), (2, 1, 2), (2, 2, 2), (0, 4, 1), (3, 255, 1)])
def test_targets(vmpl: int, target: int, code: int) -> None:
    """Refused before any page is looked at: nothing is mapped here."""
    core = Bench("genoa").core(vmpl=vmpl)
    assert adjust(core, 0, 2, target=target) == ([code, code], None)
    queries, fault = query_rights(core, 0, 2, target)
    assert (codes(queries), queries[0].permissions.tolist(), fault) == ([2, 2], [0, 0], None)


def test_what_rmpquery_finds() -> None:
    bench, core = assigned(2, vmpl=0x0102030F, validated=1)
    bench.assign(0x901, 1, vmpl=0x04050607, vmsa=1)
    (query,), fault = query_rights(core, 0, 2, 2)
    assert (query.codes.tolist(), query.permissions.tolist(), query.vmsa.tolist(), fault) == (
        [0, 0], [2, 5], [False, True], None,
    )  # fmt: skip
    bench.map(512 + 7, LARGE_PAGE + 7)
    (query,), fault = query_rights(core, (512 + 7) * PAGE, 1, 1)
    assert (query.large.tolist(), query.permissions.tolist(), fault) == ([True], [3], None)
    assert len(bench.log.of(Instruction, "RMPQUERY")) == 2


def test_each_fault_in_the_middle_of_a_run_leaves_the_rest() -> None:
    """A program's RMPADJUST is stopped twice by the hypervisor and goes on behind the pages done."""

    async def program(cpu: GuestCpu) -> Any:
        adjusted = await cpu.rmpadjust(0, 6, vmpl=1, permissions=3)
        return adjusted.tolist(), [column.tolist() for column in await cpu.rmpquery(0, 6, vmpl=1)]

    bench = Bench("genoa")
    bench.set_vmsa()
    for gfn in (0, 1, 3, 5):
        bench.give(gfn, FIRST_PAGE + gfn)
    bench.start(program)
    for missing, fault in ((2, Npf(2 * PAGE, NOT_MAPPED, 2, span=3)), (4, Npf(4 * PAGE, NOT_MAPPED))):
        assert bench.run() == fault
        rights = [entry(bench, gfn).vmpl1 for gfn in range(6)]
        assert rights == [3] * missing + [0] * (6 - missing)
        bench.give(missing, FIRST_PAGE + missing)
    bench.run()
    assert bench.executor.outcome == ([0] * 6, [[0] * 6, [False] * 6, [3] * 6, [False] * 6])


def test_a_snapshot_in_the_middle_of_a_run() -> None:
    """Both branches go on behind the pages done, in the same way."""

    async def program(cpu: GuestCpu) -> Any:
        return (await cpu.rmpadjust(0, 4, vmpl=1, permissions=3)).tolist()

    bench = Bench("genoa")
    for gfn in (0, 1, 3):
        bench.give(gfn, FIRST_PAGE + gfn)
    bench.start(program)
    assert bench.run() == Npf(2 * PAGE, NOT_MAPPED)
    taken, ends, traces = Snapshot(machine=bench.machine, executor=bench.executor), [], []
    for _ in range(2):
        taken.restore()
        start = len(bench.log.events)
        bench.give(2, FIRST_PAGE + 2)
        bench.run()
        assert bench.executor.outcome == [0] * 4
        ends.append(Snapshot(machine=bench.machine, executor=bench.executor))
        traces.append([repr(event) for event in bench.log.events[start:]])
    assert ends[0] == ends[1]
    assert traces[0] == traces[1] != []


def test_rights_on_a_page_that_is_not_validated() -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.rmpadjust(0, 3, vmpl=1, permissions=3)

    bench = Bench("genoa")
    for gfn in range(3):
        bench.give(gfn, FIRST_PAGE + gfn, validated=int(gfn != 1))
    bench.start(program)
    exit_ = bench.run()
    assert isinstance(exit_, Shutdown)
    assert "vector 29, error 0x404, address 0x1000" in exit_.reason
    assert [entry(bench, gfn).vmpl1 for gfn in range(3)] == [3, 0, 0]


BAD: list[tuple[Callable[[GuestCpu], object], type[Exception], str]] = [
    (lambda cpu: cpu.rmpadjust(8, 1, vmpl=1, permissions=1), ValueError, "address = 0x8: RMPADJUST takes a page"),
    (lambda cpu: cpu.rmpadjust(0, 1, vmpl=256, permissions=1), ValueError, "vmpl = 0x100: the operand holds 8 bits"),
    (lambda cpu: cpu.rmpadjust(0, 1, vmpl=1, permissions=-1), ValueError, "permissions = -0x1: the operand holds"),
    (lambda cpu: cpu.rmpquery(PAGE + 1, 1, vmpl=1), ValueError, "address = 0x1001: RMPQUERY takes a page"),
    (lambda cpu: cpu.rmpquery(0, 1, vmpl=1.5), TypeError, r"vmpl = 1\.5: an integer"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_operands_that_no_instruction_has(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(GuestCpu())


def test_owner_and_guest_page_are_checked_for_each() -> None:
    bench, core = assigned(3, validated=1)
    bench.assign(0x902, 2, asid=ASID + 1)
    for name, run in RUNS.items():
        outcomes, fault = run(core, 0, 3)
        assert (codes(outcomes), fault) == ([0, 0], Npf(2 * PAGE, REFUSED)), name
