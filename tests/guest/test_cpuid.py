"""CPUID in the guest: what the page says, what is put in, and what only the hypervisor can say. Numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest

from snpbook.guest.termination import Terminated
from snpbook.hardware.guest_cpu import GuestCpu
from tests.guest.bare import PLACE, Answer, Bare, cpuid_page

Entry = tuple[int, int, int, int, int, int, int, int]


def entry(leaf: int, sub: int = 0, *registers: int, xcr0: int = 0, xss: int = 0) -> Entry:
    eax, ebx, ecx, edx = (*registers, 0, 0, 0, 0)[:4]
    return leaf, sub, xcr0, xss, eax, ebx, ecx, edx


TABLE = [
    entry(0x0, 0, 0x10, 1, 2, 3),
    entry(0x1, 0, 0xA20F10, 0x55660800, 1 << 0, 1 << 9 | 1 << 0),
    entry(0x7, 0, 1, 2, 1 << 4 | 1 << 3, 4),
    entry(0x7, 1, 0x71),
    entry(0xB, 0, 1, 2, 3, 4),
    entry(0xB, 1, 5, 6, 7, 8),
    entry(0xD, 0, 0x207, 0x999, 0x340, 0, xcr0=7),
    entry(0xD, 0, 0x207, 0x240, 0x340, 0, xcr0=1),
    entry(0xD, 1, 0xF, 0x240, 0x1800, 0, xcr0=1),
    entry(0xD, 2, 0x100, 0x240),
    entry(0xD, 9, 0x8, 0x980),
    entry(0xD, 11, 0x10, 0, 1),
    entry(0x80000000, 0, 0x80000021),
    entry(0x8000001E, 0, 0xAAAA, 0x1234BB, 0x5678CC, 9),
    entry(0x8000001F, 0, 0x1F, 51),
]
TOLD = Answer({"rax": 0x11111111, "rbx": 0x22222222, "rcx": 0x33333333, "rdx": 0x44444444})
LEAVES: dict[str, tuple[int, int, dict[str, int], tuple[int, int, int, int], int]] = {
    "0": (0, 0, {}, (0x10, 1, 2, 3), 0),
    "subleaf of no indexed leaf": (0, 5, {}, (0x10, 1, 2, 3), 0),
    "1": (1, 0, {}, (0xA20F10, 0x22660800, 1, 1), 1),
    "1 with OSXSAVE": (1, 0, {"cr4": 0x40020}, (0xA20F10, 0x22660800, 1 << 27 | 1, 1), 1),
    "7 without PKE": (7, 0, {}, (1, 2, 8, 4), 0),
    "7 with PKE": (7, 0, {"cr4": 0x400020}, (1, 2, 0x18, 4), 0),
    "7.1": (7, 1, {}, (0x71, 0, 0, 0), 0),
    "B": (0xB, 0, {}, (1, 2, 3, 0x44444444), 1),
    "B.1": (0xB, 1, {}, (5, 6, 7, 0x44444444), 1),
    "D with x87": (0xD, 0, {"xcr0": 1}, (0x207, 0x240, 0x340, 0), 0),
    "D with AVX": (0xD, 0, {"xcr0": 7}, (0x207, 0x340, 0x340, 0), 0),
    "D with PKRU": (0xD, 0, {"xcr0": 0x207}, (0x207, 0x988, 0x340, 0), 0),
    "D.1": (0xD, 1, {"xcr0": 0x207}, (0xF, 0x240 + 0x108, 0x1800, 0), 0),
    "D.1 with XSS": (0xD, 1, {"xcr0": 7, "xss": 0x800}, (0xF, 0x240 + 0x110, 0x1800, 0), 0),
    "D.2": (0xD, 2, {}, (0x100, 0x240, 0, 0), 0),
    "missing, in range": (0x5, 0, {}, (0, 0, 0, 0), 0),
    "missing, beyond": (0x11, 0, {}, (0, 0, 0, 0), 0),
    "no range": (0x40000000, 0, {}, (0, 0, 0, 0), 0),
    "8000_001E": (0x8000001E, 0, {}, (0x11111111, 0x123422, 0x567833, 9), 1),
    "8000_001F": (0x8000001F, 0, {}, (0x1F, 51, 0, 0), 0),
}
"""Leaf, subleaf, registers before, what comes, how often the hypervisor is asked."""


def ask(leaf: int, subleaf: int, registers: dict[str, int]) -> Any:
    async def body(cpu: GuestCpu) -> tuple[int, ...]:
        await cpu.load(**registers)
        found: tuple[int, ...] = await cpu.cpuid(leaf, subleaf)
        return tuple(found)

    return body


@pytest.mark.parametrize("name", list(LEAVES))
def test_by_the_page(name: str) -> None:
    leaf, subleaf, registers, expected, asked = LEAVES[name]
    guest = Bare(cpuid=TABLE)
    assert guest.run(ask(leaf, subleaf, registers), TOLD) == expected
    assert len(guest.requests) == asked
    for request in guest.requests:
        assert request.fields.keys() == {"code", "info1", "info2", "rax", "rcx"}
        assert request.fields["rax"] == leaf


def test_a_missing_leaf_in_its_range_is_finished_too() -> None:
    guest = Bare(cpuid=[entry(0, 0, 0x10)])
    assert guest.run(ask(0xB, 0, {}), TOLD) == (0, 0, 0, 0x44444444)


def test_early_by_the_msr_protocol() -> None:
    """The hypervisor's part comes by four rounds."""
    guest = Bare(cpuid=TABLE)

    def answer(value: int) -> int:
        return (0x60 + (value >> 30 & 3)) << 32 | value & 3 << 30 | 5

    assert guest.run(ask(0xB, 1, {}), msr=answer, early=True) == (5, 6, 7, 0x63)
    assert guest.values == [0xB << 32 | register << 30 | 4 for register in range(4)]


@pytest.mark.parametrize(
    "lie", [0, 4, 0x63 << 32 | 4, 0x63 << 32 | 1 << 12 | 5, 0x63 << 32 | 1 << 30 | 5, 0x63 << 32 | 1 << 29 | 5]
)
def test_lies_by_the_msr_protocol(lie: int) -> None:
    guest = Bare(cpuid=TABLE)
    with pytest.raises(Terminated):
        guest.run(ask(0xB, 0, {}), msr=lambda _: lie, early=True)
    assert guest.ended_with == (1, 5)


@pytest.mark.parametrize("missing", ["rax", "rbx", "rcx", "rdx", "info1"])
def test_an_answer_without_a_register(missing: str) -> None:
    guest = Bare(cpuid=TABLE)
    marked = [name for name in ("info1", "info2", "rax", "rbx", "rcx", "rdx") if name != missing]
    with pytest.raises(Terminated):
        guest.run(ask(0xB, 0, {}), Answer(TOLD.fields, marked))
    assert guest.ended_with == (1, 5)


@pytest.mark.parametrize("count", [0, 65, 0xFFFFFFFF])
def test_a_page_with_an_impossible_count(count: int) -> None:
    guest = Bare()
    guest.put(PLACE.cpuid, cpuid_page(TABLE, count))
    with pytest.raises(Terminated):
        guest.run(ask(0, 0, {}))
    assert guest.ended_with == (1, 4)


@pytest.mark.parametrize(
    ("subleaf", "table", "xcr0"),
    [(0, TABLE, 1 << 5 | 3), (1, [*TABLE[:8], entry(0xD, 1, 0x5, xcr0=1)], 3)],
    ids=["a state without an entry", "no compacted format"],
)
def test_sizes_that_cannot_be_computed(subleaf: int, table: list[Entry], xcr0: int) -> None:
    guest = Bare(cpuid=table)
    with pytest.raises(Terminated):
        guest.run(ask(0xD, subleaf, {"xcr0": xcr0}))
    assert guest.ended_with == (1, 4)
