"""A guest above an SVSM: what it is launched with, what it finds, how it knows, and what it cannot do by itself."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.guest import processors
from snpbook.guest.acceptance import accept, give_up
from snpbook.guest.boot import Acceptance, Kernel, start
from snpbook.guest.calling_area import CallingArea, remapped
from snpbook.guest.conversions import make_shared
from snpbook.guest.layout import Layout
from snpbook.guest.messages import Channel, RequestFailed
from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.vmm.configuration import DirectBoot, VmmError
from snpbook.spec.ghcb import MsrCode
from snpbook.spec.image import ImageError
from snpbook.spec.messages import MessageType
from snpbook.spec.resources import resource
from snpbook.spec.uapi_kvm import Exit
from snpbook.spec.vmsa import VCPU_TYPES
from snpbook.system import Guest
from snpbook.tools.sample_image import build_svsm
from tests.guest.svsm_world import AREA, CPUID, SECRETS, STATE, TABLES, ended, fresh, pvalidate, rights, run
from tests.machines import MIB, PAGE, booted, frame_of, launched, poke_private, private_bytes

GUEST_SECRETS, GUEST_CPUID = 0x80D000, 0x80E000
C_BIT = 51


def kernel(guest: Guest, body: Any, vcpu: int = 0) -> Any:
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        return await body(await Kernel.attach(cpu, place))

    return guest.run(program, vcpu)


# The launch.


def test_the_digest_is_that_of_what_was_loaded(tmp_path: Path) -> None:
    """Held against sev-snp-measure, which knows nothing of this package."""
    measure = pytest.importorskip("sevsnpmeasure.guest")
    guest = fresh()
    files = {"fd": guest.vmm.image.data, "svsm": resource("data", "firmware", "svsm.bin").read_bytes()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    signature = int(VCPU_TYPES["EPYC-Milan"])
    expected = measure.svsm_calc_launch_digest(2, signature, str(tmp_path / "fd"), 0, str(tmp_path / "svsm"), False)
    report = guest.request_report(b"n")
    assert report[0x90:0xC0] == expected == guest.system.owner(guest).expected_measurement


def test_the_image_is_as_its_maker_makes_it() -> None:
    assert resource("data", "firmware", "svsm.bin").read_bytes() == build_svsm()


def test_where_an_svsm_cannot_be() -> None:
    with pytest.raises(VmmError, match="on mainline"):
        booted(era="mainline").create_vm(svsm=True)
    system = booted(era="svsm-host")
    with pytest.raises(VmmError, match="sev-es"):
        system.create_vm(svsm=True, kind="sev-es")
    with pytest.raises(VmmError, match="kernel hashes"):
        system.create_vm(svsm=True, boot=DirectBoot(b"kernel"))


def test_an_image_that_is_no_svsm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snpbook.system.SAMPLE_SVSM", ("data", "firmware", "sample.fd"))
    with pytest.raises(ImageError, match="no SVSM"):
        booted(era="svsm-host").create_vm(svsm=True)


# What the guest finds.


def test_the_secrets_page_has_no_key_of_a_more_privileged_vmpl() -> None:
    guest = fresh()
    own, told = private_bytes(guest, SECRETS, PAGE), private_bytes(guest, GUEST_SECRETS, PAGE)
    assert any(own[0x20:0x40])
    assert told[0x20:0x60] == bytes(64)
    assert (told[0x60:0xA0], told[:0x20]) == (own[0x60:0xA0], own[:0x20])
    assert any(told[0x60:0x80])
    size = (1 << 32) - len(guest.vmm.image.data) - TABLES
    assert struct.unpack("<QQQIB", told[0x140:0x15D]) == (TABLES, size, 0x80F000, 1, 2)
    assert told[0xA0:0x140] == own[0xA0:0x140]
    assert told[0x15D:] == own[0x15D:]


def test_the_cpuid_page_tells_of_the_svsm() -> None:
    guest = fresh()
    own, told = (bytearray(private_bytes(guest, at, PAGE)) for at in (CPUID, GUEST_CPUID))
    (count,) = struct.unpack_from("<I", own)
    changed = []
    for number in range(count):
        at = 16 + 48 * number
        if own[at : at + 48] != told[at : at + 48]:
            changed.append(struct.unpack_from("<I", own, at)[0])
            before, after = (struct.unpack_from("<I", page, at + 24)[0] for page in (own, told))
            assert after == before | 1 << 28 != before
            struct.pack_into("<I", told, at + 24, before)
    assert changed == [0x8000001F]
    assert own == told


def test_the_guest_has_all_of_its_ram_and_nothing_of_the_svsms() -> None:
    guest = fresh()
    rmp, slots = guest.system.machine.rmp, list(guest.vmm.vm.slots)

    def granted(gfns: range) -> np.ndarray[Any, Any]:
        slot = next(slot for slot in slots if gfns.start in slot.gfns)
        assert slot.private is not None
        return rmp.peek(slot.private.frames(slot, gfns))[:, 1] >> np.uint64(8)

    ram = range(4, 12 * MIB // PAGE)
    assert guest.vmm.vm.is_private(ram).all()
    assert (granted(ram) == 0xF00).all(), "read, write and execute for VMPL2, nothing for VMPL1 and 3"
    own = [page for page in range(TABLES // PAGE, 0xFEF53000 // PAGE) if page != 0xFEF14]
    assert (granted(range(own[0], own[-1] + 1))[[page - own[0] for page in own]] & 0xFF00 == 0).all()
    assert rights(guest, 0xFEF14000) == ([0xF, 0, 1, 0], True, True)
    assert rights(guest, 0xFEF15000)[:2] == ([0xF, 0, 0, 0], True), "VMPL0 of the second processor"
    image = range(guest.vmm.svsm_gpa // PAGE, guest.vmm.image.gpa // PAGE)
    assert (granted(image) & 0xFF00 == 0).all()
    assert (granted(range(guest.vmm.image.gpa // PAGE, 1 << 20)) == 0xF00).all()


def test_the_guest_knows_its_level() -> None:
    async def body(kernel: Kernel) -> Any:
        return kernel.vmpl, await kernel.cpu.rdmsr(0xC001F000), (await kernel.cpu.cpuid(0x8000001F)).eax >> 28 & 1

    guest = fresh()
    vcpu = guest.vmm.vcpus[0]
    intercepts = bytearray(vcpu.control().intercepts)
    intercepts[0x7C // 8] |= 1 << 0x7C % 8  # MSRs outside of the permission map's ranges, as Linux has it
    guest.system.host.cpu.write(vcpu.vmcb, bytes(intercepts))
    assert kernel(guest, body) == (2, AREA, 1)
    assert guest.dmesg[1] == "SEV: SNP running at VMPL2."


def test_what_vmpl2_cannot_do_by_itself() -> None:
    """PVALIDATE is a #GP, RMPADJUST of its own level refused, and the SVSM's memory out of reach."""

    async def body(cpu: GuestCpu) -> list[Any]:
        found: list[Any] = [
            (await cpu.rmpadjust(0x300000, 1, vmpl=level, permissions=0)).tolist() for level in range(3)
        ]
        try:
            await cpu.pvalidate(0x300000, 1)
        except GuestException as fault:
            found.append(fault.vector)
        return found

    guest = fresh()
    assert run(guest, body) == [[2], [2], [2], 13]

    async def spy(cpu: GuestCpu) -> bytes:
        data: bytes = await cpu.read(SECRETS + 0x20, 32)
        return data

    with pytest.raises(OSError, match="ELOOP"):
        run(guest, spy)


def test_a_report_by_a_key_that_it_does_not_have() -> None:
    guest = fresh()

    async def body(kernel: Kernel) -> int:
        try:
            await Channel(kernel.channel, kernel.place, 0).exchange(MessageType.REPORT_REQ, bytes(96))
        except RequestFailed as failed:
            return failed.errno or 0
        return 0

    assert kernel(guest, body) == 25, "ENOTTY: VMPCK0 is zeros"
    report = guest.request_report(b"n")
    assert struct.unpack_from("<I", report, 0x30) == (2,)


# How it knows.


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [(0x000, bytes(4), 6), (0x148, bytes(8), 7), (0x15C, b"\0", 8), (0x150, (0x80F008).to_bytes(8, "little"), 9)],
)
def test_secrets_pages_that_cannot_be(place: int, value: bytes, reason: int) -> None:
    guest = fresh()
    layout = Layout.of(guest.vmm.image)
    poke_private(guest, GUEST_SECRETS + place, value)

    async def again(cpu: GuestCpu) -> None:
        await start(cpu, layout)

    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        run(guest, again)
    assert ended(guest) == (1, reason)


def test_a_host_that_does_not_run_other_vmpls() -> None:
    """Without feature bit 5 a guest above VMPL0 has nobody to ask: reason 3."""
    guest = fresh()
    layout = Layout.of(guest.vmm.image)

    def host(moment: Moment) -> None:
        if moment.stage is Stage.ENTRY and moment.code is MsrCode.FEATURES_REQUEST:
            moment.answer_msr(0x3 << 12 | 0x081)

    async def again(cpu: GuestCpu) -> None:
        await start(cpu, layout)

    tamper(guest, host)
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        run(guest, again)
    assert ended(guest) == (1, 3)


def test_a_calling_area_that_is_refused() -> None:
    async def body(cpu: GuestCpu) -> None:
        await remapped(CallingArea(cpu, AREA, 2), STATE)

    guest = fresh()
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        run(guest, body)
    assert ended(guest) == (1, 11)


# Its memory.


def test_pages_change_sides_through_the_svsm() -> None:
    pages = range(0x3FE, 0x403)

    async def body(kernel: Kernel) -> Any:
        await give_up(kernel.channel, pages)
        between = [rights(guest, page * PAGE)[2] for page in pages]
        await accept(kernel.channel, pages)
        await kernel.cpu.write(pages.start * PAGE, b"for us alone")
        return between

    guest = fresh()
    frames = [frame_of(guest.vmm.vm, page * PAGE) for page in pages]
    assert kernel(guest, body) == [False] * 5
    assert private_bytes(guest, pages.start * PAGE, 12) == b"for us alone"
    assert len(frames) == 5


@pytest.mark.parametrize("act", [accept, give_up])
def test_the_same_again_ends_the_guest(act: Any) -> None:
    async def body(kernel: Kernel) -> None:
        if act is give_up:
            assert await pvalidate(kernel.cpu, 0x300000) == (0, 1)
        await act(kernel.channel, range(0x300, 0x301))

    guest = fresh()
    with pytest.raises(RuntimeError, match="SYSTEM_EVENT"):
        kernel(guest, body)
    assert ended(guest) == (1, 2)


def test_lazy_acceptance() -> None:
    """The same report, ids apart, as with eager acceptance, and fewer validations; units come as they are used."""
    guest = launched(booted(era="svsm-host"), memory="12 MiB", vcpus=2, svsm=True)
    accepted = guest.boot(Acceptance.LAZY)
    assert accepted < fresh().accepted == accepted + 3 * 2 * MIB
    assert guest.request_report(b"n")[:0x140] == fresh().request_report(b"n")[:0x140]
    assert private_bytes(guest, STATE + 32, 32) == private_bytes(fresh(), STATE + 32, 32), "one seed, one vTPM"

    async def body(kernel: Kernel) -> Any:
        table = kernel.unaccepted
        return await table.accept(range(0x210, 0x211)), (await table.left()).nonzero()[0].tolist()

    before = guest.system.counts.pages_validated
    assert kernel(guest, body) == (512, [2, 3])
    assert guest.system.counts.pages_validated - before == 512


# Its processors.


def start_second(guest: Guest) -> None:
    async def boss(kernel: Kernel) -> None:
        await make_shared(kernel.channel, kernel.place, C_BIT, range(0x280, 0x281))
        await processors.start(kernel.channel, 1, 0x301000, vector=0x10, features=1, calling_area=0x302000)

    kernel(guest, boss)


def second(guest: Guest, body: Any) -> Any:
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        return await body(await processors.online(cpu, place, 0x280000, 0x302000))

    return guest.run(program, 1)


@pytest.mark.parametrize("waits", [False, True])
def test_a_second_processor_has_the_svsm_validate_for_it(waits: bool) -> None:
    """Whether its VMPL0 has run before, and waits, or begins with the first call."""
    guest = fresh()
    if waits:
        assert guest.vmm.run(1) is Exit.HLT
    start_second(guest)

    async def body(kernel: Kernel) -> Any:
        await give_up(kernel.channel, range(0x500, 0x501))
        await accept(kernel.channel, range(0x500, 0x501))
        await kernel.cpu.write(0x500000, b"left by the second")
        return kernel.vmpl, await kernel.cpu.look("vmpl")

    assert second(guest, body) == (2, (2,))
    assert private_bytes(guest, 0x500000, 18) == b"left by the second"
    assert rights(guest, 0x301000) == ([0xF, 0, 1, 0], True, True)


def test_it_is_stopped_and_its_page_is_ordinary_again() -> None:
    guest = fresh()
    start_second(guest)

    async def boss(kernel: Kernel) -> bytes:
        await processors.stop(kernel.channel, 1, 0x301000)
        await kernel.cpu.write(0x301000, b"ordinary")
        data: bytes = await kernel.cpu.read(0x301000, 8)
        return data

    assert kernel(guest, boss) == b"ordinary"
    assert rights(guest, 0x301000) == ([0xF, 0, 0xF, 0], False, True)
