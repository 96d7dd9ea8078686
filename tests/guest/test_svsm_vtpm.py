"""The SVSM's vTPM from its guest's side: the protocol's buffer, and TPM 2.0 commands typed byte by byte."""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Any

import pytest

from snpbook.guest.svsm.endorsement_key import _prime, modulus
from snpbook.hardware.guest_cpu import GuestCpu
from tests.guest.svsm_world import ADDRESS, FIRST_VMSA, OK, PARAMETER, SECRETS, STATE, VTPM, call, fresh, pvalidate, run
from tests.machines import PAGE, private_bytes
from tests.sampling import sampled

BUFFER = 0x300000
STARTUP = bytes.fromhex("8001 0000000c 00000144 0000")
PASSWORD = bytes.fromhex("00000009 40000009 0000 00 0000")
WRONG_PASSWORD = struct.pack(">I", 10) + PASSWORD[4:-1] + b"\1x"
EK = 0x81010001


async def tpm(cpu: GuestCpu, command: bytes) -> bytes:
    """One command through the page: the answer."""
    await cpu.write(BUFFER, struct.pack("<IBI", 8, 0, len(command)) + command)
    code, *_ = await call(cpu, VTPM, 1, BUFFER)
    assert code == OK
    (size,) = struct.unpack("<I", await cpu.read(BUFFER, 4))
    answer: bytes = await cpu.read(BUFFER + 4, size)
    assert struct.unpack(">HI", answer[:6])[1] == size
    return answer


def command(code: int, body: bytes = b"", tag: int = 0x8001) -> bytes:
    return struct.pack(">HII", tag, 10 + len(body), code) + body


def answers(*commands: bytes, started: bool = True) -> list[bytes]:
    async def body(cpu: GuestCpu) -> list[bytes]:
        return [await tpm(cpu, each) for each in commands]

    found: list[bytes] = run(fresh(), body) if not started else run(fresh(), _started(body))
    return found


def _started(body: Any) -> Any:
    async def after(cpu: GuestCpu) -> Any:
        assert code(await tpm(cpu, STARTUP)) == 0
        return await body(cpu)

    return after


def code(answer: bytes) -> int:
    return int.from_bytes(answer[6:10], "big")


# The protocol.


def test_query() -> None:
    async def body(cpu: GuestCpu) -> Any:
        return await call(cpu, VTPM, 0, 1, 2, 3)

    assert run(fresh(), body) == (OK, 1 << 8, 0, 3)


@pytest.mark.parametrize(
    ("buffer", "head", "expected"),
    sampled([
        (0, (8, 0, 12), PARAMETER), (BUFFER, (8, 1, 12), PARAMETER), (BUFFER, (9, 0, 12), PARAMETER),
        (BUFFER, (0, 0, 12), PARAMETER), (BUFFER, (8, 0, 4088), PARAMETER), (BUFFER, (8, 0, 1 << 31), PARAMETER),
        (SECRETS, None, ADDRESS), (STATE - 8, None, ADDRESS), (FIRST_VMSA, None, ADDRESS), (1 << 40, None, ADDRESS),
        ((12 << 20) - 16, None, ADDRESS), (0x305000, None, ADDRESS),
    ], 6),
)  # fmt: skip
def test_buffers_that_are_refused(buffer: int, head: tuple[int, int, int] | None, expected: int) -> None:
    async def body(cpu: GuestCpu) -> int:
        await pvalidate(cpu, 0x305000)
        if head:
            await cpu.write(buffer, struct.pack("<IBI", *head) + STARTUP)
        return (await call(cpu, VTPM, 1, buffer))[0]

    guest = fresh()
    before = private_bytes(guest, SECRETS, PAGE), private_bytes(guest, STATE, PAGE)
    assert run(guest, body) == expected
    assert (private_bytes(guest, SECRETS, PAGE), private_bytes(guest, STATE, PAGE)) == before


def test_a_buffer_need_not_be_aligned() -> None:
    async def body(cpu: GuestCpu) -> bytes:
        await cpu.write(BUFFER + 100, struct.pack("<IBI", 8, 0, len(STARTUP)) + STARTUP)
        await call(cpu, VTPM, 1, BUFFER + 100)
        found: bytes = await cpu.read(BUFFER + 100, 14)
        return found

    assert run(fresh(), body) == struct.pack("<I", 10) + bytes.fromhex("8001 0000000a 00000000")


# Commands.


@pytest.mark.parametrize(
    ("given", "started", "expected"),
    sampled([
        (b"", True, 0x142), (STARTUP[:9], True, 0x142), (STARTUP + b"\0", True, 0x142),
        (b"\x12" + STARTUP[1:], True, 0x1E),
        (command(0x153), True, 0x143), (command(0x131), True, 0x143), (command(0x158), True, 0x143),
        (STARTUP, True, 0x100), (command(0x17B, bytes(2)), False, 0x100), (command(0x144, b"\0\1"), False, 0x1C4),
        (command(0x173, struct.pack(">I", EK + 1)), True, 0x18B), (command(0x173), True, 0x1DA),
        (command(0x17A, struct.pack(">III", 6, 0, 1)), True, 0x1C4), (command(0x17B, b"\0\1\0"), True, 0x142),
        (command(0x182, bytes(4)), True, 0x125),
        (command(0x182, struct.pack(">I", 24) + PASSWORD + bytes(4), 0x8002), True, 0x184),
        (command(0x182, bytes(4) + PASSWORD + struct.pack(">IH", 1, 4) + bytes(20), 0x8002), True, 0x1C3),
        (command(0x182, struct.pack(">I", 17) + PASSWORD + bytes(4), 0x8002), True, 0x907),
        (command(0x182, bytes(4) + PASSWORD[:-1] + b"\1" + b"x" + bytes(4), 0x8002), True, 0x144),
        (command(0x182, bytes(4) + WRONG_PASSWORD + bytes(4), 0x8002), True, 0x98E),
    ], 10),
)  # fmt: skip
def test_commands_that_fail(given: bytes, started: bool, expected: int) -> None:
    (answer,) = answers(given, started=started)
    assert code(answer) == expected
    assert len(answer) == 10
    assert answer[:2] == (b"\x00\xc4" if expected == 0x1E else b"\x80\x01")


def test_the_endorsement_key_is_what_its_public_area_says() -> None:
    listed, read, again = answers(
        command(0x17A, struct.pack(">III", 1, 0x81000000, 8)), *[command(0x173, struct.pack(">I", EK))] * 2
    )
    assert listed[10:] == struct.pack(">BIII", 0, 1, 1, EK)
    size = int.from_bytes(read[10:12], "big")
    public, rest = read[12 : 12 + size], read[12 + size :]
    name = b"\x00\x0b" + sha256(public).digest()
    qualified = b"\x00\x0b" + sha256(struct.pack(">I", 0x4000000B) + name).digest()
    assert size == 314
    assert rest == b"\x00\x22" + name + b"\x00\x22" + qualified
    assert read == again
    seed = private_bytes(fresh(), STATE + 32, 32)
    assert public[58:] == modulus(seed).to_bytes(256, "big")


def test_what_it_can_do() -> None:
    answer, tail, none = answers(
        command(0x17A, struct.pack(">III", 2, 0, 100)), command(0x17A, struct.pack(">III", 2, 0x17A, 2)),
        command(0x17A, struct.pack(">III", 1, 0x80000000, 2)),
    )  # fmt: skip
    expected = [0x144, 1 << 25 | 0x173, 0x17A, 0x17B, 0x17E, 1 << 25 | 0x182]
    assert answer[10:] == struct.pack(">BII6I", 0, 2, 6, *expected)
    assert tail[10:] == struct.pack(">BII2I", 1, 2, 2, 0x17A, 0x17B), "there is more"
    assert none[10:] == struct.pack(">BII", 0, 1, 0)


def test_random_numbers() -> None:
    first, second, much = answers(*[command(0x17B, b"\0\x10")] * 2, command(0x17B, b"\xff\xff"))
    assert first[10:12] == b"\0\x10"
    assert (len(first), len(much)) == (28, 12 + 32)
    assert first[12:] != second[12:]


def test_registers_are_extended_and_read() -> None:
    digest = sha256(b"kernel").digest()
    extend = command(0x182, struct.pack(">I", 9) + PASSWORD + struct.pack(">IH", 1, 0xB) + digest, 0x8002)
    select = command(0x17E, struct.pack(">IHB", 1, 0xB, 3) + (1 << 9 | 1 << 16 | 1 << 17).to_bytes(3, "little"))
    many = command(0x17E, struct.pack(">IHB", 1, 0xB, 3) + b"\xff\xff\xff")
    other = command(0x17E, struct.pack(">IHB", 1, 4, 3) + b"\xff\0\0")
    extended, read, eight, none = answers(extend, select, many, other)
    assert extended == bytes.fromhex("8002 00000013 00000000 00000000 0000 00 0000".replace(" ", ""))
    value = sha256(bytes(32) + digest).digest()
    assert read[10:] == (
        struct.pack(">IIHB", 1, 1, 0xB, 3) + (1 << 9 | 1 << 16 | 1 << 17).to_bytes(3, "little") + struct.pack(">I", 3)
        + b"\0\x20" + value + b"\0\x20" + bytes(32) + b"\0\x20" + b"\xff" * 32
    )  # fmt: skip
    assert eight[18:28] == struct.pack(">HB", 0xB, 3) + b"\xff\0\0" + struct.pack(">I", 8)
    assert none[18:] == struct.pack(">HB", 4, 3) + bytes(3) + bytes(4)


def test_seeds_make_keys() -> None:
    """Two primes of 1024 bits, another key for another seed, the same for the same."""
    seed = bytes(32)
    p, q = _prime(seed, b"p"), _prime(seed, b"q")
    assert p * q == modulus(seed)
    assert (p.bit_length(), q.bit_length(), (p * q).bit_length()) == (1024, 1024, 2048)
    assert all(pow(base, n - 1, n) == 1 for n in (p, q) for base in (2, 3, 65537))
    assert modulus(b"\1" * 32) != modulus(seed)
    assert (p - 1) % 65537 * ((q - 1) % 65537)
