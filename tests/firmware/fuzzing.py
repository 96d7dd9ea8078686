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
from snpbook.spec.dispatch import BUFFER_CLASSES, BUFFERS
from snpbook.spec.firmware_image import ImageType
from snpbook.spec.layout import Field
from snpbook.spec.msr import Msr
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.releases import release
from snpbook.spec.states import LegacyPlatformState
from snpbook.spec.status import Status
from snpbook.vendor.images import firmware_image
from snpbook.vendor.vlek import wrapped_vlek
from tests.firmware.leaks import Image, image, secrets, shown
from tests.firmware.legacy_board import NV, LegacyBoard
from tests.firmware.test_legacy_fuzz import NUMBERS
from tests.firmware.test_legacy_fuzz import boards as legacy_boards
from tests.firmware.test_requests import seal
from tests.firmware.typical import (
    AGENT,
    BLANK,
    COMMON,
    FREE_METADATA,
    IMAGE,
    INPUT,
    LARGE,
    LARGE_FIRMWARE,
    LIST,
    MESSAGE,
    METADATA,
    NORMAL,
    PRE_GUEST,
    PRE_SWAP,
    SEALED,
    SECRETS,
    TARGET,
    TMR,
    TYPICAL,
)
from tests.firmware.worlds import context_of
from tests.machines import BUFFER, GCTX, MIB, PAGE, SYSCFG_FOR_SNP, Board, counting_rng

PLACES = [
    0, BUFFER, GCTX, AGENT, TARGET, NORMAL, SECRETS, PRE_GUEST, PRE_SWAP, METADATA, METADATA + 64, FREE_METADATA,
    *BLANK, *INPUT, LARGE, LARGE + PAGE, LARGE_FIRMWARE, TMR, 47 * MIB, 60 * MIB, 64 * MIB - PAGE, 64 * MIB, 300 * MIB,
    0xA0000, 1 << 40, 1 << 46, 2**64 - 1,
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


def _uncovered(board: Board) -> Board:
    """A table that ends before memory does."""
    for core in board.machine.cores:
        core.wrmsr(Msr.RMP_BASE, 32 * MIB)
        core.wrmsr(Msr.RMP_END, 33 * MIB - 1)
    return board


def _powered(board: Board) -> Board:
    for core in board.machine.cores:
        core.wrmsr(Msr.SYSCFG, SYSCFG_FOR_SNP)
    return board


STAGES: dict[str, Callable[[], Board]] = {
    "UNINIT": lambda: _powered(Board()),
    "UNINIT, 1.58": lambda: _powered(Board("genoa", release="1.58")),
    "INIT": lambda: Board().initialise(),
    "LAUNCH": lambda: _launching(Board()),
    "RUNNING": lambda: _running(Board()),
    "RUNNING, DEBUG": lambda: _running(Board(), DEFAULT_POLICY | 3 << 18),
    "RUNNING, 1.58": lambda: _running(Board("genoa", release="1.58")),
    "RUNNING, small table": lambda: _running(_uncovered(Board(installed=512 * MIB))),
    "shut down": lambda: _left(Board()),
    "legacy INIT": lambda: LegacyBoard().start(),
    "legacy INIT, Naples": lambda: LegacyBoard("naples").start(),
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
    return random.choice([*NUMBERS, 0, 1, 2, 9, 98, 99, 110, 509, 1006, 2047]) & field.limit


def buffer(random: Random, command: int) -> bytes:
    """A command's buffer: typical but for a few fields, any in all of them, with some bits flipped, or noise."""
    layout = BUFFERS.get(Command(command)) if command in set(Command) else None
    if layout is None or random.random() < 0.05:
        return random.randbytes(0x40)
    choices = {**COMMON, "length": [layout.size], **TYPICAL.get(Command(command), {})}
    anyhow = random.choice((0.0, 0.1, 1.0))
    data = layout.pack(**{
        name: value(random, name, field, layout.size) if field.kind == "raw" or random.random() < anyhow
        else random.choice(choices.get(name, [0]))
        for name, field in layout.fields.items()
    })  # fmt: skip
    return mutated(random, data) if random.random() < 0.1 else data


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
    context, vmpck = context_of(board, gctx), random.randrange(4)
    kind = random.choice([*range(1, 18, 2)] * 3 + [0, 2, 6, 99])
    count = getattr(context, f"msg_count{vmpck}") + (random.random() < 0.95)
    sealed = seal(getattr(context, f"vmpck{vmpck}"), message_body(random, kind), seqno=count % 2**64, vmpck=vmpck,
                  kind=kind, version=random.choice((1, 1, 1, 2)))  # fmt: skip
    return mutated(random, sealed) if random.random() < 0.1 else sealed


def request(random: Random, board: Board) -> Step:
    """SNP_GUEST_REQUEST with a message of some guest and a page for the answer."""
    gctx, answer = random.choice((GCTX, AGENT, AGENT)), random.choice(BLANK)
    fields = struct.pack("<QQQ", gctx, MESSAGE, answer + random.choice((0, 0, 0, 3, 0xE00)))
    sealed = message(random, board, gctx)[:PAGE]
    return Step(Command.SNP_GUEST_REQUEST, BUFFER, fields, ((MESSAGE, sealed),), (answer, FIRMWARE))


def blob(random: Random, board: Board) -> tuple[int, bytes]:
    """Something that a command may find where an address of its buffer leads to, and where."""
    psp, product = board.psp, board.machine.product.name
    at = random.choice((IMAGE, SEALED, LIST, NV))
    if at == IMAGE:
        abi, build = random.choice(("1.51", "1.55", "1.58", "0.24")), random.randrange(256)
        svn, kind = min(psp.committed_tcb.snp + random.randrange(3), 255), random.choice([*ImageType, ImageType.SEV])
        return at, firmware_image(product, release(abi), build=build, svn=svn, kind=kind)
    if at == SEALED:
        return at, wrapped_vlek("a provider", psp.chip, psp.reported_tcb, random.randbytes(12))
    if at == NV:
        return at, random.choice((b"\xff" * 0x8000, random.randbytes(PAGE)))
    ids = struct.pack("<4I", *random.choices((0, 1, 2, 511, 2**32 - 1), k=4))
    ranges = struct.pack("<IIQII", random.randrange(3), 0, random.choice(PLACES), random.randrange(600), 0)
    return at, random.choice((ids, ranges, random.randbytes(PAGE)))


def cpuid_page(random: Random) -> bytes:
    """A table with one entry."""
    leaf, registers = random.choice((0, 1, 7, 0xD, 0xB, 0x8000001F, 0x80000021)), random.choices((0, 7, 2**32 - 1), k=4)
    return struct.pack("<I12xII16x4I8x", 1, leaf, random.randrange(3), *registers)


def _commands(random: Random, board: Board) -> list[Command]:
    """Mostly those of a platform that is in use."""
    alive = []
    if board.psp.legacy.state is not LegacyPlatformState.UNINIT:
        alive += [command for command in BUFFER_CLASSES if command < Command.SNP_INIT]
    if board.psp.initialised:
        alive += [command for command in BUFFER_CLASSES if command > Command.SNP_INIT]
    return alive if alive and random.random() < 0.8 else [*Command]


def step(random: Random, board: Board) -> Step:
    """The next thing that the host does."""
    if random.random() < 0.25 and board.psp.initialised and board.state(AGENT) == PageState.CONTEXT:
        return request(random, board)
    command = random.randrange(256) if random.random() < 0.03 else random.choice(_commands(random, board))
    address = BUFFER if random.random() < 0.95 else place(random)
    writes, update, pages = [], None, None
    if random.random() < 0.4:
        at, data = blob(random, board)
        writes.append((at, mutated(random, data) if random.random() < 0.3 else data))
    if command == Command.SNP_LAUNCH_UPDATE and random.random() < 0.5:
        writes.append((PRE_GUEST, cpuid_page(random)))
    if random.random() < 0.3 and board.psp.rmp_built:
        new = random.choice((FIRMWARE, FIRMWARE, HYPERVISOR, NewState(assigned=True, asid=1, immutable=True)))
        update = random.choice((BUFFER, *BLANK, PRE_GUEST, PRE_SWAP, FREE_METADATA)), new
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
        if status is Status.SUCCESS:
            self.known |= secrets(self.board)
        return status

    def assert_tight(self) -> None:
        found = shown(self.board, self.memory, self.known)
        assert not found, f"{self}\nshows {found[:4]}"

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"{step} -> {status!r}" for step, status in self.steps)])
