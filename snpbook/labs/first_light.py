"""The overture's machine: small enough that one map shows all of its memory, with the log of what happened."""

from __future__ import annotations

from collections.abc import Mapping

from snpbook.hardware.exits import HostPageFault
from snpbook.spec.commands import Command
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.system import Guest, Owner, System, Verdict
from snpbook.trace import Event, FirmwareCommand, Instruction, Message
from snpbook.views.checks import checks
from snpbook.views.log import log
from snpbook.views.page import entry_fields
from snpbook.views.static import Static
from snpbook.widgets.rmpmap import RmpMap

INSTALLED = 256 << 20


class Lab:
    """A machine with 256 MB of memory, its map and its log; `map` follows every RMP change."""

    def __init__(self, product: str = "milan", seed: str = "first light") -> None:
        self.system = System(product, seed, installed=INSTALLED)
        self._recorder = self.system.record()
        rmp = self.system.machine.rmp
        self._pages = range(self.system.machine.map.top >> PAGE_SHIFT)
        self.map = RmpMap(rmp.states(self._pages), lookup=self._fields, title=f"RMP of {product}")
        self.system.trace.subscribe(self._follow)

    def __repr__(self) -> str:
        return f"Lab({self.system!r})"

    def boot_host(self) -> str:
        """Boot the host: its kernel's messages."""
        self.system.host.boot()
        return "\n".join(e.text for e in self._recorder.of(Message) if e.source == "kernel")

    def create_vm(self, memory: str = "32 MiB", vcpus: int = 2) -> Guest:
        """A guest with the sample firmware image."""
        return self.system.create_vm(memory=memory, vcpus=vcpus)

    def page_of(self, guest: Guest, gpa: int) -> int:
        """The page frame that holds a private page of the guest."""
        gfn = gpa >> PAGE_SHIFT
        slot = guest.vmm.vm.slots.of(gfn)
        if slot is None or slot.private is None:
            raise ValueError(f"gpa {gpa:#x} is no private memory of the guest")
        return int(slot.private.frames(slot, range(gfn, gfn + 1))[0])

    def host_reads(self, pfn: int, size: int = 32) -> bytes:
        """What the host finds at the start of a page."""
        return self.system.host.cpu.read(pfn << PAGE_SHIFT, size)

    def host_writes(self, pfn: int, data: bytes) -> HostPageFault | str:
        """The host's attempt to write to a page: the processor's refusal where the page is not its own."""
        try:
            self.system.host.cpu.write(pfn << PAGE_SHIFT, data)
        except HostPageFault as fault:
            return fault
        return f"{len(data)} bytes written"

    def firmware_log(self, *commands: Command) -> Static:
        """What the secure processor was asked, one row for a run of pages; of `commands` only, if given."""
        names = {command.name for command in commands}
        events = [e for e in self._recorder.of(FirmwareCommand) if not names or e.name in names]
        return log(events, "Commands to the secure processor")

    def owner(self, guest: Guest) -> Owner:
        """The guest's owner, who is elsewhere and sees the report only."""
        return self.system.owner(guest)

    def steps(self, verdict: Verdict) -> Static:
        """The checks behind a verdict."""
        return checks(verdict.checks, f"Verdict: {verdict}")

    def _follow(self, event: Event) -> None:
        if isinstance(event, Instruction | FirmwareCommand):
            self.map.update(self.system.machine.rmp.states(self._pages))

    def _fields(self, pfn: int) -> Mapping[str, object]:
        return entry_fields(self.system.machine.rmp.entry(pfn))
