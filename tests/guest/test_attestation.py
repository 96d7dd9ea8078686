"""The sev-guest driver: what it sends, that no number is used twice, and that every change of an answer is found."""

from __future__ import annotations

import errno
from collections.abc import Callable
from hashlib import sha256

import pytest

from snpbook.guest.attestation import request_report
from snpbook.guest.layout import Layout
from snpbook.guest.messages import RequestFailed
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.host.kvm import guest_requests
from snpbook.host.kvm.exchange import Exchange
from snpbook.spec.status import Status
from snpbook.system import Guest
from tests.guest.booted import fresh
from tests.machines import PAGE, poke_private, private_bytes

DATA = bytes(range(64))
SEQNO = 0xA0
"""The sequence number of VMPCK0 in the secrets page."""


@pytest.fixture(params=["rfc-v7", "mainline"])
def guest(request: pytest.FixtureRequest) -> Guest:
    return fresh(request.param)


def place(guest: Guest) -> Layout:
    return Layout.of(guest.vmm.image)


def shared(guest: Guest, gpa: int) -> bytes:
    """A shared page as the host reads it."""
    return guest.vmm.read(gpa, PAGE)


def counter(guest: Guest) -> int:
    return int.from_bytes(private_bytes(guest, place(guest).secrets + SEQNO, 4), "little")


def context(guest: Guest) -> int:
    """The system address of the guest's context page."""
    sev = guest.vmm.vm.sev
    assert sev is not None
    assert sev.gctx is not None
    return sev.gctx


def sent(guest: Guest) -> int:
    """The sequence number of the request that lies in the shared page."""
    return int.from_bytes(shared(guest, place(guest).request)[0x20:0x28], "little")


def test_the_printed_message(guest: Guest) -> None:
    """The vector of the sheet, through the guest's own sealing and past the host's eyes."""
    key = bytes(range(32))
    poke_private(guest, place(guest).secrets + 0x20, key)
    gctx = context(guest)
    processor = guest.system.processor
    processor.save_context(gctx, processor.context(gctx).replace(vmpck0=key))
    assert guest.request_report(DATA)[0x50:0x90] == DATA
    request = shared(guest, place(guest).request)
    assert request[:16].hex() == "0f354f26b13f7433d3674d8eebcaf847"
    assert request[0x60:0x70].hex() == "e22d803ca0aaea00420d0fc830cc86c4"
    assert sha256(request[:0xC0]).hexdigest() == "37986d2e2816e933c1e342b05eac83a78b121d632b6090da8dff837967ad24aa"
    assert request[0xC0:] == bytes(PAGE - 0xC0)


def test_numbers_go_on(guest: Guest) -> None:
    seen = []
    for number in range(3):
        report = guest.request_report(bytes([number]))
        assert report[0x50] == number
        seen.append((sent(guest), counter(guest)))
    assert seen == [(1, 2), (3, 4), (5, 6)]


def test_the_host_sees_no_plaintext(guest: Guest) -> None:
    data = b"a secret question, which nobody but the firmware may read......."
    report = guest.request_report(data)
    for gpa in (place(guest).request, place(guest).response):
        page = shared(guest, gpa)
        assert data[:16] not in page
        assert report[0x90:0xC0] not in page


Serve = Callable[[Exchange], int]


def requests(monkeypatch: pytest.MonkeyPatch, change: Callable[[Serve, Exchange], int]) -> None:
    """A KVM that serves guest requests in its own way: in the guest's pages, or through its own."""
    for name in ("_in_place", "_bounced"):
        honest: Serve = getattr(guest_requests, name)
        monkeypatch.setattr(guest_requests, name, lambda exchange, honest=honest: change(honest, exchange))


def answering(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]) -> None:
    """A KVM that changes the response page behind the firmware's back."""

    def changed(honest: Serve, exchange: Exchange) -> int:
        status, vm = honest(exchange), exchange.vcpu.vm
        vm.write(exchange.info_2, change(vm.read(exchange.info_2, PAGE)))
        return status

    requests(monkeypatch, changed)


def flip(page: bytes, position: int) -> bytes:
    return page[:position] + bytes([page[position] ^ 1]) + page[position + 1 :]


@pytest.mark.parametrize("position", [0, 15, 0x20, 0x30, 0x31, 0x32, 0x34, 0x35, 0x36, 0x3C, 0x5F, 0x60, 0x80, 0x51F])
def test_a_changed_answer_is_found(guest: Guest, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    answering(monkeypatch, lambda page: flip(page, position))
    with pytest.raises(RequestFailed):
        guest.request_report(DATA)


def test_an_old_answer_is_found(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.request_report(DATA)
    old = shared(guest, place(guest).response)
    answering(monkeypatch, lambda _: old)
    with pytest.raises(RequestFailed, match="number 2"):
        guest.request_report(DATA)


def test_its_own_request_is_no_answer(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reflected with the number raised: the type and the tag do not fit."""

    def reflected(_: bytes) -> bytes:
        request = shared(guest, place(guest).request)
        return request[:0x20] + b"\2" + request[0x21:]

    answering(monkeypatch, reflected)
    with pytest.raises(RequestFailed):
        guest.request_report(DATA)


@pytest.mark.parametrize("size", [0xFFF0, 0xFA0 + 1])
def test_an_answer_longer_than_its_page_is_found(guest: Guest, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    answering(monkeypatch, lambda page: page[:0x36] + size.to_bytes(2, "little") + page[0x38:])
    with pytest.raises(RequestFailed):
        guest.request_report(DATA)


def test_the_number_is_written_back_before_the_request_goes_out(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(honest: Serve, exchange: Exchange) -> int:
        seen.append(counter(guest))
        return honest(exchange)

    requests(monkeypatch, look)
    guest.request_report(DATA)
    assert seen == [2]


def test_a_dropped_request_wipes_the_key(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host refuses by itself. Whether the firmware has the message nobody knows, so no other one goes out."""
    with monkeypatch.context() as patch:
        requests(patch, lambda *_: Status.RESOURCE_LIMIT)
        with pytest.raises(RequestFailed, match=r"EIO.*0x17") as caught:
            guest.request_report(DATA)
    assert (caught.value.errno, caught.value.exitinfo2) == (errno.EIO, 0x17)
    first = shared(guest, place(guest).request)
    assert (sent(guest), counter(guest)) == (1, 2)
    assert private_bytes(guest, place(guest).secrets + 0x20, 32) == bytes(32)
    with pytest.raises(RequestFailed, match="ENOTTY"):
        guest.request_report(b"another question")
    assert (shared(guest, place(guest).request), counter(guest)) == (first, 2)


def test_the_last_number_is_not_used(guest: Guest) -> None:
    """The counter in the secrets page has 32 bits: it must not wrap."""
    poke_private(guest, place(guest).secrets + SEQNO, (2**32 - 2).to_bytes(4, "little"))
    with pytest.raises(RequestFailed, match="used up"):
        guest.request_report(DATA)
    assert counter(guest) == 2**32 - 2


def test_a_refused_payload_says_its_status(guest: Guest) -> None:
    """The key that the driver asks for is switched off."""
    gctx = context(guest)
    processor = guest.system.processor
    processor.save_context(gctx, processor.context(gctx).replace(vcek_dis=1))
    with pytest.raises(RequestFailed, match="0x27"):
        guest.request_report(DATA)


@pytest.mark.parametrize("vmpl", [0, 1, 3])
def test_the_report_names_the_vmpl_that_was_asked_for(guest: Guest, vmpl: int) -> None:
    async def program(cpu: GuestCpu) -> bytes:
        return await request_report(cpu, place(guest), DATA, vmpl)

    report: bytes = guest.run(program)
    assert int.from_bytes(report[0x30:0x34], "little") == vmpl


def test_after_a_failure_the_vcpu_can_run_again(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        answering(patch, lambda page: flip(page, 0x60))
        with pytest.raises(RequestFailed, match="EBADMSG"):
            guest.request_report(DATA)
    assert not guest.vmm.vcpus[0].executor.busy
    with pytest.raises(RequestFailed, match="ENOTTY"):
        guest.request_report(DATA)
