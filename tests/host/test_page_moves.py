"""Host memory under the guests: huge pages, fragmentation, and what moving a page does to whom."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from snpbook.host.memory import PageAllocator
from snpbook.host.page_moves import compact, fragment, mergeable, migrate, swap_out
from snpbook.host.refusal import KernelError
from snpbook.spec.process import Advice
from snpbook.system import System
from tests.host.regimes import FIRST, MIB, PAGE

UNREGISTER = 0x8010AEBC
TEXT = b"what the guest wrote"


class Plain:
    """A guest that nobody encrypts, or a SEV guest whose memory was registered and is no more."""

    def __init__(self, kind: str) -> None:
        system = System("milan", "moves", installed=128 * MIB)
        system.host.boot("mainline")
        self.guest = system.create_vm(memory="16 MiB", kind=kind)
        self.guest.launch()
        self.vmm, self.kernel = self.guest.vmm, system.host
        self.kind = kind

    def unregister(self) -> None:
        for block in self.vmm.blocks:
            region = block.address.to_bytes(8, "little") + block.size.to_bytes(8, "little")
            self.vmm.process.ioctl(self.vmm.vm_fd, UNREGISTER, region)

    @property
    def page(self) -> range:
        number = self.vmm.user(FIRST * PAGE) // PAGE
        return range(number, number + 1)

    def write(self, pages: int = 1) -> None:
        async def program(cpu: object) -> None:
            await cpu.write(FIRST * PAGE, TEXT.ljust(PAGE, b"\0") * pages)  # type: ignore[attr-defined]

        self.guest.run(program)

    def read(self) -> bytes:
        async def program(cpu: object) -> bytes:
            return bytes(await cpu.read(FIRST * PAGE, len(TEXT)))  # type: ignore[attr-defined]

        return bytes(self.guest.run(program))


@pytest.mark.parametrize(("kind", "kept"), [("plain", True), ("sev", False), ("sev-es", False)])
@pytest.mark.parametrize("move", ["migrate", "swap"])
def test_an_unpinned_page_that_moves(kind: str, kept: bool, move: str) -> None:
    """Ciphertext is worth nothing at another address: the tweak is made of it."""
    host = Plain(kind)
    if kind != "plain":
        host.unregister()
    host.write()
    space, memory = host.vmm.process.space, host.kernel.memory
    old = int(space.frames(host.page)[0])
    if move == "migrate":
        assert migrate(space.files(host.page)).all()
    else:
        assert swap_out(space.files(host.page)).all()
        memory.claim(range(old, old + 1))  # somebody else has it meanwhile
    assert (host.read() == TEXT) == kept
    assert int(space.frames(host.page)[0]) != old


def test_ksm_looks_at_pages_that_nobody_pins() -> None:
    host = Plain("plain")
    host.write(8)
    files = host.vmm.process.space.files(range(host.page.start, host.page.start + 8))
    assert mergeable(files) == 7
    host.kernel.memory.pin(np.concatenate([file.peek(offsets) for file, offsets in files])[:3])
    assert mergeable(files) == 4


# The allocator.


def test_huge_pages_run_out_and_are_whole_aligned_runs() -> None:
    memory = PageAllocator([range(0x250, 0xC80)])
    assert memory.huge_pages == 4
    assert [memory.allocate_order9() for _ in range(4)] == [
        range(start, start + 0x200) for start in (0x400, 0x600, 0x800, 0xA00)
    ]
    assert memory.allocate_order9() is None
    assert memory.free == 0x1B0 + 0x80


def test_a_frame_is_claimed_once() -> None:
    memory = PageAllocator([range(0x250, 0xC80)])
    memory.claim(range(0x300, 0x310))
    with pytest.raises(KernelError) as caught:
        memory.claim(range(0x30F, 0x311))
    assert caught.value.errno == errno.ENOMEM
    assert memory.holes(range(0x2F0, 0x320)) == [range(0x2F0, 0x300), range(0x310, 0x320)]
    memory.release(range(0x300, 0x310))
    assert memory.holes(range(0x10000)) == [range(0x250, 0xC80)]


def test_fragmented_memory_has_no_huge_pages_and_much_room() -> None:
    memory = PageAllocator([range(0x250, 0xC80)])
    free, taken = memory.free, fragment(memory)
    assert (memory.huge_pages, memory.allocate_order9()) == (0, None)
    assert memory.free == free - len(taken) == free - 5
    for pages in taken:
        memory.release(pages)
    assert memory.huge_pages == 4


def test_compaction_makes_room_and_keeps_what_memory_holds() -> None:
    host = Plain("plain")
    process, memory = host.vmm.process, host.kernel.memory
    rest = memory.take(memory.free - memory.huge_pages * 512)  # then only whole blocks are free
    blocks = [memory.allocate(512, 512) for _ in range(20)]
    others = memory.take(memory.free)
    for block in blocks:
        memory.release(block[7:8])
    address = process.mmap(20 * PAGE)
    for number in range(20):
        process.store(address + number * PAGE, bytes([number]) * PAGE)
    for block in blocks:
        memory.release(block[:7])
        memory.release(block[8:])
    assert memory.huge_pages == 0
    ((file, _),) = process.space.files(range(address // PAGE, address // PAGE + 20))
    pinned = file.peek(range(20))[3:4].copy()
    memory.pin(pinned)
    assert compact(memory, [file]) == 19, "all pages are now where the pinned one is"
    assert file.peek(range(20))[3] == pinned[0]
    assert [process.load(address + number * PAGE, 1)[0] for number in range(20)] == list(range(20))
    assert len(rest) + len(others) > 0


def test_memory_of_a_process_gets_huge_pages_when_it_asks() -> None:
    host = Plain("plain")
    process = host.vmm.process
    address = process.mmap(4 * MIB)
    process.store(address, b"small")
    process.madvise(address, 4 * MIB, Advice.HUGEPAGE)
    process.store(address + 2 * MIB + 5, b"huge")
    pages = range(address // PAGE, address // PAGE + 1024)
    assert np.flatnonzero(np.diff(process.space.is_large(pages))).tolist() == [511]
    assert process.load(address + 2 * MIB, 12) == bytes(5) + b"huge" + bytes(3)
    process.madvise(address + 2 * MIB, PAGE, Advice.DONTNEED)
    assert not process.space.is_large(pages).any()
