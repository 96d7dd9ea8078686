"""The secure processor: its state on the chip, and the dispatch of mailbox commands.

Guest state is in context pages in DRAM; only what is listed here is held on the chip. A command either
answers SUCCESS or refuses with the status of its first failing check. Source: SNP ABI; mailbox rules
of firmware 1.55.25 (`buffers` has those on command buffers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from snpbook.firmware.asids import Asids
from snpbook.firmware.buffers import CommandBuffer
from snpbook.firmware.keys import Chip, attestation_key, lower_stick, memory_key
from snpbook.firmware.legacy_buffers import ShortBuffer
from snpbook.firmware.legacy_state import LegacyPlatform
from snpbook.firmware.observation import Before
from snpbook.firmware.pages import check_address, state_of, without_c_bit
from snpbook.hardware.dram import Words
from snpbook.hardware.machine import Machine
from snpbook.hardware.rmp import U64, decode_states
from snpbook.spec.commands import DECODED_COMMAND_BITS, Command
from snpbook.spec.context import FIRMWARE_KEY_ID, GUEST_CONTEXT
from snpbook.spec.dispatch import NOT_MODELLED, RESERVED_FIRST
from snpbook.spec.key_derivation import VCEK_LABEL
from snpbook.spec.layout import Layout, Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.platform import Fault
from snpbook.spec.policy import PLATFORM_INFO, Tcb
from snpbook.spec.releases import Release
from snpbook.spec.states import GUEST_TRANSITIONS, GuestState, PlatformState
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.trace import FirmwareCommand

Rng = Callable[[int], bytes]
Handler = Callable[["SecureProcessor", Record], Record | None]
"""A command's function: given its buffer, it answers with the buffer to be written back, if it has one to write."""
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
            raise ValueError(f"{product.title}: no firmware of it is modelled")
        self.min_sev_asid = product.min_sev_asid
        self.release = self.committed = product.firmware
        """The running firmware, and the one below which no update may go."""
        self.current_tcb: Tcb = self.release.tcb
        self.committed_tcb: Tcb = self.release.tcb
        self.configured_tcb: Tcb | None = None
        """What SNP_CONFIG has asked reports to name."""
        self.state = PlatformState.UNINIT
        self.legacy = LegacyPlatform()
        self.rmp_tcb: Tcb | None = None
        """The current TCB when the RMP was built; None where it is none of ours."""
        self.faults: set[Fault] = set()
        """What is wrong with the part that no register shows: nothing, unless somebody tries out the answers."""
        self.rapl_disabled = False
        self.guest_count = 0
        self.mask_chip_id = self.mask_chip_key = False
        self.vlek: bytes | None = None
        """The hashstick of a provider's loaded key."""
        self.vcek_tcb: Tcb = self.release.tcb
        """The TCB of the hashstick in use; that of `vcek` and of derived guest keys."""
        self.mitigations = 0
        """CURRENT_MIT_VECTOR: what SNP_VERIFY_MITIGATION has found to be mitigated."""
        self.asids = Asids(machine, product.asid_limit, product.min_sev_asid)
        self._stray: list[int] = []
        self._changes: list[tuple[Words, Words, Words]] = []
        self._before: Before | None = None
        """The states that the running command has found, where somebody listens."""
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
        """The TCB that reports name: the one that SNP_CONFIG asked for, else the committed one."""
        return self.configured_tcb or self.committed_tcb

    @property
    def rmp_built(self) -> bool:
        """Whether the RMP is one that this firmware has built."""
        return self.rmp_tcb is not None

    @property
    def platform_info(self) -> int:
        """PLATFORM_INFO of reports, and what a guest policy is held against."""
        info = PLATFORM_INFO.unpack(self.release.platform_info.to_bytes(PLATFORM_INFO.size, "little"))
        hiding = self.machine.hidden_asids > 0
        now = info.replace(tsme_en=self.machine.tsme, rapl_dis=self.rapl_disabled, ciphertext_hiding_en=hiding)
        return int.from_bytes(bytes(now), "little")

    @property
    def vcek(self) -> ec.EllipticCurvePrivateKey:
        """The versioned chip endorsement key of the hashstick in use: `vcek_tcb` says of which TCB."""
        return attestation_key(self.hashstick(self.vcek_tcb), VCEK_LABEL)

    def hashstick(self, tcb: Tcb) -> bytes:
        """The chip's stick at a TCB not above the current one, from those that the boot loader gave for that."""
        return lower_stick(self.chip.hashsticks(self.current_tcb), self.current_tcb, tcb)

    def execute(self, command: int, address: int) -> int:
        """Run one mailbox command: the status code."""
        command &= _DECODED
        self._observe()
        buffer, refusal = None, None
        try:
            layout, handler, _ = self._lookup(command)
            buffer = self._read(Command(command), layout, address)
            if (answer := handler(self, buffer.record)) is not None:
                buffer.answer(self, answer)
        except FirmwareRefusal as refused:
            refusal = refused
            if buffer is not None and isinstance(refused, ShortBuffer):
                buffer.answer(self, refused.buffer)
        if buffer is not None:
            buffer.release(self)
        return self._finish(command, buffer, refusal)

    def execute_run(self, command: int, address: int, pages: range) -> tuple[int, int]:
        """Run one command for each page of a run: (pages done, status of the last command)."""
        command &= _DECODED
        self._observe()
        buffer, done, refusal = None, 0, None
        try:
            layout, _, run_handler = self._lookup(command)
            name = _name(command)
            require(run_handler is not None, Status.INVALID_COMMAND, f"{name} names one page", "a page command", name)
            assert run_handler is not None
            buffer = self._read(Command(command), layout, address)
            done, refusal = run_handler(self, buffer.record, pages)
        except FirmwareRefusal as early:
            refusal = early
        if done:
            self._finish(command, buffer, None, pages[:done])
        if refusal is None:
            return done, Status.SUCCESS
        self._observe()
        return done, self._finish(command, buffer, refusal, pages[done : done + 1])

    def _observe(self) -> None:
        self._before = Before.of(self) if self.machine.trace else None

    def _lookup(self, command: int) -> tuple[Layout | None, Handler, RunHandler | None]:
        name = _name(command)
        missing = NOT_MODELLED.get(Command(command)) if command in _NAMED else None
        require(missing is None, Status.INVALID_COMMAND, f"{missing} is not modelled", "the mailbox", name, "MODEL")
        known = command in self._commands and command in _commands_of(self.release.abi)
        require(known, Status.INVALID_COMMAND, "the command is one that this firmware has", "a known id", name)
        return self._commands[Command(command)]

    def _read(self, command: Command, layout: Layout | None, address: int) -> CommandBuffer:
        """The command buffer; most SNP commands want its reserved bits 0 before anything else."""
        if layout is None:
            return CommandBuffer(command, 0, _EMPTY)
        buffer = CommandBuffer.read(self, command, layout, address)
        self._stray = buffer.stray
        if command in RESERVED_FIRST:
            self.require_reserved_zero()
        return buffer

    def _finish(
        self, command: int, buffer: CommandBuffer | None, refusal: FirmwareRefusal | None, pages: range | None = None
    ) -> int:
        """Leave error information and one event behind: the status."""
        status = Status.SUCCESS if refusal is None else refusal.status
        if refusal is not None:
            self.machine.mailbox.push(status)
        changes, self._changes, self._stray = self._changes, [], []
        found, self._before = self._before, None
        if found is not None:
            parts = zip(*changes, strict=True) if changes else ()
            changed, before, after = map(np.concatenate, parts) if changes else _NONE
            event = FirmwareCommand(
                name=_name(command),
                status=status,
                arguments={} if buffer is None else dict(buffer.record),
                refusal=refusal and refusal.with_traceback(None),
                pages=pages,
                changed=changed,
                before=None if before is None else decode_states(before),
                after=None if after is None else decode_states(after),
                states=found.changes(self),
            )
            self.machine.trace.emit(event)
        return status

    def note_entries(self, pages: Words, before: Words, after: Words) -> None:
        """Tell the command's event that RMP entries (n, 2) of pages (n,) have changed."""
        self._changes.append((pages, before, after))

    def note_guest(self, spa: int, state: GuestState | None) -> None:
        """Tell the command's event the state in which it leaves a guest; None: there is no guest any more."""
        if self._before is not None:
            self._before.left(spa, state)

    # What commands share: the prefix [P S G] of SNP ABI command descriptions.

    def require_reserved_zero(self) -> None:
        """P: the reserved bits of the command's buffer are zero."""
        require(not self._stray, Status.INVALID_PARAM, "reserved bits of the buffer are zero", 0, self._stray)

    def page_aligned(self, **addresses: int) -> None:
        """P: bits 11:0 of page addresses are zero."""
        for name, address in addresses.items():
            require(address % PAGE_SIZE == 0, Status.INVALID_PARAM, f"{name} is page-aligned", 0, address % PAGE_SIZE)

    def require_initialised(self) -> None:
        """S: SNP is initialised."""
        require(self.initialised, Status.INVALID_PLATFORM_STATE, "platform state", "INIT", self.state.name)

    def require_safe(self) -> None:
        """The hardware has done what the firmware told it."""
        safe = Fault.UNSAFE_HARDWARE not in self.faults
        require(safe, Status.HWERROR_UNSAFE, "the hardware reaches a safe state", cite="SEV")

    def context(self, gctx: int) -> Record:
        """G: the page is a guest's context; its contents, decrypted.

        What a command wrote over it while SNP was off, and page states were not tested, is none any more (MODEL).
        """
        spa = check_address(self, gctx, PAGE_SIZE, "gctx_paddr")
        found = state_of(self, spa)
        require(found is PageState.CONTEXT, Status.INVALID_GUEST, "state of gctx_paddr", "CONTEXT", found.name)
        page = np.array([spa >> PAGE_SHIFT], U64)
        context = GUEST_CONTEXT.unpack(self.machine.memory.read_pages(FIRMWARE_KEY_ID, page).tobytes())
        whole = isinstance(context.state, GuestState) and context.asid <= self.asids.limit
        require(whole, Status.INVALID_GUEST, "it still holds a context", "a guest's state", context.state, "MODEL")
        if self._before is not None:
            self._before.found(spa, context.state)
        return context

    def next_state(self, context: Record, command: Command) -> GuestState:
        """The state to which a command leads a guest; INVALID_GUEST_STATE where its state does not admit it."""
        after = GUEST_TRANSITIONS.get((context.state, command))
        if after is None:
            raise wrong_guest_state(context, command)
        return after

    def save_context(self, gctx: int, context: Record) -> None:
        spa = without_c_bit(self, gctx)
        self.note_guest(spa, context.state)
        page = np.array([spa >> PAGE_SHIFT], U64)
        data = np.frombuffer(bytes(context), np.uint8).reshape(1, PAGE_SIZE)
        self.machine.memory.write_pages(FIRMWARE_KEY_ID, page, data)


_EMPTY = Layout("EmptyBuffer", 0, GUEST_CONTEXT.cite, []).record()
_NONE = (None, None, None)
_DECODED = (1 << DECODED_COMMAND_BITS) - 1
_NAMED = frozenset(map(int, Command))


@cache
def _commands_of(release: Release) -> frozenset[Command]:
    return release.commands


def wrong_guest_state(context: Record, command: Command) -> FirmwareRefusal:
    """The refusal of a command that a guest's state does not admit."""
    admitted = " or ".join(state.name for state, known in GUEST_TRANSITIONS if known is command)
    return FirmwareRefusal(Status.INVALID_GUEST_STATE, "guest state", admitted, context.state)


def _name(command: int) -> str:
    return Command(command).name if command in _NAMED else f"{command:#04x}"
