"""Guests that move: to a second board with another chip, and out of memory and back. What is replayed is accepted."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from snpbook.spec.commands import Command
from snpbook.spec.status import Status
from snpbook.vendor.sev_ca import SevCa
from tests.firmware import legacy_owner as other
from tests.firmware.legacy_board import CERT, ES_ASID, MIB, PAGE, PLAIN_ASID, A, B, C, D, LegacyBoard
from tests.firmware.legacy_owner import Owner

ES, NOSEND, DOMAIN, SEV = 4, 8, 16, 32
MEMORY = 26 * MIB
"""Where the guest is, on both boards."""
SESSION = 28 * MIB


def boards(name: str = "milan") -> tuple[LegacyBoard, LegacyBoard]:
    return LegacyBoard(name).start(), LegacyBoard(name, "the other chip").start()


def send_start(source: LegacyBoard, target: LegacyBoard, handle: int, **changes: Any) -> Status:
    """SEND_START with all that the target can show; its session lies at SESSION then."""
    pdh, pek, oca, cek = target.certificates()
    ca = SevCa(target.machine.product.name)
    fields = {"pdh": pdh, "plat": pek + oca + ca.sign_cek(cek), "amd": ca.chain} | changes
    arguments: dict[str, Any] = {"handle": handle, "session_paddr": SESSION, "session_len": 0x80}
    for (name, data), place in zip(fields.items(), (A, B, C), strict=True):
        arguments |= {f"{name}_cert{'s' * (name != 'pdh')}_paddr": source.write(place, data)}
        arguments |= {f"{name}_cert{'s' * (name != 'pdh')}_len": len(data)}
    status, answer = source.try_(Command.SEND_START, **arguments)
    if status is Status.SUCCESS:
        assert answer.policy == source.psp.legacy.guests[handle].policy_word
    return status


def receive_start(source: LegacyBoard, target: LegacyBoard, policy: int, asid: int) -> int:
    pdh, session = source.certificates()[0], source.machine.dram.read(SESSION, 0x80)
    fields = {"pdh_cert_paddr": target.write(A, pdh), "pdh_cert_len": CERT}
    fields |= {"session_paddr": target.write(B, session), "session_len": 0x80}
    handle: int = target.call(Command.RECEIVE_START, policy=policy, **fields).handle
    target.ok(Command.ACTIVATE, handle=handle, asid=asid)
    return handle


def sent(board: LegacyBoard, handle: int, address: int, size: int, kind: str = "DATA") -> tuple[bytes, bytes]:
    """A packet of the guest's memory."""
    answer = board.call(Command[f"SEND_UPDATE_{kind}"], handle=handle, hdr_paddr=D, hdr_len=0x40,
                        guest_paddr=address, guest_len=size, trans_paddr=C, trans_len=0x5000)  # fmt: skip
    assert (answer.hdr_len, answer.trans_len) == (0x34, size)
    return board.machine.dram.read(D, 0x34), board.machine.dram.read(C, size)


def received(board: LegacyBoard, handle: int, address: int, packet: tuple[bytes, bytes], kind: str = "DATA") -> Status:
    header, body = packet
    return board.command(Command[f"RECEIVE_UPDATE_{kind}"], handle=handle, hdr_paddr=board.write(D, header),
                         hdr_len=0x34, guest_paddr=address, guest_len=len(body), trans_paddr=board.write(C, body),
                         trans_len=len(body))  # fmt: skip


def running(board: LegacyBoard, policy: int, asid: int, data: bytes) -> int:
    """A guest with a memory of `data`, and one page of registers if it is one of SEV-ES."""
    handle = board.launch(policy, asid)
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(MEMORY, data), len=len(data))
    if policy & ES:
        board.write(MEMORY + MIB, b"registers".ljust(PAGE, b"\0"))
        board.ok(Command.LAUNCH_UPDATE_VMSA, handle=handle, paddr=MEMORY + MIB, len=PAGE)
    board.finish_launch(handle)
    return handle


@pytest.mark.parametrize("name", ["rome", "milan"])
def test_a_guest_moves_with_memory_and_registers(name: str) -> None:
    (source, target), policy, data = boards(name), ES | SEV, bytes(range(256)) * 16 * 5
    handle = running(source, policy, ES_ASID, data)
    source.machine.encryption.write(ES_ASID, MEMORY, b"changed while it ran")
    assert send_start(source, target, handle) is Status.SUCCESS
    there = receive_start(source, target, policy, ES_ASID + 1)
    for offset in range(0, len(data), 0x5000):
        packet = sent(source, handle, MEMORY + offset, min(0x5000, len(data) - offset))
        assert data[offset + 32 : offset + 64] not in packet[1]
        assert received(target, there, MEMORY + offset, packet) is Status.SUCCESS
    registers = sent(source, handle, MEMORY + MIB, PAGE, "VMSA")
    assert received(target, there, MEMORY + MIB, registers, "VMSA") is Status.SUCCESS
    source.ok(Command.SEND_FINISH, handle=handle)
    target.ok(Command.RECEIVE_FINISH, handle=there)
    expected = b"changed while it ran" + data[20:]
    assert target.plain(MEMORY, len(data), ES_ASID + 1) == expected
    assert target.plain(MEMORY + MIB, 9, ES_ASID + 1) == b"registers"
    assert (MEMORY + MIB) // PAGE in target.machine.vmsa_checksums
    assert ES_ASID + 1 in target.machine.runnable
    assert target.machine.dram.read(MEMORY, 64) != source.machine.dram.read(MEMORY, 64), "another memory key"
    source.ok(Command.DEACTIVATE, handle=handle)
    source.cpu.wbinvd()
    source.ok(Command.DF_FLUSH)
    assert source.command(Command.ACTIVATE, handle=handle, asid=ES_ASID) is Status.INVALID_GUEST_STATE


def test_registers_that_the_host_changed_are_not_sent() -> None:
    source, target = boards()
    handle = running(source, ES, ES_ASID, b"x" * PAGE)
    assert send_start(source, target, handle) is Status.SUCCESS
    fields = {"handle": handle, "hdr_paddr": D, "hdr_len": 0x34, "guest_len": PAGE, "trans_paddr": C, "trans_len": PAGE}
    source.machine.dram.write(MEMORY + MIB, b"host")
    assert source.command(Command.SEND_UPDATE_VMSA, guest_paddr=MEMORY + MIB, **fields) is Status.INVALID_PARAM
    assert source.command(Command.SEND_UPDATE_VMSA, guest_paddr=MEMORY, **fields) is Status.INVALID_PARAM


def test_packets_of_a_transfer_can_be_replayed_and_misplaced() -> None:
    """Legacy SEV accepts a packet twice, out of order and at another address: nothing in it says when and where.

    A packet of another transfer, a shortened or a changed one is refused (BAD_MEASUREMENT).
    """
    source, target = boards()
    handle = running(source, 0, PLAIN_ASID, b"1" * PAGE + b"2" * PAGE)
    assert send_start(source, target, handle) is Status.SUCCESS
    there = receive_start(source, target, 0, PLAIN_ASID)
    first, second = (sent(source, handle, MEMORY + at, PAGE) for at in (0, PAGE))
    for place, packet in ((MEMORY + PAGE, second), (MEMORY, first), (MEMORY + PAGE, first)):
        assert received(target, there, place, packet) is Status.SUCCESS
    assert target.plain(MEMORY, 2 * PAGE) == b"1" * 2 * PAGE
    before = target.plain(MEMORY, 2 * PAGE)
    header, body = second
    for bad in (
        (header, body[:-16]), (first[0], body), (header, bytes([body[0] ^ 1]) + body[1:]),
        (header[:4] + bytes([header[4] ^ 1]) + header[5:], body), (header[:-1] + bytes([header[-1] ^ 1]), body),
        Owner().packet(b"3" * PAGE, 2),
    ):  # fmt: skip
        assert received(target, there, MEMORY, bad) is Status.BAD_MEASUREMENT
    assert target.plain(MEMORY, 2 * PAGE) == before
    compressed = struct.pack("<I", 1) + header[4:]
    assert received(target, there, MEMORY, (compressed, body)) is Status.UNSUPPORTED


def test_a_session_is_for_one_receiver_and_one_policy() -> None:
    source, target = boards()
    stranger = LegacyBoard(seed="a third chip").start()
    handle = running(source, 0, PLAIN_ASID, b"x" * PAGE)
    assert send_start(source, target, handle) is Status.SUCCESS
    session, pdh = source.machine.dram.read(SESSION, 0x80), source.certificates()[0]
    for board, policy in ((stranger, 0), (target, 1)):
        fields = {"pdh_cert_paddr": board.write(A, pdh), "pdh_cert_len": CERT}
        fields |= {"session_paddr": board.write(B, session), "session_len": 0x80}
        assert board.command(Command.RECEIVE_START, policy=policy, **fields) is Status.BAD_MEASUREMENT


def test_the_policy_says_where_a_guest_may_go() -> None:
    source, target = boards()
    stays = running(source, NOSEND, PLAIN_ASID, b"x" * PAGE)
    assert send_start(source, target, stays) is Status.POLICY_FAILURE
    home = running(source, DOMAIN, PLAIN_ASID + 1, b"x" * PAGE)
    assert send_start(source, target, home) is Status.POLICY_FAILURE, "another owner"
    assert send_start(source, source, home) is Status.SUCCESS
    amds = running(source, SEV, PLAIN_ASID + 2, b"x" * PAGE)
    assert send_start(source, target, amds, plat=b"".join(target.certificates()[1:])) is Status.INVALID_CERTIFICATE
    _, pek, oca, cek = target.certificates()
    signed = SevCa("milan").sign_cek(cek)
    for algo in (1, 2):  # what AMD signs with SHA-384, called RSA with SHA-256, or ECDSA
        plat = pek + oca + signed[:0x418] + struct.pack("<I", algo) + signed[0x41C:]
        assert send_start(source, target, amds, plat=plat) is Status.INVALID_CERTIFICATE
    rome = SevCa("rome").chain
    assert send_start(source, target, amds, amd=rome) is Status.INVALID_CERTIFICATE, "not this product's root"
    nobody = other.cert(other.body(other.PDH, other.key(30).public_key()), (other.PEK, other.key(31)))
    assert send_start(source, target, amds, pdh=nobody) is Status.BAD_SIGNATURE
    newer = running(source, SEV | 2 << 16, PLAIN_ASID + 3, b"x" * PAGE)
    assert send_start(source, target, newer) is Status.POLICY_FAILURE
    anywhere = running(source, 0, PLAIN_ASID + 4, b"x" * PAGE)
    assert send_start(source, target, anywhere, pdh=nobody) is Status.SUCCESS, "nobody asked for a chain"


def test_a_cancelled_guest_runs_on() -> None:
    source, target = boards()
    handle = running(source, 0, PLAIN_ASID, b"x" * PAGE)
    assert send_start(source, target, handle) is Status.SUCCESS
    source.ok(Command.SEND_CANCEL, handle=handle)
    assert source.call(Command.GUEST_STATUS, handle=handle).state == 3
    assert send_start(source, target, handle) is Status.SUCCESS


# Swap.

OUT, MDATA = 30 * MIB, 32 * MIB


def swap(board: LegacyBoard, command: Command, src: int, dst: int, *, kind: int = 0, mdata: int = MDATA,
         handle: int = 1, **fields: Any) -> Status:  # fmt: skip
    return board.command(command, handle=handle, page_type=kind, src_paddr=src, dst_paddr=dst, mdata_paddr=mdata,
                         **fields)  # fmt: skip


def test_an_old_image_of_a_page_can_be_swapped_in_again() -> None:
    """Legacy SEV accepts it, as often as the host likes: no entry says that an image is spent or out of date."""
    board = LegacyBoard().start()
    running(board, 0, PLAIN_ASID, b"old" + bytes(PAGE - 3))
    assert swap(board, Command.SWAP_OUT, MEMORY, OUT, software_data=7) is Status.SUCCESS
    assert board.machine.dram.read(MDATA, 16) == struct.pack("<QQ", 7, 0)
    assert b"old" not in board.machine.dram.read(OUT, PAGE)
    board.machine.encryption.write(PLAIN_ASID, MEMORY, b"new")
    assert swap(board, Command.SWAP_OUT, MEMORY, OUT + PAGE, mdata=MDATA + 64) is Status.SUCCESS
    assert board.machine.dram.read(MDATA + 64 + 8, 8) == struct.pack("<Q", 1), "each image has its own nonce"
    for mdata, image, found in ((MDATA + 64, OUT + PAGE, b"new"), (MDATA, OUT, b"old"), (MDATA, OUT, b"old")):
        assert swap(board, Command.SWAP_IN, image, MEMORY, mdata=mdata) is Status.SUCCESS
        assert board.plain(MEMORY, 3) == found


def test_images_are_whole_and_of_one_guest() -> None:
    board = LegacyBoard().start()
    running(board, 0, PLAIN_ASID, b"page" * (PAGE // 4))
    running(board, 0, PLAIN_ASID + 1, b"page" * (PAGE // 4))
    board.write(MEMORY, bytes(PAGE))
    assert swap(board, Command.SWAP_OUT, MEMORY, OUT) is Status.SUCCESS
    before = board.machine.dram.read(MEMORY, PAGE)
    assert swap(board, Command.SWAP_IN, OUT, MEMORY, handle=2) is Status.BAD_MEASUREMENT
    assert swap(board, Command.SWAP_IN, OUT, MEMORY, kind=2) is Status.INVALID_PARAM
    for place in (OUT + 5, MDATA + 1, MDATA + 9, MDATA + 0x11, MDATA + 0x22):
        held = board.machine.dram.read(place, 1)
        board.write(place, bytes([held[0] ^ 1]))
        assert swap(board, Command.SWAP_IN, OUT, MEMORY) is Status.BAD_MEASUREMENT, hex(place)
        board.write(place, held)
    assert board.machine.dram.read(MEMORY, PAGE) == before


def test_registers_swap_with_their_checksum() -> None:
    board = LegacyBoard().start()
    running(board, ES, ES_ASID, b"x" * PAGE)
    page = (MEMORY + MIB) // PAGE
    assert swap(board, Command.SWAP_OUT, MEMORY + MIB, OUT) is Status.INVALID_PARAM, "it is a VMSA"
    assert swap(board, Command.SWAP_OUT, MEMORY, OUT, kind=2) is Status.INVALID_PARAM, "it is none"
    assert swap(board, Command.SWAP_OUT, MEMORY + MIB, OUT, kind=2) is Status.SUCCESS
    assert page not in board.machine.vmsa_checksums
    assert swap(board, Command.SWAP_IN, OUT, MEMORY + 2 * MIB, kind=2) is Status.SUCCESS
    assert page + MIB // PAGE in board.machine.vmsa_checksums
    assert board.plain(MEMORY + 2 * MIB, 9, ES_ASID) == b"registers"
