"""The secure processor: its state on the chip, and the dispatch of mailbox commands.

Guest state is in context pages in DRAM; only what is listed here is held on the chip. A command either
answers SUCCESS or refuses with the status of its first failing check. Source: SNP ABI; mailbox rules
of firmware 1.55.25.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.firmware.asids import Asids
from snpbook.firmware.keys import Chip, memory_key
from snpbook.firmware.pages import check_address, state_of, without_c_bit
from snpbook.hardware.machine import Machine
from snpbook.hardware.rmp import U64
from snpbook.spec.commands import Command
from snpbook.spec.context import FIRMWARE_KEY_ID, GUEST_CONTEXT
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Layout, Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.policy import Tcb
from snpbook.spec.states import GUEST_TRANSITIONS, GuestState, PlatformState
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.trace import FirmwareCommand

Rng = Callable[[int], bytes]
Handler = Callable[["SecureProcessor", Record], None]
RunHandler = Callable[["SecureProcessor", Record, range], tuple[int, FirmwareRefusal | None]]
Commands = Mapping[Command, tuple[Layout | None, Handler, RunHandler | None]]
"""For each command its buffer's layout, its function, and the function for a run of pages if it names a page."""


class SecureProcessor:
    """The AMD-SP of one socket, with its fused chip secret.

    `rng(n)` gives n random bytes: guest keys and report ids come from it.
    """

    def __init__(self, machine: Machine, chip: Chip, rng: Rng, commands: Commands) -> None:
        self.machine, self.chip, self.rng = machine, chip, rng
        self._commands = commands
        product = machine.product
        if product.firmware is None:
            raise ValueError(f"{product.title}: no SNP firmware of it is modelled")
        self.release, self.min_sev_asid = product.firmware, product.min_sev_asid
        self.state = PlatformState.UNINIT
        self.rmp_built = False
        self.current_tcb: Tcb = self.release.tcb
        self.committed_tcb: Tcb = self.release.tcb
        self.guest_count = 0
        self.asids = Asids(machine.cores, product.asid_limit, product.min_sev_asid)
        self._vcek: ec.EllipticCurvePrivateKey | None = None
        key = memory_key(rng(32), product.memory_key_size)
        machine.encryption.install(FIRMWARE_KEY_ID, key)
        machine.mailbox.connect(self)

    def __repr__(self) -> str:
        return f"SecureProcessor({self.release}, {self.state.name}, {self.guest_count} guests)"

    @property
    def initialised(self) -> bool:
        return self.state is PlatformState.INIT

    @property
    def reported_tcb(self) -> Tcb:
        """The TCB that reports name and whose VCEK signs: the committed one until SNP_CONFIG exists."""
        return self.committed_tcb

    @property
    def vcek(self) -> ec.EllipticCurvePrivateKey:
        """The versioned chip endorsement key at the reported TCB."""
        if self._vcek is None:
            self._vcek = self.chip.vcek(self.reported_tcb)
        return self._vcek

    def execute(self, command: int, address: int) -> int:
        """Run one mailbox command: the status code."""
        name = _name(command)
        try:
            layout, handler, _ = self._lookup(command)
            buffer = self._buffer(Command(command), layout, address)
            arguments: dict[str, Any] = dict(buffer) if buffer else {}
            handler(self, buffer)
        except FirmwareRefusal as refusal:
            self._emit(name, refusal.status, {}, str(refusal))
            return refusal.status
        self._emit(name, Status.SUCCESS, arguments, "")
        return Status.SUCCESS

    def execute_run(self, command: int, address: int, pages: range) -> tuple[int, int]:
        """Run one command for each page of a run: (pages done, status of the last command)."""
        if not pages:
            raise ValueError("pages: a run has at least one page")
        name = _name(command)
        try:
            layout, _, run_handler = self._lookup(command)
            require(run_handler is not None, Status.INVALID_COMMAND, f"{name} names one page", "a page command", name)
            assert run_handler is not None
            buffer = self._buffer(Command(command), layout, address)
            done, refusal = run_handler(self, buffer, pages)
        except FirmwareRefusal as early:
            done, refusal, buffer = 0, early, None
        if done:
            self._emit(name, Status.SUCCESS, dict(buffer) if buffer else {}, "", pages[:done])
        if refusal is not None:
            self._emit(name, refusal.status, {}, str(refusal), pages[done : done + 1])
        return done, Status.SUCCESS if refusal is None else refusal.status

    def _lookup(self, command: int) -> tuple[Layout | None, Handler, RunHandler | None]:
        known = command in self._commands
        require(
            known, Status.INVALID_COMMAND, "the command is one that this firmware has", "a known id", _name(command)
        )
        return self._commands[Command(command)]

    def _buffer(self, command: Command, layout: Layout | None, address: int) -> Record:
        """The command buffer; its reserved bits are checked first of all (INVALID_PARAM)."""
        if layout is None:
            return _EMPTY
        spa = check_address(self, address, layout.size, "command buffer", lookup=False)
        data = self.machine.memory.read(KeyId.UNENCRYPTED, spa, layout.size)
        stray = layout.reserved_set(data, self.release.abi.unknown_fields(command))
        require(not stray, Status.INVALID_PARAM, f"reserved bits of {layout.name} are zero", 0, stray)
        return layout.unpack(data)

    def _emit(self, name: str, status: int, arguments: dict[str, Any], reason: str, pages: range | None = None) -> None:
        if self.machine.trace:
            self.machine.trace.emit(
                FirmwareCommand(name=name, status=status, arguments=arguments, reason=reason, pages=pages)
            )

    # What commands share: the prefix [P S G] of SNP ABI command descriptions.

    def page_aligned(self, **addresses: int) -> None:
        """P: bits 11:0 of page addresses are zero."""
        for name, address in addresses.items():
            require(address % PAGE_SIZE == 0, Status.INVALID_PARAM, f"{name} is page-aligned", 0, address % PAGE_SIZE)

    def require_initialised(self) -> None:
        """S: SNP is initialised."""
        require(self.initialised, Status.INVALID_PLATFORM_STATE, "platform state", "INIT", self.state.name)

    def context(self, gctx: int) -> Record:
        """G: the page is a guest's context; its contents, decrypted."""
        spa = check_address(self, gctx, PAGE_SIZE, "gctx_paddr")
        found = state_of(self, spa)
        require(found is PageState.CONTEXT, Status.INVALID_GUEST, "state of gctx_paddr", "CONTEXT", found.name)
        page = np.array([spa >> PAGE_SHIFT], U64)
        return GUEST_CONTEXT.unpack(self.machine.memory.read_pages(FIRMWARE_KEY_ID, page).tobytes())

    def next_state(self, context: Record, command: Command) -> GuestState:
        """The state to which a command leads a guest; INVALID_GUEST_STATE where its state does not admit it."""
        after = GUEST_TRANSITIONS.get((context.state, command))
        if after is None:
            raise wrong_guest_state(context, command)
        return after

    def save_context(self, gctx: int, context: Record) -> None:
        page = np.array([without_c_bit(self, gctx) >> PAGE_SHIFT], U64)
        data = np.frombuffer(bytes(context), np.uint8).reshape(1, PAGE_SIZE)
        self.machine.memory.write_pages(FIRMWARE_KEY_ID, page, data)


_EMPTY = Layout("EmptyBuffer", 0, GUEST_CONTEXT.cite, []).record()


def wrong_guest_state(context: Record, command: Command) -> FirmwareRefusal:
    """The refusal of a command that a guest's state does not admit."""
    admitted = " or ".join(state.name for state, known in GUEST_TRANSITIONS if known is command)
    return FirmwareRefusal(Status.INVALID_GUEST_STATE, "guest state", admitted, context.state)


def _name(command: int) -> str:
    return Command(command).name if command in Command._value2member_map_ else f"{command:#04x}"
