"""A program that fills memory with a pattern and looks whether it is still there.

Each word is its own address and the round in which it was written: whatever lies in a page tells where it comes from
and how old it is, down to the eight bytes. The pattern is no secret.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.guest.workloads.corruption import Corrupted, Corruption, Finding
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import PAGE_SIZE

_ADDRESS_BITS = 48
ROUNDS = 1 << 64 - _ADDRESS_BITS
_WORD = 8
_AT_ONCE = 512 * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class MemoryToucher:
    """Uses the private memory `memory` (guest addresses, whole pages). It keeps nothing else anywhere."""

    cpu: GuestCpu
    memory: range

    def __post_init__(self) -> None:
        if self.memory.start % PAGE_SIZE or self.memory.stop % PAGE_SIZE or self.memory.step != 1:
            raise ValueError(f"memory = {self.memory}: whole pages")

    async def fill(self, number: int) -> None:
        """Write the pattern of round `number` (1 to `ROUNDS` - 1, so that no word is that of fresh memory)."""
        for start in self.memory[::_AT_ONCE]:
            await self.cpu.write(start, self._pattern(start, _round(number)).astype("<u8").tobytes())

    async def look(self, number: int) -> list[Finding]:
        """The pages that do not hold the pattern of round `number`."""
        findings = []
        for start in self.memory[::_AT_ONCE]:
            expected = self._pattern(start, _round(number))
            found = np.frombuffer(await self.cpu.read(start, expected.nbytes), "<u8").reshape(expected.shape)
            bad = np.flatnonzero((found != expected).any(axis=1))
            findings += [_finding(start + int(i) * PAGE_SIZE, found[i], expected[i]) for i in bad]
        return findings

    async def check(self, number: int) -> int:
        """How many pages hold the pattern of round `number`: all, or it raises `Corrupted`."""
        findings = await self.look(number)
        if findings:
            raise Corrupted(findings)
        return len(self.memory) // PAGE_SIZE

    def _pattern(self, start: int, number: int) -> NDArray[np.uint64]:
        """The words from guest address `start` on, one row a page."""
        addresses = np.arange(start, min(start + _AT_ONCE, self.memory.stop), _WORD, dtype=np.uint64)
        return (addresses | np.uint64(number << _ADDRESS_BITS)).reshape(-1, PAGE_SIZE // _WORD)


def _round(number: int) -> int:
    if not 0 < number < ROUNDS:
        raise ValueError(f"round {number}: 1 to {ROUNDS - 1}")
    return number


def _finding(gpa: int, found: NDArray[np.uint64], expected: NDArray[np.uint64]) -> Finding:
    """Read a page by its first word, and see whether the others agree."""
    where, when = int(found[0]) % (1 << _ADDRESS_BITS), int(found[0]) >> _ADDRESS_BITS
    steps = np.arange(len(found), dtype=np.uint64) * np.uint64(_WORD)
    if not when or where % PAGE_SIZE or not np.array_equal(found, found[0] + steps):
        words = np.flatnonzero(found != expected)
        first = int(words[0])
        text = (
            f"{len(words)} of {len(found)} words differ, the first at {gpa + first * _WORD:#x}: {int(found[first]):#x}"
        )
        return Finding(gpa, Corruption.GARBAGE, text)
    if where != gpa:
        return Finding(gpa, Corruption.SWAPPED, f"page {where:#x}, round {when}")
    return Finding(gpa, Corruption.STALE, f"round {when}, where {int(expected[0]) >> _ADDRESS_BITS} was written")
