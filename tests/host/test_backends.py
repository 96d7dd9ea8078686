"""A back end is one file, one line of the registry and its test: the null back end runs a guest."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

import snpbook
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm.backends import BACKENDS
from snpbook.host.kvm.null_memory import NullMemory
from snpbook.host.kvm.vm import VmFile
from snpbook.host.ledger import Ledger
from snpbook.host.recount import recount
from snpbook.host.refusal import KernelError
from snpbook.spec.private_memory import Backend
from tests.host.selftests.harness import EXIT_HLT, MIB, PAGE, PUNCH_HOLE, Host

ATTRIBUTES_V10, ENABLE_CAP, SET_REGION = 0xC020AED3, 0x4068AEA3, 0x4020AE46
BASE = 0x1000000


class NullGuest:
    """A guest of type 0 with a slot of 4 MiB at `BASE` on the null back end, and its page tables at 0."""

    def __init__(self) -> None:
        self.host = Host("rfc-v7", installed=128 * MIB)
        self.ledger = Ledger(self.host.system.trace)
        process = self.host.process
        self.fd = self.host.vm()
        process.ioctl(self.fd, ENABLE_CAP, bytearray(struct.pack("<IIQ88x", 240, 0, 1)))
        self.file = process.install(NullMemory(self.host.system.host, 4 * MIB))
        self.shared = process.mmap(4 * MIB)
        region = struct.pack("<IIQQQQII112x", 0, 4, BASE, 4 * MIB, self.shared, 0, self.file, 0)
        process.ioctl(self.fd, SET_REGION, bytearray(region))
        self.vcpu = self.host.vcpu(self.fd)

    def convert(self, gpa: int, size: int, private: bool) -> None:
        request = struct.pack("<QQQQ", gpa, size, 8 * private, 0)
        self.host.process.ioctl(self.fd, ATTRIBUTES_V10, bytearray(request))

    def access(self, gpa: int, data: bytes = b"") -> bytes:
        async def program(cpu: GuestCpu) -> bytes:
            if data:
                await cpu.write(gpa, data)
            found: bytes = await cpu.read(gpa, 8)
            await cpu.hlt()
            return found

        self.vcpu.program(program)
        assert self.vcpu.run() == EXIT_HLT
        self.vcpu.run()
        return bytes(self.vcpu.outcome)

    def check(self) -> None:
        file = self.host.process.file(self.fd)
        assert isinstance(file, VmFile)
        assert self.ledger.pages(file.vm) == recount(file.vm)


def test_the_two_sides_are_two_pages_and_a_punch_gives_one_back() -> None:
    guest = NullGuest()
    assert guest.access(BASE, b"shared 1") == b"shared 1"
    guest.convert(BASE, PAGE, True)
    assert guest.access(BASE) == bytes(8), "a new page, zeroed"
    assert guest.access(BASE, b"private1") == b"private1"
    assert guest.host.process.load(guest.shared, 8) == b"shared 1"
    guest.check()
    guest.convert(BASE, PAGE, False)
    assert guest.access(BASE) == b"shared 1"
    guest.convert(BASE, PAGE, True)
    assert guest.access(BASE) == b"private1"
    guest.host.process.fallocate(guest.file, 1 | PUNCH_HOLE, 0, PAGE)
    assert guest.access(BASE) == bytes(8)
    guest.check()


def test_nothing_pins_or_assigns_its_pages() -> None:
    guest = NullGuest()
    guest.convert(BASE, MIB, True)
    guest.access(BASE, b"x" * 8)
    file = guest.host.process.file(guest.fd)
    assert isinstance(file, VmFile)
    pages = recount(file.vm)
    assert (pages.private, pages.pinned, pages.assigned, pages.large) == (1, 0, 0, 0)


def test_other_descriptors_and_short_files_are_refused() -> None:
    guest = NullGuest()
    process = guest.host.process
    short = process.install(NullMemory(guest.host.system.host, PAGE))
    for fd, address in ((guest.host.kvm, 2 * BASE), (short, 2 * BASE)):
        region = struct.pack("<IIQQQQII112x", 1, 4, address, 4 * MIB, guest.shared, 0, fd, 0)
        with pytest.raises(KernelError) as caught:
            process.ioctl(guest.fd, SET_REGION, bytearray(region))
        assert caught.value.errno == errno.EINVAL


def test_its_end_gives_everything_back() -> None:
    guest = NullGuest()
    memory, process = guest.host.system.host.memory, guest.host.process
    guest.convert(BASE, MIB, True)
    guest.access(BASE, b"x" * 8)
    process.exit()
    assert memory.pinned == 0
    fresh = Host("rfc-v7", installed=128 * MIB)
    fresh.process.exit()
    assert memory.allocated == fresh.system.host.memory.allocated


def test_a_back_end_is_named_in_its_own_file_the_registry_and_the_table_of_cells() -> None:
    """Where the null back end is spoken of: what a fifth one would touch."""
    root = Path(snpbook.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if "NullMemory" in path.read_text()}
    assert found == {"host/kvm/null_memory.py", "host/kvm/backends.py"}
    named = [name for names, _ in BACKENDS.values() for name in names]
    assert sorted([*named, Backend.REGISTERED]) == sorted(Backend)
