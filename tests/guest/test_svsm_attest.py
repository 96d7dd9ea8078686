"""The SVSM's attestation protocol from its guest's side, through its calls and through configfs-tsm."""

from __future__ import annotations

import errno
import struct
from hashlib import sha512
from typing import Any
from uuid import UUID

import pytest

from snpbook.attacks.ghcb import Moment, Stage, tamper
from snpbook.attest.certs import Certificate
from snpbook.attest.roots import named_roots
from snpbook.attest.verify import VerifiedReport, verify
from snpbook.guest.boot import Kernel
from snpbook.guest.layout import Layout
from snpbook.guest.messages import RequestFailed
from snpbook.guest.process import SystemCallFailed
from snpbook.guest.sev_guest import SevGuest
from snpbook.guest.tsm import ReportEntry
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.ghcb import Nae
from snpbook.system import NOW, Guest, Outcome
from tests.guest.booted import fresh as without
from tests.guest.svsm_world import (
    ADDRESS,
    ATTEST,
    BUFFER,
    FIRST_VMSA,
    OK,
    PARAMETER,
    REQUEST,
    SECRETS,
    STATE,
    UNSUPPORTED_PROTOCOL,
    call,
    fresh,
    pvalidate,
    run,
)  # fmt: skip
from tests.machines import PAGE, poke_private, private_bytes

VTPM_GUID = UUID("c476f1eb-0123-45a5-9641-b4e7dde5bfe3")
NONCE = bytes(range(64))
NONCE_AT, REPORT, MANIFEST, CERTIFICATES = 0x300000, 0x301000, 0x302000, 0x304000
SERVICES, SINGLE = 0, 1
REPORT_SIZE, EK_SIZE, ALL_SIZE = 1184, 314, 24 + 24 + 314
PLACES = {
    "report_gpa": (0x00, "Q"), "report_size": (0x08, "I"), "nonce_gpa": (0x10, "Q"), "nonce_size": (0x18, "H"),
    "manifest_gpa": (0x20, "Q"), "manifest_size": (0x28, "I"), "cert_gpa": (0x30, "Q"), "cert_size": (0x38, "I"),
    "version": (0x50, "I"),
}  # fmt: skip
GOOD = {
    "report_gpa": REPORT, "report_size": 0x1000, "nonce_gpa": NONCE_AT, "nonce_size": 64, "manifest_gpa": MANIFEST,
    "manifest_size": 0x1000, "cert_gpa": 0, "cert_size": 0,
}  # fmt: skip


def operation(single: bool, guid: UUID = VTPM_GUID, stray: int | None = None, **fields: int) -> bytes:
    """The structure of a call; `stray` is a byte that should be zero."""
    raw = bytearray(0x58 if single else 0x40)
    for name, value in {**GOOD, **fields}.items():
        place, form = PLACES[name]
        struct.pack_into("<" + form, raw, place, value)
    if single:
        raw[0x40:0x50] = guid.bytes_le
    if stray is not None:
        raw[stray] = 1
    return bytes(raw)


async def attest(cpu: GuestCpu, number: int = SERVICES, raw: bytes | None = None, at: int = BUFFER) -> Any:
    await cpu.write(at, operation(number == SINGLE) if raw is None else raw)
    return await call(cpu, ATTEST, number, at)


def verified(guest: Guest, report: bytes) -> VerifiedReport:
    chain = [Certificate.read(der) for der in guest.system.certificates()]
    return verify(report, chain, named_roots("toy"), NOW)


@pytest.mark.parametrize("number", [SERVICES, SINGLE])
def test_a_report_that_binds_the_manifest(number: int) -> None:
    async def body(cpu: GuestCpu) -> Any:
        await cpu.write(NONCE_AT, NONCE)
        registers = await attest(cpu, number)
        return registers, await cpu.read(REPORT, REPORT_SIZE), await cpu.read(MANIFEST, registers[1])

    guest = fresh()
    registers, report, manifest = run(guest, body)
    size = EK_SIZE if number == SINGLE else ALL_SIZE
    assert registers == (OK, size, 0, REPORT_SIZE)
    found = verified(guest, report).report.fields
    assert found.report_data == sha512(NONCE + manifest).digest()
    assert found.vmpl == 0
    assert guest.system.owner(guest).verify(report).outcome is Outcome.ACCEPTED
    public = manifest if number == SINGLE else manifest[48:]
    if number == SERVICES:
        assert manifest[:24] == UUID("63849ebb-3d92-4670-a1ff-58f9c94b87bb").bytes_le + struct.pack("<II", size, 1)
        assert manifest[24:48] == VTPM_GUID.bytes_le + struct.pack("<II", 48, EK_SIZE)
    head = "0001 000b 000300b2 0020 837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
    assert public[: len(bytes.fromhex(head))].hex() == head.replace(" ", "")
    assert public[42:58].hex() == "0006008000430010080000000000" + "0100"
    assert int.from_bytes(public[58:], "big").bit_length() == 2048


BAD: dict[str, tuple[dict[str, Any], int]] = {
    "nonce of 63 bytes": ({"nonce_size": 63}, PARAMETER), "nonce of 65": ({"nonce_size": 65}, PARAMETER),
    "nonce across pages": ({"nonce_gpa": NONCE_AT + PAGE - 63}, PARAMETER),
    "nonce in the SVSM": ({"nonce_gpa": SECRETS + 0x20}, ADDRESS),
    "nonce beyond RAM": ({"nonce_gpa": 1 << 40}, ADDRESS),
    "report not a page": ({"report_gpa": REPORT + 8}, PARAMETER),
    "manifest not a page": ({"manifest_gpa": MANIFEST + 8}, PARAMETER),
    "certificates not a page": ({"cert_gpa": CERTIFICATES + 8, "cert_size": PAGE}, PARAMETER),
    "too many certificates": ({"cert_gpa": CERTIFICATES, "cert_size": 0x4001}, PARAMETER),
    "report into the SVSM": ({"report_gpa": SECRETS}, ADDRESS),
    "manifest into the SVSM": ({"manifest_gpa": STATE}, ADDRESS),
    "certificates into the SVSM": ({"cert_gpa": SECRETS, "cert_size": PAGE}, ADDRESS),
    "report into a save area": ({"report_gpa": FIRST_VMSA}, ADDRESS),
    "report beyond RAM": ({"report_gpa": 1 << 40}, ADDRESS), "at the end of RAM": ({"report_gpa": 12 << 20}, ADDRESS),
    "manifest over the end of RAM": ({"manifest_gpa": (12 << 20) - PAGE, "manifest_size": 2 * PAGE}, ADDRESS),
    **{f"byte {byte:#x}": ({"stray": byte}, PARAMETER) for byte in (0x0C, 0x0F, 0x1A, 0x1F, 0x2C, 0x3F)},
}  # fmt: skip


def test_what_is_refused_costs_no_message() -> None:
    async def body(cpu: GuestCpu) -> dict[str, list[int]]:
        return {
            name: [(await attest(cpu, number, operation(bool(number), **options)))[0] for number in (SERVICES, SINGLE)]
            for name, (options, _) in BAD.items()
        }

    guest = fresh()
    before = private_bytes(guest, SECRETS, PAGE), private_bytes(guest, STATE, PAGE)
    assert run(guest, body) == {name: [code, code] for name, (_, code) in BAD.items()}
    assert (private_bytes(guest, SECRETS, PAGE), private_bytes(guest, STATE, PAGE)) == before, "no number is used"


def test_single_services_that_are_refused() -> None:
    async def body(cpu: GuestCpu) -> list[int]:
        other, text = UUID("a4453a59-9e1b-4787-a033-1986d6adbe55"), VTPM_GUID.bytes
        asked = [
            operation(True, other), operation(True, UUID(bytes=text[::-1])), operation(True, version=1),
            operation(True, stray=0x54), operation(True, UUID(int=0)),
        ]  # fmt: skip
        return [(await attest(cpu, SINGLE, raw))[0] for raw in asked]

    unknown = UNSUPPORTED_PROTOCOL
    assert run(fresh(), body) == [unknown, unknown, PARAMETER, PARAMETER, unknown]


def test_operations_that_are_not_the_guests() -> None:
    async def body(cpu: GuestCpu) -> list[int]:
        await pvalidate(cpu, 0x305000)
        return [(await call(cpu, ATTEST, 0, at))[0] for at in (SECRETS, 1 << 40, FIRST_VMSA, 0x305000)]

    assert run(fresh(), body) == [ADDRESS] * 4


def test_buffers_that_are_too_small_are_told_how_large() -> None:
    async def body(cpu: GuestCpu) -> list[Any]:
        small: list[dict[str, Any]] = [
            {"manifest_size": ALL_SIZE - 1},
            {"report_size": REPORT_SIZE - 1},
            {"manifest_size": 0},
        ]
        found = [await attest(cpu, SERVICES, operation(False, **each)) for each in small]
        return [*found, await attest(cpu, SERVICES, operation(False, manifest_size=ALL_SIZE, report_size=REPORT_SIZE))]

    told = (ALL_SIZE, 0, REPORT_SIZE)
    assert run(fresh(), body) == [(PARAMETER, *told)] * 3 + [(OK, *told)]


def test_certificates_of_the_host() -> None:
    """A host with a table of two pages: one is too few, and RDX says how many bytes it takes."""
    guest, table = fresh(), b"\x01" * 24 + bytes(24) + b"certificate" * 600

    def host(moment: Moment) -> None:
        if moment.event is not Nae.EXTENDED_GUEST_REQUEST:
            return
        assert moment.page is not None
        if moment.stage is Stage.EXIT and moment.page.rbx < 2:
            moment.keep()
            moment.put(sw_exit_info_1=0, sw_exit_info_2=1 << 32, rbx=2)
            moment.mark("sw_exit_info_1", "sw_exit_info_2", "rbx")
        elif moment.stage is Stage.ENTRY and moment.page.rbx >= 2:
            moment.write(moment.page.rax, table)

    async def body(cpu: GuestCpu) -> list[Any]:
        found = [
            await attest(cpu, SERVICES, operation(False, cert_gpa=CERTIFICATES, cert_size=size))
            for size in (PAGE, 0x4000)
        ]
        return [*found, await cpu.read(CERTIFICATES, 2 * PAGE)]

    tamper(guest, host)
    small, large, got = run(guest, body)
    assert small == (PARAMETER, ALL_SIZE, 2 * PAGE, REPORT_SIZE)
    assert large == (OK, ALL_SIZE, 0x4000, REPORT_SIZE)
    assert got.rstrip(b"\0") == table


def test_a_buffer_that_becomes_a_save_area_meanwhile() -> None:
    """While the host fetches the report, another processor has made a save area of the buffer: it is not written."""
    guest = fresh()

    def host(moment: Moment) -> None:
        if moment.stage is Stage.EXIT and moment.event is Nae.GUEST_REQUEST:
            poke_private(guest, STATE + PAGE + 5 * 32, struct.pack("<QQIBB", REPORT, 0x30F000, 1, 1, 1))

    async def body(cpu: GuestCpu) -> Any:
        await cpu.write(REPORT, bytes(PAGE))
        return (await attest(cpu))[0]

    tamper(guest, host)
    assert run(guest, body) == ADDRESS
    assert private_bytes(guest, REPORT, PAGE) == bytes(PAGE)


def test_a_firmware_that_refuses() -> None:
    """The SVSM's message key is gone: its guest hears INVALID_REQUEST, and the SVSM goes on."""
    guest = fresh()
    poke_private(guest, SECRETS + 0x20, bytes(32))

    async def body(cpu: GuestCpu) -> list[Any]:
        return [(await attest(cpu))[0], (await call(cpu, 0, 6, 1))[0]]

    assert run(guest, body) == [REQUEST, OK]


# configfs-tsm.


def entry_of(kernel: Kernel) -> ReportEntry:
    entry = ReportEntry(SevGuest(kernel, kernel.vmpl, range(0x300, 0x307)))
    entry.write_inblob(NONCE)
    return entry


def tsm(guest: Guest, body: Any) -> Any:
    place = Layout.of(guest.vmm.image)

    async def program(cpu: GuestCpu) -> Any:
        return await body(entry_of(await Kernel.attach(cpu, place)))

    return guest.run(program)


def test_the_attestation_directory() -> None:
    async def body(entry: ReportEntry) -> list[Any]:
        entry.write_privlevel(2)
        own = await entry.outblob()
        entry.write_service_provider("svsm")
        all_services = await entry.outblob(), await entry.manifestblob(), await entry.auxblob()
        entry.write_service_guid(str(VTPM_GUID))
        entry.write_service_manifest_version(0)
        one = await entry.outblob(), await entry.manifestblob()
        entry.write_service_guid(str(UUID(int=0)))
        return [own, all_services, one, len(await entry.manifestblob()), entry.generation, entry.privlevel_floor]

    guest = fresh()
    own, (report, manifest, certificates), (single, public), size, generation, floor = tsm(guest, body)
    assert verified(guest, own).report.fields.vmpl == 2
    assert verified(guest, report).report.fields.report_data == sha512(NONCE + manifest).digest()
    assert verified(guest, single).report.fields.report_data == sha512(NONCE + public).digest()
    assert (manifest[48:], size, len(public), certificates) == (public, ALL_SIZE, EK_SIZE, b"")
    assert (generation, floor) == (6, 2)


@pytest.mark.parametrize("what", ["guid", "version", "text"])
def test_services_that_are_not_there(what: str) -> None:
    async def body(entry: ReportEntry) -> str:
        entry.write_service_provider("svsm")
        try:
            match what:
                case "guid":
                    entry.write_service_guid("a4453a59-9e1b-4787-a033-1986d6adbe55")
                case "version":
                    entry.write_service_guid(str(VTPM_GUID))
                    entry.write_service_manifest_version(1)
                case _:
                    entry.write_service_guid("no guid")
            await entry.outblob()
        except SystemCallFailed as failed:
            return errno.errorcode[failed.errno or 0]
        return ""

    assert tsm(fresh(), body) == "EINVAL"


def test_a_guest_without_an_svsm_has_no_such_provider() -> None:
    async def body(entry: ReportEntry) -> str:
        entry.write_service_provider("svsm")
        try:
            await entry.outblob()
        except (SystemCallFailed, RequestFailed) as failed:
            return errno.errorcode[failed.errno or 0]
        return ""

    assert tsm(without(), body) == "EINVAL"
