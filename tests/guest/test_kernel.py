"""A kernel after its boot: conversions, lazy acceptance, bounce buffers, processors, and guests of every kind."""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Any

import pytest

from snpbook.guest import processors
from snpbook.guest.acceptance import accept, ask, give_up
from snpbook.guest.boot import Acceptance, Kernel
from snpbook.guest.conversions import BounceBuffers, bounce_size, make_private, make_shared
from snpbook.guest.direct_boot import BootRefused, read_hashes, take
from snpbook.guest.layout import SHARED_PAGES, Layout
from snpbook.guest.page_tables import use
from snpbook.guest.termination import Terminated
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.iommu import DmaBlocked
from snpbook.hardware.ports import Device
from snpbook.host.vmm.configuration import DirectBoot
from snpbook.spec.ghcb import PageOperation
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.uapi_kvm import Exit
from snpbook.system import Guest, System, sample_image
from snpbook.trace import VmExit
from tests.guest.booted import fresh
from tests.machines import MIB, PAGE, booted, frame_of, launched, private_bytes
from tests.sampling import sampled

C_BIT = 51
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])


# Conversions.


@ERAS
def test_pages_go_to_shared_and_back(era: str) -> None:
    """Both sides of a 2 MB boundary; the host reads what the guest writes while they are shared, and not after."""
    guest = fresh(era)
    place, pages = Layout.of(guest.vmm.image), range(0x3FE, 0x403)

    async def share(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        await make_shared(kernel.channel, place, C_BIT, pages)
        await cpu.write(pages.start * PAGE, b"for the host")

    async def take_back(cpu: GuestCpu) -> bytes:
        kernel = await Kernel.attach(cpu, place)
        await make_private(kernel.channel, place, C_BIT, pages)
        await cpu.write(pages.start * PAGE, b"for us alone")
        data: bytes = await cpu.read(pages.start * PAGE, 12)
        return data

    guest.run(share)
    assert guest.vmm.read(pages.start * PAGE, 12) == b"for the host"
    assert not guest.vmm.vm.is_private(pages).any()
    assert guest.run(take_back) == b"for us alone"
    assert guest.vmm.vm.is_private(pages).all()
    assert private_bytes(guest, pages.start * PAGE, 12) == b"for us alone"


def test_whole_regions_keep_their_large_entries() -> None:
    guest = fresh(memory="16 MiB")
    place, pages = Layout.of(guest.vmm.image), range(0x200, 0x600)

    async def program(cpu: GuestCpu) -> bytes:
        kernel = await Kernel.attach(cpu, place)
        await make_shared(kernel.channel, place, C_BIT, pages)
        await cpu.write(0x3FFFF0, bytes(range(32)))
        spare: bytes = await cpu.read(place.tables + 4 * PAGE, 8)
        return spare

    assert guest.run(program) == bytes(8), "no table was needed"
    assert guest.vmm.read(0x3FFFF0, 32) == bytes(range(32))


@pytest.mark.parametrize(("entries", "lists"), [(253, 3), (64, 10)])
def test_lists_are_as_long_as_they_may_be(entries: int, lists: int) -> None:
    """600 pages of 4 KB: 253 + 253 + 94 entries, or nine lists of 64 and a rest."""
    guest = fresh()
    place, log = Layout.of(guest.vmm.image), guest.system.record()

    async def program(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        await ask(kernel.channel, [range(0x100, 0x358)], PageOperation.SHARED, entries)

    guest.run(program)
    assert sum(event.pages for event in log.of(VmExit) if event.reason == "VMGEXIT") == lists


@ERAS
@pytest.mark.parametrize("act", [accept, give_up])
def test_the_same_again_ends_the_guest(era: str, act: Any) -> None:
    """What is private cannot be accepted, and what is shared not given up: somebody has lied about pages."""
    guest = fresh(era)
    place, page = Layout.of(guest.vmm.image), range(0x300, 0x301)

    async def program(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        if act is give_up:
            await cpu.pvalidate(0x300000, 1, validate=False)
        await act(kernel.channel, page)

    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        guest.run(program)
    guest.vmm.run()
    outcome = guest.vmm.vcpus[0].executor.outcome
    assert isinstance(outcome, Terminated)
    assert outcome.reason.name == "PVALIDATE"


# Lazy acceptance.


@ERAS
def test_lazy_acceptance_accepts_units_as_they_are_used(era: str) -> None:
    """16 MiB: the first 2 MB by halves around the shared pages, four whole units, the rest by what the image has."""
    guest = launched(booted(era=era), memory="16 MiB")
    place, counts = Layout.of(guest.vmm.image), guest.system.counts
    accepted = guest.boot(Acceptance.LAZY)
    private = 16 * MIB - (31 + SHARED_PAGES) * PAGE
    units = [1, 2, 3, 5, 6, 7]  # not 0 (shared pages) and not 4 (the image's sections)
    assert accepted == private - len(units) * 2 * MIB == counts.pages_validated * PAGE

    async def program(cpu: GuestCpu) -> list[Any]:
        table = (await Kernel.attach(cpu, place)).unaccepted
        before = [await table.holds(0x200000), await table.holds(0x100000), await table.holds(0x800000)]
        first = await table.accept(range(0x210, 0x211))
        again = await table.accept(range(0x210, 0x211))
        guard = await table.accept(range(0x500, 0x600))
        await cpu.write(0x600000, b"used")
        left = (await table.left()).nonzero()[0].tolist()
        return [before, first, again, guard, left, await cpu.read(0x600000, 4)]

    assert guest.run(program) == [[True, False, False], 512, 0, 1024, [5, 6, 7], b"used"]
    assert counts.pages_validated * PAGE == accepted + 3 * 2 * MIB


def test_memory_that_is_not_accepted_cannot_be_used() -> None:
    guest = launched(booted(era="mainline"), memory="16 MiB")
    guest.boot(Acceptance.LAZY)
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> None:
        await Kernel.attach(cpu, place)
        await cpu.read(0x200000, 1)

    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        guest.run(program)


def test_both_ways_measure_the_same() -> None:
    reports = []
    for when in Acceptance:
        guest = launched(booted(era="mainline"), memory="16 MiB")
        guest.boot(when)
        reports.append(guest.request_report(b"n"))
    assert reports[0] == reports[1]


# Bounce buffers.


def test_bounce_buffers() -> None:
    guest = fresh()
    place, pool = Layout.of(guest.vmm.image), range(0x100, 0x104)

    async def program(cpu: GuestCpu) -> Any:
        kernel = await Kernel.attach(cpu, place)
        await make_shared(kernel.channel, place, C_BIT, pool)
        buffers = BounceBuffers(kernel.channel, pool)
        first, second = await buffers.map(b"a" * 2049), await buffers.map(b"b" * 100)
        third = await buffers.map(b"c" * 8192)
        full = None
        try:
            await buffers.map(b"d" * 4097)
        except ValueError as error:
            full = str(error)
        back = await buffers.unmap(first, claimed=1 << 40), await buffers.unmap(third, claimed=-5)
        again = await buffers.map(b"d" * 4096)
        return (first, second, third, again), full, back, await buffers.unmap(second, claimed=3)

    places, full, back, short = guest.run(program)
    assert places == (0x100000, 0x101000, 0x101800, 0x100000)
    assert full == "the bounce buffers have no 3 slots in a row"
    assert (back, short) == ((b"a" * 2049, b""), b"bbb")
    assert guest.vmm.read(0x101000, 100) == bytes(100), "wiped"


@pytest.mark.parametrize(("memory", "size"), [(1 << 30, 64 << 20), (4 << 30, 257698037), (1 << 40, 1 << 30)])
def test_how_much_bounces(memory: int, size: int) -> None:
    assert bounce_size(memory) == size


class Disk:
    """A virtual disk with DMA: a request is four words in a page that its driver shares, data lies where it says."""

    def __init__(self, guest: Guest, ring: int) -> None:
        self.guest, self.ring, self.device = guest, ring, Device(guest.system.machine)
        self.sectors: dict[int, bytes] = {}

    def frame(self, gpa: int) -> int:
        """Where the host has a page of the guest that is shared."""
        vmm, gfns = self.guest.vmm, range(gpa // PAGE, gpa // PAGE + 1)
        slot = vmm.vm.slots.of(gfns.start)
        assert slot is not None
        return int(slot.shared_frames(vmm.process.space, gfns)[0]) * PAGE

    def serve(self) -> None:
        """One request, page by page."""
        gpa, size, sector, is_write = struct.unpack("<QIII", self.device.dma_read(self.frame(self.ring), 20))
        data, parts = self.sectors.get(sector, b"").ljust(size, b"."), []
        for at in range(0, size, PAGE):
            spa, count = self.frame(gpa + at) + (gpa + at) % PAGE, min(PAGE, size - at)
            if is_write:
                parts.append(self.device.dma_read(spa, count))
            else:
                self.device.dma_write(spa, data[at : at + count])
        if is_write:
            self.sectors[sector] = b"".join(parts)


@ERAS
def test_a_disk_sees_what_bounces_and_nothing_else(era: str) -> None:
    """64 MB of the 96 are shared for it; a block goes out, another comes back; private memory is out of its reach."""
    guest = fresh(era, memory="96 MiB")
    place, size = Layout.of(guest.vmm.image), bounce_size(96 * MIB)
    pool, home, ring = range(0x2000, 0x2000 + size // PAGE), 0x1200000, 0x1100000
    disk, used = Disk(guest, ring), dict[int, int]()
    block = bytes(range(256)) * 32

    def driver(act: Any) -> Any:
        async def program(cpu: GuestCpu) -> Any:
            kernel = await Kernel.attach(cpu, place)
            return await act(cpu, kernel, BounceBuffers(kernel.channel, pool, used))

        return guest.run(program)

    async def write(cpu: GuestCpu, kernel: Kernel, buffers: BounceBuffers) -> int:
        for pages in (pool, range(ring // PAGE, ring // PAGE + 1)):
            await make_shared(kernel.channel, place, C_BIT, pages)
        await cpu.write(home, block)
        address = await buffers.map(await cpu.read(home, len(block)))
        await cpu.write(ring, struct.pack("<QIII", address, len(block), 7, 1))
        return address

    async def read(cpu: GuestCpu, kernel: Kernel, buffers: BounceBuffers) -> int:
        await buffers.unmap(address)
        again = await buffers.map(bytes(len(block)))
        await cpu.write(ring, struct.pack("<QIII", again, len(block), 7, 0))
        return again

    async def finish(cpu: GuestCpu, kernel: Kernel, buffers: BounceBuffers) -> bytes:
        await cpu.write(home + 0x4000, await buffers.unmap(address))
        data: bytes = await cpu.read(home + 0x4000, len(block))
        return data

    address = driver(write)
    assert address in range(pool.start * PAGE, pool.stop * PAGE)
    assert not guest.vmm.vm.is_private(pool).any()
    disk.serve()
    assert disk.sectors == {7: block}
    spa = frame_of(guest.vmm.vm, home)
    assert disk.device.dma_read(spa, 64) != block[:64], "the private block itself is ciphertext to a device"
    with pytest.raises(DmaBlocked):
        disk.device.dma_write(spa, b"from the disk")
    disk.sectors[7] = b"fresh" + block[5:]
    address = driver(read)
    disk.serve()
    assert driver(finish) == b"fresh" + block[5:]
    assert guest.vmm.read(address, len(block)) == bytes(len(block)), "wiped"
    assert private_bytes(guest, home, 8) == block[:8], "what the driver did not ask for is as it was"


# Further processors.


def start_all(guest: Guest, count: int) -> None:
    place = Layout.of(guest.vmm.image)

    async def boss(cpu: GuestCpu) -> None:
        kernel = await Kernel.attach(cpu, place)
        for number in range(1, count):
            await processors.start(kernel.channel, number, 0x300000 + number * PAGE, vector=0x10, features=1)

    guest.run(boss)


def working(place: Layout, number: int) -> Any:
    async def worker(cpu: GuestCpu) -> tuple[int, ...]:
        before: tuple[int, ...] = await cpu.look("cr0", "efer", "rflags", "dr7", "g_pat", "xcr0", "vmpl")
        await use(cpu, place, C_BIT)
        await cpu.write(0x400000 + number * PAGE, b"left by %d" % number)
        return before

    return worker


@pytest.mark.parametrize("era", ["mainline", *sampled(["rfc-v7"], 1)])
def test_sixteen_processors_leave_a_value_each(era: str) -> None:
    guest = fresh(era, vcpus=16)
    place = Layout.of(guest.vmm.image)
    start_all(guest, 16)
    for number, vcpu in enumerate(guest.vmm.vcpus):
        vcpu.executor.start(working(place, number))
        assert guest.vmm.run(number) is Exit.HLT
        if number:
            assert vcpu.executor.outcome == (0x60000010, 0x1000, 2, 0x400, 0x7040600070406, 1, 0)
    for number in range(16):
        left = b"left by %d" % number
        assert private_bytes(guest, 0x400000 + number * PAGE, len(left)) == left


def test_a_processor_is_stopped_and_its_page_is_ordinary_again() -> None:
    guest = fresh(vcpus=2)
    place = Layout.of(guest.vmm.image)
    start_all(guest, 2)

    async def boss(cpu: GuestCpu) -> bytes:
        kernel = await Kernel.attach(cpu, place)
        await processors.stop(kernel.channel, 1, 0x301000)
        await cpu.write(0x301000, b"ordinary")
        data: bytes = await cpu.read(0x301000, 8)
        return data

    assert guest.run(boss) == b"ordinary"
    with pytest.raises(OSError, match="EAGAIN"):
        guest.vmm.run(1)


@pytest.mark.parametrize("page", [0x200000, 0x301008])
def test_a_save_area_that_cannot_be(page: int) -> None:
    guest = fresh(vcpus=2)
    place = Layout.of(guest.vmm.image)

    async def boss(cpu: GuestCpu) -> str:
        kernel = await Kernel.attach(cpu, place)
        try:
            await processors.start(kernel.channel, 1, page, vector=0x10, features=1)
        except ValueError as error:
            return str(error)
        return ""

    assert "2 MB boundary" in guest.run(boss)


# Every kind of guest.

SAYS = {
    "plain": "no memory encryption",
    "sev": "Memory Encryption Features active: AMD SEV",
    "sev-es": "Memory Encryption Features active: AMD SEV SEV-ES",
    "snp": "Memory Encryption Features active: AMD SEV SEV-ES SEV-SNP",
}


@pytest.mark.parametrize("kind", list(SAYS))
def test_the_same_code_runs_on_every_kind_and_says_what_it_has(kind: str) -> None:
    guest = fresh(kind=kind)
    assert guest.dmesg[0] == SAYS[kind]
    assert bool(guest.accepted) == (kind == "snp")

    async def program(cpu: GuestCpu) -> bytes:
        await cpu.write(0x500000, b"kept")
        data: bytes = await cpu.read(0x500000, 4)
        return data

    assert guest.run(program) == b"kept"
    assert (guest.vmm.read(0x500000, 4) == b"kept") == (kind == "plain")


@pytest.mark.parametrize("kind", list(SAYS))
def test_it_knows_its_protections_by_sev_status(kind: str) -> None:
    """Bits 0, 1 and 2 of SEV_STATUS, and nothing else in guests that ask for nothing more."""

    async def program(cpu: GuestCpu) -> Any:
        found = (await Kernel.attach(cpu, Layout.of(sample_image()))).protections
        return found.status, [name for name, on in found.rows if on], len(found.rows), found.unknown

    has = {"plain": 0, "sev": 1, "sev-es": 2, "snp": 3}[kind]
    expected = ["SEV", "SEV_ES", "SNP_ACTIVE"][:has]
    assert fresh(kind=kind).run(program) == ((1 << has) - 1, expected, 20, 0)


@pytest.mark.parametrize("name", ["debug_swap", "restricted_injection"])
def test_what_an_snp_guest_has_more_shows_there(name: str) -> None:
    system = System("milan", "tests", installed=1 << 28)
    system.host.boot("svsm-host", modules={"kvm_amd": "debug_swap=1"})
    guest = launched(system, memory="12 MiB", **{name: True})
    guest.boot(knows=SevFeatures.RESTRICTED_INJECTION)

    async def program(cpu: GuestCpu) -> Any:
        rows = dict((await Kernel.attach(cpu, Layout.of(sample_image()))).protections.rows)
        return rows["DEBUG_VIRTUALIZATION"], rows["RESTRICTED_INJECTION"]

    assert guest.run(program) == (name == "debug_swap", name == "restricted_injection")


# Measured direct boot.

BOOT = DirectBoot(b"a kernel" * 100, b"an initrd", "console=ttyS0")


@pytest.mark.parametrize("changed", [None, "kernel", "initrd", "command line"])
def test_only_what_was_measured_is_booted(changed: str | None) -> None:
    system = booted(era="mainline")
    guest = system.create_vm(memory="12 MiB", boot=BOOT)
    guest.launch()
    guest.boot()
    place, source = Layout.of(guest.vmm.image), 0x1000 + PAGE
    blobs = {"kernel": BOOT.kernel, "initrd": BOOT.initrd, "command line": BOOT.cmdline.encode() + b"\0"}

    def program(name: str, size: int) -> Any:
        async def body(cpu: GuestCpu) -> bytes:
            await Kernel.attach(cpu, place)
            hashes = await read_hashes(cpu, guest.vmm.image.hash_table_base)
            return await take(cpu, hashes, name, source, size, 0x300000)

        return body

    for name, blob in blobs.items():
        offered = blob[:-1] + b"!" if name == changed else blob
        guest.vmm.write(source, offered)
        if name == changed:
            with pytest.raises(BootRefused, match=name):
                guest.run(program(name, len(blob)))
        else:
            assert sha256(guest.run(program(name, len(blob)))).digest() == sha256(blob).digest()


def test_a_guest_without_hashes_boots_no_kernel() -> None:
    guest = fresh()

    async def body(cpu: GuestCpu) -> Any:
        return await read_hashes(cpu, guest.vmm.image.hash_table_base)

    with pytest.raises(BootRefused, match="no hash table"):
        guest.run(body)
