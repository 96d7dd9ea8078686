"""Machines for tests: a board with its secure processor and no host software, and the whole of what it remembers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snpbook.firmware.keys import Chip
from snpbook.firmware.table import power_on
from snpbook.hardware.bios import SNP_READY, BiosSetup
from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.host.kvm.vm import Vm
from snpbook.spec.commands import Command, MailboxRegister
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.layout import Layout
from snpbook.spec.msr import Msr
from snpbook.spec.pages import LaunchPage
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.products import product
from snpbook.spec.status import Status
from snpbook.system import Guest, System
from snpbook.trace import Recorder, Trace
from tests.observers.page_moves import check_page_moves

MIB = 1 << 20
PAGE = 4096
SYSCFG_FOR_SNP = 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25
"""MFDM, memory encryption, SNP, VMPL."""
BUFFER = 16 * MIB
"""Where tests put command buffers."""
GCTX, FREE = 17 * MIB, 18 * MIB
"""Where tests put the context page, and pages for everything else. Multiples of 2 MB suit large pages."""


def counting_rng(seed: bytes = b"") -> Callable[[int], bytes]:
    """Random bytes that are none: SHA-256 of a counter, as many as asked for."""
    count = 0

    def rng(size: int) -> bytes:
        nonlocal count
        count += 1
        return (sha256(seed + count.to_bytes(4, "little")).digest() * (size // 32 + 1))[:size]

    return rng


class Board:
    """A machine of 64 MiB as the BIOS leaves it, its secure processor powered on, and a host CPU to poke at both.

    Its memory is the dictionary, of which only what was touched need be compared.
    """

    def __init__(
        self,
        name: str = "milan",
        *,
        cores: int = 2,
        sockets: int = 1,
        installed: int = 64 * MIB,
        mapping: bool = False,
        release: str | None = None,
        bios: BiosSetup = SNP_READY,
    ) -> None:
        self.log = Recorder()
        trace = Trace()
        trace.subscribe(self.log)
        trace.subscribe(check_page_moves)
        self.machine = Machine(
            product(name).running(release) if release else product(name),
            installed,
            boot_entropy=bytes(32),
            trace=trace,
            cores=cores,
            sockets=sockets,
            mapping=mapping,
            bios=bios,
        )
        self.psp = power_on(self.machine, Chip.from_seed("tests", name), counting_rng())
        self.cpu = HostCpu(self.machine)

    # Mailbox.

    def put(self, layout: Layout | None, stray: tuple[int, ...] = (), **fields: Any) -> int:
        """Write a command buffer, with the reserved bits `stray` set: its address."""
        if layout is None:
            return 0
        number = int.from_bytes(layout.pack(**fields), "little")
        for bit in stray:
            number |= 1 << bit
        self.machine.dram.write(BUFFER, number.to_bytes(layout.size, "little"))
        return BUFFER

    def send(self, command: int, address: int) -> Status:
        """Drive the three registers as a driver does."""
        self.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, address & 0xFFFFFFFF)
        self.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, address >> 32)
        self.cpu.mailbox_write(MailboxRegister.COMMAND, command << 16)
        answer = self.cpu.mailbox_read(MailboxRegister.COMMAND)
        assert answer >> 31, "no response"
        return Status(answer & 0xFFFF)

    def command(self, command: Command, stray: tuple[int, ...] = (), **fields: Any) -> Status:
        """Issue a command."""
        return self.send(command, self.put(BUFFERS[command], stray, **fields))

    def run(self, command: Command, pages: range, **fields: Any) -> tuple[int, Status]:
        """Issue a command for each page of a run: how many succeeded, and the status of the last."""
        address = self.put(BUFFERS[command], **fields)
        self.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, address)
        self.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, 0)
        done = self.cpu.mailbox_repeat(command, pages)
        return done, Status(self.cpu.mailbox_read(MailboxRegister.COMMAND) & 0xFFFF)

    def ok(self, command: Command, **fields: Any) -> None:
        """Issue a command that must succeed."""
        assert self.command(command, **fields) is Status.SUCCESS, self.log.events[-1]

    # The way to a guest.

    def initialise(self) -> Board:
        """What the kernel does before it uses SNP."""
        for core in self.machine.cores:
            core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
        self.ok(Command.SNP_INIT_EX, init_rmp=1)
        self.cpu.wbinvd()
        self.ok(Command.SNP_DF_FLUSH)
        return self

    def assign(self, spa: int, new: NewState, gpa: int = 0, count: int = 1) -> None:
        """RMPUPDATE pages from `spa` on, which must succeed; pages of no guest have no guest address."""
        step = 512 if new.large else 1
        pages = range(spa >> 12, (spa >> 12) + count * step, step)
        gfns = np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(gpa >> 12)
        codes = self.cpu.rmpupdate(pages, gfns if new.asid else np.zeros(count, np.uint64), new)
        assert not codes.any(), codes

    def create(self, gctx: int = GCTX) -> None:
        """A context in INIT."""
        self.assign(gctx, FIRMWARE)
        self.ok(Command.SNP_GCTX_CREATE, gctx_paddr=gctx)

    def start(self, gctx: int = GCTX, asid: int = 1, policy: int = DEFAULT_POLICY) -> None:
        """A context in LAUNCH with an ASID (0: none)."""
        self.create(gctx)
        self.ok(Command.SNP_LAUNCH_START, gctx_paddr=gctx, policy=policy)
        if asid:
            self.ok(Command.SNP_ACTIVATE, gctx_paddr=gctx, asid=asid)

    def add(self, spa: int, gpa: int, kind: LaunchPage = LaunchPage.NORMAL, asid: int = 1, **fields: Any) -> None:
        """Assign a page and add it to the launch."""
        large = bool(fields.get("page_size"))
        self.assign(spa, NewState(assigned=True, asid=asid, immutable=True, large=large), gpa)
        self.ok(Command.SNP_LAUNCH_UPDATE, **{"gctx_paddr": GCTX, "page_paddr": spa, "page_type": kind, **fields})

    def finish(self, gctx: int = GCTX, **fields: Any) -> None:
        self.ok(Command.SNP_LAUNCH_FINISH, gctx_paddr=gctx, **fields)

    def state(self, spa: int) -> int:
        """The page state by the RMP."""
        return int(self.machine.rmp.states(range(spa >> 12, (spa >> 12) + 1))[0])


@dataclass(eq=False)
class World:
    """Everything that a machine and its secure processor remember; `==` compares every byte."""

    memory: dict[int, NDArray[np.uint8]]
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, board: Board) -> World:
        machine, psp = board.machine, board.psp
        regions = machine.dram._regions  # asking for them would make the missing ones
        memory = {number: region.copy() for number, region in regions.items() if region.any()}
        cores = [(core.wbinvd_done, {msr: core.rdmsr(msr) for msr in (Msr.SYSCFG, Msr.HWCR)}) for core in machine.cores]
        keys = [asid for asid in range(1024) if machine.encryption.has_key(asid)]
        rest = (
            psp.state, psp.rmp_built, psp.guest_count, psp.current_tcb, psp.committed_tcb, psp.asids.states.tobytes(),
            sorted(machine.runnable.items()), cores, keys,
            psp.rmp_tcb, psp.configured_tcb, psp.vcek_tcb, str(psp.release),
            str(psp.committed), psp.mask_chip_id, psp.mask_chip_key, psp.vlek, psp.mitigations, psp.rapl_disabled,
            machine.hidden_asids, machine.iommu.snp_enabled, psp.legacy.state, psp.legacy.tmr,
        )  # fmt: skip
        return cls(memory, rest)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, World) or self.rest != other.rest or self.memory.keys() != other.memory.keys():
            return False
        return all(np.array_equal(region, other.memory[number]) for number, region in self.memory.items())

    __hash__ = None  # type: ignore[assignment]


# Hosts and guests.


def booted(name: str = "milan", seed: str = "tests", *, installed: int = 1 << 30, era: str = "rfc-v7") -> System:
    """A system whose host has booted."""
    system = System(name, seed, installed=installed)
    system.host.boot(era)
    return system


def launched(system: System | None = None, **options: Any) -> Guest:
    """A guest of the sample image, launched and not booted."""
    guest = (system or booted()).create_vm(**options)
    guest.launch()
    return guest


def frame_of(vm: Vm, gpa: int) -> int:
    """The system address that backs a private guest page."""
    slot = vm.slots.of(gpa >> 12)
    assert slot is not None
    assert slot.private is not None
    return int(slot.private.frames(slot, range(gpa >> 12, (gpa >> 12) + 1))[0]) << 12


def private_bytes(guest: Guest, gpa: int, size: int) -> bytes:
    """What the guest has in its private memory, read with its key behind everybody's back."""
    return guest.system.machine.encryption.read(guest.vmm.vm.asid, frame_of(guest.vmm.vm, gpa) + gpa % PAGE, size)


def poke_private(guest: Guest, gpa: int, data: bytes) -> None:
    """Write the guest's private memory with its key."""
    guest.system.machine.encryption.write(guest.vmm.vm.asid, frame_of(guest.vmm.vm, gpa) + gpa % PAGE, data)
