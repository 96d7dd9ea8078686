"""/dev/sev-guest and the attestation directory: structures by their offsets, the user's errors, the host's answers."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Any

import pytest

from snpbook.guest.attestation import derive_key
from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.guest.messages import RequestFailed
from snpbook.guest.process import Process
from snpbook.guest.sev_guest import SevGuest
from snpbook.guest.tsm import ReportEntry
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm import guest_requests
from snpbook.host.kvm.exchange import Exchange
from snpbook.spec.ghcb import Nae
from snpbook.system import Guest
from snpbook.trace import VmExit
from tests.guest.booted import fresh
from tests.machines import PAGE, poke_private, private_bytes

REPORT, KEY, EXT = 0xC0205300, 0xC0205301, 0xC0205302
USER = range(0x300000, 0x310000)
REQ, RESP, CERTS = USER.start, USER.start + 0x2000, USER.start + 0x4000
DEVICE = "/dev/sev-guest"
NONCE = bytes(range(64))
Act = Callable[[Process, int], Any]


@pytest.fixture
def guest() -> Guest:
    return fresh()


def program(guest: Guest, act: Act) -> Any:
    """A user's program with the device open: what `act` returns, or the errno that it failed with."""

    async def body(cpu: GuestCpu) -> Any:
        kernel = await Kernel.attach(cpu, Layout.of(guest.vmm.image))
        process = Process(cpu, USER, {DEVICE: SevGuest(kernel)})
        return await act(process, process.open(DEVICE))

    return guest.run(body)


def ioctl(number: int, data: bytes, answer: int, *, version: int = 1, req: int = REQ, resp: int = RESP) -> Act:
    """Put a request into memory, call: (errno or 0, exitinfo2, response, request)."""

    async def act(process: Process, descriptor: int) -> tuple[int, int, bytes, bytes]:
        await process.store(REQ, data)
        argument, failed = bytearray(struct.pack("<B7xQQQ", version, req, resp, 0)), 0
        try:
            await process.ioctl(descriptor, number, argument)
        except OSError as error:
            failed = error.errno or -1
        (info,) = struct.unpack_from("<Q", argument, 24)
        return failed, info, await process.load(RESP, answer), await process.load(REQ, len(data))

    return act


def report_request(vmpl: int = 0) -> bytes:
    return NONCE + struct.pack("<I28x", vmpl)


def extended(address: int = CERTS, length: int = 0x1000) -> bytes:
    return report_request() + struct.pack("<QI4x", address, length)


def secrets(guest: Guest) -> int:
    return Layout.of(guest.vmm.image).secrets


def key_is_wiped(guest: Guest) -> bool:
    return private_bytes(guest, secrets(guest) + 0x20, 32) == bytes(32)


# What works.


def test_report(guest: Guest) -> None:
    failed, info, answer, _ = program(guest, ioctl(REPORT, report_request(), 4000))
    assert (failed, info) == (0, 0)
    assert struct.unpack_from("<II", answer) == (0, 0x4A0)
    assert answer[0x20 + 0x50 : 0x20 + 0x90] == NONCE
    assert answer[0x20 + 0x4A0 :] == bytes(4000 - 0x20 - 0x4A0)
    assert private_bytes(guest, secrets(guest) + 0xA0, 4) == b"\2\0\0\0"


def test_derived_keys(guest: Guest) -> None:
    """The same for the same, another for another; the guest's own request has the same key."""

    def request(select: int, svn: int = 0) -> bytes:
        return struct.pack("<IIQIIQ", 0, 0, select, 0, svn, 0)

    keys = [program(guest, ioctl(KEY, request(select), 64)) for select in (0, 0, 8)]
    assert [each[:2] for each in keys] == [(0, 0)] * 3
    found = [each[2][0x20:0x40] for each in keys]
    assert found[0] == found[1] != found[2]

    async def own(cpu: GuestCpu) -> bytes:
        return await derive_key(cpu, Layout.of(guest.vmm.image), guest_field_select=8)

    assert guest.run(own) == found[2]


def test_extended_report(guest: Guest) -> None:
    """KVM 6.12 has no certificates: an empty table."""
    failed, info, answer, _ = program(guest, ioctl(EXT, extended(), 4000))
    assert (failed, info) == (0, 0)
    assert answer[0x20 + 0x50 : 0x20 + 0x90] == NONCE
    assert program(guest, ioctl(EXT, extended(length=0), 4000))[:2] == (0, 0)


# The user's errors.

BAD: dict[str, tuple[int, bytes, dict[str, int], int]] = {
    "version 0": (REPORT, report_request(), {"version": 0}, errno.EINVAL),
    "no request": (REPORT, report_request(), {"req": 0}, errno.EINVAL),
    "no response": (KEY, bytes(32), {"resp": 0}, errno.EINVAL),
    "request outside": (REPORT, report_request(), {"req": USER.stop - 95}, errno.EFAULT),
    "kernel memory": (REPORT, report_request(), {"req": 0x80D000}, errno.EFAULT),
    "unknown call": (0xC0205303, report_request(), {}, errno.ENOTTY),
    "certificates of no pages": (EXT, extended(length=0x1001), {}, errno.EINVAL),
    "too many certificates": (EXT, extended(length=0x5000), {}, errno.EINVAL),
    "certificates outside": (EXT, extended(USER.stop - 0xFFF), {}, errno.EFAULT),
}


@pytest.mark.parametrize("name", list(BAD))
def test_the_users_errors_cost_nothing(guest: Guest, name: str) -> None:
    number, data, options, expected = BAD[name]
    assert program(guest, ioctl(number, data, 64, **options))[0] == expected
    assert not key_is_wiped(guest)
    assert private_bytes(guest, secrets(guest) + 0xA0, 4) == bytes(4)


def test_descriptors() -> None:
    process = Process(GuestCpu(), USER, {DEVICE: None})  # type: ignore[dict-item]
    assert [process.open(DEVICE), process.open(DEVICE)] == [3, 4]
    process.close(3)
    assert process.open(DEVICE) == 3
    for act in (lambda: process.open("/dev/tdx_guest"), lambda: process.close(9)):
        with pytest.raises(OSError, match=r"ENOENT|EBADF"):
            act()


# The host's answers.


def answering(monkeypatch: pytest.MonkeyPatch, *info2: int, pages: int = 0) -> list[tuple[int, bytes]]:
    """A KVM that answers the first requests so by itself: the events, and the messages that it saw."""
    left, seen, honest = list(info2), [], Exchange.close

    def close(exchange: Exchange) -> None:
        if exchange.event in guest_requests.EVENTS:
            message = exchange.vcpu.vm.read(exchange.info_1, PAGE)
            seen.append((exchange.event, message))
            if left:
                exchange.answer(info_2=left.pop(0))
                if pages:
                    exchange.vcpu.state = exchange.vcpu.state.replace(rbx=pages)
        honest(exchange)

    monkeypatch.setattr(Exchange, "close", close)
    return seen


def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that never reach the firmware."""
    monkeypatch.setattr(guest_requests, "_bounced", lambda exchange: 0)


def test_a_busy_host_gets_the_same_message_again(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = guest_requests._bounced, []

    def busy(exchange: Exchange) -> Any:
        calls.append(1)
        return 2 << 32 if len(calls) <= 3 else honest(exchange)

    monkeypatch.setattr(guest_requests, "_bounced", busy)
    seen = answering(monkeypatch)
    assert program(guest, ioctl(REPORT, report_request(), 4000))[:2] == (0, 0)
    assert len(seen) == 4
    assert len({message for _, message in seen}) == 1


def test_a_host_that_stays_busy(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    dropping(monkeypatch)
    seen = answering(monkeypatch, *[2 << 32] * 99)
    assert program(guest, ioctl(REPORT, report_request(), 64))[:2] == (errno.ETIMEDOUT, 2 << 32)
    assert len(seen) == 30
    assert key_is_wiped(guest)
    assert program(guest, ioctl(REPORT, report_request(), 64))[0] == errno.ENOTTY


def test_too_few_pages_for_certificates(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is used up by the same message without certificates, the key stays, the user learns how many."""
    honest, first = guest_requests._bounced, []

    def once(exchange: Exchange) -> Any:
        first.append(1)
        return honest(exchange) if len(first) > 1 else 0

    monkeypatch.setattr(guest_requests, "_bounced", once)
    seen = answering(monkeypatch, 1 << 32, pages=3)
    failed, info, _, request = program(guest, ioctl(EXT, extended(), 64))
    assert (failed, info) == (errno.EIO, 1 << 32)
    assert struct.unpack_from("<I", request, 104) == (3 * PAGE,)
    assert [event for event, _ in seen] == [Nae.EXTENDED_GUEST_REQUEST, Nae.GUEST_REQUEST]
    assert seen[0][1] == seen[1][1]
    assert not key_is_wiped(guest)
    monkeypatch.undo()
    assert program(guest, ioctl(EXT, extended(length=0x3000), 4000))[:2] == (0, 0)


@pytest.mark.parametrize("info2", [1 << 32, 3 << 32, 0x16, 0xFFFFFFFF, 0x1D | 5 << 32])
def test_any_other_refusal_wipes_the_key(guest: Guest, monkeypatch: pytest.MonkeyPatch, info2: int) -> None:
    answering(monkeypatch, info2)
    assert program(guest, ioctl(REPORT, report_request(), 64))[:2] == (errno.EIO, info2)
    assert key_is_wiped(guest)


def test_without_numbers_left(guest: Guest) -> None:
    poke_private(guest, secrets(guest) + 0xA0, b"\xff\xff\xff\xff")
    assert program(guest, ioctl(REPORT, report_request(), 64))[:2] == (errno.EIO, 0xFFFFFFFF)
    assert not key_is_wiped(guest)


# The directory.


def entry(guest: Guest, act: Callable[[ReportEntry], Any]) -> Any:
    async def body(cpu: GuestCpu) -> Any:
        kernel = await Kernel.attach(cpu, Layout.of(guest.vmm.image))
        return await act(ReportEntry(SevGuest(kernel)))

    return guest.run(body)


def test_an_entry_keeps_its_report_until_it_is_written_to(guest: Guest) -> None:
    async def act(report: ReportEntry) -> Any:
        report.write_inblob(NONCE)
        first = await report.outblob()
        again, aux = await report.outblob(), await report.auxblob()
        generation = report.generation
        report.write_privlevel(2)
        return first, again, aux, await report.outblob(), generation, report.generation, report.provider

    log = guest.system.record()
    first, again, aux, other, before, after, provider = entry(guest, act)
    assert first == again != other
    assert (len(first), first[0x50:0x90], aux) == (0x4A0, NONCE, b"")
    assert other[0x30:0x34] == b"\2\0\0\0"
    assert (before, after, provider) == (1, 2, "sev_guest")
    assert private_bytes(guest, secrets(guest) + 0xA0, 4) == b"\4\0\0\0", "two messages"
    assert log.of(VmExit)


def error_of(act: Callable[[], Any]) -> int:
    with pytest.raises(OSError, match=r"E[A-Z]+") as caught:
        act()
    return caught.value.errno or 0


def test_what_an_entry_refuses(guest: Guest) -> None:
    async def act(report: ReportEntry) -> list[int]:
        found = []
        for blob in (None, bytes(63)):
            if blob is not None:
                report.write_inblob(blob)
            try:
                await report.outblob()
            except OSError as error:
                found.append(error.errno or 0)
        wrong: list[Callable[[], None]] = [
            lambda: report.write_inblob(bytes(65)), lambda: report.write_inblob(b""),
            lambda: report.write_privlevel(4), lambda: report.write_privlevel(-1),
            lambda: report.write_service_provider("tdx"),
        ]  # fmt: skip
        return [*found, *(error_of(each) for each in wrong), report.generation]

    assert entry(guest, act) == [errno.EINVAL] * 7 + [1]
    assert error_of(lambda: ReportEntry(None).provider) == errno.ENXIO


def test_a_level_below_the_floor() -> None:
    report = ReportEntry(SevGuest(None, vmpl=2))  # type: ignore[arg-type]
    assert report.privlevel_floor == 2
    assert error_of(lambda: report.write_privlevel(1)) == errno.EINVAL
    report.write_privlevel(3)


@pytest.mark.parametrize(("field", "number"), [("vcek_dis", errno.EINVAL)])
def test_a_status_of_the_firmware(guest: Guest, field: str, number: int) -> None:
    sev = guest.vmm.vm.sev
    assert sev is not None
    assert sev.gctx is not None
    processor = guest.system.processor
    processor.save_context(sev.gctx, processor.context(sev.gctx).replace(**{field: 1}))

    async def act(report: ReportEntry) -> int:
        report.write_inblob(NONCE)
        try:
            await report.outblob()
        except RequestFailed as error:
            return error.errno or 0
        return 0

    assert entry(guest, act) == number
    assert not key_is_wiped(guest)
