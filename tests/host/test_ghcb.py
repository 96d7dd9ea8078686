"""The host's half of the GHCB: what KVM and the VMM answer to requests good and bad, and faults without progress."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from snpbook.guest.boot import Layout
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.host.refusal import KernelError
from snpbook.host.run import FAULT_LIMIT, run
from snpbook.spec.kvm import KvmExit, MemoryAttribute
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.vmcb import ExitCode, intercept_bits
from snpbook.system import Guest
from snpbook.trace import Message, VmExit
from tests.machines import MIB, PAGE, booted, frame_of, launched

CODE, INFO1, INFO2, SCRATCH, RAX, BITMAP, BUFFER, USAGE = 0x390, 0x398, 0x3A0, 0x3A8, 0x1F8, 0x3F0, 0x800, 0xFFC
PSC, REQUEST, FEATURES, IOIO = 0x80000010, 0x80000011, 0x8000FFFD, 0x7B


def ghcb(fields: dict[int, int], *, valid: list[int] | None = None, buffer: bytes = b"", usage: int = 0) -> bytes:
    """A GHCB page by its offsets; `valid` lists the fields marked as filled in, those of `fields` by default."""
    page = bytearray(PAGE)
    bitmap = 0
    for offset, value in fields.items():
        struct.pack_into("<Q", page, offset, value)
    for offset in fields if valid is None else valid:
        bitmap |= 1 << offset // 8
    page[BITMAP : BITMAP + 16] = bitmap.to_bytes(16, "little")
    page[BUFFER : BUFFER + len(buffer)] = buffer
    struct.pack_into("<HI", page, 0xFFA, 2, usage)
    return bytes(page)


def u64(page: bytes, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 8], "little")


class Asker:
    """A booted guest that puts any bytes into its GHCB, and any value into the MSR."""

    def __init__(self, memory: str = "12 MiB") -> None:
        self.guest: Guest = launched(memory=memory)
        self.guest.boot()
        self.place = Layout.of(self.guest.vmm.image)
        self.vm = self.guest.vmm.vm

    def page(self, page: bytes) -> bytes:
        async def program(cpu: GuestCpu) -> bytes:
            await cpu.write(self.place.ghcb, page)
            await cpu.wrmsr(Msr.GHCB, self.place.ghcb)
            await cpu.vmgexit()
            answer: bytes = await cpu.read(self.place.ghcb, PAGE)
            return answer

        answer: bytes = self.guest.run(program)
        return answer

    def msr(self, value: int) -> int:
        async def program(cpu: GuestCpu) -> int:
            await cpu.wrmsr(Msr.GHCB, value)
            await cpu.vmgexit()
            answer: int = await cpu.rdmsr(Msr.GHCB)
            return answer

        answer: int = self.guest.run(program)
        return answer

    def psc(
        self, entries: list[int], cur: int = 0, end: int | None = None, at: int = BUFFER
    ) -> tuple[int, int, int, list[int]]:
        """A page state change: (SW_EXITINFO1, SW_EXITINFO2, cur_entry, the entries after it)."""
        body = struct.pack("<HHI", cur, len(entries) - 1 if end is None else end, 0)
        body += b"".join(entry.to_bytes(8, "little") for entry in entries)
        fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: self.place.ghcb + at}
        answer = self.page(ghcb(fields, buffer=bytes(max(at - BUFFER, 0)) + body))
        after = answer[at : at + len(body)]
        words = [u64(after, 8 + 8 * i) for i in range(len(entries))]
        return u64(answer, INFO1), u64(answer, INFO2), int.from_bytes(after[:2], "little"), words


@pytest.fixture
def asker() -> Asker:
    return Asker()


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(KernelError) as caught:
        yield
    assert caught.value.errno == number


# The MSR protocol.


def test_msr_answers(asker: Asker) -> None:
    assert asker.msr(0x002) == 2 << 48 | 1 << 32 | 51 << 24 | 0x001, "versions 1 to 2, C-bit 51"
    assert asker.msr(0x080) == 1 << 12 | 0x081, "SNP"
    assert asker.msr(0x010) == 0xFFFFFFFFFFFFF011, "no preferred place"
    assert asker.msr(0x7000 | 0x012) == 0x7000 | 0x013
    assert asker.msr(0x12345 << 12 | 0xABC) == 0x12345 << 12 | 0xABC, "an unknown code is left as it is"


def test_page_state_by_msr(asker: Asker) -> None:
    gfn = 0x500
    assert asker.msr(2 << 52 | gfn << 12 | 0x014) == 0x015
    assert not asker.vm.is_private(range(gfn, gfn + 1)).any()
    assert asker.msr(1 << 52 | gfn << 12 | 0x014) == 0x015
    assert asker.vm.is_private(range(gfn, gfn + 1)).all()


@pytest.mark.parametrize("operation", [0, 3, 4, 15])
def test_an_unknown_page_state_by_msr_fails(asker: Asker, operation: int) -> None:
    assert asker.msr(operation << 52 | 0x500 << 12 | 0x014) == 1 << 63 | 0x015
    assert asker.vm.is_private(range(0x500, 0x501)).all()


def test_termination_goes_to_the_vmm_and_the_log(asker: Asker) -> None:
    log = asker.guest.system.record()
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        asker.msr(2 << 16 | 1 << 12 | 0x100)
    assert [event.text for event in log.of(Message)] == ["SEV-ES guest requested termination: 0x1:0x2"]


# Registration.


def test_an_unregistered_ghcb_ends_kvm_run() -> None:
    guest = launched()

    async def program(cpu: GuestCpu) -> None:
        await cpu.wrmsr(Msr.GHCB, 0x3000)
        await cpu.vmgexit()

    with fails(errno.EINVAL):
        guest.run(program)


def test_another_page_than_the_registered_one(asker: Asker) -> None:
    with fails(errno.EINVAL):
        asker.msr(asker.place.ghcb + PAGE)


def test_a_registered_page_outside_of_memory(asker: Asker) -> None:
    assert asker.msr(1 << 40 | 0x012) == 1 << 40 | 0x013
    with fails(errno.EFAULT):
        asker.msr(1 << 40)


# Malformed GHCBs: SW_EXITINFO1 2, the error in SW_EXITINFO2.

GOOD = {CODE: FEATURES, INFO1: 0, INFO2: 0}
OUT = {CODE: IOIO, INFO1: 0x80 << 16 | 1 << 4, INFO2: 0}
IN = {CODE: IOIO, INFO1: 0x80 << 16 | 1 << 4 | 1, INFO2: 0}
MALFORMED: dict[str, tuple[dict[str, Any], int]] = {
    "usage": ({"fields": GOOD, "usage": 1}, 2),
    "no code": ({"fields": GOOD, "valid": [INFO1, INFO2]}, 4),
    "no info 1": ({"fields": GOOD, "valid": [CODE, INFO2]}, 4),
    "no info 2": ({"fields": GOOD, "valid": [CODE, INFO1]}, 4),
    "usage first": ({"fields": GOOD, "usage": 1, "valid": []}, 2),
    "unknown event": ({"fields": {**GOOD, CODE: 0x12345}}, 6),
    "missing before unknown": ({"fields": {**GOOD, CODE: 0x12345}, "valid": [CODE]}, 4),
    "OUT without RAX": ({"fields": OUT}, 4),
    "string without scratch": ({"fields": {**IN, INFO1: IN[INFO1] | 1 << 2}}, 4),
    "string": ({"fields": {**IN, INFO1: IN[INFO1] | 1 << 2, SCRATCH: 0}}, 5),
    "32 bits": ({"fields": {**IN, INFO1: 0x80 << 16 | 1 << 6 | 1}}, 5),
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_malformed(asker: Asker, name: str) -> None:
    arguments, error = MALFORMED[name]
    answer = asker.page(ghcb(**arguments))
    assert (u64(answer, INFO1), u64(answer, INFO2)) == (2, error)


def test_features_and_the_bitmap_of_an_answer(asker: Asker) -> None:
    answer = asker.page(ghcb(GOOD))
    assert (u64(answer, INFO1), u64(answer, INFO2)) == (0, 1)
    bitmap = int.from_bytes(answer[BITMAP : BITMAP + 16], "little")
    assert bitmap == sum(1 << offset // 8 for offset in (INFO1, INFO2, RAX, 0x308, 0x310, 0x318))


def test_ports() -> None:
    """The clock's index and data registers; an unknown port reads as all ones."""
    asker = Asker("64 MiB")
    assert u64(asker.page(ghcb(IN)), RAX) == 0xFF
    index = {**OUT, INFO1: 0x70 << 16 | 1 << 4, RAX: 0x34}
    data = {**IN, INFO1: 0x71 << 16 | 1 << 4 | 1}
    asker.page(ghcb(index))
    low = u64(asker.page(ghcb(data)), RAX)
    asker.page(ghcb({**index, RAX: 0x80 | 0x35}))
    high = u64(asker.page(ghcb(data)), RAX)
    assert (high << 8 | low) << 16 == (64 - 16) * MIB


# Page state changes.

TO_PRIVATE, TO_SHARED, LARGE = 1 << 52, 2 << 52, 1 << 56


def entry(gfn: int, operation: int = TO_SHARED, cur: int = 0, large: bool = False) -> int:
    return cur | gfn << 12 | operation | LARGE * large


def test_psc_done(asker: Asker) -> None:
    entries = [entry(0x400), entry(0x401), entry(0x600, large=True), entry(0x403, TO_PRIVATE)]
    info1, info2, cur, after = asker.psc(entries)
    assert (info1, info2, cur) == (0, 0, 4)
    assert after == [entries[0] | 1, entries[1] | 1, entries[2] | 512, entries[3] | 1]
    private = asker.vm.is_private(range(0x400, 0xA00))
    assert not private[[0, 1]].any()
    assert not private[0x200:0x400].any()
    assert private[2:0x200].all()


def test_psc_of_a_partly_done_large_entry(asker: Asker) -> None:
    _, info2, cur, after = asker.psc([entry(0x600, cur=500, large=True)])
    assert (info2, cur, after) == (0, 1, [entry(0x600, cur=512, large=True)])
    assert asker.vm.is_private(range(0x600, 0x600 + 500)).all()
    assert not asker.vm.is_private(range(0x600 + 500, 0x800)).any()


def test_psc_continues_at_cur_entry(asker: Asker) -> None:
    _, info2, cur, _ = asker.psc([entry(0x400), entry(0x401), entry(0x402)], cur=1)
    assert (info2, cur) == (0, 3)
    assert asker.vm.is_private(range(0x400, 0x403)).tolist() == [True, False, False]


def test_psc_behind_its_end_is_done(asker: Asker) -> None:
    assert asker.psc([entry(0x400)], cur=1, end=0)[:3] == (0, 0, 1)
    assert asker.psc([entry(0x400)], cur=900, end=0)[:3] == (0, 0, 900)
    assert asker.vm.is_private(range(0x400, 0x401)).all()


@pytest.mark.parametrize(
    ("end", "at"), [(253, BUFFER), (0xFFFF, BUFFER), (0, BUFFER + 2032 - 8), (3, BUFFER + 2032 - 32)]
)
def test_psc_invalid_header(asker: Asker, end: int, at: int) -> None:
    assert asker.psc([], end=end, at=at)[:2] == (0, 1 << 32 | 1)


@pytest.mark.parametrize(
    "bad",
    [entry(0x601, large=True), entry(0x600, cur=513, large=True), entry(0x405, cur=2)],
    ids=["gfn", "cur 2M", "cur 4K"],
)
def test_psc_invalid_entry(asker: Asker, bad: int) -> None:
    """The entries before it are done, and cur_entry points at it."""
    info1, info2, cur, after = asker.psc([entry(0x400), bad, entry(0x401)])
    assert (info1, info2, cur) == (0, 1 << 32 | 2, 1)
    assert after == [entry(0x400, cur=1), bad, entry(0x401)]
    assert asker.vm.is_private(range(0x400, 0x402)).tolist() == [False, True]


@pytest.mark.parametrize("operation", [0, 3, 4, 9])
def test_psc_of_other_operations_counts_as_done(asker: Asker, operation: int) -> None:
    assert asker.psc([entry(0x400, operation << 52), entry(0x401)])[:3] == (0, 0, 2)
    assert asker.vm.is_private(range(0x400, 0x402)).tolist() == [True, False]


@pytest.mark.parametrize("at", [0, BUFFER - 8, BUFFER + 2032 - 7, 0xFF8])
def test_psc_scratch_outside_of_the_shared_buffer(asker: Asker, at: int) -> None:
    fields = {CODE: PSC, INFO1: 0, INFO2: 0, SCRATCH: asker.place.ghcb + at}
    answer = asker.page(ghcb(fields))
    assert (u64(answer, INFO1), u64(answer, INFO2)) == (2, 3)


def test_psc_of_pages_that_nobody_has_costs_the_host_little(asker: Asker) -> None:
    """A guest names the ends of its address space; no slot is there, and the attribute is kept all the same."""
    last = (1 << 40) - 1
    assert asker.psc([entry(last, TO_PRIVATE), entry(last - 511, TO_PRIVATE, large=True)])[:3] == (0, 0, 2)
    assert asker.vm.is_private(range(last - 511, last + 1)).all()
    assert asker.msr(1 << 52 | last << 12 | 0x014) == 0x015


# Guest requests.


@pytest.mark.parametrize(("info1", "info2"), [(0x1001, 0x3000), (0x2000, 0x3008), (0x2000, 0x2000)])
def test_guest_request_addresses(asker: Asker, info1: int, info2: int) -> None:
    answer = asker.page(ghcb({CODE: REQUEST, INFO1: info1, INFO2: info2}))
    assert (u64(answer, INFO1), u64(answer, INFO2)) == (2, 4)


def test_guest_request_outside_of_memory(asker: Asker) -> None:
    with fails(errno.EFAULT):
        asker.page(ghcb({CODE: REQUEST, INFO1: 1 << 40, INFO2: 0x3000}))


def test_guest_request_that_the_firmware_refuses(asker: Asker) -> None:
    answer = asker.page(ghcb({CODE: REQUEST, INFO1: asker.place.request, INFO2: asker.place.response}))
    assert (u64(answer, INFO1), u64(answer, INFO2)) == (0, 0x16), "the firmware's status, for the guest"


# Faults.


async def read_page(cpu: GuestCpu, address: int) -> bytes:
    data: bytes = await cpu.read(address, 16)
    return data


def test_a_guest_that_gets_nowhere_is_stopped(asker: Asker) -> None:
    """The host takes the page from under the guest and maps it again: real hardware would fault for ever."""
    frame = frame_of(asker.vm, 0x400000) >> 12
    asker.guest.system.host.cpu.rmpupdate(range(frame, frame + 1), range(1), NewState(assigned=True, asid=77))
    log = asker.guest.system.record()
    with fails(errno.ELOOP):
        asker.guest.run(lambda cpu: read_page(cpu, 0x400000))
    assert len(log.of(VmExit)) == FAULT_LIMIT + 1


def test_an_exit_that_kvm_does_not_know(asker: Asker) -> None:
    """Another intercept in the VMCB than KVM's own: the exit reaches a kernel that has no handler for it."""

    async def program(cpu: GuestCpu) -> None:
        await cpu.pause()

    vcpu = asker.guest.vmm.vcpus[0]
    asker.vm.cpu.write(vcpu.vmcb, intercept_bits(ExitCode.PAUSE))
    with fails(errno.EINVAL):
        asker.guest.run(program)


def test_a_fault_that_no_slot_explains(asker: Asker) -> None:
    with fails(errno.EFAULT):
        asker.guest.run(lambda cpu: read_page(cpu, 256 * MIB))


def test_an_implicit_conversion_goes_to_the_vmm_once(asker: Asker) -> None:
    """A private access to a page that the host calls shared: the VMM sets the attribute, the guest gets a #VC."""
    asker.vm.set_memory_attributes(0x400000, PAGE, MemoryAttribute(0))
    with pytest.raises(RuntimeError, match="SHUTDOWN"):
        asker.guest.run(lambda cpu: read_page(cpu, 0x400000))
    assert asker.vm.is_private(range(0x400, 0x401)).all()
    frame = frame_of(asker.vm, 0x400000) >> 12
    assert asker.guest.system.machine.rmp.states(range(frame, frame + 1))[0] == PageState.GUEST_INVALID


def test_the_exit_says_what_kind_of_access_it_was() -> None:
    guest = launched()
    vcpu = guest.vmm.vcpus[0]
    vcpu.executor.start(lambda cpu: read_page(cpu, 0x400000))
    exit_ = run(vcpu)
    assert exit_.reason is KvmExit.MEMORY_FAULT
    assert exit_.detail == {"flags": 1, "gpa": 0x400000, "size": PAGE}, "flag bit 0 is PRIVATE in the v7 era"


def test_one_guest_cannot_see_another() -> None:
    """Two guests on one host, each with its own RAM at the same addresses."""
    system = booted()
    guests = [launched(system, memory="12 MiB") for _ in range(2)]

    async def write(cpu: GuestCpu, data: bytes) -> None:
        await cpu.write(0x500000, data)

    for number, guest in enumerate(guests):
        guest.boot()
        guest.run(lambda cpu, number=number: write(cpu, bytes([number + 1]) * 16))
    assert [guest.run(lambda cpu: read_page(cpu, 0x500000)) for guest in guests] == [b"\1" * 16, b"\2" * 16]


def test_a_page_converted_to_and_fro_for_ever_stops_the_guest(asker: Asker) -> None:
    """The VMM is asked for the same page again and again: PVALIDATE through a shared mapping of a private page."""

    async def program(cpu: GuestCpu) -> None:
        while True:
            await cpu.write(asker.place.request, b"shared")
            await cpu.pvalidate(asker.place.request, 1)

    with fails(errno.ELOOP):
        asker.guest.run(program)
