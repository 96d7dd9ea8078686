"""A machine with its secure processor and no host software: somebody writes the mailbox by hand.

The bench only does what a host could do: RMPUPDATE, WBINVD, a buffer in memory, three registers. That it can look into
a guest's context is a teacher's privilege. Its addresses are choices (MODEL).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from snpbook.firmware.admission import Standing, obstacle
from snpbook.firmware.keys import Chip
from snpbook.firmware.processor import Rng
from snpbook.firmware.table import power_on
from snpbook.hardware.dram import whole
from snpbook.hardware.host_instructions import HYPERVISOR, NewState
from snpbook.hardware.machine import Machine
from snpbook.hardware.ports import HostCpu
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import COMMAND_SHIFT, STATUS_MASK, Command, MailboxRegister
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.dispatch import BUFFER_CLASSES, BUFFERS, BufferClass
from snpbook.spec.layout import Record
from snpbook.spec.msr import SYSCFG_MEM_ENCRYPT, SYSCFG_MFDM, SYSCFG_SNP_EN, SYSCFG_VMPL_EN, Msr
from snpbook.spec.pages import PAGE_SHIFT, PageState
from snpbook.spec.products import product as find_product
from snpbook.spec.refusal import Refusal
from snpbook.spec.rmp import RmpCode
from snpbook.spec.states import LegacyGuestState
from snpbook.spec.status import Status
from snpbook.trace import FirmwareCommand, Recorder, Trace

MIB = 1 << 20
INSTALLED = 64 * MIB
BUFFER, CONTEXT, SPARE = 16 * MIB, 17 * MIB, 18 * MIB
"""Where the bench puts command buffers, where a guest's context belongs, and the first of many free pages."""
HANDLE = 1
"""That of the first legacy guest."""
_SNP_ON = SYSCFG_MFDM | SYSCFG_MEM_ENCRYPT | SYSCFG_SNP_EN | SYSCFG_VMPL_EN
_HALF = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Change:
    """A page whose RMP entry a command has written, by its state before and after."""

    page: int
    before: PageState
    after: PageState


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """What one command did: its status, why it was refused if it was, and what came of it.

    `registers` are the three of the mailbox afterwards, `written` the buffer if the firmware wrote it back.
    """

    name: str
    arguments: Mapping[str, Any]
    status: Status
    refusal: Refusal | None
    changes: tuple[Change, ...]
    registers: Mapping[MailboxRegister, int]
    written: Record | None
    before: Standing
    after: Standing

    @property
    def ok(self) -> bool:
        return self.status is Status.SUCCESS

    def __repr__(self) -> str:
        return f"{self.name}: {self.refusal or self.status.name}"


class Bench:
    """A machine of a product, its chip made from `seed`; SNP is switched on in the cores and not yet initialised.

    `psp` is the secure processor, `host` the host's CPU, `made` all answers so far. `ValueError` for a product without
    SNP.
    """

    def __init__(self, product: str = "milan", seed: str = "bench", *, rng: Rng, cores: int = 2) -> None:
        self._log = Recorder()
        trace = Trace()
        trace.subscribe(self._log)
        part, entropy = find_product(product), rng(32)
        if SevCapability.SEV_SNP not in part.capabilities:
            raise ValueError(f"product = {product!r}: {part.title} has no SNP to be switched on")
        self.machine = Machine(part, INSTALLED, boot_entropy=entropy, trace=trace, cores=cores)
        self.psp = power_on(self.machine, Chip.from_seed(seed, product), rng)
        self.host = HostCpu(self.machine)
        self.made: list[Answer] = []
        for core in self.host.cores:
            self.host.wrmsr(Msr.SYSCFG, _SNP_ON, core)

    def __repr__(self) -> str:
        return f"Bench({self.machine.product.name}, {self.psp!r})"

    # The mailbox.

    def command(self, command: Command, **fields: Any) -> Answer:
        """Fill in a command's buffer and send it; fields that are not named are zero.

        `ValueError` for a value that does not fit.
        """
        layout = BUFFERS[command]
        return self.send(command, layout.pack(**fields) if layout else b"")

    def send(self, command: int, buffer: bytes, *, address: int = BUFFER) -> Answer:
        """Send any command number with any buffer, which goes to `address` first; without one the address is 0.

        A buffer that the firmware only writes is left as it is, and so is one that stands there already: a host that
        gives the page away for the answer writes the operands before. `HostPageFault` where the page is not its own.
        """
        known = Command(command) if whole("command", command) in list(Command) else None
        before = self.standing()
        output = known is not None and BUFFER_CLASSES.get(known) is BufferClass.OUT
        if not output and self.host.read(address, len(buffer)) != buffer:
            self.host.write(address, buffer)
        held = self.host.read(address, len(buffer))
        self._write(address if buffer else 0, command)
        event: FirmwareCommand = self._log.of(FirmwareCommand)[-1]
        status = Status(self.host.mailbox_read(MailboxRegister.COMMAND) & STATUS_MASK)
        registers = {register: self.host.mailbox_read(register) for register in MailboxRegister}
        layout, now = BUFFERS[known] if known else None, self.host.read(address, len(buffer))
        written = layout.unpack(now) if layout and now != held and len(now) >= layout.size else None
        answer = Answer(event.name, event.arguments, status, event.refusal, _changes(event), registers, written,
                        before, self.standing())  # fmt: skip
        self.made.append(answer)
        return answer

    def _write(self, address: int, command: int) -> None:
        """The three registers, in the order in which a driver writes them."""
        self.host.mailbox_write(MailboxRegister.ADDRESS_LOW, address & _HALF)
        self.host.mailbox_write(MailboxRegister.ADDRESS_HIGH, address >> 32)
        self.host.mailbox_write(MailboxRegister.COMMAND, command << COMMAND_SHIFT)

    # What a host does around it.

    def initialise(self) -> Bench:
        """SNP_INIT_EX with a new table, WBINVD, SNP_DF_FLUSH: what a kernel does before its first guest."""
        self.command(Command.SNP_INIT_EX, init_rmp=1)
        self.host.wbinvd()
        self.command(Command.SNP_DF_FLUSH)
        return self

    def assign(self, spa: int, new: NewState, gpa: int = 0) -> RmpCode:
        """RMPUPDATE of the page at `spa`: the return code."""
        page = _page(spa)
        code = self.host.rmpupdate(range(page, page + 1), np.array([gpa >> PAGE_SHIFT], np.uint64), new)
        return RmpCode(int(code[0]))

    def take_back(self, spa: int) -> RmpCode:
        """RMPUPDATE of the page at `spa` to the hypervisor's."""
        return self.assign(spa, HYPERVISOR)

    # What can be seen.

    def standing(self) -> Standing:
        """Where the platforms stand, the SNP guest whose context is at `CONTEXT`, and the first legacy guest."""
        context, legacy = self.context(), self.psp.legacy.guests.get(HANDLE)
        state = legacy.state if legacy else LegacyGuestState.UNINIT
        return Standing(self.psp.state, self.psp.legacy.state, context.state if context else None, state)

    def obstacle(self, command: Command) -> str:
        """What rules a command out whatever its operands are, in words; empty where it is admitted."""
        known = command in self.psp.release.abi.commands
        return obstacle(command, self.standing()) if known else f"firmware {self.psp.release} does not have it"

    def state(self, spa: int) -> PageState:
        """The state of the page at `spa`; without an RMP all pages are the hypervisor's."""
        return self.machine.rmp.state(_page(spa))

    def context(self) -> Record | None:
        """What stands in the guest's context at `CONTEXT`; None where that page is no context."""
        if not self.psp.initialised or self.state(CONTEXT) is not PageState.CONTEXT:
            return None
        return self.psp.context(CONTEXT)

    def asid(self, number: int) -> AsidState:
        """The state of an ASID on the first core complex. `ValueError` for a number that is no ASID."""
        if not 0 < whole("number", number) <= self.psp.asids.limit:
            raise ValueError(f"number = {number}: ASIDs are 1 to {self.psp.asids.limit}")
        return AsidState(int(self.psp.asids.states[0, number]))


def _page(spa: int) -> int:
    if whole("spa", spa) < 0:
        raise ValueError(f"spa = {spa}: no address")
    return spa >> PAGE_SHIFT


def _changes(event: FirmwareCommand) -> tuple[Change, ...]:
    if event.changed is None or event.before is None or event.after is None:
        return ()
    rows = zip(event.changed.tolist(), event.before.tolist(), event.after.tolist(), strict=True)
    return tuple(Change(page, PageState(before), PageState(after)) for page, before, after in rows)
