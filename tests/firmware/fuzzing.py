"""Boards in several states, and what a host that knows the interface but not its rules might send to them.

Everything comes from a `random.Random`, so that a seed and the name of a stage are a whole reproduction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.hardware.snapshot import Snapshot
from snpbook.spec.commands import Command, MailboxRegister
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.firmware_image import ImageType
from snpbook.spec.layout import Field
from snpbook.spec.msr import Msr
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.releases import release
from snpbook.spec.status import Status
from snpbook.vendor.images import firmware_image
from snpbook.vendor.vlek import wrapped_vlek
from tests.firmware.leaks import Image, image, secrets, shown
from tests.firmware.legacy_board import LegacyBoard
from tests.firmware.test_legacy_fuzz import NUMBERS
from tests.firmware.test_legacy_fuzz import boards as legacy_boards
from tests.firmware.test_requests import seal
from tests.firmware.worlds import context_of
from tests.machines import BUFFER, FREE, GCTX, MIB, PAGE, SYSCFG_FOR_SNP, Board, counting_rng

AGENT, TARGET = GCTX + PAGE, GCTX + 2 * PAGE
NORMAL, SECRETS, PRE_GUEST, PRE_SWAP, METADATA, FREE_METADATA = (FREE + number * PAGE for number in range(6))
BLANK = [FREE + number * PAGE for number in range(8, 14)]
"""Firmware pages."""
INPUT = [20 * MIB + number * PAGE for number in range(4)]
"""Pages of the hypervisor, with something in them."""
LARGE, LARGE_FIRMWARE, TMR = 22 * MIB, 24 * MIB, 40 * MIB
PLACES = [
    0, BUFFER, GCTX, AGENT, TARGET, NORMAL, SECRETS, PRE_GUEST, PRE_SWAP, METADATA, METADATA + 64, FREE_METADATA,
    *BLANK, *INPUT, LARGE, LARGE + PAGE, LARGE_FIRMWARE, TMR, 47 * MIB, 60 * MIB, 64 * MIB - PAGE, 64 * MIB, 0xA0000,
    1 << 40, 1 << 46, 2**64 - 1,
]  # fmt: skip
POLICIES = [DEFAULT_POLICY, DEFAULT_POLICY | 1 << 18, DEFAULT_POLICY | 1 << 19, DEFAULT_POLICY | 1 << 20, 0, 4, 5]
C_BIT = 1 << 51


@dataclass(frozen=True)
class Step:
    """Memory written by the host, an RMPUPDATE or WBINVD, then a command; `pages` is for a run of them."""

    command: int
    address: int
    buffer: bytes
    writes: tuple[tuple[int, bytes], ...] = ()
    update: tuple[int, NewState] | None = None
    wbinvd: bool = False
    pages: range | None = None

    def play(self, board: Board) -> Status:
        """What the firmware answers; an exception is what must not be."""
        for address, data in self.writes:
            board.machine.dram.write(address, data)
        if self.update is not None:
            board.cpu.rmpupdate(range(self.update[0] >> 12, (self.update[0] >> 12) + 1), np.zeros(1, np.uint64),
                                self.update[1])  # fmt: skip
        if self.wbinvd:
            board.cpu.wbinvd()
        if self.buffer:
            board.machine.dram.write(BUFFER, self.buffer)
        if self.pages is None:
            return board.send(self.command, self.address)
        board.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, self.address & 0xFFFFFFFF)
        board.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, self.address >> 32)
        board.cpu.mailbox_repeat(self.command, self.pages)
        return Status(board.cpu.mailbox_read(MailboxRegister.COMMAND) & 0xFFFF)


# Stages.


def _launching(board: Board, policy: int = DEFAULT_POLICY | 1 << 18) -> Board:
    """An agent, a guest in launch with it, and pages in most states."""
    board.initialise()
    board.start(AGENT, 9)
    board.finish(AGENT)
    board.create(TARGET)
    board.create(GCTX)
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=policy, ma_en=1, ma_gctx_paddr=AGENT)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1)
    board.add(NORMAL, 0x1000)
    board.add(PRE_SWAP, 0x4000)
    board.add(SECRETS, 0x2000, LaunchPage.SECRETS)
    held = NewState(assigned=True, asid=1, immutable=True)
    board.assign(PRE_GUEST, held, 0x3000)
    board.assign(PRE_SWAP, held, 0x4000)
    board.assign(LARGE, NewState(assigned=True, asid=1, immutable=True, large=True), LARGE)
    board.assign(LARGE_FIRMWARE, NewState(assigned=True, immutable=True, large=True))
    for page in (*BLANK, METADATA, FREE_METADATA):
        board.assign(page, FIRMWARE)
    board.ok(Command.SNP_PAGE_MD_INIT, gctx_paddr=GCTX, page_paddr=METADATA)
    assert board.state(PRE_SWAP) == PageState.PRE_SWAP
    return board


def _running(board: Board, policy: int = DEFAULT_POLICY | 1 << 18) -> Board:
    _launching(board, policy).finish()
    return board


def _both(board: Board) -> Board:
    """Legacy guests beside SNP ones."""
    _running(board)
    board.assign(TMR, FIRMWARE, count=512)
    board.ok(Command.INIT, es=1, tmr_paddr=TMR, tmr_len=2 * MIB)
    board.assign(BUFFER, FIRMWARE)
    board.ok(Command.LAUNCH_START, policy=4)
    return board


def _left(board: Board) -> Board:
    """SNP shut down; the table, with a context and firmware pages in it, is still there."""
    board.initialise()
    for page in BLANK:
        board.assign(page, FIRMWARE)
    board.create()
    board.ok(Command.SNP_SHUTDOWN)
    return board


def _powered(board: Board) -> Board:
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    return board


STAGES: dict[str, Callable[[], Board]] = {
    "UNINIT": lambda: _powered(Board()),
    "INIT": lambda: Board().initialise(),
    "LAUNCH": lambda: _launching(Board()),
    "RUNNING": lambda: _running(Board()),
    "RUNNING, DEBUG": lambda: _running(Board(), DEFAULT_POLICY | 3 << 18),
    "RUNNING, 1.58": lambda: _running(Board("genoa", release="1.58")),
    "shut down": lambda: _left(Board()),
    "legacy INIT": lambda: LegacyBoard().start(),
    **{f"legacy {stage}": lambda number=number: legacy_boards()[number][0]
       for number, stage in enumerate(("LUPDATE", "RUNNING", "SUPDATE", "RUPDATE"))},
    "both": lambda: _both(Board()),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    board: Board
    start: Snapshot
    memory: Image

    def restore(self) -> Board:
        self.start.restore()
        self.board.psp.rng = counting_rng(b"fuzz")
        return self.board


@cache
def stage(name: str) -> Stage:
    """A board in that state, to be restored before each use."""
    board = STAGES[name]()
    for page in INPUT:
        board.machine.dram.write(page, Random(page).randbytes(PAGE))
    return Stage(board, Snapshot(machine=board.machine, processor=board.psp), image(board))


# What is sent.


def place(random: Random) -> int:
    """An address: a likely one, near to it, with the C-bit, or any."""
    at = random.choice(PLACES)
    if random.random() < 0.15:
        at += random.choice((-64, -16, -1, 1, 4, 16, 64, 0x800, 0xFF0))
    if random.random() < 0.05:
        at = random.getrandbits(64)
    return (at | C_BIT * (random.random() < 0.05)) & 2**64 - 1


def value(random: Random, name: str, field: Field, size: int) -> int | bytes:
    """A value for a field of a buffer of `size` bytes."""
    if field.kind == "raw":
        return random.randbytes(field.size)
    if field.kind == "sub":
        raise ValueError(f"{name}: buffers have no records in them")
    if random.random() < 0.05:
        return random.getrandbits(field.width)
    if name == "length":
        return size
    if name == "page":
        return place(random) >> 12 & field.limit
    if "gctx" in name:
        return random.choice((GCTX, GCTX, AGENT, TARGET, random.choice(BLANK)))
    if name.endswith("paddr"):
        return place(random) & field.limit
    if name == "policy":
        return random.choice(POLICIES) & field.limit
    if field.width <= 8:
        return random.randrange(min(field.limit, 7) + 1)
    return random.choice(NUMBERS + [0, 1, 2, 9, 98, 99, 110, 509, 1006, 2047]) & field.limit


def buffer(random: Random, command: int) -> bytes:
    """A command's buffer: sensible, with some bits flipped, or noise."""
    layout = BUFFERS.get(Command(command)) if command in set(Command) else None
    if layout is None or random.random() < 0.05:
        return random.randbytes(0x40)
    data = bytearray(layout.pack(**{
        name: value(random, name, field, layout.size) for name, field in layout.fields.items()
    }))  # fmt: skip
    return mutated(random, bytes(data)) if random.random() < 0.1 else bytes(data)


def mutated(random: Random, data: bytes) -> bytes:
    """A few bits flipped, or a run of bytes replaced."""
    changed = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(changed))
        if random.random() < 0.5:
            changed[at] ^= 1 << random.randrange(8)
        else:
            changed[at : at + 16] = random.randbytes(16)[: len(changed) - at]
    return bytes(changed)


def message_body(random: Random, kind: int) -> bytes:
    """The payload of a guest message, right, nearly right, or noise of any size.

    An image that comes in has the digest of a guest without pages, and keys that nobody could guess.
    """
    small, target = random.randrange(4), random.choice((GCTX, AGENT, TARGET, random.choice(PLACES)))
    root = bytes(0x20) + struct.pack("<Q", random.getrandbits(1)) + bytes(0x18)
    exported = random.randbytes(0x190) + bytes(0x50) + root + random.randbytes(0xE0)
    incoming = struct.pack("<QII16x", target, 0x300, 3) + exported
    bodies = {
        1: struct.pack("<I12x", random.choice((0, 1, 3, 64, 65))) + random.randbytes(48 * random.randrange(4)),
        3: struct.pack("<IIQIIQ", random.randrange(8), 0, random.getrandbits(7), small, small, random.choice((0, 1))),
        5: random.randbytes(64) + struct.pack("<II24x", small, small),
        7: struct.pack("<QII", target, random.getrandbits(1), 0),
        9: incoming, 11: incoming, 15: bytes(8) + incoming[8:],
        13: struct.pack("<Q24x", target) + random.randbytes(32),
        17: bytes(0x80),
    }  # fmt: skip
    body = bodies.get(kind, b"") or random.randbytes(16 * random.randrange(1, 60))
    return mutated(random, body) if random.random() < 0.2 else body


def message(random: Random, board: Board, gctx: int) -> bytes:
    """A message of a guest, sealed with one of its keys and mostly the right number, or spoilt."""
    context, vmpck, kind = context_of(board, gctx), random.randrange(4), random.choice([*range(1, 18, 2)] * 3 + [0, 2, 6, 99])
    count = getattr(context, f"msg_count{vmpck}") + (random.random() < 0.95)
    sealed = seal(getattr(context, f"vmpck{vmpck}"), message_body(random, kind), seqno=count % 2**64, vmpck=vmpck,
                  kind=kind, version=random.choice((1, 1, 1, 2)))  # fmt: skip
    return mutated(random, sealed) if random.random() < 0.1 else sealed


def request(random: Random, board: Board) -> Step:
    """SNP_GUEST_REQUEST with a message of some guest and a page for the answer."""
    gctx, answer = random.choice((GCTX, AGENT, AGENT)), random.choice(BLANK)
    fields = struct.pack("<QQQ", gctx, INPUT[0], answer + random.choice((0, 0, 0, 3, 0xE00)))
    sealed = message(random, board, gctx)[:PAGE]
    return Step(Command.SNP_GUEST_REQUEST, BUFFER, fields, ((INPUT[0], sealed),), (answer, FIRMWARE))


def blob(random: Random, board: Board) -> bytes:
    """Something that a command may find where an address of its buffer leads to."""
    psp, product = board.psp, board.machine.product.name
    tcb = psp.committed_tcb
    return random.choice((
        lambda: random.randbytes(PAGE),
        lambda: struct.pack("<IIQII", random.randrange(3), 0, random.choice(PLACES), random.randrange(600), 0),
        lambda: struct.pack("<4I", *random.choices((0, 1, 2, 511, 2**32 - 1), k=4)),
        lambda: struct.pack("<I12xII16xIIII8x", 1, random.choice((0, 1, 7, 0xD, 0x8000001F)), 0, *random.choices((0, 7), k=4)),
        lambda: wrapped_vlek("a provider", psp.chip, psp.reported_tcb, random.randbytes(12)),
        lambda: firmware_image(
            product, release(random.choice(("1.51", "1.55", "1.58", "0.24"))), build=random.randrange(256),
            svn=min(tcb.snp + random.randrange(3), 255), size=random.choice((0x400, PAGE)),
            kind=random.choice((ImageType.SEV, ImageType.SEV, ImageType.BOOT_LOADER)),
        ),
        lambda: b"\xff" * 0x8000,
    ))()  # fmt: skip


def step(random: Random, board: Board) -> Step:
    """The next thing that the host does."""
    if random.random() < 0.25 and board.psp.initialised and board.state(AGENT) == PageState.CONTEXT:
        return request(random, board)
    command = random.choice([*Command]) if random.random() < 0.97 else random.randrange(256)
    address = BUFFER if random.random() < 0.95 else place(random)
    writes, update, pages = [], None, None
    if random.random() < 0.4:
        data = blob(random, board)
        writes.append((random.choice(INPUT), mutated(random, data) if random.random() < 0.3 else data))
    if random.random() < 0.3 and board.psp.rmp_built:
        new = random.choice((FIRMWARE, FIRMWARE, HYPERVISOR, NewState(assigned=True, asid=1, immutable=True)))
        update = random.choice((BUFFER, *BLANK, PRE_GUEST, FREE_METADATA)), new
    if command in (Command.SNP_PAGE_RECLAIM, Command.SNP_LAUNCH_UPDATE) and random.random() < 0.3:
        first = place(random) >> 12
        pages = range(first, first + random.randrange(1, 5) * 512, random.choice((1, 512)))
    return Step(command, address, buffer(random, command), tuple(writes), update, random.random() < 0.2, pages)


@dataclass
class Run:
    """What was done to a board of a stage, and the secrets that there were meanwhile."""

    name: str
    board: Board
    memory: Image
    steps: list[tuple[Step, Status | None]]
    known: set[bytes]

    @classmethod
    def of(cls, name: str) -> Run:
        prepared = stage(name)
        board = prepared.restore()
        return cls(name, board, prepared.memory, [], secrets(board))

    def play(self, step: Step) -> Status:
        self.steps.append((step, None))
        try:
            status = step.play(self.board)
        except Exception as error:
            raise AssertionError(f"{self}\n{type(error).__name__} got out: {error}") from error
        self.steps[-1] = step, status
        self.known |= secrets(self.board)
        return status

    def assert_tight(self) -> None:
        found = shown(self.board, self.memory, self.known)
        assert not found, f"{self}\nshows {found[:4]}"

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"{step} -> {status!r}" for step, status in self.steps)])
