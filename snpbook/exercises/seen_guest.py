"""A guest whose pages are looked at from both sides: what the host finds in memory, and what the guest reads.

It has booted with lazy acceptance, so that some of its memory is not accepted yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snpbook.guest import page_tables
from snpbook.guest.boot import Acceptance, Kernel
from snpbook.guest.conversions import make_private, make_shared
from snpbook.guest.layout import Layout
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.spec.vmcb import Vector
from snpbook.system import System
from snpbook.views.page import entry_fields
from snpbook.views.page_seen import Seen

INSTALLED = 128 << 20
MEMORY = "16 MiB"
_LOOK = 32
"""How many bytes are looked at."""


class SeenGuest:
    """The guest; `places` are pages of it by name."""

    def __init__(self) -> None:
        self.system = System("milan", "two eyes", installed=INSTALLED, cores=2)
        self.system.host.boot("mainline")
        self.guest = self.system.create_vm(memory=MEMORY)
        self.guest.launch()
        self.guest.boot(Acceptance.LAZY)
        self.place = place = Layout.of(self.guest.vmm.image)
        first, unit = PAGES_PER_LARGE // 2 << PAGE_SHIFT, PAGES_PER_LARGE << PAGE_SHIFT
        self.places: Mapping[str, int] = {
            "a page of a program": first,
            "another page of it": first + PAGE_SIZE,
            "memory not used yet": 2 * unit,
            "the GHCB": place.ghcb,
            "the secrets page": place.secrets,
            "the CPUID page": place.cpuid,
            "the guest's page table": place.tables,
        }
        self.own = (first, first + PAGE_SIZE, 2 * unit)
        """The pages that a program may change."""

    def __repr__(self) -> str:
        return f"SeenGuest({self.guest!r})"

    def look(self, gpa: int) -> Seen:
        """What host and guest see of the page at `gpa`. The guest does not touch what it has not accepted."""
        data, why, c_bit, accepted = self._run(_read, gpa)
        vmm, vm = self.guest.vmm, self.guest.vmm.vm
        gfns = range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1)
        private = bool(vm.is_private(gfns)[0])
        slot = vm.slots.of(gfns.start)
        assert slot is not None
        if private and slot.private is not None:
            frame = int(slot.private.pages.peek(slot.offsets(gfns))[0])
        else:
            frame = int(slot.shared_frames(vmm.process.space, gfns)[0])
        cpu = self.system.host.cpu
        host = cpu.read(frame << PAGE_SHIFT, _LOOK) if frame else None
        entry = entry_fields(cpu.rmp_entry(frame)) if frame else {}
        return Seen(gpa, host, data, why, frame << PAGE_SHIFT, entry, private, c_bit, accepted)

    def write(self, gpa: int, data: bytes) -> None:
        """The guest stores `data` at the beginning of a page. `ValueError` for one that it has not accepted."""
        self._may(gpa)
        seen = self.look(gpa)
        if seen.c_bit and not seen.accepted:
            raise ValueError("the guest has not accepted this page: it would take #VC and end itself")

        async def act(kernel: Kernel, gpa: int) -> None:
            await kernel.cpu.write(gpa, data)

        self._run(act, gpa)

    def convert(self, gpa: int, *, private: bool) -> None:
        """The guest makes a page shared, or private again. `ValueError` where it is already so, or not accepted."""
        self._may(gpa)
        seen = self.look(gpa)
        if seen.c_bit is private:
            raise ValueError(f"the page is {'private' if private else 'shared'} already")
        if not private and not seen.accepted:
            raise ValueError("the guest has not accepted this page: there is nothing to give up")
        self._run(_take_back if private else _share, gpa)

    def accept(self, gpa: int) -> int:
        """The guest accepts the units of 2 MB that it needs for a page: how many pages became so."""
        self._may(gpa)
        accepted: int = self._run(_accept, gpa)
        return accepted

    def touch(self, gpa: int) -> str:
        """A guest without a #VC handler reads the page: the exception that it takes, or nothing."""
        fault = self._run(_touch, gpa)
        return "" if fault is None else f"#VC, error code {fault.error:#x}"

    def _may(self, gpa: int) -> None:
        if gpa not in self.own:
            raise ValueError("the kernel needs this page as it is: choose one of a program")

    def _run(self, act: Any, gpa: int) -> Any:
        async def program(cpu: GuestCpu) -> Any:
            return await act(await Kernel.attach(cpu, self.place), gpa)

        return self.guest.run(program)


async def _private(kernel: Kernel, gpa: int) -> bool:
    entry, _ = await page_tables.leaf(kernel.cpu, gpa)
    return bool(entry >> _c_bit(kernel) & 1)


async def _read(kernel: Kernel, gpa: int) -> tuple[bytes | None, str, bool, bool]:
    c_bit = await _private(kernel, gpa)
    accepted = c_bit and not await kernel.unaccepted.holds(gpa)
    if c_bit and not accepted:
        return None, "not accepted: not touched", c_bit, accepted
    return await kernel.cpu.read(gpa, _LOOK), "", c_bit, accepted


async def _touch(kernel: Kernel, gpa: int) -> GuestException | None:
    kernel.cpu.set_handler(Vector.VC, None)
    try:
        await kernel.cpu.read(gpa, 1)
    except GuestException as fault:
        return fault
    return None


async def _share(kernel: Kernel, gpa: int) -> None:
    await make_shared(kernel.channel, kernel.place, _c_bit(kernel), _page(gpa))


async def _take_back(kernel: Kernel, gpa: int) -> None:
    await make_private(kernel.channel, kernel.place, _c_bit(kernel), _page(gpa))


async def _accept(kernel: Kernel, gpa: int) -> int:
    return await kernel.unaccepted.accept(_page(gpa))


def _c_bit(kernel: Kernel) -> int:
    assert kernel.protections.c_bit is not None
    return kernel.protections.c_bit


def _page(gpa: int) -> range:
    return range(gpa >> PAGE_SHIFT, (gpa >> PAGE_SHIFT) + 1)
