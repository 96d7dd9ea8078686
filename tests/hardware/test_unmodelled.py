"""Paging that the model cannot run: the vCPU ends with a reason, and the machine is as after any other exit."""

from typing import Any

import pytest

from snpbook.hardware.exits import GuestException, Hlt, Shutdown
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import Msr
from snpbook.spec.products import TSC_MHZ
from tests.hardware.kinds import AnyBench

KINDS = ["plain", "sev", "es", "snp"]
PE_ET_PG, PAE, LA57, LME = 0x80000011, 1 << 5, 1 << 12, 1 << 8
ACCESSES = {
    "read": lambda cpu: cpu.read(0x1000, 4),
    "write": lambda cpu: cpu.write(0x1000, b"x"),
    "pvalidate": lambda cpu: cpu.pvalidate(0x1000, 2),
}


@pytest.mark.parametrize(
    ("kind", "access"), [(kind, name) for kind in KINDS for name in ACCESSES if kind == "snp" or name != "pvalidate"]
)
@pytest.mark.parametrize("registers", [{"cr0": PE_ET_PG}, {"cr4": PAE | LA57, "efer": LME, "cr0": PE_ET_PG}])
def test_other_paging_ends_the_vcpu(kind: str, registers: dict[str, int], access: str) -> None:
    async def program(cpu: GuestCpu) -> None:
        await cpu.load(rsi=0x77, **registers)
        await ACCESSES[access](cpu)

    bench = AnyBench(kind)
    for gfn in range(4):
        bench.memory(gfn, 0x900 + gfn)
    bench.start(program)
    exit_ = bench.run()
    assert isinstance(exit_, Shutdown)
    assert "only long mode with four levels" in exit_.reason
    assert "LIMITATIONS.md" in exit_.reason
    assert bench.read_vmcb().exit_code == 0x7F
    saved = bench.read_registers()
    assert saved.cr0 == PE_ET_PG
    assert saved.cr4 == registers.get("cr4", 0)
    assert not bench.executor.busy
    assert not bench.machine.in_use
    assert not bench.machine.cores[0].in_guest
    assert bench.run() == Hlt()


LOADS = [
    [("efer", LME), ("cr0", PE_ET_PG)],
    [("cr0", PE_ET_PG), ("efer", LME)],
    [("cr4", PAE), ("efer", LME), ("cr0", PE_ET_PG), ("cr4", 1 << 6)],
]


@pytest.mark.parametrize("loads", LOADS)
def test_long_mode_needs_pae(loads: list[tuple[str, int]]) -> None:
    """#GP(0) at the write that would make it, the last; the register keeps what it had."""
    *before, (name, value) = loads

    async def program(cpu: GuestCpu) -> Any:
        for other, held in before:
            await cpu.load(**{other: held})
        held = await cpu.look(name)
        with pytest.raises(GuestException) as caught:
            await cpu.load(**{name: value})
        return caught.value.vector, caught.value.error, await cpu.look(name) == held

    bench = AnyBench()
    bench.start(program)
    assert bench.run() == Hlt()
    assert bench.executor.outcome == (13, 0, True)


def test_the_counter_runs_at_the_rate_of_the_model() -> None:
    async def program(cpu: GuestCpu) -> Any:
        return await cpu.rdmsr(Msr.GUEST_TSC_FREQ)

    bench = AnyBench()
    bench.set_vmsa(sev_features=1 | 1 << 9, guest_tsc_scale=1 << 32)
    bench.start(program)
    bench.run()
    assert bench.executor.outcome == TSC_MHZ == 2400
