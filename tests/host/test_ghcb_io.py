"""Port and MMIO accesses through the GHCB, by kvm_run: single ones, strings, and where the scratch area may lie."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from snpbook.hardware.exits import GuestException
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.msr import Msr
from tests.host.askers import (
    BUFFER,
    BUFFER_SIZE,
    CODE,
    INFO1,
    INFO2,
    IO,
    MMIO,
    PAGE,
    RAX,
    SCRATCH,
    Asker,
    EsAsker,
    fails,
    ghcb,
    infos,
    sev_es,
    snp,
    u64,
)

GUESTS = pytest.mark.parametrize("guest", [snp, sev_es])
SIZES = pytest.mark.parametrize("size", [1, 2, 4])
Get = Callable[[str], Asker | EsAsker]
PORT, READ, WRITE = 0x3F8, 0x80000001, 0x80000002
DEVICE = 0xFED00000


def io_info(size: int, *, is_in: bool = False, string: bool = False) -> int:
    return PORT << 16 | {1: 1, 2: 2, 4: 4}[size] << 4 | string << 2 | is_in


# Single accesses.


@GUESTS
@SIZES
@pytest.mark.parametrize("era", ["rfc-v7", "mainline"])
def test_out(guest: Get, size: int, era: str) -> None:
    asker = guest(era)
    seen: list[tuple[int, ...]] = []

    def serve(reason: int) -> None:
        assert reason == IO
        seen.append(asker.exit("<BBHIQ"))
        assert asker.port_data[:size] == (0x1122334455667788).to_bytes(8, "little")[:size]

    answer = asker.event(0x7B, io_info(size), serve=serve, rax=0x1122334455667788)
    assert seen == [(1, size, PORT, 1, PAGE)]
    assert infos(answer) == (0, 0)
    assert u64(answer, RAX) == 0x1122334455667788


@GUESTS
@SIZES
def test_in(guest: Get, size: int) -> None:
    """Of RAX, the bytes that are not read stay as they are, except that 32 bits clear the upper half."""
    asker = guest("mainline")

    def serve(reason: int) -> None:
        assert asker.exit("<BBHIQ") == (0, size, PORT, 1, PAGE)
        asker.put(b"\xa1\xa2\xa3\xa4\xa5", PAGE - 32)

    answer = asker.event(0x7B, io_info(size, is_in=True), serve=serve, rax=0x1122334455667788)
    expected = {1: 0x11223344556677A1, 2: 0x112233445566A2A1, 4: 0xA4A3A2A1}[size]
    assert u64(answer, RAX) == expected


def test_in_without_rax() -> None:
    asker = snp()
    answer = asker.event(0x7B, io_info(1, is_in=True), serve=lambda reason: asker.put(b"\x5a", PAGE - 32))
    assert u64(answer, RAX) == 0x5A


# Strings.


@GUESTS
@SIZES
def test_outs_and_ins_of_the_whole_buffer(guest: Get, size: int) -> None:
    asker = guest("mainline")
    count, data = BUFFER_SIZE // size, bytes(range(254)) * 8
    seen: list[tuple[int, ...]] = []

    def out(reason: int) -> None:
        seen.append(asker.exit("<BBHIQ"))
        assert asker.port_data[:BUFFER_SIZE] == data

    scratch = asker.ghcb + BUFFER
    answer = asker.event(0x7B, io_info(size, string=True), count, serve=out, buffer=data, scratch=scratch)
    assert infos(answer) == (0, 0)
    assert seen == [(1, size, PORT, count, PAGE)]

    def into(reason: int) -> None:
        assert asker.exit("<BBHIQ") == (0, size, PORT, count, PAGE)
        asker.put(data[::-1], PAGE - 32)

    answer = asker.event(0x7B, io_info(size, is_in=True, string=True), count, serve=into, scratch=scratch)
    assert answer[BUFFER : BUFFER + BUFFER_SIZE] == data[::-1]


@pytest.mark.parametrize(("at", "count"), [(BUFFER + 100, 17), (BUFFER + BUFFER_SIZE - 4, 1), (BUFFER, 0)])
def test_part_of_the_buffer(at: int, count: int) -> None:
    asker = snp()
    calls: list[int] = []

    def serve(reason: int) -> None:
        calls.append(asker.exit("<BBHIQ")[3])
        asker.put(b"\xee" * (4 * count), PAGE - 32)

    answer = asker.event(0x7B, io_info(4, is_in=True, string=True), count, serve=serve, scratch=asker.ghcb + at)
    assert infos(answer) == (0, 0)
    assert calls == ([count] if count else []), "a string of nothing is done"
    assert answer[at : at + 4 * count] == b"\xee" * (4 * count)
    assert answer[BUFFER : BUFFER + BUFFER_SIZE].count(0xEE) == 4 * count


def test_a_string_longer_than_an_int_counts() -> None:
    asker = snp()
    with fails(errno.EINVAL):
        asker.event(0x7B, io_info(4, string=True), 1 << 30, scratch=asker.ghcb + BUFFER)


# The scratch area.


@pytest.mark.parametrize(
    ("at", "size"),
    [
        (0, 4), (BUFFER - 1, 4), (BUFFER - 4, 4), (BUFFER + BUFFER_SIZE - 3, 4), (BUFFER + BUFFER_SIZE, 1),
        (BUFFER, BUFFER_SIZE + 1), (PAGE, 4), (-PAGE, 4), (1 << 40, 4),
    ],
)  # fmt: skip
def test_a_scratch_area_outside_of_the_shared_buffer(at: int, size: int) -> None:
    asker = snp()
    fields = {CODE: 0x7B, INFO1: io_info(1, is_in=True, string=True), INFO2: size, SCRATCH: asker.ghcb + at}
    assert infos(asker.page(ghcb(fields))) == (2, 3)


@pytest.mark.parametrize("scratch", [0, (1 << 64) - 2])
def test_no_scratch_area_at_all(scratch: int) -> None:
    for asker in (snp(), sev_es("rfc-v7")):
        assert infos(asker.event(0x7B, io_info(1, string=True), 8, scratch=scratch)) == (2, 3)


def test_version_1_has_scratch_areas_elsewhere() -> None:
    """Up to 64 KiB long, in what the host sees: in pieces of a page of port data."""
    asker, area, pieces = sev_es("rfc-v7"), 0x100000, []
    size = 16 * PAGE
    asker.vmm.write(area, bytes(range(256)) * (size // 256))

    def serve(reason: int) -> None:
        pieces.append(asker.exit("<BBHIQ")[3])
        assert asker.port_data == bytes(range(256)) * 16

    assert infos(asker.event(0x7B, io_info(4, string=True), size // 4, serve=serve, scratch=area)) == (0, 0)
    assert pieces == [1024] * 16
    assert infos(asker.event(0x7B, io_info(4, string=True), size // 4 + 1, scratch=area)) == (2, 3)
    with fails(errno.EFAULT):
        asker.event(0x7B, io_info(4, string=True), 1, scratch=1 << 40)


def test_version_1_reads_into_a_scratch_area_elsewhere() -> None:
    asker, area = sev_es("rfc-v7"), 0x100FF0

    def serve(reason: int) -> None:
        asker.put(bytes([len(pieces) + 1]) * PAGE, PAGE - 32)
        pieces.append(asker.exit("<BBHIQ")[3])

    pieces: list[int] = []
    asker.event(0x7B, io_info(2, is_in=True, string=True), 3000, serve=serve, scratch=area)
    assert pieces == [2048, 952]
    assert asker.vmm.read(area, 6000) == b"\1" * 4096 + b"\2" * 1904


# MMIO.


@GUESTS
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_mmio(guest: Get, size: int) -> None:
    asker, at = guest("mainline"), BUFFER + 8
    data = bytes(range(1, 9))

    def write(reason: int) -> None:
        assert reason == MMIO
        assert asker.exit("<Q8sIB") == (DEVICE, data[:size].ljust(8, b"\0"), size, 1)

    scratch = asker.ghcb + at
    answer = asker.event(WRITE, DEVICE, size, serve=write, buffer=bytes(8) + data, scratch=scratch)
    assert infos(answer) == (0, 0)

    def read(reason: int) -> None:
        assert asker.exit("<Q", 0) + asker.exit("<IB", 16) == (DEVICE, size, 0)
        asker.put(data[::-1], 8)

    answer = asker.event(READ, DEVICE, size, serve=read, scratch=scratch)
    assert answer[at : at + 8] == data[::-1][:size].ljust(8, b"\0")


@pytest.mark.parametrize("code", [READ, WRITE])
def test_mmio_lengths(code: int) -> None:
    asker = snp()
    scratch = asker.ghcb + BUFFER
    assert infos(asker.event(code, DEVICE, 0, scratch=scratch)) == (0, 0), "nothing is done"
    for size in (9, 1 << 40):
        assert infos(asker.event(code, DEVICE, size, scratch=scratch)) == (2, 5)
    assert infos(asker.event(code, DEVICE, 8, scratch=asker.ghcb + BUFFER - 8)) == (2, 3)


def test_version_1_has_longer_mmio() -> None:
    """In pieces of 8 bytes."""
    asker, seen = sev_es("rfc-v7"), []

    def serve(reason: int) -> None:
        seen.append(asker.exit("<Q", 0) + asker.exit("<I", 16))
        asker.put(bytes([len(seen)]) * 8, 8)

    answer = asker.event(READ, DEVICE, 20, serve=serve, scratch=asker.ghcb + BUFFER)
    assert seen == [(DEVICE, 8), (DEVICE + 8, 8), (DEVICE + 16, 4)]
    assert answer[BUFFER : BUFFER + 20] == b"\1" * 8 + b"\2" * 8 + b"\3" * 4


# From the access to the exit.


@pytest.mark.parametrize("write", [False, True])
def test_an_access_to_no_memory_becomes_mmio(write: bool) -> None:
    """KVM puts an entry with a reserved bit into the nested tables; hardware makes the next access a #VC."""
    asker = sev_es()
    seen: list[tuple[int, ...]] = []

    def serve(reason: int) -> None:
        assert reason == MMIO
        seen.append((*asker.exit("<Q", 0), *asker.exit("<IB", 16)))
        asker.put(b"\x11\x22\x33\x44\0\0\0\0", 8)

    async def handler(cpu: GuestCpu, exception: GuestException) -> bool:
        assert (exception.vector, exception.error) == (29, 0x400)
        (rax,) = await cpu.look("rax")
        code = WRITE if write else READ
        fields = {CODE: code, INFO1: exception.address, INFO2: 4, SCRATCH: asker.ghcb + BUFFER}
        await cpu.write(asker.ghcb, ghcb(fields, buffer=rax.to_bytes(8, "little")))
        await cpu.wrmsr(Msr.GHCB, asker.ghcb)
        await cpu.vmgexit()
        await cpu.load(rax=int.from_bytes(await cpu.read(asker.ghcb + BUFFER, 4), "little"))
        return True

    async def program(cpu: GuestCpu) -> bytes:
        cpu.set_handler(29, handler)
        if write:
            await cpu.write(DEVICE, b"\xaa\xbb\xcc\xdd")
            return b""
        data: bytes = await cpu.read(DEVICE, 4)
        return data

    async def mapped(cpu: GuestCpu) -> bytes:
        """The device's page into the guest's own tables, shared as every device is."""
        tables = 0x20000
        number = DEVICE >> 30 & 511
        await cpu.write(0x11000 + 8 * number, (tables | 1 << 51 | 7).to_bytes(8, "little"))
        await cpu.write(tables, bytes(PAGE))
        await cpu.write(tables + PAGE, bytes(PAGE))
        await cpu.write(tables + 8 * (DEVICE >> 21 & 511), (tables + PAGE | 1 << 51 | 7).to_bytes(8, "little"))
        await cpu.write(tables + PAGE + 8 * (DEVICE >> 12 & 511), (DEVICE | 7).to_bytes(8, "little"))
        return await program(cpu)

    assert asker.drive(mapped, serve) == (b"" if write else b"\x11\x22\x33\x44")
    assert seen == [(DEVICE, 4, int(write))]
