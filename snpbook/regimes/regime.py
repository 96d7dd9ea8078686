"""A guest of one cell of the table of private memory on a host of its own, and what either side does with its pages.

Whoever experiments acts through guest programs, the VMM's system calls and the kernel; the ledger listens from the
start. Sources: RFC v7 and v8 letters; Linux 6.12.
"""

from __future__ import annotations

from snpbook.guest.acceptance import ask
from snpbook.guest.boot import Acceptance, Kernel
from snpbook.guest.layout import SHARED_PAGES, Layout
from snpbook.hardware.dram import Words
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm import registered
from snpbook.host.kvm.guest_memfd import GuestMemfd
from snpbook.host.kvm.memslots import Memslot
from snpbook.host.kvm.vm import Vm
from snpbook.host.ledger import Ledger, Sample
from snpbook.host.memory import PageFile
from snpbook.host.memory_files import PUNCH
from snpbook.host.recount import Pages, recount
from snpbook.host.vmm.exits import convert
from snpbook.host.vmm.guest import Vmm
from snpbook.spec.ghcb import PageOperation
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.private_memory import CELLS, Backend, cell
from snpbook.spec.process import Advice
from snpbook.spec.sizes import parse_size
from snpbook.spec.uapi_kvm import HC_MAP_GPA_RANGE, MapGpaRange
from snpbook.system import Guest, System

MIB = 1 << 20
FIRST = 10 * MIB >> PAGE_SHIFT
"""The first guest page behind all that a launch measures and a boot accepts."""
ENCRYPTED = tuple(place for place in CELLS if place[0] != "plain")
"""The cells whose guests have something to keep private, as (kind, back end)."""


class Regime:
    """A guest with `memory` on a host with `installed` bytes of it (or texts such as "16 MiB").

    `huge`: restricted files, or where there are none the VMM's memory, may have huge pages. `discard`: a conversion
    frees the side that is left. `NoSuchCell` for a kind of guest that never had its private pages in the back end.
    """

    def __init__(
        self,
        kind: str,
        backend: str,
        *,
        memory: int | str = 16 * MIB,
        installed: int | str = 128 * MIB,
        huge: bool = False,
        discard: bool = True,
    ) -> None:
        self.cell = cell(kind, backend)
        self.memory, self.discard = parse_size(memory), discard
        self.system = System("milan", "regimes", installed=parse_size(installed))
        self.host = self.system.host
        self.host.registered_snp = (kind, backend) == ("snp", Backend.REGISTERED)
        self.host.shmem_huge = huge
        self.host.boot(self.cell.era)
        self.ledger = Ledger(self.system.trace)
        self.guest = self.start()

    def __repr__(self) -> str:
        return f"Regime({self.kind} on {self.cell.backend}, {self.guest!r})"

    def start(self) -> Guest:
        """A further guest on the same host, not launched; the regime's own is `guest`."""
        kind, backend = self.cell.kind, self.cell.backend
        return self.system.create_vm(memory=self.memory, kind=kind, discard=self.discard, backend=backend)

    @property
    def kind(self) -> str:
        return self.cell.kind

    @property
    def vmm(self) -> Vmm:
        return self.guest.vmm

    @property
    def vm(self) -> Vm:
        return self.vmm.vm

    @property
    def pages(self) -> range:
        """The guest pages from `FIRST` to the end of memory: nobody has used them before an experiment does."""
        return range(FIRST, self.memory >> PAGE_SHIFT)

    # Counting.

    def sample(self, label: str) -> Sample:
        """What the ledger says now."""
        return self.ledger.sample(label, self.vm)

    def recount(self) -> Pages:
        """The same pages, counted in memory itself."""
        return recount(self.vm)

    # The guest.

    def boot(self) -> None:
        """Boot, and accept what is no whole 2 MB: the rest of memory stays as it is until it is used.

        Memory of a lazily pinned guest begins as private, and the SEV-ES guest's firmware does not tell that its GHCB
        is shared, as unpatched firmware did not: the VMM is told here in its place.
        """
        if self.cell.backend is Backend.LAZY:
            shared = Layout.of(self.vmm.image).shared >> PAGE_SHIFT
            self.convert(range(shared, shared + SHARED_PAGES), private=False)
        self.guest.boot(Acceptance.LAZY)

    def touch(self, gfns: range, data: bytes = b"x") -> None:
        """The guest writes `data` to the begin of each page, which it has validated where it must, and clears the rest.

        Under a key of its own, where it has one.
        """

        async def program(cpu: GuestCpu) -> None:
            if self.kind == "snp":
                await cpu.pvalidate(gfns.start << PAGE_SHIFT, len(gfns))
            await cpu.write(gfns.start << PAGE_SHIFT, data.ljust(PAGE_SIZE, b"\0") * len(gfns))

        self.guest.run(program)

    def use(self, gfns: range) -> None:
        """The guest takes pages into use, which gives them memory, and leaves what is in them."""

        async def program(cpu: GuestCpu) -> None:
            if self.kind == "snp":
                await cpu.pvalidate(gfns.start << PAGE_SHIFT, len(gfns))
            else:
                await cpu.read(gfns.start << PAGE_SHIFT, len(gfns) << PAGE_SHIFT)

        async def nothing(cpu: GuestCpu) -> None:
            """Takes the place of the program, which remembers all that it read."""

        self.guest.run(program)
        self.guest.run(nothing)

    def read(self, gfn: int, size: int = 8) -> bytes:
        """What the guest reads at the begin of a page."""

        async def program(cpu: GuestCpu) -> bytes:
            found: bytes = await cpu.read(gfn << PAGE_SHIFT, size)
            return found

        return bytes(self.guest.run(program))

    def pvalidate(self, gfn: int, *, validate: bool = True) -> tuple[int, bool]:
        """What PVALIDATE of a page answers: its return code, and whether nothing changed. Or it rescinds."""

        async def program(cpu: GuestCpu) -> tuple[int, bool]:
            codes, unchanged = await cpu.pvalidate(gfn << PAGE_SHIFT, 1, validate=validate)
            return int(codes[0]), bool(unchanged[0])

        code, same = self.guest.run(program)
        return code, same

    def ask(self, gfns: range, *, private: bool) -> None:
        """The guest, which has booted, asks for a conversion as its kind does, and rescinds what becomes shared before.

        SNP: page state changes in lists. Others: KVM_HC_MAP_GPA_RANGE, where the slots have private files; a SEV guest
        on registered memory has nobody to ask. `RuntimeError` where the hypercall fails.
        """
        place, upm = Layout.of(self.vmm.image), self.cell.upm
        operation = PageOperation.PRIVATE if private else PageOperation.SHARED
        flags = int(MapGpaRange.ENCRYPTED) if private else 0

        async def change(cpu: GuestCpu) -> None:
            kernel = await Kernel.attach(cpu, place)
            if not private:
                await cpu.pvalidate(gfns.start << PAGE_SHIFT, len(gfns), validate=False)
            await ask(kernel.channel, [gfns], operation)

        async def call(cpu: GuestCpu) -> int:
            if self.kind == "sev-es":
                await Kernel.attach(cpu, place)
            await cpu.load(rax=HC_MAP_GPA_RANGE, rbx=gfns.start << PAGE_SHIFT, rcx=len(gfns), rdx=flags)
            await cpu.vmmcall()
            (answer,) = await cpu.look("rax")
            return int(answer)

        if self.kind == "snp":
            self.guest.run(change)
        elif upm and (answer := self.guest.run(call)):
            raise RuntimeError(f"KVM_HC_MAP_GPA_RANGE for {gfns}: {answer:#x}")

    # The host.

    def convert(self, gfns: range, *, private: bool) -> None:
        """What KVM or the VMM does when the guest asks, also for one that has not booted.

        For SEV guests on registered memory nobody does anything.
        """
        if self.vm.in_place:
            registered.convert(self.vm, gfns, private=private)
        elif self.cell.upm:
            convert(self.vmm, gfns.start << PAGE_SHIFT, len(gfns) << PAGE_SHIFT, private=private)

    def punch(self, gfns: range) -> None:
        """A hole in the private file: its pages are the host's again. `ValueError` without one."""
        gpa = gfns.start << PAGE_SHIFT
        block = self.vmm.block_of(gpa)
        if block is None or block.private_fd < 0:
            raise ValueError(f"gfn = {gfns.start:#x}: no private file is behind it")
        self.vmm.process.fallocate(block.private_fd, PUNCH, gpa - block.gpa, len(gfns) << PAGE_SHIFT)

    def balloon(self, gfns: range) -> None:
        """The guest gives pages up, and the VMM what is behind them on either side."""
        self.vmm.process.madvise(self.vmm.user(gfns.start << PAGE_SHIFT), len(gfns) << PAGE_SHIFT, Advice.DONTNEED)
        if self.vmm.private_memory:
            self.punch(gfns)

    def memory_error(self, gfns: range) -> None:
        """The hardware reports that what private pages hold is lost. `ValueError` for a file that is not told of it."""
        slot = self._slot(gfns)
        if not isinstance(slot.private, GuestMemfd):
            raise ValueError(f"{self.cell.backend} memory: what becomes of a page with a memory error is not modelled")
        slot.private.fail(slot.offsets(gfns))

    def user_pages(self, gfns: range) -> range:
        """The pages of the VMM's address space that show the shared side of guest pages."""
        first = self.vmm.user(gfns.start << PAGE_SHIFT) >> PAGE_SHIFT
        return range(first, first + len(gfns))

    def frames(self, gfns: range) -> Words:
        """The frames in which the guest has its private pages, 0 where it has none."""
        ((file, offsets),) = self.private_files(gfns)
        return file.peek(offsets).copy()

    def private_files(self, gfns: range) -> list[tuple[PageFile, range]]:
        """Which offsets of which files hold the private pages: a private file's, or those of the VMM's memory."""
        slot = self._slot(gfns)
        if slot.private is None:
            return self.vmm.process.space.files(slot.user_pages(gfns))
        return [(slot.private.pages, slot.offsets(gfns))]

    def _slot(self, gfns: range) -> Memslot:
        slot = self.vm.slots.of(gfns.start)
        if slot is None or slot.part(gfns) != gfns:
            raise ValueError(f"guest pages {gfns.start:#x} to {gfns.stop:#x} do not lie in one slot")
        return slot
