"""Handlers on top of a program, and copies of a vCPU that has stopped in the middle: both go on alike."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import GuestException, Hlt, Npf, Shutdown, Vmgexit
from snpbook.hardware.guest_cpu import GuestCpu, ProgramFailure
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.msr import Msr
from tests.hardware.guests import PAGE, Bench
from tests.hardware.kinds import AnyBench


def bench() -> Bench:
    """A guest with pages 0 to 7; page 5 is not validated."""
    result = Bench()
    for gfn in range(8):
        result.give(gfn, 0x900 + gfn, validated=int(gfn != 5))
    return result


async def accept(cpu: GuestCpu, exception: GuestException) -> bool:
    """Validate the page that the guest has touched, and have the access done again."""
    await cpu.pvalidate(exception.address & ~0xFFF, 1)
    return False


def test_a_handler_repairs_and_the_access_is_done_again() -> None:
    async def program(cpu: GuestCpu) -> Any:
        cpu.set_handler(29, accept)
        await cpu.write(0x4FF8, b"0123456789abcdef")
        return await cpu.read(0x5000, 8), await cpu.look("cr2")

    guest = bench()
    guest.start(program)
    assert guest.run() == Hlt()
    assert guest.executor.outcome == (b"89abcdef", (0x5000,))
    kinds = [type(result).__name__ for result in guest.executor.results]
    assert kinds == ["Taken", "tuple", "NoneType", "bytes", "tuple"]
    assert guest.read_vmsa().rip == 5


def test_a_handler_emulates() -> None:
    """CPUID from the guest's own table: the results are what the handler put into the registers."""

    async def from_table(cpu: GuestCpu, exception: GuestException) -> bool:
        (leaf,) = await cpu.look("rax")
        assert exception.error == 0x72
        await cpu.load(rax=leaf + 1, rbx=2, rcx=3, rdx=4)
        return True

    async def program(cpu: GuestCpu) -> Any:
        cpu.set_handler(29, from_table)
        found = [await cpu.cpuid(leaf) for leaf in (0, 0x8000001F)]
        cpu.set_handler(29, None)
        try:
            await cpu.cpuid(0)
        except GuestException as exception:
            return found, exception.vector

    guest = bench()
    guest.start(program)
    guest.run()
    assert guest.executor.outcome == ([(1, 2, 3, 4), (0x80000020, 2, 3, 4)], 29)


def test_a_handler_that_asks_the_hypervisor() -> None:
    """The vCPU leaves in the middle of the handler, which goes on at the next entry."""

    async def ask(cpu: GuestCpu, exception: GuestException) -> bool:
        await cpu.wrmsr(Msr.GHCB, 0x14)
        await cpu.vmgexit()
        await cpu.load(rax=await cpu.rdmsr(Msr.GHCB))
        return True

    async def program(cpu: GuestCpu) -> Any:
        cpu.set_handler(29, ask)
        return await cpu.port_in(0x60)

    guest = bench()
    guest.start(program)
    assert guest.run() == Vmgexit()
    guest.set_vmcb(ghcb_gpa=0x5A)
    assert guest.run() == Hlt()
    assert guest.executor.outcome == 0x5A


def test_the_same_exception_in_its_handler_is_a_double_fault() -> None:
    async def touch(cpu: GuestCpu, exception: GuestException) -> bool:
        await cpu.read(5 * PAGE, 1)
        return False

    async def program(cpu: GuestCpu) -> None:
        cpu.set_handler(29, touch)
        await cpu.read(5 * PAGE, 1)

    guest = bench()
    guest.start(program)
    exit_ = guest.run()
    assert isinstance(exit_, Shutdown)
    assert exit_.reason.startswith("double fault: vector 29")
    assert not guest.executor.busy


def test_another_exception_in_a_handler() -> None:
    """It goes to its own handler, or out of the handler's await; what nobody takes ends the vCPU."""

    async def by_port(cpu: GuestCpu, exception: GuestException) -> bool:
        try:
            await cpu.rdmsr(0xC0010199)
        except GuestException as inner:
            await cpu.load(rax=inner.vector)
        return True

    async def repaired(cpu: GuestCpu, exception: GuestException) -> bool:
        await cpu.load(rdx=0, rax=77)
        return True

    async def through(cpu: GuestCpu, exception: GuestException) -> bool:
        await cpu.rdmsr(0xC0010199)
        return True

    async def program(cpu: GuestCpu) -> Any:
        cpu.set_handler(29, by_port)
        first = await cpu.port_in(0x60)
        cpu.set_handler(13, repaired)
        return first, await cpu.port_in(0x60)

    async def fails(cpu: GuestCpu) -> Any:
        cpu.set_handler(29, through)
        return await cpu.port_in(0x60)

    guest = bench()
    guest.start(program)
    assert guest.run() == Hlt()
    assert guest.executor.outcome == (13, 77)
    guest.start(fails)
    exit_ = guest.run()
    assert isinstance(exit_, Shutdown)
    assert exit_.reason == "unhandled exception: vector 13, error 0x0, address 0x0"


def test_a_handler_cannot_emulate_a_run_of_pages() -> None:
    async def claim(cpu: GuestCpu, exception: GuestException) -> bool:
        return True

    async def program(cpu: GuestCpu) -> None:
        cpu.set_handler(13, claim)
        await cpu.pvalidate(0, 1)

    guest = bench()
    guest.set_vmsa(vmpl=1)
    guest.start(program)
    with pytest.raises(TypeError, match="cannot be emulated: the handler returns False"):
        guest.run()


def test_a_program_gives_up_in_a_handler() -> None:
    async def give_up(cpu: GuestCpu, exception: GuestException) -> bool:
        raise ProgramFailure("no more")

    async def program(cpu: GuestCpu) -> None:
        cpu.set_handler(29, give_up)
        await cpu.cpuid(0)

    guest = bench()
    guest.start(program)
    assert guest.run() == Hlt()
    assert isinstance(guest.executor.outcome, ProgramFailure)
    assert not guest.executor.busy


# Copies.


async def everything(cpu: GuestCpu) -> Any:
    """Handlers, an emulated instruction, exits inside a handler, and a long PVALIDATE with holes."""

    async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
        if exception.error == 0x404:
            return await accept(cpu, exception)
        await cpu.vmgexit()
        await cpu.load(rax=0x99, rbx=0, rcx=0, rdx=0)
        return True

    cpu.set_handler(29, handler)
    await cpu.write(5 * PAGE, b"first")
    leaf = await cpu.cpuid(0)
    codes, unchanged = await cpu.pvalidate(0x10 * PAGE, 8)
    await cpu.hlt()
    return leaf, codes.tolist(), unchanged.tolist(), await cpu.read(5 * PAGE, 5)


HOLES = (0x12, 0x15)


def guest_with_holes() -> Bench:
    guest = bench()
    for gfn in range(0x10, 0x18):
        if gfn not in HOLES:
            guest.give(gfn, 0x980 + gfn, validated=int(gfn == 0x11))
    return guest


def go_on(guest: Bench, steps: int | None = None) -> list[Any]:
    """Run some entries, or to the end, mapping what is missing: exits and events."""
    guest.log.events.clear()
    exits: list[Any] = []
    while guest.executor.busy and (steps is None or len(exits) < steps):
        exits.append(guest.run())
        if isinstance(exits[-1], Npf):
            gfn = exits[-1].gpa // PAGE
            guest.give(gfn, 0x980 + gfn, validated=0)
    return [*exits, *map(repr, guest.log.events)]


def test_the_program_by_itself() -> None:
    guest = guest_with_holes()
    guest.start(everything)
    exits = [exit_ for exit_ in go_on(guest) if not isinstance(exit_, str)]
    assert [type(exit_).__name__ for exit_ in exits] == ["Vmgexit", "Npf", "Npf", "Hlt", "Hlt"]


@pytest.mark.parametrize("entries", range(5))
def test_both_branches_go_on_alike(entries: int) -> None:
    """A machine restored at any exit gives the same exits, events, outcome and memory as the one that went on."""
    guest = guest_with_holes()
    guest.start(everything)
    go_on(guest, entries)
    snapshot = Snapshot(machine=guest.machine, executor=guest.executor)
    first = go_on(guest), guest.executor.outcome, list(map(repr, guest.executor.results))
    ended = Snapshot(machine=guest.machine, executor=guest.executor)
    snapshot.restore()
    assert Snapshot(machine=guest.machine, executor=guest.executor) == snapshot
    again = go_on(guest), guest.executor.outcome, list(map(repr, guest.executor.results))
    assert first == again
    assert first[1] == ((0x99, 0, 0, 0), [0] * 8, [False, True, *[False] * 6], b"first")
    assert Snapshot(machine=guest.machine, executor=guest.executor).differences(ended) == []


@pytest.mark.parametrize("entries", range(5))
def test_another_executor_takes_over_in_the_middle(entries: int) -> None:
    """The progress of a pending operation travels with the snapshot, and the snapshot can be used again."""
    guest = guest_with_holes()
    guest.start(everything)
    go_on(guest, entries)
    state = guest.executor.snapshot()
    for _ in range(2):
        other = CoroutineExecutor()
        other.restore(state)
        assert repr(other) == repr(guest.executor)
        assert repr(other.snapshot()) == repr(state)
    guest.executor = other
    go_on(guest)
    assert guest.executor.outcome == ((0x99, 0, 0, 0), [0] * 8, [False, True, *[False] * 6], b"first")


def test_a_run_in_the_middle_is_in_the_snapshot() -> None:
    """Of eight pages two are done when the third faults: the copy knows them and goes on with the third."""
    guest = guest_with_holes()
    guest.start(everything)
    assert isinstance(go_on(guest, 2)[1], Npf)
    state = deepcopy(guest.executor.snapshot())
    (pending,) = state[2]
    assert np.concatenate([outcome.codes for outcome in pending.outcomes]).tolist() == [0, 0]


def test_results_lead_a_fresh_program_through_its_handlers() -> None:
    guest = guest_with_holes()
    guest.start(everything)
    go_on(guest, 4)
    results = list(guest.executor.results)
    other = CoroutineExecutor()
    other.start(everything, results)
    assert list(map(repr, other.results)) == list(map(repr, results))
    guest.executor = other
    go_on(guest)
    assert guest.executor.outcome == ((0x99, 0, 0, 0), [0] * 8, [False, True, *[False] * 6], b"first")


def test_a_handler_of_an_event_is_led_back_to_its_place() -> None:
    """What an event's handler returns counts as little in a fresh program as in the old one."""

    async def program(cpu: GuestCpu) -> Any:
        async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
            await cpu.vmgexit()
            return True

        cpu.set_handler(28, handler)
        return await cpu.read(0, 4)

    guest = bench()
    guest.set_vmcb(event_injection=1 << 31 | 3 << 8 | 28)
    guest.start(program)
    assert guest.run() == Vmgexit()
    other = CoroutineExecutor()
    other.start(program, guest.executor.results)
    guest.executor = other
    guest.set_vmsa(rax=0x55)
    assert guest.run() == Hlt()
    assert guest.executor.outcome == guest.plain(0x900)[:4]


def test_an_idle_executor_is_restored_idle() -> None:
    guest = guest_with_holes()
    state = guest.executor.snapshot()
    guest.start(everything)
    go_on(guest, 1)
    guest.executor.restore(state)
    assert not guest.executor.busy
    assert guest.run() == Hlt()
    guest.start(everything)
    go_on(guest)
    done = guest.executor.snapshot()
    other = CoroutineExecutor()
    other.restore(done)
    assert other.outcome == guest.executor.outcome
    assert AnyBench().run() == Hlt()


def test_a_handler_passes_an_exception_on() -> None:
    """The interrupted instruction raises it, also in a copy that is led to a place behind it."""

    async def refuse(cpu: GuestCpu, exception: GuestException) -> GuestException:
        await cpu.load(rbx=5)
        return GuestException(13, 7, 0)

    async def program(cpu: GuestCpu) -> Any:
        cpu.set_handler(29, refuse)
        found = None
        try:
            await cpu.cpuid(0)
        except GuestException as exception:
            found = exception.vector, exception.error, exception.instruction
        await cpu.hlt()
        return found, await cpu.look("rbx")

    guest = bench()
    guest.start(program)
    assert guest.run() == Hlt()
    copy = CoroutineExecutor()
    copy.restore(guest.executor.snapshot())
    guest.executor = copy
    assert guest.run() == Hlt()
    assert guest.executor.outcome == ((13, 7, b""), (5,))
