"""Which save areas the guest's processors have, and where each calls from: a table in the SVSM's own memory.

Only this file changes it, and everybody asks it before a page changes hands: a save area or calling area that is in use
is nobody's to validate, write or use twice. Source: COCONUT-SVSM kernel/src/cpu/percpu.rs (PerCpuVmsas).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from snpbook.guest.svsm.errors import Refused, check
from snpbook.guest.svsm.places import ENTRY, PROCESSORS, REGISTERED, Places
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.svsm import SvsmCode

_NONE = (1 << 32) - 1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registry:
    """The table, as a processor reaches it."""

    cpu: GuestCpu
    places: Places

    # Processors.

    async def set_processors(self, apic_ids: list[int]) -> None:
        """The APIC IDs of all processors, in the order of their numbers."""
        ids = np.full(PROCESSORS, _NONE, "<u4")
        ids[: len(apic_ids)] = apic_ids
        await self.cpu.write(self.places.apic_ids, ids.tobytes())

    async def number_of(self, apic_id: int) -> int:
        """The number of the processor with an APIC ID; INVALID_PARAMETER where there is none."""
        ids = np.frombuffer(await self.cpu.read(self.places.apic_ids, 4 * PROCESSORS), "<u4")
        found = np.flatnonzero(ids == apic_id) if 0 <= apic_id < _NONE else np.empty(0, np.int64)
        check(len(found) == 1, SvsmCode.INVALID_PARAMETER, f"there is a processor with APIC ID {apic_id:#x}")
        return int(found[0])

    # Save areas.

    async def current(self, processor: int) -> Record | None:
        """The save area that a processor's guest runs with, and its calling area."""
        entries = (await self._entries()).values()
        return next((each for each in entries if each.current and each.processor == processor), None)

    async def find(self, vmsa: int) -> Record | None:
        """The entry of a save area in use."""
        return next((each for each in (await self._entries()).values() if each.vmsa == vmsa and each.used), None)

    async def register(self, vmsa: int, calling_area: int, processor: int) -> None:
        """Note two pages before anything is done with them. INVALID_ADDRESS where one is in use, BUSY without room."""
        taken = await self.pages()
        wanted = np.array([vmsa, calling_area], np.uint64) >> np.uint64(PAGE_SHIFT)
        check(not np.isin(wanted, taken).any(), SvsmCode.INVALID_ADDRESS, "the pages are no save or calling areas yet")
        entries = await self._entries()
        free = next((i for i in range(REGISTERED) if i not in entries), None)
        if free is None:
            raise Refused(SvsmCode.BUSY, f"there are {REGISTERED} save areas: delete one")
        await self._store(free, ENTRY.record(vmsa=vmsa, calling_area=calling_area, processor=processor))

    async def use(self, vmsa: int) -> None:
        """The save area is checked and marked: from now on it is its processor's current one."""
        entries = await self._entries()
        mine = next(each for each in entries.values() if each.vmsa == vmsa)
        for number, each in entries.items():
            if each.vmsa == vmsa:
                await self._store(number, each.replace(used=1, current=1))
            elif each.current and each.processor == mine.processor:
                await self._store(number, each.replace(current=0))

    async def remap(self, processor: int, calling_area: int) -> None:
        """Another calling area for a processor. INVALID_ADDRESS for a page that is in use."""
        page = np.uint64(calling_area >> PAGE_SHIFT)
        check(page not in await self.pages(), SvsmCode.INVALID_ADDRESS, "the page is no save or calling area yet")
        for number, each in (await self._entries()).items():
            if each.current and each.processor == processor:
                await self._store(number, each.replace(calling_area=calling_area))

    async def forget(self, vmsa: int) -> None:
        """A save area is one no longer."""
        for number, each in (await self._entries()).items():
            if each.vmsa == vmsa:
                await self._store(number, ENTRY.record())

    async def pages(self, *, calling_areas: bool = True) -> NDArray[np.uint64]:
        """The pages that are save areas, and those that are calling areas."""
        raw = np.frombuffer(await self.cpu.read(self.places.entries, REGISTERED * ENTRY.size), ENTRY.dtype)
        mine = raw[raw["vmsa"] != 0]
        kinds = [mine["vmsa"], *([mine["calling_area"]] if calling_areas else [])]
        found: NDArray[np.uint64] = np.concatenate(kinds).astype(np.uint64) >> np.uint64(PAGE_SHIFT)
        return found

    async def exclusively(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call during which no other processor serves one: BUSY where one does already.

        What a call has found out, above all that a page is no save area, holds until it is done.
        """
        lock, _ = self.places.field("lock")
        if await self.cpu.exchange(lock, b"\1") != b"\0":
            raise Refused(SvsmCode.BUSY, "another processor serves a call: ask again")
        try:
            result = await call()
        except Refused:
            await self.cpu.write(lock, b"\0")
            raise
        await self.cpu.write(lock, b"\0")
        return result

    async def _entries(self) -> dict[int, Record]:
        """The entries that are not free, by their numbers."""
        raw = await self.cpu.read(self.places.entries, REGISTERED * ENTRY.size)
        used = np.flatnonzero(np.frombuffer(raw, ENTRY.dtype)["vmsa"])
        return {i: ENTRY.unpack(raw, i * ENTRY.size) for i in used.tolist()}

    async def _store(self, number: int, entry: Record) -> None:
        await self.cpu.write(self.places.entries + number * ENTRY.size, bytes(entry))
