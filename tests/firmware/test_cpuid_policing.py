"""CPUID policing: what each rule lets through, and what the firmware makes of the rest. Numbers are the sheet's."""

from __future__ import annotations

import struct

import pytest

from snpbook.firmware.cpuid_policing import police
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.products import product
from snpbook.spec.status import Status
from tests.firmware.test_launch import launch_update
from tests.firmware.test_messages import entry
from tests.machines import FREE, GCTX, PAGE, Board

GENOA = product("genoa")
Four = tuple[int, int, int, int]


def judged(leaf: int, subleaf: int, given: Four, xcr0: int = 0, xss: int = 0, tail: int = 0) -> tuple[bool, Four, int]:
    """Whether an entry is accepted, its registers afterwards, its last word afterwards."""
    packed = struct.pack("<IIQQIIIIQ", leaf, subleaf, xcr0, xss, *given, tail)
    verdict = police(GENOA, packed)
    assert verdict.entries[:0x18] == packed[:0x18]
    eax, ebx, ecx, edx, rest = struct.unpack_from("<IIIIQ", verdict.entries, 0x18)
    return verdict.violation is None, (eax, ebx, ecx, edx), rest


def own(leaf: int, subleaf: int = 0) -> Four:
    return tuple(GENOA.cpuid(leaf, subleaf))  # type: ignore[return-value]


@pytest.mark.parametrize("key", [key for key in GENOA.leaves if key[0] not in (0x80000025, 0x8000001E)])
def test_a_processor_may_say_what_it_says_itself(key: tuple[int, int | None]) -> None:
    leaf, subleaf = key[0], key[1] or 0
    registers = own(leaf, subleaf)
    if (leaf, subleaf) == (0xD, 0):
        registers = (*registers[:1], 0x240, *registers[2:])
    if (leaf, subleaf) == (0xD, 1):
        registers = (*registers[:1], 0x240, *registers[2:])
    assert judged(leaf, subleaf, registers)[:2] == (True, registers)


@pytest.mark.parametrize(("leaf", "subleaf", "given", "right"), [
    (0x0, 0, (0x11, 1, 2, 3), (0x10, 1, 2, 3)),
    (0x1, 0, (0x00A10F12, 0x800, 0, 0), (0x00A10F11, 0x800, 0, 0)),
    (0x1, 0, (0x10A10F11, 0x800, 0, 0), (0x00A10F11, 0x800, 0, 0)),
    (0x1, 0, (0x00800F12, 0xFF00, 0, 0), (0x00800F12, 0x0800, 0, 0)),
    (0x1, 0, (0, 0x800, 1 << 27 | 1 << 31 | 1 << 2, 0), (0, 0x800, 1 << 27 | 1 << 31, 0)),
    (0x3, 0, (0, 0, 0, 1), (0, 0, 0, 0)),
    (0x5, 0, (0x10000, 1, 8, 0x100), (0, 1, 0, 0)),
    (0x6, 0, (0xFF, 1, 3, 1), (4, 0, 1, 0)),
    (0x7, 0, (2, 0, 1 << 4, 0x10000010), (1, 0, 1 << 4, 0x10000010)),
    (0x7, 0, (1, 0, 0, 0x30000010), (1, 0, 0, 0)),  # quirk: all of EDX goes
    (0x7, 1, (0x21, 1, 1, 1), (0x20, 0, 0, 0)),
    (0x7, 2, (1, 0, 0, 0), (0, 0, 0, 0)),
    (0xD, 0, (0, 0, 7, 7), (3, 0x240, 7, 0)),
    (0xD, 0xB, (0, 1, 0, 1), (0x10, 0, 1, 0)),
    (0xF, 0, (1, 9, 1, 9), (0, 9, 0, 9)),
    (0x80000000, 0, (0x80000029, 5, 6, 7), (0x80000028, 5, 6, 7)),
    (0x80000007, 0, (1, 0, 9, 0), (0, 0, 9, 0)),
    (0x80000008, 0, (0xFF3935, 0, 0, 0x20008), (0xFF3934, 0, 0, 0x10007)),
    (0x8000001F, 0, (0, 0x4033, 0, 0), (0, 0x4033, 0, 0)),
    (0x8000001F, 0, (0, 0x4FF3, 0, 0), (0, 0x4FF3, 0, 0)),
    (0x8000001F, 0, (0, 0x5FFF, 0, 0), (0, 0x403F, 0, 0)),  # quirk: low bits stay, 11:6 go
    (0x80000022, 0, (0, 0x117, 1, 0), (0, 0x106, 1, 0)),
    (0x40000000, 0, (9, 9, 9, 9), (9, 9, 9, 9)),
    (0x00010000, 0, (9, 9, 9, 9), (9, 9, 9, 9)),
])  # fmt: skip
def test_corrections(leaf: int, subleaf: int, given: Four, right: Four) -> None:
    accepted, found, _ = judged(leaf, subleaf, given)
    assert [hex(value) for value in found] == [hex(value) for value in right]
    assert accepted == (found == given)


@pytest.mark.parametrize(("xcr0", "size"), [
    (1, 0x240), (3, 0x240), (7, 0x340), (0x27, 0x380), (0x67, 0x580), (0xE7, 0x980), (0x2E7, 0x988), (1 << 9, 0x988),
])  # fmt: skip
def test_size_of_the_standard_area(xcr0: int, size: int) -> None:
    assert judged(0xD, 0, (3, size, 0, 0), xcr0)[0]
    assert judged(0xD, 0, (3, size + 8, 0, 0), xcr0) == (False, (3, size, 0, 0), 0)


@pytest.mark.parametrize(("xcr0", "xss", "size"), [
    (3, 0, 0x240), (7, 0, 0x340), (0x2E7, 0, 0x240 + 0x100 + 0x40 + 0x200 + 0x400 + 8), (3, 1 << 11, 0x250),
    (3, 3 << 11, 0x268),
])  # fmt: skip
def test_size_of_the_compacted_area(xcr0: int, xss: int, size: int) -> None:
    assert judged(0xD, 1, (0, size, 0, 0), xcr0, xss)[0]
    assert judged(0xD, 1, (0, 0, 0, 0), xcr0, xss) == (False, (0, size, 0, 0), 0)


def test_a_reserved_word_is_flagged_and_stays() -> None:
    assert judged(0x2, 0, (1, 2, 3, 4), tail=9) == (False, (1, 2, 3, 4), 9)


def test_the_launch_writes_the_corrected_page_back_and_takes_it_then() -> None:
    table = [entry(0, 0, 0x11, 1, 2, 3), entry(0x40000000, 0, 9, 9, 9, 9), entry(3, 0, 0, 0, 0, 1)]
    page = struct.pack("<I12x", 3) + b"".join(table) + b"behind it"
    built = launch_update(kind=LaunchPage.CPUID, data=page)
    board: Board = built.board
    before = board.psp.context(GCTX)
    assert built.issue() is Status.INVALID_PARAM
    right = page[:16] + entry(0, 0, 0x10, 1, 2, 3) + table[1] + entry(3, 0, 0, 0, 0, 0) + b"behind it"
    assert board.cpu.read(FREE, PAGE) == right.ljust(PAGE, b"\0")
    assert board.psp.context(GCTX) == before
    assert board.state(FREE) == PageState.PRE_GUEST
    assert built.issue() is Status.SUCCESS
    assert board.command(Command.SNP_LAUNCH_FINISH, gctx_paddr=GCTX) is Status.SUCCESS
