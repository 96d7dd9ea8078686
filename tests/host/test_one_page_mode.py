"""An exit that stands for a run of pages comes to the same as an exit for each page: state, results and totals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from snpbook.hardware import core_rmp, walker
from snpbook.hardware.exits import Npf
from snpbook.hardware.guest_cpu import GuestCpu
from tests.host import invariants
from tests.host.race_world import KINDS, World, drive
from tests.host.sev_hosts import PAGE


def play(kind: str) -> tuple[Any, ...]:
    """A guest that touches runs of pages: what it saw, what is mapped, the RMP, memory, and what was counted."""
    world = World(kind)
    system = world.host.system
    counted = asdict(system.counts)

    async def program(cpu: GuestCpu) -> list[bytes]:
        if world.snp:
            await cpu.pvalidate(2 * PAGE, 1)
            await cpu.pvalidate(3 * PAGE, 4)
        await cpu.write(2 * PAGE, bytes(range(256)) * (5 * PAGE // 256))
        await cpu.write(3 * PAGE - 5, b"over a boundary")
        seen = [await cpu.read(2 * PAGE, 5 * PAGE)]
        if not world.snp:
            await cpu.write(9 * PAGE, b"shared" * PAGE)
            seen.append(await cpu.read(8 * PAGE, 8 * PAGE))
        return seen

    world.executor.start(program)
    assert drive(world.running()) == 0
    vm, machine = world.vm.vm, system.machine
    leaves = sorted((gfn, large) for gfn, _, large in invariants.leaves(world.kernel, vm.mmu.tables.root, 3))
    frames = [frame for _, frame, _ in sorted(invariants.leaves(world.kernel, vm.mmu.tables.root, 3))]
    entries = [machine.rmp.entry(frame).replace(asid=0) for frame in frames]
    key = vm.asid if world.snp else 0
    plain = [machine.encryption.read(key, frame << 12, PAGE) for frame in frames]
    totals = {name: value - counted[name] for name, value in asdict(system.counts).items()}
    outcome = world.executor.outcome
    allocated = world.kernel.memory.allocated
    world.check()
    world.end()
    return outcome, leaves, entries, plain, totals, allocated


@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_come_to_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = play(kind)
    sizes: list[int] = []

    def one_page(gpa: int, error: Any, count: int = 1, *_: int) -> Npf:
        sizes.append(count)
        return Npf(gpa, error, 1)

    monkeypatch.setattr(walker, "Npf", one_page)
    monkeypatch.setattr(core_rmp, "Npf", one_page)
    pages = play(kind)
    assert max(sizes) > 1, "there were runs to take apart"
    for one, other in zip(runs, pages, strict=True):
        assert one == other
