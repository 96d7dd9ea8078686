"""Races without threads: whatever others do between two steps of a call, the invariants hold and nothing is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from snpbook.host.kvm.mmu import Mmu
from snpbook.host.refusal import KernelError
from snpbook.host.steps import Steps
from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from tests.host import invariants
from tests.host.race_world import ACTS, KINDS, World, acts_of, drive
from tests.host.scheduler import interleavings, until
from tests.sampling import ALL, sampled

Begin = Callable[[World], Steps[int]]


def at_every_step(kind: str, begin: Begin, act: str, *, launch: bool = True) -> Iterator[World]:
    """The call, cut into at each of its yields in turn by the act, and driven to its end: the world then."""
    number = 0
    while True:
        world = World(kind, launch=launch)
        world.program()
        steps = begin(world)
        if not until(steps, number):
            return
        try:
            ACTS[act][1](world)
        except KernelError as error:
            if error.errno not in (errno.EBADF, errno.EIO):
                raise
        except RuntimeError as deadlock:  # the act needs a lock that the call holds: it would wait
            if "deadlock" not in str(deadlock):
                raise
        world.check()
        with suppress(KernelError):
            for _ in steps:
                world.check()
        world.check()
        yield world
        number += 1 if ALL or number < 6 else 3


FAULTS = sampled([(kind, act) for kind in KINDS for act in acts_of(kind)], 14)


@pytest.mark.parametrize(("kind", "act"), FAULTS)
def test_at_every_step_of_a_fault(kind: str, act: str) -> None:
    count = 0
    for world in at_every_step(kind, World.running, act):
        if world.kernel.kvm.vms and act not in ("close the VM", "close everything"):
            drive(world.running())
            world.check()
        world.end()
        count += 1
    assert count >= 5


@pytest.mark.parametrize("kind", ["snp", "snp-v7", "protected"])
@pytest.mark.parametrize("private", [False, True], ids=["to shared", "to private"])
def test_at_every_step_of_a_conversion(kind: str, private: bool) -> None:
    """Each act, and the guest running, at each step of KVM_SET_MEMORY_ATTRIBUTES."""
    gfns = range(4, 12) if private else range(2, 7)

    def begin(world: World) -> Steps[int]:
        drive(world.running())
        return world.changing(gfns, private)

    names = ["punch all", "close the memfd", "close everything", "munmap", "madvise", "delete the slot"]
    for act in names if ALL else names[:2]:
        for world in at_every_step(kind, begin, act):
            world.end()


@pytest.mark.parametrize("kind", ["snp", "protected", "snp-v7"])
def test_the_guest_runs_at_every_step_of_a_conversion(kind: str) -> None:
    number, ended = 0, False
    while not ended:
        world = World(kind)
        world.program()
        steps = world.changing(range(2, 5), False)
        ended = not until(steps, number)
        drive(world.running())
        world.check()
        assert drive(steps) == 0
        world.check()
        drive(world.running())
        world.check()
        world.end()
        number += 1


MEANWHILE = [
    "punch a page", "close everything", "delete the slot", "madvise", "punch all", "close the memfd", "munmap",
    "convert to shared",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["snp", "snp-v7"])
@pytest.mark.parametrize("act", MEANWHILE if ALL else MEANWHILE[:4])
def test_at_every_step_of_a_launch_update(kind: str, act: str) -> None:
    def begin(world: World) -> Steps[int]:
        if kind == "snp":
            world.make_private(range(6))
        return world.updating(range(6))

    count = 0
    for world in at_every_step(kind, begin, act, launch=False):
        world.end()
        count += 1
    assert count >= 6, "a place between the pages"


@pytest.mark.parametrize("kind", ["snp", "snp-v7"])
@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("reclaim", [False, True], ids=["refused", "refused and kept"])
def test_the_firmware_fails_in_the_middle_of_a_launch_update(
    kind: str, after: int, reclaim: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that the firmware keeps is leaked, and nothing else is."""
    world = World(kind, launch=False)
    if kind == "snp":
        world.make_private(range(6))
    steps = world.updating(range(6))
    until(steps, after)
    world.host.spoil(monkeypatch, Command.SNP_LAUNCH_UPDATE, Status.INVALID_PARAM)
    if reclaim:
        world.host.spoil(monkeypatch, Command.SNP_PAGE_RECLAIM, Status.INVALID_PAGE_STATE)
    drive(steps)
    world.check()
    assert world.kernel.ccp.leaks.count == int(reclaim)
    monkeypatch.undo()
    world.end()
    assert world.kernel.ccp.leaks.count == int(reclaim)


# Two calls, every order.


@pytest.mark.parametrize("kind", ["snp", "protected", "snp-v7"])
def test_a_fault_and_a_conversion_in_every_order(kind: str) -> None:
    """A pre-fault of one page, or in the v7 series the guest itself, and a conversion of it.

    While the conversion stands still in the middle the fault begins again and again: after some steps it is left alone.
    """

    def world() -> tuple[World, list[Steps[int]]]:
        made = World(kind)
        made.kernel.step_pages = None
        if made.v7:
            made.program()
            return made, [_first_steps(made.running(), 12), made.changing(range(2, 3), False)]
        return made, [_first_steps(made.pre_faulting(range(2, 3)), 12), made.changing(range(2, 3), False)]

    orders = 0
    for made, run in interleavings(world):
        made.check()
        assert run.results[1] == 0
        orders += 1
        if orders % 8 == 0:
            made.end()
        if not ALL and orders >= 30:
            break
    assert orders > 20


def _first_steps(steps: Steps[int], count: int) -> Steps[int]:
    """A call that is not driven further: the guest is then somewhere in the middle."""
    for _ in range(count):
        try:
            step = next(steps)
        except (StopIteration, KernelError):
            return 0
        yield step
    return 0


# The checks that these races need.


def _fails(monkeypatch: pytest.MonkeyPatch, name: str, value: object, kind: str, act: str, begin: Begin) -> None:
    monkeypatch.setattr(Mmu, name, value, raising=False)
    with pytest.raises(AssertionError, match="gfn"):
        _to_the_end(kind, begin, act)


def _to_the_end(kind: str, begin: Begin, act: str) -> None:
    for world in at_every_step(kind, begin, act):
        world.end()


@pytest.mark.parametrize(
    ("kind", "act"),
    [("snp", "punch all"), ("protected", "convert to shared"), ("plain", "madvise"), ("plain", "delete the slot"),
     ("snp-v7", "punch all")],
)  # fmt: skip
def test_without_the_sequence_a_fault_maps_what_is_gone(kind: str, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry of a fault that began before an invalidation is needed: without it stale pages get mapped."""
    begin = World.running
    _fails(monkeypatch, "sequence", property(lambda mmu: 0, lambda mmu, value: None), kind, act, begin)


def test_without_busy_ranges_a_fault_maps_into_an_invalidation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that begins and ends while an invalidation is open sees no change of the sequence."""
    monkeypatch.setattr(Mmu, "busy", lambda mmu, gfns: False)
    seen = []
    for number in range(8):
        world = World("protected")
        world.program()
        steps = world.changing(range(2, 5), False)
        until(steps, number)
        drive(world.running())
        drive(steps)
        try:
            world.check()
        except AssertionError as error:
            seen.append(str(error))
    assert seen
    assert all("gfn" in text for text in seen)


def test_a_call_holds_its_file() -> None:
    """A descriptor closed in the middle of its call: the VM lives until the call is over."""
    world = World("snp")
    world.program()
    steps = world.running()
    until(steps, 3)
    world.close_all()
    assert len(world.kernel.kvm.vms) == 1
    assert drive(steps) in (0, errno.EFAULT, errno.ELOOP)
    assert not world.kernel.kvm.vms
    world.end()


def test_the_invariants_see_a_lost_page() -> None:
    world = World("protected")
    world.kernel.memory.allocate(1)
    with pytest.raises(AssertionError, match="1 pages are lost"):
        world.end()
    assert invariants.held(world.kernel) == world.baseline + 1
