"""Page acceptance: lists that travel together, the order of steps both ways, and what a wrong order leads to."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from snpbook.guest import msr_protocol, page_tables
from snpbook.guest.acceptance import accept, ask, give_up
from snpbook.guest.boot import Kernel
from snpbook.guest.conversions import make_private, make_shared
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import Layout
from snpbook.guest.termination import Terminated
from snpbook.hardware.cache import Cache
from snpbook.hardware.core import GuestCore
from snpbook.hardware.executor import CoroutineExecutor
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.vmm import exits
from snpbook.spec.ghcb import PageOperation
from snpbook.spec.termination import Reason
from snpbook.system import Guest
from snpbook.trace import Instruction, VmExit
from tests.guest.bare import PLACE, Answer, Bare
from tests.guest.booted import fresh
from tests.machines import PAGE, private_bytes
from tests.sampling import sampled

C_BIT = 51
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
RUNS = {
    "one run": [range(0x100, 0x358)],
    "with gaps": [*(range(gfn, gfn + 1) for gfn in range(0x100, 0x22C, 2)), range(0x280, 0x3F0)],
    "large in the middle": [range(0x180, 0x200), range(0x200, 0x600, 512), range(0x600, 0x640)],
    "short": [range(0x300, 0x303)],
}


def kernel_program(guest: Guest, body: Any) -> Any:
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        return await body(await Kernel.attach(cpu, place), place)

    return guest.run(program)


def played(era: str, parts: list[range], entries: int) -> tuple[Any, ...]:
    """Pages asked to be shared, and what that leaves: attributes, RMP entries, the GHCB, exits, lists."""
    guest = fresh(era)
    log = guest.system.record()

    async def body(kernel: Kernel, place: Layout) -> bytes:
        await ask(kernel.channel, parts, PageOperation.SHARED, entries)
        page: bytes = await kernel.cpu.read(place.ghcb, PAGE)
        return page

    page = kernel_program(guest, body)
    vm, rmp = guest.vmm.vm, guest.system.machine.rmp
    counts = {reason: sum(event.count for event in log.of(VmExit) if event.reason == reason) for reason in ("VMGEXIT",)}
    return page, vm.is_private(range(0xC00)).tolist(), rmp.peek(range(rmp.entries)).tobytes(), counts


@pytest.mark.parametrize(("name", "entries", "era"), sampled(product(RUNS, (64, 253, 7), ("rfc-v7", "mainline")), 8))
def test_lists_together_do_what_lists_in_turn_do(
    name: str, entries: int, era: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = played(era, RUNS[name], entries)
    assert together[3]["VMGEXIT"] >= -(-sum(map(len, RUNS[name])) // entries)
    monkeypatch.setattr(CoroutineExecutor, "following", np.empty((0, 0), np.uint8))
    assert played(era, RUNS[name], entries) == together


@ERAS
def test_runs_of_lists_are_one_exit(era: str) -> None:
    """600 pages in lists of 7: 86 lists, in fewer exits, and the counter advances by lists."""
    guest = fresh(era)
    log = guest.system.record()

    async def body(kernel: Kernel, place: Layout) -> None:
        await ask(kernel.channel, [range(0x100, 0x358)], PageOperation.SHARED, 7)

    kernel_program(guest, body)
    events = [event.count for event in log.of(VmExit) if event.reason == "VMGEXIT"]
    assert sum(events) == 86
    assert len(events) == 2, "the exit, and the lists that were served with it"


@ERAS
def test_a_host_that_fails_in_a_later_list_ends_the_guest(era: str) -> None:
    """Memory that is none: the pages before it are converted, and the guest hears of the failure."""
    guest = fresh(era)

    async def body(kernel: Kernel, place: Layout) -> None:
        await ask(kernel.channel, [range(0x300, 0xC40)], PageOperation.PRIVATE, 64)

    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        kernel_program(guest, body)
    guest.vmm.run()
    outcome = guest.vmm.vcpus[0].executor.outcome
    assert isinstance(outcome, Terminated)
    assert outcome.reason is Reason.PSC


@ERAS
@pytest.mark.parametrize("lie", ["not done", "other length", "reserved"])
def test_lies_about_the_lists_before_the_last_end_the_guest(
    era: str, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, honest = fresh(era), CoroutineExecutor.answered

    def answered(executor: CoroutineExecutor, earlier: Any) -> None:
        told = np.array(earlier)
        told[3, {"not done": 0, "other length": 2, "reserved": 5}[lie]] = 0 if lie == "not done" else 9
        honest(executor, told)

    monkeypatch.setattr(CoroutineExecutor, "answered", answered)

    async def body(kernel: Kernel, place: Layout) -> None:
        await ask(kernel.channel, [range(0x100, 0x358)], PageOperation.SHARED, 64)

    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        kernel_program(guest, body)
    guest.vmm.run()
    assert guest.vmm.vcpus[0].executor.outcome.reason is Reason.PSC


def test_more_answers_than_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="did not make so many"):
        CoroutineExecutor().answered(np.zeros((1, 2032), np.uint8))


# The order of steps.


def steps(guest: Guest, act: Any, pages: range) -> list[str]:
    """The order in which C-bit, PVALIDATE and page state change come, from the trace and the tables."""
    order: list[str] = []
    honest = page_tables.mark

    async def mark(*arguments: Any, **names: Any) -> None:
        order.append("C-bit")
        await honest(*arguments, **names)

    def listen(event: Any) -> None:
        if isinstance(event, Instruction) and event.name == "PVALIDATE":
            order.append("PVALIDATE")

    def converted(*arguments: Any, **names: Any) -> None:
        order.append("page state")
        convert(*arguments, **names)

    convert = exits.convert
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_tables, "mark", mark)
        patch.setattr(exits, "convert", converted)
        stop = guest.system.trace.subscribe(listen)

        async def body(kernel: Kernel, place: Layout) -> None:
            await act(kernel.channel, place, C_BIT, pages)

        kernel_program(guest, body)
        stop()
    return order


@ERAS
def test_the_order_both_ways(era: str) -> None:
    guest, pages = fresh(era), range(0x300, 0x304)
    assert steps(guest, make_shared, pages) == ["PVALIDATE", "page state", "C-bit"]
    assert list(dict.fromkeys(steps(guest, make_private, pages))) == ["C-bit", "page state", "PVALIDATE"]


def stopped(guest: Guest, body: Any) -> Any:
    """How a guest ended that its host cannot run on."""
    with pytest.raises(RuntimeError, match=r"SYSTEM_EVENT|SHUTDOWN"):
        kernel_program(guest, body)
    guest.vmm.run()
    return guest.vmm.vcpus[0].executor.outcome


@ERAS
def test_to_shared_without_rescinding_first(era: str) -> None:
    """The page goes with its validation; one that comes back for it is not valid, and the old one is lost."""
    guest = fresh(era)

    async def body(kernel: Kernel, place: Layout) -> tuple[int, int]:
        await ask(kernel.channel, [range(0x300, 0x301)], PageOperation.SHARED)
        await ask(kernel.channel, [range(0x300, 0x301)], PageOperation.PRIVATE)
        kernel.cpu.set_handler(29, None)
        try:
            await kernel.cpu.read(0x300000, 8)
        except GuestException as exception:
            return exception.vector, exception.error
        return 0, 0

    assert kernel_program(guest, body) == (29, 0x404)


@ERAS
def test_a_c_bit_without_a_page_state_change_finds_nothing_valid(era: str) -> None:
    """The C-bit alone makes a private access to a page that is shared: it is not the guest's, or not valid."""
    guest, pages = fresh(era), range(0x300, 0x301)

    async def body(kernel: Kernel, place: Layout) -> Any:
        await make_shared(kernel.channel, place, C_BIT, pages)
        await page_tables.mark(kernel.cpu, place, C_BIT, pages, private=True)
        await kernel.cpu.read(0x300000, 8)

    assert isinstance(stopped(guest, body), Terminated)


@ERAS
def test_what_is_shared_before_the_c_bit_goes_is_not_written_as_secret(era: str) -> None:
    """Between page state change and C-bit a write through the old entry does not reach the shared page."""
    guest, pages = fresh(era), range(0x300, 0x301)

    async def body(kernel: Kernel, place: Layout) -> Any:
        await give_up(kernel.channel, pages)
        await kernel.cpu.write(0x300000, b"a secret")

    stopped(guest, body)
    assert guest.vmm.read(0x300000, 8) != b"a secret"


@ERAS
def test_early_pages_go_one_by_one_by_the_msr(era: str) -> None:
    """Before there is a GHCB: one exit for each page."""
    guest = fresh(era)
    log = guest.system.record()

    async def body(kernel: Kernel, place: Layout) -> None:
        for gfn in range(0x300, 0x305):
            await kernel.cpu.pvalidate(gfn * PAGE, 1, validate=False)
            await msr_protocol.change_page(kernel.cpu, gfn, PageOperation.SHARED)

    kernel_program(guest, body)
    assert sum(event.reason == "VMGEXIT" for event in log.of(VmExit)) == 5
    assert not guest.vmm.vm.is_private(range(0x300, 0x305)).any()


@ERAS
def test_bulk_conversion_and_back(era: str) -> None:
    """4 MiB at once, in lists of 253: what comes back is empty and the guest's."""
    guest = fresh(era)

    async def body(kernel: Kernel, place: Layout) -> bytes:
        for _ in range(2):
            await make_shared(kernel.channel, place, C_BIT, range(0x210, 0x610))
            await make_private(kernel.channel, place, C_BIT, range(0x210, 0x610))
        await kernel.cpu.write(0x400000, b"kept")
        data: bytes = await kernel.cpu.read(0x400000, 4)
        return data

    assert kernel_program(guest, body) == b"kept"
    assert private_bytes(guest, 0x400000, 4) == b"kept"
    assert guest.vmm.vm.is_private(range(0x210, 0x610)).all()


# Stale lines.

HOSTS = range(0x30, 0x32)
"""Pages that were the host's, who has written all of them, when the guest asks for them."""


class Written(Bare):
    """A guest on a machine with a cache, whose hypervisor answers a request with pages that it has just written."""

    def __init__(self, ebx: int) -> None:
        super().__init__(cpuid=[(0x8000001F, 0, 0, 0, 0x1A, ebx, 0, 0)])
        self.cache = Cache(self.bench.machine.encryption, coherent=True)
        self.bench.machine.memory = self.cache

    def _serve(self, *arguments: Any) -> None:
        self.cache.wbinvd()
        super()._serve(*arguments)
        for gfn in HOSTS:
            self.bench.map(gfn, 0x900 + gfn)
            self.bench.cpu.write((0x900 + gfn) * PAGE, b"old" * 1365)
            self.bench.assign(0x900 + gfn, gfn, validated=0)

    @property
    def stale(self) -> list[tuple[int, int]]:
        """The host's lines of the pages: page and line."""
        lines = self.cache.lines()
        mine = lines[lines["key_id"] == 0]["spa"].tolist()
        return [(spa // PAGE - 0x900, spa % PAGE // 64) for spa in mine if spa // PAGE - 0x900 in HOSTS]


@pytest.mark.parametrize(("ebx", "left"), [(0x4173, range(1, 63)), (1 << 31 | 0x4173, range(64))])
def test_what_is_validated_is_touched_where_the_processor_needs_it(ebx: int, left: range) -> None:
    """CPUID 8000_001F EBX[31] says that it does not: there the host's lines stay, of the ends of pages too."""
    guest = Written(ebx)
    buffer = b"\2\0\1\0".ljust(8, b"\0")
    guest.run(lambda cpu: accept(Ghcb(cpu, PLACE.ghcb), HOSTS), Answer(buffer=buffer))
    assert guest.stale == [(gfn, line) for gfn in HOSTS for line in left]


@ERAS
def test_each_page_is_touched_once(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranges with 2 MB pages too, and after it has been validated; what is given up is not."""
    guest, pages, honest = fresh(era), range(0x210, 0x610), GuestCore.touch
    touched: list[int] = []

    def touch(core: GuestCore, address: int, count: int) -> Any:
        done, fault = honest(core, address, count)
        touched.extend(range(address // PAGE, address // PAGE + done))
        return done, fault

    monkeypatch.setattr(GuestCore, "touch", touch)

    async def body(kernel: Kernel, place: Layout) -> int:
        await make_shared(kernel.channel, place, C_BIT, pages)
        before = len(touched)
        await make_private(kernel.channel, place, C_BIT, pages)
        return before

    assert kernel_program(guest, body) == 0
    assert touched == list(pages)
