"""Programs of several VMPLs on one vCPU, each from its own save area, and XCHG, by which they agree."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import Hlt, Npf, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.snapshot import Snapshot
from tests.hardware.guests import Bench

OTHER_VMSA = 0x12


def two() -> tuple[Bench, CoroutineExecutor]:
    """A vCPU with a save area for VMPL0 and one for VMPL2, and a program for each."""

    def program(name: str) -> Any:
        async def body(cpu: GuestCpu) -> list[Any]:
            seen: list[Any] = [name]
            for _ in range(2):
                seen.append(await cpu.look("vmpl", "rax"))
                await cpu.vmgexit()
            return seen

        return body

    bench = Bench(mapping=False)
    bench.assign(OTHER_VMSA, 0xFFFFFFFFE, vmsa=1)
    below = CoroutineExecutor()
    bench.executor.levels[0] = below
    below.start(program("svsm"))
    bench.start(program("guest"))
    return bench, below


def enter(bench: Bench, vmpl: int) -> Any:
    """VMRUN with the save area of a VMPL."""
    page = OTHER_VMSA if vmpl else bench.vmcb["vmsa_pa"] >> 12
    bench.set_vmcb(vmsa_pa=page << 12)
    return bench.run()


def save_areas(bench: Bench) -> None:
    bench.set_vmsa(vmpl=0, rax=7)
    own = bench.machine.encryption.read(5, bench.vmcb["vmsa_pa"], 4096)
    other = bytearray(own)
    other[0xCA] = 2
    other[0x1F8] = 9
    bench.machine.encryption.write(5, OTHER_VMSA << 12, bytes(other))


def test_whose_program_runs_follows_from_the_save_area() -> None:
    bench, below = two()
    save_areas(bench)
    assert [enter(bench, vmpl) for vmpl in (0, 2, 2, 0)] == [Vmgexit()] * 4
    assert [enter(bench, vmpl) for vmpl in (2, 0)] == [Hlt()] * 2
    assert below.outcome == ["svsm", (0, 7), (0, 7)]
    assert bench.executor.outcome == ["guest", (2, 9), (2, 9)]


def test_levels_are_in_a_snapshot() -> None:
    bench, below = two()
    save_areas(bench)
    enter(bench, 0)
    enter(bench, 2)
    taken = Snapshot(machine=bench.machine, executor=bench.executor)
    ends = []
    for _ in range(2):
        for vmpl in (0, 2, 0, 2):
            enter(bench, vmpl)
        ends.append((bench.executor.levels[0].outcome, bench.executor.outcome))
        taken.restore()
        assert bench.executor.levels[0].busy
        assert Snapshot(machine=bench.machine, executor=bench.executor) == taken
    assert ends[0] == ends[1] == (["svsm", (0, 7), (0, 7)], ["guest", (2, 9), (2, 9)])
    assert below.outcome == ends[0][0]


def test_an_exchange_is_one_step() -> None:
    """The old bytes; a fault leaves all as it was; then the same again."""
    bench = Bench(mapping=False)
    bench.give(0x10, 0x900)
    bench.machine.encryption.write(5, 0x900 << 12, b"old")

    async def body(cpu: GuestCpu) -> list[Any]:
        return [await cpu.exchange(0x10000, b"new"), await cpu.exchange(0x20000, b"\1"), await cpu.read(0x10000, 3)]

    bench.start(body)
    assert isinstance(bench.run(), Npf)
    bench.give(0x20, 0x901)
    bench.machine.encryption.write(5, 0x901 << 12, b"\5")
    assert bench.run() == Hlt()
    assert bench.executor.outcome == [b"old", b"\5", b"new"]
    assert bench.plain(0x901)[:1] == b"\1"


def test_an_exchange_needs_the_right_to_write() -> None:
    bench = Bench(mapping=False)
    bench.give(0x10, 0x900, vmpl=0x0F | 1 << 16)
    bench.machine.encryption.write(5, 0x900 << 12, b"old")
    bench.set_vmsa(vmpl=2)

    async def body(cpu: GuestCpu) -> Any:
        return await cpu.read(0x10000, 3), await cpu.exchange(0x10000, b"new")

    bench.start(body)
    assert isinstance(bench.run(), Npf)
    assert bench.plain(0x900)[:3] == b"old"


@pytest.mark.parametrize("data", [b"", bytes(9)])
def test_operands_of_an_exchange(data: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        GuestCpu().exchange(0, data)
