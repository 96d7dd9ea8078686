"""Any calls in any order, legal and not, on guests of all kinds in two kernels: the invariants hold after each."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snpbook.host.refusal import KernelError
from tests.host import invariants
from tests.host.race_world import ACTS, KINDS, PAGES, PUNCH, SEV_KINDS, World, drive
from tests.host.sev_hosts import COPY_FROM, MOVE_FROM, PAGE
from tests.sampling import ALL

GFNS = st.tuples(st.integers(0, PAGES), st.integers(1, PAGES)).map(lambda pair: range(pair[0], pair[0] + pair[1]))
"""Guest pages, some beyond the memory."""
NUMBERS = [
    0xAE41, 0xAE80, 0x4020AE46, 0x40A0AE49, 0x4020AED2, 0xC020AED3, 0xC040AED4, 0xC040AED5, 0x4068AEA3, 0xC008AEBA,
    0x8010AEBB, 0x8010AEBC, 0x8008AED2, 0xAE60, 0x4004AE99, 0x8090AE81, 0x4090AE82, 0xC0105300, 0xAE01, 0xDEAD,
]  # fmt: skip
WORDS = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 22, 100, PAGE, PAGE + 1, PAGES * PAGE, 1 << 40, (1 << 64) - PAGE, (1 << 64) - 1]
)
MEMORY = ["private", "shared", "punch", "allocate", "fault", "launch", "shrink", "unmap"]
LIMIT = 5


class Surface(RuleBasedStateMachine):
    """Up to `LIMIT` processes, each with a guest."""

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[World] = []

    def pick(self, number: int) -> World:
        return self.worlds[number % len(self.worlds)]

    @rule(kind=st.sampled_from([*KINDS, *SEV_KINDS]), launch=st.booleans())
    def begin(self, kind: str, launch: bool) -> None:
        if len(self.worlds) < LIMIT:
            self.worlds.append(World(kind, launch=launch))

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT), act=st.sampled_from(sorted(ACTS)))
    def act(self, number: int, act: str) -> None:
        with suppress(KernelError):
            ACTS[act][1](self.pick(number))

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT))
    def run(self, number: int) -> None:
        world = self.pick(number)
        with suppress(KernelError):
            if not world.executor.busy:
                world.program()
            drive(world.running())

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT), gfns=GFNS, what=st.sampled_from(MEMORY))
    def memory(self, number: int, gfns: range, what: str) -> None:
        world = self.pick(number)
        start, size = gfns.start * PAGE, len(gfns) * PAGE
        with suppress(KernelError):
            match what:
                case "private" | "shared":
                    world.make_private(gfns, what == "private")
                case "punch" | "allocate":
                    world.process.fallocate(world.memfd, PUNCH if what == "punch" else 1, start, size)
                case "fault":
                    drive(world.pre_faulting(gfns))
                case "launch":
                    drive(world.updating(gfns))
                case "shrink":
                    drive(world.setting(len(gfns)))
                case "unmap":
                    world.process.munmap(world.shared + start, size)

    @precondition(lambda self: self.worlds)
    @rule(
        number=st.integers(0, LIMIT),
        fd=st.integers(2, 9),
        call=st.sampled_from(NUMBERS),
        words=st.lists(WORDS, max_size=20),
    )
    def ioctl(self, number: int, fd: int, call: int, words: list[int]) -> None:
        """Any ioctl on any descriptor with any structure."""
        world = self.pick(number)
        data: Any = struct.pack(f"<{len(words)}Q", *words).ljust(256, b"\0") if words else 0
        with suppress(KernelError):
            world.process.ioctl(fd, call, data)

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT), op=st.integers(0, 103), words=st.lists(WORDS, max_size=8))
    def encrypt_op(self, number: int, op: int, words: list[int]) -> None:
        """Any sub-command with any structure."""
        world = self.pick(number)
        payload = struct.pack(f"<{len(words)}Q", *words).ljust(88, b"\0")
        with suppress(KernelError):
            world.vm.op(op, payload)

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT), cap=st.sampled_from([MOVE_FROM, COPY_FROM]))
    def second_vm(self, number: int, cap: int) -> None:
        """Another VM of the process takes the keys of its first, or shares them."""
        world = self.pick(number)
        with suppress(KernelError):
            world.host.vm(world.vm.vm.type).enable(cap, world.vm.fd)

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT), fd=st.integers(3, 12))
    def close(self, number: int, fd: int) -> None:
        with suppress(KernelError):
            self.pick(number).process.close(fd)

    @precondition(lambda self: self.worlds)
    @rule(number=st.integers(0, LIMIT))
    def end(self, number: int) -> None:
        world = self.pick(number)
        self.worlds.remove(world)
        world.process.exit()

    @invariant()
    def holds(self) -> None:
        for kernel in {id(world.kernel): world.kernel for world in self.worlds}.values():
            invariants.check(kernel)

    def teardown(self) -> None:
        """All processes exit: everything is free."""
        for world in self.worlds:
            world.process.exit()
        for world in self.worlds:
            world.check()
            assert not world.kernel.kvm.vms
            leaks = world.kernel.ccp.leaks
            assert invariants.held(world.kernel) <= world.baseline, f"lost pages beside {leaks!r}"
            asids = world.kernel.kvm.asids
            assert not (asids.taken & ~asids.reclaimable).any()
            assert not any(asids.charged.values())


TestSurface = Surface.TestCase
TestSurface.settings = settings(
    max_examples=1000 if ALL else 10, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
