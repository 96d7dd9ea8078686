"""The guest's memory as its SVSM reaches it: whatever address a guest gives is checked before it is used.

An address counts where the guest has RAM, where the SVSM itself has none, and where no save area lies; what the guest
has not validated cannot be read and is its own mistake. Sources: COCONUT-SVSM kernel/src/mm (valid_phys_region,
guestmem).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.guest.svsm.errors import Refused, check
from snpbook.guest.svsm.places import HEAD, Places
from snpbook.guest.svsm.registry import Registry
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.image import FOUR_GIB
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.svsm import SvsmCode
from snpbook.spec.vmcb import ExitCode, Vector

_HIGH = FOUR_GIB >> PAGE_SHIFT
Numbers = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """What the guest of `registry` has."""

    registry: Registry

    @property
    def cpu(self) -> GuestCpu:
        return self.registry.cpu

    @property
    def places(self) -> Places:
        return self.registry.places

    async def is_ram(self, first: Numbers, count: Numbers) -> NDArray[np.bool_]:
        """Which runs of pages lie in one stretch of the guest's RAM, and nowhere in the SVSM's own memory."""
        head = HEAD.unpack(await self.cpu.read(self.places.state, HEAD.size))
        own = self.places.own
        stop = first + count
        low, high = stop <= np.uint64(head.low_end), (first >= np.uint64(_HIGH)) & (stop <= np.uint64(head.high_end))
        outside = (stop <= np.uint64(own.start >> PAGE_SHIFT)) | (first >= np.uint64(own.stop >> PAGE_SHIFT))
        found: NDArray[np.bool_] = (low | high) & outside & (stop >= first)
        return found

    async def check(self, gpa: int, size: int) -> None:
        """INVALID_ADDRESS for bytes that are not all the guest's to give."""
        first, last = gpa >> PAGE_SHIFT, -(-(gpa + size) // PAGE_SIZE)
        runs = np.array([first], np.uint64), np.array([last - first], np.uint64)
        good = last < 1 << 64 - PAGE_SHIFT and bool((await self.is_ram(*runs))[0])
        check(good, SvsmCode.INVALID_ADDRESS, f"{gpa:#x}+{size:#x} is the guest's own RAM")
        areas = await self.registry.pages(calling_areas=False)
        free = not ((areas >= first) & (areas < last)).any()
        check(free, SvsmCode.INVALID_ADDRESS, f"{gpa:#x}+{size:#x} has no save areas")

    async def read(self, gpa: int, size: int) -> bytes:
        """A copy of the guest's bytes, which no longer change; INVALID_ADDRESS for what it does not have."""
        await self.check(gpa, size)
        with self.refusing():
            data: bytes = await self.cpu.read(gpa, size)
        return data

    async def write(self, gpa: int, data: bytes) -> None:
        """Store bytes for the guest; INVALID_ADDRESS for what it does not have."""
        await self.check(gpa, len(data))
        with self.refusing():
            await self.cpu.write(gpa, data)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """A page that the guest has not validated refuses its call (INVALID_ADDRESS), and does not end the SVSM."""
        try:
            with self.unhandled():
                yield
        except GuestException as fault:
            if fault.error != ExitCode.PAGE_NOT_VALIDATED:
                raise
            raise Refused(SvsmCode.INVALID_ADDRESS, f"the page at {fault.address:#x} is validated") from fault

    @contextmanager
    def unhandled(self) -> Iterator[None]:
        """Have #VC raised out of the await inside."""
        handler = self.cpu.handlers[Vector.VC]
        self.cpu.set_handler(Vector.VC, None)
        try:
            yield
        finally:
            self.cpu.set_handler(Vector.VC, handler)
