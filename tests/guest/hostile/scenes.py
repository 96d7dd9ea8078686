"""What a guest does while its host is hostile: short programs that note each value that only they should decide.

`seen` are the values that must be those of a run with an honest host; `told` is what the host may decide, and what is
noted of it is whether it can be at all. Numbers are typed again from the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from snpbook.guest import processors
from snpbook.guest.acceptance import accept
from snpbook.guest.attestation import derive_key
from snpbook.guest.boot import Kernel, start
from snpbook.guest.conversions import BounceBuffers, make_private, make_shared
from snpbook.guest.direct_boot import BootRefused, take
from snpbook.guest.layout import Layout
from snpbook.guest.memory_map import memory_ranges
from snpbook.guest.messages import RequestFailed
from snpbook.guest.page_tables import mark, use
from snpbook.guest.process import Process
from snpbook.guest.sev_guest import SevGuest
from snpbook.guest.tsm import ReportEntry
from snpbook.guest.vc import VcHandler
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu

PAGE = 4096
C_BIT = 51
PRIVATE = (0x300000, 0x301000, 0x302000, 0x303000)
"""Pages with a pattern; the last one changes sides."""
CONVERTED = PRIVATE[-1] // PAGE
POOL = range(0x310, 0x314)
SAVE_AREA = 0x304000
LEFT = 0x305000
"""Where another processor has its registers, and where it leaves a word."""
USER = range(0x320000, 0x330000)
DEVICE = 0x40000
"""A page beyond all memory: a device's."""
SECRET = 0x5EC2E75EC2E75EC2
LEAVES = [(1, 0), (7, 0), (0xB, 0), (0xD, 1), (0x8000001E, 0)]
HOSTS_BITS = {1: (0, 0xFF000000, 0, 1 << 9), 0xB: (0, 0, 0, 0xFFFFFFFF), 0x8000001E: (0xFFFFFFFF, 0xFF, 0xFF, 0)}
"""The bits of EAX to EDX that are the host's to say."""
BLOB = bytes(range(256)) * 8


@dataclass
class Notes:
    """What a program has noted, in its order."""

    place: Layout
    values: list[tuple[str, Any]] = field(default_factory=list)
    ended: bool = False
    """Whether the other processor has been ended: what it notes from then on, it should not have come to."""

    def seen(self, name: str, value: Any) -> None:
        self.values.append((name, value))

    def seen_by_other(self, name: str, value: Any) -> None:
        self.seen(name + ", after its end" * self.ended, value)

    def told(self, name: str, value: int, bits: int) -> None:
        self.values.append((name, 0 <= value < 1 << bits))


Part = Callable[[GuestCpu, Notes], Coroutine[Any, Any, None]]
Scene = tuple[tuple[int, Part], ...]
"""Programs one after the other, each with the processor that runs it."""


def pattern(page: int) -> bytes:
    return (page.to_bytes(8, "little") + b"a secret") * 256


async def fill(cpu: GuestCpu) -> None:
    await cpu.write(PRIVATE[0], b"".join(map(pattern, PRIVATE)))


async def check(cpu: GuestCpu, notes: Notes) -> None:
    """All pages at once: they lie side by side."""
    data = await cpu.read(PRIVATE[0], len(PRIVATE) * PAGE)
    for number, page in enumerate(PRIVATE):
        notes.seen(f"page {page:#x}", data[number * PAGE : (number + 1) * PAGE] == pattern(page))


async def instructions(cpu: GuestCpu, notes: Notes) -> None:
    """Whatever the host may intercept: what it says, what it may not touch, and what must not go out."""
    await Kernel.attach(cpu, notes.place)
    await fill(cpu)
    for leaf, subleaf in LEAVES:
        found = await cpu.cpuid(leaf, subleaf)
        mine = tuple(f & ~h for f, h in zip(found, HOSTS_BITS.get(leaf, (0, 0, 0, 0)), strict=True))
        notes.seen(f"CPUID {leaf:#x}.{subleaf}", mine)
    await cpu.load(rax=SECRET, rbx=SECRET, rcx=SECRET, rdx=SECRET, rsi=SECRET, rdi=SECRET)
    for turn in range(3):
        await cpu.pause()
        await cpu.write(PRIVATE[1] + 8, b"a secret")
        notes.seen(f"a word, {turn}", await cpu.read(PRIVATE[1] + 8, 8))
    await cpu.load(rax=SECRET)
    await cpu.pause()
    notes.seen("registers", await cpu.look("rax", "rbx", "rcx", "rdx", "rsi", "rdi"))
    await cpu.load(rax=SECRET, rbx=SECRET, rsi=SECRET, rdi=SECRET, rcx=0)
    notes.told("port of 1", await cpu.port_in(0x71, 1), 8)
    (rax,) = await cpu.look("rax")
    notes.seen("RAX beyond AL", rax >> 8)
    notes.told("port of 4", await cpu.port_in(0x71, 4), 32)
    notes.told("RAX of a port of 4", (await cpu.look("rax"))[0], 32)
    await cpu.port_out(0x70, 0x34, 1)
    notes.seen("the rest of a register", (await cpu.look("rbx", "rsi", "rdi")))
    await cpu.write(PRIVATE[2], b"-" * 4096)
    await cpu.port_string(0x71, PRIVATE[2] + 64, 96, 1, is_in=True)
    after = await cpu.read(PRIVATE[2], PAGE)
    notes.seen("around a string", (after[:64], after[160:]))
    await cpu.write(PRIVATE[2], b"for a port......")
    await cpu.port_string(0x80, PRIVATE[2], 16, 1, is_in=False)
    await cpu.write(PRIVATE[2], pattern(PRIVATE[2]))
    notes.seen("DR7 before", await cpu.read_dr7())
    await cpu.load(dr7=0x403)
    notes.seen("DR7", await cpu.read_dr7())
    await cpu.wbinvd()
    await cpu.monitor(SECRET)
    try:
        notes.told("MSR", await cpu.rdmsr(0x123456), 64)
    except GuestException as refused:
        if refused.vector not in (13, 6):
            raise
    await mark(cpu, notes.place, C_BIT, range(DEVICE, DEVICE + 1), private=False)
    for size in (1, 8):
        notes.told(
            f"device register of {size}", int.from_bytes(await cpu.read(DEVICE * PAGE, size), "little"), 8 * size
        )
    await check(cpu, notes)


async def pages(cpu: GuestCpu, notes: Notes) -> None:
    """A page goes to shared and back, and is used before and after."""
    kernel = await Kernel.attach(cpu, notes.place)
    await fill(cpu)
    await cpu.pause()
    await make_shared(kernel.channel, notes.place, C_BIT, range(CONVERTED, CONVERTED + 1))
    await cpu.pause()
    await make_private(kernel.channel, notes.place, C_BIT, range(CONVERTED, CONVERTED + 1))
    mine = b"a new secret"
    await cpu.write(PRIVATE[-1], mine)
    for turn in range(3):
        await cpu.pause()
        notes.seen(f"the page afterwards, {turn}", await cpu.read(PRIVATE[-1], len(mine)))
    await cpu.write(PRIVATE[-1], pattern(PRIVATE[-1]))
    await check(cpu, notes)


async def messages(cpu: GuestCpu, notes: Notes) -> None:
    """Reports and a key, through the driver and without; after a failure the next one must be refused."""
    kernel = await Kernel.attach(cpu, notes.place)
    await fill(cpu)
    driver = SevGuest(kernel)
    process = Process(cpu, USER, {"/dev/sev-guest": driver})
    descriptor = process.open("/dev/sev-guest")
    failures: list[int] = []
    for turn in range(2):
        data = bytes([turn]) * 64
        await process.store(USER.start, data + bytes(32) + (USER.start + 0x4000).to_bytes(8, "little") + b"\0\x20\0\0")
        await process.store(USER.start + 0x2000, bytes(0x1000))
        await process.store(USER.start + 0x4000, b"\xaa" * 0x4000)
        argument = bytearray(b"\1" + bytes(7) + USER.start.to_bytes(8, "little"))
        argument += (USER.start + 0x2000).to_bytes(8, "little") + bytes(8)
        try:
            await process.ioctl(descriptor, 0xC0205300 if turn == 1 else 0xC0205302, argument)
        except OSError as failed:
            failures.append(failed.errno or 0)
            if failures == [5, 5]:
                raise
            continue
        answer = await process.load(USER.start + 0x2000, 0x20 + 0x4A0)
        notes.seen(f"report {turn}", answer[0x20 + 0x50 : 0x20 + 0x90] == data)
        notes.seen(f"the whole report {turn}", sha256(answer).hexdigest())
        behind = await process.load(USER.start + 0x6000, 0x2000)
        notes.seen(f"behind the certificates {turn}", behind == b"\xaa" * 0x2000)
    try:
        notes.seen("key", await derive_key(cpu, notes.place))
        entry = ReportEntry(driver)
        entry.write_inblob(bytes(64))
        notes.seen("outblob", (await entry.outblob())[0x50:0x90])
    except RequestFailed as failed:
        failures.append(failed.errno or 0)
    await check(cpu, notes)
    if failures:
        raise RequestFailed(failures[0], f"errors of the driver: {failures}")


async def devices(cpu: GuestCpu, notes: Notes) -> None:
    """Bounce buffers, whose lengths the device tells in shared memory, and a blob to boot, hashed before it is used."""
    kernel = await Kernel.attach(cpu, notes.place)
    await fill(cpu)
    await make_shared(kernel.channel, notes.place, C_BIT, POOL)
    buffers = BounceBuffers(kernel.channel, range(POOL.start, POOL.start + 2))
    ring, blob = POOL.start * PAGE + 2 * PAGE, POOL.start * PAGE + 3 * PAGE
    for turn in range(2):
        place = await buffers.map(b"\0" * 64)
        other = await buffers.map(b"for another device")
        await cpu.write(ring, (64).to_bytes(4, "little"))
        await cpu.wbinvd()
        claimed = int.from_bytes(await cpu.read(ring, 4), "little", signed=True)
        await cpu.write(PRIVATE[1], pattern(PRIVATE[1]))
        await cpu.write(PRIVATE[1], await buffers.unmap(place, claimed))
        notes.seen(f"behind the buffer {turn}", await cpu.read(PRIVATE[1] + 64, 64) == pattern(PRIVATE[1])[64:128])
        await buffers.unmap(other)
    await cpu.write(blob, BLOB)
    await cpu.wbinvd()
    hashes = {"kernel": sha256(BLOB).digest()}
    try:
        await take(cpu, hashes, "kernel", blob, len(BLOB), PRIVATE[0])
        await cpu.wbinvd()
        notes.seen("what is booted", await cpu.read(PRIVATE[0], len(BLOB)) == BLOB)
    except BootRefused:
        pass
    await cpu.write(PRIVATE[0], pattern(PRIVATE[0]))
    await cpu.write(PRIVATE[1], pattern(PRIVATE[1]))
    await check(cpu, notes)


async def early(cpu: GuestCpu, notes: Notes) -> None:
    """From the reset vector: what it learns of itself, and the first pages."""
    kernel = await start(cpu, notes.place)
    notes.seen("protections", (kernel.protections.c_bit, kernel.protections.snp))
    for ram in await memory_ranges(cpu):
        notes.told("memory", ram.stop, 40)
    await accept(kernel.channel, range(PRIVATE[0] // PAGE, PRIVATE[-1] // PAGE + 1))
    await fill(cpu)
    await cpu.wbinvd()
    await check(cpu, notes)


async def create(cpu: GuestCpu, notes: Notes) -> None:
    """Another processor is started, of which the guest alone says how."""
    kernel = await Kernel.attach(cpu, notes.place)
    await fill(cpu)
    await processors.start(kernel.channel, 1, SAVE_AREA, vector=0x10, features=1)
    await cpu.pause()
    notes.seen("a word", await cpu.read(PRIVATE[1] + 8, 8))


async def work(cpu: GuestCpu, notes: Notes) -> None:
    """What the other processor does."""
    cpu.set_handler(29, VcHandler(notes.place, C_BIT))
    notes.seen_by_other("registers", await cpu.look("cr0", "efer", "rflags", "dr7", "g_pat", "xcr0", "vmpl"))
    await cpu.pause()
    await use(cpu, notes.place, C_BIT)
    await cpu.write(LEFT, b"left by the other one")
    await cpu.pause()
    notes.seen_by_other("what it left", await cpu.read(LEFT, 21))


async def destroy(cpu: GuestCpu, notes: Notes) -> None:
    """It is ended, and its save area is an ordinary page; what it held stays, for a host that would run it again."""
    kernel = await Kernel.attach(cpu, notes.place)
    await processors.stop(kernel.channel, 1, SAVE_AREA)
    notes.ended = True
    await cpu.write(SAVE_AREA + PAGE // 2, b"mine again")
    await cpu.pause()


async def look_back(cpu: GuestCpu, notes: Notes) -> None:
    """After everything that the host has tried with the other processor."""
    await Kernel.attach(cpu, notes.place)
    notes.seen("what was the save area", await cpu.read(SAVE_AREA + PAGE // 2, 10))
    await check(cpu, notes)


SCENES: dict[str, Scene] = {
    "early": ((0, early),), "instructions": ((0, instructions),), "pages": ((0, pages),),
    "messages": ((0, messages),), "devices": ((0, devices),),
    "processors": ((0, create), (1, work), (0, destroy), (1, work), (0, look_back)),
}  # fmt: skip
