"""A hostile host fills the CPUID page: the firmware refuses it, the guest stops, or no lie reaches its programs.

A host may hide what a processor has. It never gets the guest to believe in more, or in another bit that encrypts.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random
from typing import Any

from snpbook.attacks.cpuid_page import change_cpuid
from snpbook.attacks.ghcb import tamper
from snpbook.guest.acceptance import accept
from snpbook.guest.boot import start
from snpbook.guest.layout import Layout
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.snapshot import Snapshot
from snpbook.system import Guest
from tests.guest.hostile.scenes import PRIVATE, pattern
from tests.guest.hostile.world import Outcome, Watch, ended
from tests.machines import PAGE, booted
from tests.sampling import ALL

CASES = 200 if ALL else 6
HIDDEN = {
    (0x1, 0): (None, None, 1 << 27 | 1 << 31, 0), (0x6, 0): (0, 0, 0, 0), (0x7, 0): (1, 0, 1 << 4, 0),
    (0x7, 1): (0, 0, 0, 0), (0xD, 1): (0, None, 0, 0), (0x80000001, 0): (None, None, 0, 0),
    (0x80000007, 0): (0, 0, None, 0), (0x8000001B, 0): (0, None, None, None), (0x8000001F, 0): (0, None, None, None),
    (0x80000021, 0): (0, None, None, None),
}  # fmt: skip
"""Registers of features by leaf and subleaf: bits that may be set and are not the processor's; None: no features."""
STOPS = {"0:0", "1:4"}
"""It denies SEV; it counts no entries."""


@cache
def created(era: str) -> tuple[Guest, Snapshot]:
    guest = booted(era=era).create_vm(memory="12 MiB", discard=False)
    return guest, guest.system.snapshot()


def attempt(era: str, seed: int | None) -> tuple[Outcome, dict[tuple[int, int], tuple[int, ...]]]:
    """A launch with a page of lies (None: without), and a guest's first steps: how it ended, what CPUID says there."""
    guest, snapshot = created(era)
    snapshot.restore()
    if seed is not None:
        change_cpuid(guest, Random(seed))
    try:
        guest.launch()
    except OSError as refused:
        return Outcome("refused", str(refused)), {}
    watch, place, told = Watch(), Layout.of(guest.vmm.image), {}
    tamper(guest, watch)

    async def program(cpu: GuestCpu) -> Any:
        kernel = await start(cpu, place)
        await accept(kernel.channel, range(PRIVATE[0] // PAGE, PRIVATE[-1] // PAGE + 1))
        await cpu.write(PRIVATE[0], pattern(PRIVATE[0]))
        told.update({which: tuple(await cpu.cpuid(*which)) for which in HIDDEN})
        return kernel.protections.c_bit, await cpu.read(PRIVATE[0], PAGE) == pattern(PRIVATE[0])

    found: list[Any] = []
    outcome = ended(lambda: found.append(guest.run(program)), watch)
    if (outcome.kind == "correct" and found != [(51, True)]) or watch.wrong:
        outcome = Outcome("wrong", f"{found} {watch.wrong}")
    return outcome, told


@cache
def own(era: str) -> dict[tuple[int, int], tuple[int, ...]]:
    outcome, told = attempt(era, None)
    assert outcome.kind == "correct"
    return told


def judged(seed: int) -> Outcome:
    era = ("mainline", "rfc-v7")[seed % 2]
    outcome, told = attempt(era, seed)
    for which, registers in told.items():
        for said, had, free in zip(registers, own(era)[which], HIDDEN[which], strict=True):
            if free is not None and said & ~(had | free):
                return Outcome("wrong", f"CPUID {which}: {said:#x}, and the processor has {had:#x}")
    return outcome


def test_no_more_than_the_processor_has() -> None:
    found = Counter(map(judged, range(CASES)))
    kinds = {outcome.kind for outcome in found}
    assert kinds <= {"correct", "stop", "refused"}, found
    assert {outcome.detail for outcome in found if outcome.kind == "stop"} <= STOPS, found
    assert all("INVALID_PARAM" in outcome.detail for outcome in found if outcome.kind == "refused")
    assert {"correct", "refused"} <= kinds
