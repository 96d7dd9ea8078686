"""A guest on each cell of the table of private memory, and one workload for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm import registered
from snpbook.host.ledger import Ledger, Sample
from snpbook.host.recount import recount
from snpbook.host.refusal import KernelError
from snpbook.host.vmm.exits import convert
from snpbook.spec.private_memory import Backend, cell
from snpbook.spec.process import Advice
from snpbook.system import Guest, System

MIB, PAGE = 1 << 20, 4096
ENCRYPTED = [
    ("sev", "registered"), ("sev-es", "registered"), ("snp", "registered"), ("sev", "lazy"), ("sev-es", "lazy"),
    ("snp", "restricted"), ("snp", "guest_memfd"),
]  # fmt: skip
FIRST = 0xA00
"""A guest page that no launch measures."""


class Regime:
    """A guest of one cell, from before it has memory on, with its ledger."""

    def __init__(
        self, kind: str, backend: str, *, memory: int = 16 * MIB, installed: int = 128 * MIB, huge: bool = False,
        discard: bool = True,
    ) -> None:  # fmt: skip
        self.cell = cell(kind, backend)
        self.system = System("milan", "regimes", installed=installed)
        self.host = self.system.host
        self.host.registered_snp = (kind, backend) == ("snp", Backend.REGISTERED)
        self.host.shmem_huge = huge
        self.host.boot(self.cell.era)
        self.ledger = Ledger(self.system.trace)
        self.kind, self.memory, self.discard = kind, memory, discard
        self.guest = self.start()

    def start(self) -> Guest:
        """One guest; a further one shares the host."""
        return self.system.create_vm(memory=self.memory, kind=self.kind, discard=self.discard)

    @property
    def vm(self) -> Any:
        return self.guest.vmm.vm

    @property
    def frame_holders(self) -> int:
        return self.host.memory.allocated

    def sample(self, label: str) -> Sample:
        """What the ledger says, which is what memory holds."""
        sample = self.ledger.sample(label, self.vm)
        assert sample.pages == recount(self.vm), label
        return sample

    def convert(self, gfns: range, *, private: bool) -> None:
        """What KVM or the VMM does on the guest's request; SEV on registered memory needs nobody."""
        if self.vm.in_place:
            registered.convert(self.vm, gfns, private=private)
        elif self.cell.upm:
            convert(self.guest.vmm, gfns.start * PAGE, len(gfns) * PAGE, private=private)

    def touch(self, gfns: range, data: bytes = b"x") -> None:
        """The guest writes one byte of each page with its key, having accepted the page where it must."""

        async def program(cpu: GuestCpu) -> None:
            if self.kind == "snp":
                await cpu.pvalidate(gfns.start * PAGE, len(gfns))
            await cpu.write(gfns.start * PAGE, (data + bytes(PAGE - len(data))) * len(gfns))

        self.guest.run(program)

    def read(self, gfn: int, size: int = 8) -> bytes:
        """What the guest reads with its key."""

        async def program(cpu: GuestCpu) -> bytes:
            found: bytes = await cpu.read(gfn * PAGE, size)
            return found

        return bytes(self.guest.run(program))

    def pvalidate(self, gfn: int) -> tuple[int, bool]:
        """Return code and carry flag (no change)."""

        async def program(cpu: GuestCpu) -> Any:
            return await cpu.pvalidate(gfn * PAGE, 1)

        codes, unchanged = self.guest.run(program)
        return int(codes[0]), bool(unchanged[0])

    def balloon(self, gfns: range) -> None:
        """The guest gives pages up, and the VMM what is behind them on either side."""
        vmm = self.guest.vmm
        vmm.process.madvise(vmm.user(gfns.start * PAGE), len(gfns) * PAGE, Advice.DONTNEED)
        block = vmm.block_of(gfns.start * PAGE)
        if block.private_fd >= 0:
            vmm.process.fallocate(block.private_fd, 3, gfns.start * PAGE - block.gpa, len(gfns) * PAGE)

    def run(self) -> list[Sample]:
        """The workload: launch, touch 1, 10 and 100 % of what is free, convert to shared and back, idle, balloon."""
        samples = [self.sample("created")]
        self.guest.launch()
        samples.append(self.sample("launched"))
        pages = range(FIRST, self.memory // PAGE - 0x100)
        done = FIRST
        for percent in (1, 10, 100):
            more = range(done, FIRST + max(len(pages) * percent // 100, 1))
            self.convert(more, private=True)
            samples.append(self.sample(f"converted {percent} %"))
            self.touch(more)
            samples.append(self.sample(f"touched {percent} %"))
            done = more.stop
        part = range(FIRST, FIRST + 64)
        self.convert(part, private=False)
        if self.cell.upm or self.vm.in_place:
            self.guest.vmm.write(part.start * PAGE, b"shared" * 100)
        samples.append(self.sample("converted to shared"))
        self.convert(part, private=True)
        samples.append(self.sample("converted back"))
        samples.append(self.sample("idle"))
        self.balloon(range(FIRST + 128, FIRST + 256))
        samples.append(self.sample("ballooned"))
        return samples


def fit(kind: str, backend: str, *, touched: int, memory: int = 12 * MIB, installed: int = 64 * MIB) -> int:
    """How many guests fit on a host, each with so many pages converted and touched."""
    regime = Regime(kind, backend, memory=memory, installed=installed)
    count = 0
    try:
        while count < 100:
            regime.guest.launch()
            gfns = range(FIRST, FIRST + touched)
            regime.convert(gfns, private=True)
            regime.touch(gfns)
            count += 1
            regime.guest = regime.start()
    except KernelError:
        return count
    return count


def frames_of(regime: Regime, gfns: range) -> np.ndarray[Any, Any]:
    """The frames behind the user pages of a run of guest pages."""
    slot = regime.vm.slots.of(gfns.start)
    assert slot is not None
    return np.array(slot.shared_frames(regime.vm.process.space, gfns))
