"""The CC blob: the firmware leaves it, a kernel finds it by either way, and does not take a bad one.

Offsets from the sheet: magic 0, secrets page 8 and its length 0x10, CPUID page 0x18 and its length 0x20.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from snpbook.guest import cc_blob
from snpbook.guest.layout import Layout
from snpbook.guest.termination import Terminated
from snpbook.hardware.guest_cpu import GuestCpu
from tests.guest.bare import DATA, Bare
from tests.guest.booted import fresh
from tests.machines import PAGE, booted, launched, private_bytes

GUID = bytes.fromhex("5f1f7b0626cfc544855493d777912d42")
MAGIC = 0x45444D41
BLOB, LIST = DATA + 0x100, DATA + 0x200
"""In private memory of the test's own."""


def blob(magic: int = MAGIC, secrets: int = 0x18000, cpuid: int = 0x19000, length: int = PAGE) -> bytes:
    return struct.pack("<IHHQIIQII", magic, 1, 0, secrets, PAGE, 0, cpuid, length, 0)


@pytest.mark.parametrize("acceptance", ["eager", "lazy"])
def test_the_firmware_leaves_it(acceptance: str) -> None:
    guest = launched(booted(era="mainline"), memory="12 MiB")
    guest.boot(acceptance)
    at = Layout.of(guest.vmm.image).boot_tables
    assert at == 0x9000
    magic, _, _, secrets, length, _, cpuid, size, _ = struct.unpack("<IHHQIIQII", private_bytes(guest, at, 0x28))
    assert (magic, secrets, length, cpuid, size) == (MAGIC, 0x80D000, PAGE, 0x80E000, PAGE)
    assert private_bytes(guest, at + 0x400, 24) == GUID + struct.pack("<Q", at)
    assert private_bytes(guest, at + 0x800, 20) == struct.pack("<QIII", 0, 7, 4, at)


def test_both_ways_lead_to_it() -> None:
    guest = fresh()
    at = Layout.of(guest.vmm.image).boot_tables

    async def program(cpu: GuestCpu) -> Any:
        found = await cc_blob.by_efi(cpu, at + 0x400, 1), await cc_blob.by_setup_data(cpu, at + 0x800)
        return [(each.secrets_phys, each.cpuid_phys) for each in found if each]

    assert guest.run(program) == [(0x80D000, 0x80E000)] * 2


def finds(guest: Bare, tables: bytes = b"", setup: bytes = b"", first: int = LIST) -> Any:
    guest.put(DATA, tables)
    guest.put(LIST, setup)

    async def body(cpu: GuestCpu) -> Any:
        if tables:
            return await cc_blob.by_efi(cpu, DATA, len(tables) // 24)
        return await cc_blob.by_setup_data(cpu, first)

    return guest.run(body)


def test_it_is_one_among_others() -> None:
    guest = Bare()
    guest.put(BLOB, blob())
    other = bytes(range(16)) + struct.pack("<Q", 0x7000)
    assert finds(guest, other + GUID + struct.pack("<Q", BLOB)).cpuid_phys == 0x19000
    chain = struct.pack("<QIII", LIST + 32, 1, 4, 9).ljust(32, b"\0") + struct.pack("<QIII", 0, 7, 4, BLOB)
    assert finds(guest, setup=chain).secrets_phys == 0x18000


def test_where_nobody_names_it_there_is_none() -> None:
    assert finds(Bare(), bytes(range(24)) * 2) is None
    assert finds(Bare(), setup=struct.pack("<QIII", 0, 1, 4, BLOB)) is None
    assert finds(Bare(), first=0) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (blob(magic=MAGIC ^ 1), (0, 2)), (bytes(40), (0, 2)), (blob(length=PAGE - 1), (1, 4)), (blob(cpuid=0), (1, 4)),
        (blob(length=0), (1, 4)),
    ],
)  # fmt: skip
def test_a_bad_one_ends_the_guest(content: bytes, reason: tuple[int, int]) -> None:
    for way in ({"tables": GUID + struct.pack("<Q", BLOB)}, {"setup": struct.pack("<QIII", 0, 7, 4, BLOB)}):
        guest = Bare()
        guest.put(BLOB, content)
        with pytest.raises(Terminated):
            finds(guest, **way)
        assert guest.ended_with == reason
