"""Pages change sides on behalf of the guest: PVALIDATE, zeroing and rights, in the one order that is safe.

Only this file validates for the guest. A page that becomes valid is zeroed before the guest may touch it, because its
host may have put a page of the SVSM's there; of one that goes the rights go first. Runs of pages are one instruction
each. Source: COCONUT-SVSM kernel/src/protocols/core.rs (core_pvalidate).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from snpbook.guest.svsm.errors import Refused, check
from snpbook.guest.svsm.guest_memory import GuestMemory
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.rmp import RmpCode
from snpbook.spec.svsm import (
    GUEST_RIGHTS,
    GUEST_VMPL,
    PVALIDATE_ENTRY,
    PVALIDATE_LIST,
    VMPL_COUNT,
    SvsmCode,
)
from snpbook.spec.vmcb import ExitCode

_ENTRY = PVALIDATE_ENTRY.size
_ALIGNMENT = 8


async def serve_list(memory: GuestMemory, gpa: int) -> None:
    """PVALIDATE of a list at guest address `gpa`: entry by entry from `next` on, which then names the one to go on.

    The list is copied once: what the guest changes meanwhile changes nothing. INVALID_PARAMETER for a list or an entry
    that cannot be, INVALID_ADDRESS for what is not the guest's, and behind `PROTOCOL_BASE` what PVALIDATE answered.
    """
    room = (PAGE_SIZE - gpa % PAGE_SIZE - PVALIDATE_LIST.size) // _ENTRY
    check(gpa % _ALIGNMENT == 0, SvsmCode.INVALID_PARAMETER, f"the list at {gpa:#x} is aligned to {_ALIGNMENT}")
    copy = await memory.read(gpa, PAGE_SIZE - gpa % PAGE_SIZE)
    head = PVALIDATE_LIST.unpack(copy)
    good = head.next < head.entries <= room
    check(good, SvsmCode.INVALID_PARAMETER, f"entry {head.next} of {head.entries} in a page with room for {room}")
    words = np.frombuffer(copy, "<u8", head.entries - head.next, PVALIDATE_LIST.size + head.next * _ENTRY)
    done, code = await _serve(memory, words.astype(np.uint64))
    at = PVALIDATE_LIST.fields["next"]
    await memory.write(gpa + at.offset, (head.next + done).to_bytes(at.size, "little"))
    check(code == SvsmCode.SUCCESS, code, f"entry {head.next + done} of the list")


async def _serve(memory: GuestMemory, words: NDArray[np.uint64]) -> tuple[int, int]:
    """Entries done, and what the next one is refused with."""
    columns = PVALIDATE_ENTRY.columns(words.astype("<u8").view(PVALIDATE_ENTRY.dtype))
    first = columns["pfn"].astype(np.uint64)
    count = np.where(columns["page_size"] == 1, PAGES_PER_LARGE, 1).astype(np.uint64)
    named = sum(field.limit << field.lo for field in PVALIDATE_ENTRY.fields.values())
    malformed = (words & ~np.uint64(named) != 0) | (columns["page_size"] > 1) | (first % count != 0)
    areas = np.sort(await memory.registry.pages())
    used = np.searchsorted(areas, first) != np.searchsorted(areas, first + count)
    foreign = ~await memory.is_ram(first, count) | used
    codes = np.select([malformed, foreign], [SvsmCode.INVALID_PARAMETER, SvsmCode.INVALID_ADDRESS], SvsmCode.SUCCESS)
    stop = int(np.argmax(codes != SvsmCode.SUCCESS)) if codes.any() else len(words)
    kinds = words & ~np.uint64(PVALIDATE_ENTRY.fields["pfn"].limit << PAGE_SHIFT)
    joined = (first[1:stop] == first[: max(stop - 1, 0)] + np.uint64(1)) & (kinds[1:stop] == kinds[: max(stop - 1, 0)])
    small = columns["page_size"][1:stop] == 0
    bounds = [0, *(np.flatnonzero(~(joined & small)) + 1).tolist(), stop] if stop else []
    for begin, end in pairwise(bounds):
        run = _Run(int(first[begin]), end - begin, bool(columns["page_size"][begin]))
        ignore = bool(columns["ignore_unchanged"][begin])
        act = _validate if columns["validate"][begin] else _rescind
        done, code = await act(memory, run, ignore)
        if code:
            return begin + done, code
    return stop, int(codes[stop]) if stop < len(codes) else SvsmCode.SUCCESS


@dataclass(frozen=True, slots=True)
class _Run:
    """Pages of one size in a row, from page `first` on."""

    first: int
    count: int
    large: bool

    def at(self, number: int) -> int:
        """The address of one of them."""
        return self.first + number * (PAGES_PER_LARGE if self.large else 1) << PAGE_SHIFT

    @property
    def page_bytes(self) -> int:
        return self.at(1) - self.at(0)


async def _validate(memory: GuestMemory, run: _Run, ignore: bool) -> tuple[int, int]:
    """Validate, zero, grant: pages done, and the code of the next one. What it validated behind that, it takes back."""
    cpu = memory.cpu
    codes, unchanged = await cpu.pvalidate(run.at(0), run.count, large=run.large)
    bad = (codes != RmpCode.SUCCESS) | (unchanged & (not ignore))
    done = int(np.argmax(bad)) if bad.any() else run.count
    changed = (codes == RmpCode.SUCCESS) & ~unchanged
    for begin, end in _runs(changed[done:]):
        await cpu.pvalidate(run.at(done + begin), end - begin, validate=False, large=run.large)
    if done:
        await cpu.write(run.at(0), bytes(done * run.page_bytes))
        await grant(cpu, run.at(0), done, large=run.large)
    return done, _code(codes[done], unchanged[done]) if done < run.count else 0


async def _rescind(memory: GuestMemory, run: _Run, ignore: bool) -> tuple[int, int]:
    """Take the rights away, then the validation. A page that has none is unchanged."""
    done = 0
    while done < run.count:
        ready = await _revoked(memory, run, done)
        if ready:
            codes, unchanged = await memory.cpu.pvalidate(run.at(done), ready, validate=False, large=run.large)
            bad = (codes != RmpCode.SUCCESS) | (unchanged & (not ignore))
            if bad.any():
                number = int(np.argmax(bad))
                return done + number, _code(codes[number], unchanged[number])
            done += ready
        if done < run.count:
            if not ignore:
                return done, SvsmCode.UNCHANGED
            done += 1
    return done, 0


async def _revoked(memory: GuestMemory, run: _Run, start: int) -> int:
    """How many pages from `start` on lost the rights of the guest's VMPLs: those before the first that is not valid."""
    ready = run.count - start
    for vmpl in range(GUEST_VMPL, VMPL_COUNT):
        try:
            with memory.unhandled():
                await memory.cpu.rmpadjust(run.at(start), ready, vmpl=vmpl, permissions=0, large=run.large)
        except GuestException as fault:
            if fault.error != ExitCode.PAGE_NOT_VALIDATED:
                raise
            ready = (fault.address - run.at(start)) // run.page_bytes
    return ready


async def grant(cpu: GuestCpu, address: int, count: int, *, large: bool = False) -> None:
    """Give the guest's VMPL its rights on pages."""
    codes = await cpu.rmpadjust(address, count, vmpl=GUEST_VMPL, permissions=GUEST_RIGHTS, large=large)
    if codes.any():
        raise Refused(SvsmCode.PROTOCOL_BASE + int(codes[np.argmax(codes != 0)]), f"rights on {address:#x}")


def _code(code: int, unchanged: bool) -> int:
    return SvsmCode.UNCHANGED if unchanged else SvsmCode.PROTOCOL_BASE + int(code)


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]
