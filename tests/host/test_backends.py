"""A back end is one file, one line of the registry and its test: the null back end runs a guest."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

import snpbook
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm import backends
from snpbook.host.kvm.backends import BACKENDS, Row
from snpbook.host.kvm.null_memory import NullBinding, NullMemory
from snpbook.host.kvm.vm import VmFile
from snpbook.host.ledger import Ledger
from snpbook.host.process import Process
from snpbook.host.recount import recount
from snpbook.host.refusal import KernelError
from snpbook.regimes.workload import workload
from snpbook.spec.private_memory import Backend, NoSuchCell
from snpbook.system import System
from tests.host.regimes import Regime
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


FILES = {
    "NullMemory": ("null_memory", set()),
    "NullBinding": ("null_memory", set()),
    "RestrictedBinding": ("restricted", set()),
    "GuestMemfd": ("guest_memfd", {"host/kvm/vm.py", "regimes/regime.py"}),
}
"""By class: its file, and who else knows it: the ioctl that makes one, the experiment that reports a memory error."""


@pytest.mark.parametrize("name", FILES)
def test_a_back_end_is_named_in_its_own_file_and_the_registry(name: str) -> None:
    """What a fifth one touches: launch, faults, conversions and the VMM know the protocol alone."""
    root, (file, others) = Path(snpbook.__file__).parent, FILES[name]
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if re.search(rf"\b{name}\b", path.read_text())}
    assert found == {f"host/kvm/{file}.py", "host/kvm/backends.py"} | others


def test_every_back_end_has_a_row_but_the_one_without_files() -> None:
    named = [name for row in BACKENDS for name in row.names]
    assert sorted([*named, Backend.REGISTERED]) == sorted(Backend)


@pytest.mark.parametrize("kind", ["sev", "sev-es", "snp"])
def test_no_encrypted_guest_takes_it(kind: str) -> None:
    """Neither by name nor by its descriptor."""
    system = System("milan", "null", installed=128 * MIB)
    system.host.boot("rfc-v7")
    with pytest.raises(NoSuchCell, match=f"a {kind} guest has no null memory: "):
        system.create_vm(kind=kind, backend="null", memory="12 MiB")
    vmm = system.create_vm(kind=kind, memory="12 MiB").vmm
    fd = vmm.process.install(NullMemory(system.host, MIB))
    region = struct.pack("<IIQQQQII112x", 9, 4, BASE * 4, MIB, vmm.process.mmap(MIB), 0, fd, 0)
    with pytest.raises(KernelError, match=f"^EINVAL: a {kind} guest has this kind of private memory"):
        vmm.process.ioctl(vmm.vm_fd, SET_REGION, bytearray(region))


class LateMemory(NullMemory):
    """A fifth kind of file."""

    device = "late memory"


def test_a_fifth_back_end_needs_a_file_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of its own and a row of the registry, and the VMM's guest runs on it through the whole workload."""
    made: list[LateMemory] = []

    def create(process: Process, vm_fd: int, size: int) -> int:
        made.append(LateMemory(process.kernel, size))
        return process.install(made[-1])

    row = Row((Backend.NULL,), LateMemory, create, NullBinding)
    monkeypatch.setattr(backends, "BACKENDS", (row,))
    samples = {sample.label: sample.pages for sample in workload(Regime("plain", "null"))}
    assert len(made) == 2
    assert samples["ballooned"].private == sum(file.pages.resident for file in made) == 1536 - 153
