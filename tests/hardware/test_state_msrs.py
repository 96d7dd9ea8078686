"""MSRs that are part of a guest's state: what they read, what they refuse, who comes first, where they are kept."""

from typing import Any

import pytest

from snpbook.hardware.exits import GuestException, Hlt, Intercepted
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import StateMsr
from snpbook.spec.vmsa import SEGMENT
from tests.hardware.guests import PAGE, VMCB_PAGE
from tests.hardware.kinds import AnyBench

KINDS = ["plain", "sev", "es", "snp"]
# Number: byte in the VMSA, bytes, a value that the register holds.
ROWS = {
    0x48: (0x2E0, 8, 0x5),
    0x174: (0x228, 8, 0x10),
    0x175: (0x230, 8, 0xFFFF_8000_0000_1000),
    0x176: (0x238, 8, 0xFFFF_8000_0000_2000),
    0x277: (0x268, 8, 0x0007_0406_0105_0406),
    0xDA0: (0x140, 8, 0x800),
    0xC0000080: (0x0D0, 8, 0x1D01),
    0xC0000081: (0x200, 8, 0x23_0010_0000_0000),
    0xC0000082: (0x208, 8, 0xFFFF_FFFF_8100_0000),
    0xC0000083: (0x210, 8, 0x7FFF_FFFF_FFFF),
    0xC0000084: (0x218, 8, 0x47700),
    0xC0000100: (0x048, 8, 0x7F00_1234_5000),
    0xC0000101: (0x058, 8, 0xFFFF_8880_0000_0000),
    0xC0000102: (0x220, 8, 0xFFFF_8880_0000_1000),
    0xC0000103: (0x2EC, 4, 0x8000_0001),
}
IN_THE_CORE = {0xDA0: "xss", 0xC0000103: "tsc_aux"}
"""Without SEV-ES host software swaps them."""


def test_rows_are_every_register_but_the_counter() -> None:
    assert {0x10, *ROWS} == set(StateMsr)


@pytest.mark.parametrize("number", ROWS, ids=hex)
@pytest.mark.parametrize("kind", KINDS)
def test_a_register_of_the_state(kind: str, number: int) -> None:
    """Written, read back, read again after an exit, and found at its place in the save area."""
    offset, size, value = ROWS[number]

    async def program(cpu: GuestCpu) -> Any:
        await cpu.wrmsr(number, value)
        first = await cpu.rdmsr(number)
        await cpu.pause()
        return first, await cpu.rdmsr(number)

    bench = AnyBench(kind)
    bench.intercept(0x77)
    bench.start(program)
    bench.run()
    area = bytes(bench.read_registers())
    if kind in ("plain", "sev"):
        rip = bench.read_vmcb().next_rip
        bench.machine.dram.write(VMCB_PAGE * PAGE + 0x400 + 0x178, rip.to_bytes(8, "little"))
    if kind in ("plain", "sev") and number in IN_THE_CORE:
        assert bench.cpu.registers()[IN_THE_CORE[number]] == value
    else:
        assert int.from_bytes(area[offset : offset + size], "little") == value
    assert bench.run() == Hlt()
    assert bench.executor.outcome == (value, value)


@pytest.mark.parametrize(
    ("number", "value"),
    [(n, 1 << 47) for n in (0x175, 0x176, 0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102)]
    + [(0x277, 0x2), (0x277, 0x8 << 56)],
)
def test_values_that_raise_gp(number: int, value: int) -> None:
    """Addresses that are not canonical, memory types that do not exist; the register keeps what it had."""

    async def program(cpu: GuestCpu) -> Any:
        before = await cpu.rdmsr(number)
        try:
            await cpu.wrmsr(number, value)
        except GuestException as exception:
            return exception.vector, exception.error, await cpu.rdmsr(number) == before

    bench = AnyBench()
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == (13, 0, True)


def test_a_base_is_all_of_a_segment_that_changes() -> None:
    bench = AnyBench()
    core = bench.core()
    core.registers["gs"] = SEGMENT.record(selector=0x33, attrib=0xC93, limit=0xFFFFF, base=5)

    async def program(cpu: GuestCpu) -> Any:
        await cpu.wrmsr(StateMsr.GS_BASE, 0x1000)

    bench.start(program)
    bench.executor.run(core)
    assert dict(core.registers["gs"]) == {"selector": 0x33, "attrib": 0xC93, "limit": 0xFFFFF, "base": 0x1000}


def test_tsc_aux_has_32_bits() -> None:
    async def program(cpu: GuestCpu) -> Any:
        await cpu.wrmsr(StateMsr.TSC_AUX, 0x1_0000_0007)
        return await cpu.rdmsr(StateMsr.TSC_AUX)

    bench = AnyBench()
    bench.start(program)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == 7


@pytest.mark.parametrize("kind", KINDS)
def test_efer_as_by_its_own_instruction(kind: str) -> None:
    """SVME stays set with SEV-ES, the trap tells the value, RIP stands behind the write."""

    async def program(cpu: GuestCpu) -> Any:
        await cpu.wrmsr(StateMsr.EFER, 0x901)
        return await cpu.rdmsr(StateMsr.EFER)

    bench = AnyBench(kind)
    bench.intercept(0x8F)
    bench.start(program)
    assert bench.run() == Intercepted(0x8F, 0x901)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == (0x1901 if kind in ("es", "snp") else 0x901)


@pytest.mark.parametrize("kind", KINDS)
def test_the_counter_reads_as_by_its_own_instruction(kind: str) -> None:
    """Offset by the VMCB, one step of the model later; a write does not move it."""

    async def program(cpu: GuestCpu) -> Any:
        await cpu.wrmsr(StateMsr.TSC, 5)
        return await cpu.rdtsc(), await cpu.rdmsr(StateMsr.TSC)

    bench = AnyBench(kind)
    bench.machine.tsc = 10**9
    bench.set_vmcb(tsc_offset=7)
    bench.start(program)
    bench.run()
    first, second = bench.executor.outcome
    assert (first, second) == (10**9 + 2007, 10**9 + 3007)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0x10, *ROWS], ids=hex)
def test_intercepts_come_first(kind: str, number: int) -> None:
    """No map means every bit of page 0: here all are set."""

    async def program(cpu: GuestCpu) -> Any:
        found = []
        for access in (cpu.rdmsr(number), cpu.wrmsr(number, 1)):
            try:
                await access
            except GuestException as exception:
                found.append((exception.vector, int(exception.error)))
        return found

    bench = AnyBench(kind)
    bench.vmcb["msrpm_base_pa"] = 0x2000 * PAGE
    bench.machine.dram.write(0x2000 * PAGE, b"\xff" * 2 * PAGE)
    bench.intercept(0x7C)
    bench.start(program)
    exit_ = bench.run()
    if kind in ("plain", "sev"):
        assert exit_ == Intercepted(0x7C, 0)
    else:
        assert bench.executor.outcome == [(29, 0x7C)] * 2
