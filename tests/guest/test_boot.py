"""The guest's boot: it accepts its memory and nothing else, each page once, and ends where the host cheats."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from snpbook.guest.acceptance import accept
from snpbook.guest.ghcb import Ghcb
from snpbook.guest.layout import SHARED_PAGES, Layout
from snpbook.guest.memory_map import unaccepted
from snpbook.guest.termination import Terminated
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.hardware.host_instructions import NewState
from snpbook.host.kvm import ghcb_msr
from snpbook.host.kvm.exchange import Exchange
from snpbook.host.kvm.guest_memfd import GuestMemfd
from snpbook.host.kvm.restricted import RestrictedBinding
from snpbook.host.vmm import launch, page_state
from snpbook.spec import kvm
from snpbook.spec.ghcb import Nae, valid_bitmap
from snpbook.spec.image import Image, ImageError
from snpbook.spec.msr import Msr
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.rmp import ASSIGNED, VALIDATED
from snpbook.spec.termination import GeneralReason, Reason
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.uapi_sev import SevOp
from snpbook.spec.vmcb import VMCB
from snpbook.system import Guest, sample_image
from snpbook.trace import Instruction, VmExit
from tests.attest import ovmf_images as ovmf
from tests.machines import MIB, PAGE, booted, frame_of, launched, private_bytes
from tests.sampling import ALL, sampled

SMALL = "12 MiB"
SECTIONS = [(0x800, 9), (0x80A, 3), (0x80D, 1), (0x80E, 1), (0x80F, 1), (0x810, 1), (0x811, 15)]
"""The sample image's sections, in pages: what the launch validates."""
ERAS = pytest.mark.parametrize("era", ["rfc-v7", "mainline"])


def small(era: str = "mainline") -> Guest:
    """A launched guest with little memory."""
    return launched(booted(era=era), memory=SMALL)


def terminated(guest: Guest, program: Callable[[GuestCpu], Any] | None = None) -> tuple[int, int]:
    """Run a guest to its termination request: (reason set, reason) as the host sees them."""
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        guest.run(program) if program else guest.boot()
    vcpu = guest.vmm.vcpus[0]
    value = VMCB.unpack(guest.system.machine.dram.read(vcpu.vmcb, PAGE)).ghcb_gpa
    assert value & 0xFFF == 0x100
    return value >> 12 & 0xF, value >> 16


# What it accepts.


SIZES = {
    "10 MiB": 10 * MIB,
    "16 MiB": 16 * MIB,
    "64 MiB": 64 * MIB,
    20 * MIB + 5 * PAGE: 20 * MIB,
    20 * MIB + 16 * PAGE: 20 * MIB + 16 * PAGE,
    9 * MIB + PAGE: 9 * MIB + PAGE,
    2048 * MIB + 19 * PAGE: 2048 * MIB + 16 * PAGE,
    "3 GiB": 3072 * MIB,
}
"""RAM given, RAM that the clock's registers can tell: whole KiB below 16 MiB, 64 KiB above. The last two go on above
4 GiB."""


@pytest.mark.parametrize(
    ("memory", "told", "era"),
    sampled([(*size, era) for size in list(SIZES.items())[: None if ALL else -2] for era in ("rfc-v7", "mainline")], 6),
)
def test_it_accepts_its_ram_once_and_nothing_else(memory: int | str, told: int, era: str) -> None:
    accepts(memory, told, era, 2 << 30)


@pytest.mark.parametrize(("memory", "told"), [(32 * MIB + 19 * PAGE, 32 * MIB + 16 * PAGE), (48 * MIB, 48 * MIB)])
@ERAS
def test_it_goes_on_above_4_gib(memory: int, told: int, era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a VMM that has 32 MiB below."""
    monkeypatch.setattr(kvm, "LOW_RAM_END", 32 * MIB)
    accepts(memory, told, era, 32 * MIB)


def accepts(memory: int | str, told: int, era: str, low_end: int) -> None:
    system = booted(installed=8 << 30, era=era)
    guest = launched(system, memory=memory)
    place = Layout.of(guest.vmm.image)
    runs = [np.zeros(0, np.uint64)]

    def count(event: object) -> None:
        if isinstance(event, Instruction) and event.name == "PVALIDATE":
            became = event.after[:, 0] & ~event.before[:, 0] & np.uint64(VALIDATED) != 0
            runs.append(event.before[became, 0] >> np.uint64(12) & np.uint64((1 << 39) - 1))

    system.trace.subscribe(count)
    accepted = guest.boot()
    gfns, times = np.unique(np.concatenate(runs), return_counts=True)
    assert set(times.tolist()) == {1}
    low = min(told, low_end) >> 12
    expected = np.zeros((1 << 20) + (told >> 12), bool)
    expected[:low] = expected[1 << 20 : (1 << 20) + (told >> 12) - low] = True
    for first, pages in [*SECTIONS, (place.shared >> 12, SHARED_PAGES)]:
        expected[first : first + pages] = False
    assert np.array_equal(gfns, np.flatnonzero(expected))
    assert accepted == len(gfns) * PAGE
    assert system.counts.pages_validated == len(gfns)


@ERAS
def test_every_private_page_of_ram_is_the_guests_and_valid_afterwards(era: str) -> None:
    guest = small(era)
    guest.boot()
    vm, rmp = guest.vmm.vm, guest.system.machine.rmp
    place = Layout.of(guest.vmm.image)
    for slot in vm.slots:
        pages: Any = getattr(slot.private, "file", slot.private)
        entries = rmp.load(pages.pages.peek(slot.offsets(slot.gfns)))
        for gfn, (low, _) in zip(slot.gfns, entries.tolist(), strict=True):
            if not 0 <= gfn - (place.shared >> 12) < SHARED_PAGES:
                assert low & (ASSIGNED | VALIDATED) == ASSIGNED | VALIDATED
                assert (low >> 51 & 0x3FF, low >> 12 & (1 << 39) - 1) == (vm.asid, gfn)


@pytest.mark.parametrize("memory", [SMALL, "64 MiB"])
@ERAS
def test_shared_pages_stay_the_hosts(era: str, memory: str) -> None:
    guest = launched(booted(era=era), memory=memory)
    guest.boot()
    place = Layout.of(guest.vmm.image)
    gfns = range(place.shared >> 12, (place.shared >> 12) + SHARED_PAGES)
    vm = guest.vmm.vm
    assert not vm.is_private(gfns).any()
    slot = vm.slots.get(0)
    assert slot is not None
    frames = slot.shared_frames(vm.process.space, gfns)
    states = {int(guest.system.machine.rmp.states(range(frame, frame + 1))[0]) for frame in frames.tolist()}
    assert states == {PageState.HYPERVISOR}


def test_the_parts_that_are_left_to_accept() -> None:
    """By hand: one range below the shared pages, the gaps between sections, the rest, and what lies above 4 GiB."""
    image = sample_image()
    place = Layout.of(image)
    assert place == Layout(
        tables=0x800000, shared=0x1000, secrets=0x80D000, cpuid=0x80E000, spare_tables=5, notes=0x811000,
        notes_size=0xE000, calling_area=0x81F000,
    )  # fmt: skip
    left = unaccepted(image, place, [range(0xA00), range(0x100000, 0x100010)])
    assert left == [range(1), range(4, 0x800), range(0x809, 0x80A), range(0x820, 0xA00), range(0x100000, 0x100010)]
    assert unaccepted(image, place, [range(0x805)]) == [range(1), range(4, 0x800)]


def image_with(sections: list[tuple[int, int, int]]) -> Image:
    entries = [ovmf.entry(ovmf.METADATA, (2000).to_bytes(4, "little")), ovmf.entry(ovmf.RESET, bytes(4))]
    return Image.parse(ovmf.place(ovmf.image([bytes(4096)], entries), ovmf.metadata(sections), 2000))


@pytest.mark.parametrize(
    ("sections", "missing"),
    [
        ([], "no SEV metadata"),
        ([(0x800000, 0x4000, ovmf.SEC_MEM)], "secrets page"),
        ([(0x800000, 0x3000, ovmf.SEC_MEM), (0x900000, 0x1000, ovmf.SECRETS)], "SEC memory of 4 pages"),
        ([(0x800000, 0x4000, ovmf.SEC_MEM), (0x900000, 0x1000, ovmf.SECRETS)], "CPUID page"),
    ],
)
def test_images_that_cannot_boot(sections: list[tuple[int, int, int]], missing: str) -> None:
    with pytest.raises(ImageError, match=missing):
        Layout.of(image_with(sections))


def test_shared_pages_avoid_sections_at_the_bottom() -> None:
    image = image_with([(0x1000, 0x5000, ovmf.SEC_MEM), (0x7000, 0x1000, ovmf.SECRETS), (0x9000, 0x1000, ovmf.CPUID)])
    assert Layout.of(image).shared == 0xA000


# A host that cheats with pages.


async def touch(cpu: GuestCpu, address: int) -> bytes:
    data: bytes = await cpu.read(address, 8)
    return data


def swap(guest: Guest, gpa: int) -> None:
    """Give the guest a new page at an address that it has validated already."""
    vm, system = guest.vmm.vm, guest.system
    fresh = system.host.memory.take(1)
    codes = system.host.cpu.rmpupdate(fresh, np.array([gpa >> 12], np.uint64), NewState(assigned=True, asid=vm.asid))
    assert not codes.any()
    vm.mmu.tables.map(gpa >> 12, fresh)


@ERAS
def test_a_swapped_page_is_a_vc_that_ends_the_guest(era: str) -> None:
    guest = small(era)
    guest.boot()
    swap(guest, 0x500000)
    with pytest.raises(RuntimeError, match="SHUTDOWN"):
        guest.run(lambda cpu: touch(cpu, 0x500000))


def test_the_vc_has_the_code_for_a_page_that_is_not_validated() -> None:
    guest = small()
    guest.boot()
    swap(guest, 0x500000)

    async def program(cpu: GuestCpu) -> tuple[int, int, int]:
        try:
            await cpu.read(0x500000, 8)
        except GuestException as exception:
            return exception.vector, exception.error, exception.address
        raise AssertionError("the swapped page was read")

    assert guest.run(program) == (29, 0x404, 0x500000)


@ERAS
def test_the_guests_own_memory_is_never_another_guests(era: str) -> None:
    """One guest's page at the other's address: the reverse map refuses it, and the fault maps the right one again."""
    system = booted(era=era)
    first, second = launched(system, memory=SMALL), launched(system, memory=SMALL)
    first.boot()
    second.boot()
    own = second.run(lambda cpu: touch(cpu, 0x500000))
    second.vmm.vm.mmu.tables.map(0x500, np.array([frame_of(first.vmm.vm, 0x500000) >> 12], np.uint64))
    log = system.record()
    assert second.run(lambda cpu: touch(cpu, 0x500000)) == own
    reasons = [event.reason for event in log.of(VmExit)]
    assert (set(reasons[:-1]), reasons[-1]) == ({"NPF"}, "HLT")


def test_accepting_twice_ends_the_guest() -> None:
    guest = small()
    guest.boot()
    place = Layout.of(guest.vmm.image)

    async def again(cpu: GuestCpu) -> None:
        await accept(Ghcb(cpu, place.ghcb), range(0x500, 0x502))

    assert terminated(guest, again) == (1, Reason.PVALIDATE)


@ERAS
def test_a_page_that_the_launch_validated_behind_its_back_ends_the_guest(
    era: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VMM adds a page of RAM to the launch that the image does not declare."""
    guest = booted(era=era).create_vm(memory=SMALL)
    vmm, honest = guest.vmm, guest.vmm.sev

    def with_a_page(op: SevOp, **fields: Any) -> Any:
        if op is SevOp.SNP_LAUNCH_FINISH:
            launch._update(vmm, LaunchPage.ZERO, 0x500000, PAGE)
        return honest(op, **fields)

    monkeypatch.setattr(vmm, "sev", with_a_page)
    guest.launch()
    assert terminated(guest) == (1, Reason.PVALIDATE)


@ERAS
def test_a_host_that_assigns_nothing_keeps_the_guest_out(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers that the pages are private and does nothing: the guest cannot validate them, and nothing gets on."""
    guest = small(era)
    monkeypatch.setattr(RestrictedBinding, "attribute_changed", lambda *arguments, **names: None)
    monkeypatch.setattr(GuestMemfd, "prepare", lambda *arguments: None)
    with pytest.raises(OSError, match="ELOOP"):
        guest.boot()
    assert guest.system.counts.pages_validated == 0


# A host that cheats with answers.

FULL = 253
HEADERS = {
    "nothing done": [(0, FULL - 1, 0)],
    "one step back": [(100, FULL - 1, 0), (99, FULL - 1, 0)],
    "no step on": [(100, FULL - 1, 0), (100, FULL - 1, 0)],
    "grew the list": [(FULL, FULL, 0)],
    "shrank the list": [(FULL, FULL - 2, 0)],
    "beyond the list": [(FULL + 1, FULL - 1, 0)],
    "reserved bits": [(FULL, FULL - 1, 7)],
}
"""For a full list: what the host writes as (cur_entry, end_entry, reserved) in its first answers."""


def lying(monkeypatch: pytest.MonkeyPatch, event: Nae, lie: Callable[[Exchange], None]) -> None:
    """A KVM that does what is asked, and then changes in the GHCB what the guest finds there."""
    honest = Exchange.close

    def close(exchange: Exchange) -> None:
        honest(exchange)
        if exchange.event == event:
            lie(exchange)

    monkeypatch.setattr(Exchange, "close", close)


def about_lists(monkeypatch: pytest.MonkeyPatch, headers: list[tuple[int, int, int]]) -> None:
    """Its own story of the first full list; it is honest from then on."""
    left = list(headers)

    def lie(exchange: Exchange) -> None:
        vm, start = exchange.vcpu.vm, exchange.gpa + 0x800
        if left and vm.read(start + 2, 2) == (FULL - 1).to_bytes(2, "little"):
            cur, end, reserved = left.pop(0)
            story = cur.to_bytes(2, "little") + end.to_bytes(2, "little") + reserved.to_bytes(4, "little")
            vm.write(start, story)

    lying(monkeypatch, Nae.PAGE_STATE_CHANGE, lie)


@pytest.mark.parametrize(("name", "era"), sampled(product(HEADERS, ("rfc-v7", "mainline")), 8))
def test_lies_about_the_list_end_the_guest(name: str, era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = small(era)
    about_lists(monkeypatch, HEADERS[name])
    assert terminated(guest) == (1, Reason.PSC)


@pytest.mark.parametrize("info2", [1 << 32 | 1, 1 << 32 | 2, 0x100 << 32, 1])
def test_a_refused_page_state_change_ends_the_guest(info2: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = small()
    lying(monkeypatch, Nae.PAGE_STATE_CHANGE, lambda exchange: exchange.answer(info_2=info2))
    assert terminated(guest) == (1, Reason.PSC)


def test_a_host_may_stop_early_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VMM of the series, which has the whole list."""
    served, honest = [], page_state._convert

    def ten_at_a_time(vmm: Any, fields: dict[str, Any]) -> tuple[int, int]:
        served.append(len(fields["gfn"]))
        return honest(vmm, {name: column[:10] for name, column in fields.items()})

    monkeypatch.setattr(page_state, "_convert", ten_at_a_time)
    guest = launched(memory=9 * MIB)
    told = guest.boot()
    assert told == 9 * MIB - (31 + SHARED_PAGES) * PAGE
    assert served[:4] == [1, 506, 496, 486], "the first page of all, then a full list and the one behind it, shrinking"


MSR_LIES = {
    "too old": (0x001, 1 << 48 | 1 << 32 | 51 << 24 | 0x001, (0, 1)),
    "too new": (0x001, 4 << 48 | 3 << 32 | 51 << 24 | 0x001, (0, 1)),
    "no info": (0x001, 0x7FF, (0, 1)),
    "no SNP": (0x081, 0x081, (0, 2)),
    "no features": (0x081, 1 << 12 | 0x005, (0, 2)),
    "other page": (0x013, 0x9000 | 0x013, (1, 0)),
    "no page": (0x013, 0xFFFFFFFFFFFFF013, (1, 0)),
}
"""The code of an answer, what is said instead, and the reason set and reason with which the guest ends."""


def in_the_msr(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A KVM that has another answer in the GHCB MSR."""
    code, lie, _ = MSR_LIES[name]
    honest = ghcb_msr.answer
    monkeypatch.setattr(ghcb_msr, "answer", lambda vcpu, value: honest(vcpu, lie if value & 0xFFF == code else value))


@pytest.mark.parametrize("name", list(MSR_LIES))
def test_protocol_refusals_end_the_guest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_msr(monkeypatch, name)
    assert terminated(small()) == MSR_LIES[name][2]


@pytest.mark.parametrize("info1", [1, 2, 5])
def test_a_refused_event_ends_the_guest(info1: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lying(monkeypatch, Nae.IOIO, lambda exchange: exchange.answer(info1, 13))
    assert terminated(small()) == (0, GeneralReason.GENERAL)


def test_an_answer_without_its_register_ends_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAX of a port read counts only where the bitmap says so."""
    told = valid_bitmap("sw_exit_info_1", "sw_exit_info_2", "rbx", "rcx", "rdx")
    lying(monkeypatch, Nae.IOIO, lambda exchange: exchange.vcpu.vm.write(exchange.gpa + 0x3F0, told))
    assert terminated(small()) == (0, GeneralReason.GENERAL)


@ERAS
def test_a_host_that_resumes_a_terminated_guest_finds_it_halted(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_msr(monkeypatch, "no SNP")
    guest = small(era)
    terminated(guest)
    executor = guest.vmm.vcpus[0].executor
    assert guest.vmm.run() is Exit.HLT
    assert isinstance(executor.outcome, Terminated)
    assert executor.outcome.reason is GeneralReason.SNP_FEATURES


def test_less_memory_than_there_is_is_believed() -> None:
    """The host may give the guest less: it then uses less."""
    guest = launched(memory="64 MiB")
    guest.vmm.memory = 32 * MIB
    assert guest.boot() == 32 * MIB - (31 + SHARED_PAGES) * PAGE


def test_the_page_tables_are_private() -> None:
    """512 GiB mapped one to one with the C-bit, but for three shared pages."""
    guest = small()
    guest.boot()
    place = Layout.of(guest.vmm.image)
    pml4, _, _, pt = (np.frombuffer(private_bytes(guest, place.tables + i * PAGE, PAGE), "<u8") for i in range(4))
    c_bit = np.uint64(1 << 51)
    assert pml4[0] & c_bit
    assert not pml4[1:].any()
    assert [number for number in range(512) if not pt[number] & c_bit] == [1, 2, 3]
    assert guest.system.machine.dram.read(frame_of(guest.vmm.vm, place.tables), PAGE) != pml4.tobytes()


def entries(guest: Guest, tables: int) -> list[int]:
    """The guest's page-table entries, but for the accessed and dirty bits, which the processor sets."""
    words = np.frombuffer(private_bytes(guest, tables, 4 * PAGE), "<u8")
    found: list[int] = (words & np.uint64(~0x60 % 2**64)).tolist()
    return found


def test_the_ghcb_msr_is_the_hosts_to_write_and_changes_nothing() -> None:
    """The host points the MSR at the guest's page tables; the guest keeps to the page that it chose."""
    guest = small()
    guest.boot()
    place, vcpu = Layout.of(guest.vmm.image), guest.vmm.vcpus[0]
    tables = entries(guest, place.tables)
    guest.system.host.cpu.write(vcpu.vmcb + VMCB.offset("ghcb_gpa"), place.tables.to_bytes(8, "little"))
    assert len(guest.request_report(b"")) == 1184
    assert entries(guest, place.tables) == tables

    async def msr(cpu: GuestCpu) -> int:
        value: int = await cpu.rdmsr(Msr.GHCB)
        return value

    assert guest.run(msr) == place.ghcb
