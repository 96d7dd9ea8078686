"""Page swap and move: the printed vectors, what comes back is what went out, and what is old does not come back."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.releases import release
from snpbook.spec.status import Status
from tests.firmware.rows import Attempt, assert_refused
from tests.machines import FREE, GCTX, MIB, PAGE, Board

OEK = bytes(range(32))
PATTERN = bytes(range(256)) * 16
OUT, MDATA, BACK = 22 * MIB, 24 * MIB, 26 * MIB
DATA, METADATA, VMSA = 0, 1, 2


def held(
    data: bytes = PATTERN, kind: LaunchPage = LaunchPage.NORMAL, large: bool = False, name: str = "milan", **fields: Any
) -> Board:
    """A running guest with a page at FREE, guest address 0x400000, that the host has taken hold of (Pre-Swap)."""
    board = Board(name).initialise()
    board.start(policy=DEFAULT_POLICY | 1 << 19)
    board.machine.dram.write(FREE, data)
    board.add(FREE, 0x400000, kind, page_size=int(large), **fields)
    board.finish()
    context = board.psp.context(GCTX)
    board.psp.save_context(GCTX, context.replace(oek=OEK))
    board.assign(FREE, NewState(assigned=True, asid=1, immutable=True, large=large), 0x400000)
    assert board.state(FREE) == PageState.PRE_SWAP
    board.assign(OUT, replace(FIRMWARE, large=large))
    board.assign(MDATA, FIRMWARE)
    board.ok(Command.SNP_PAGE_MD_INIT, gctx_paddr=GCTX, page_paddr=MDATA)
    return board


def swap(command: str, board: Board, src: int, dst: int, slot: int | None = 0, kind: int = DATA, **more: Any) -> Status:
    """SWAP_OUT or SWAP_IN by the `slot`th entry of the metadata page, or by the root entry."""
    place = {"root_mdata_en": 1} if slot is None else {"mdata_paddr": MDATA + 64 * slot}
    fields = {"gctx_paddr": GCTX, "src_paddr": src, "dst_paddr": dst, "page_type": kind, **place, **more}
    return board.command(Command[f"SNP_PAGE_SWAP_{command}"], **fields)


def entry(board: Board, slot: int = 0) -> tuple[int, int, bytes, int, int]:
    return struct.unpack("<QQ16sQQ16x", board.cpu.read(MDATA + 64 * slot, 64))


def pre_guest(board: Board, spa: int, gpa: int = 0x400000, large: bool = False) -> None:
    board.assign(spa, NewState(assigned=True, asid=1, immutable=True, large=large), gpa)


def plain(board: Board, spa: int, size: int = PAGE) -> bytes:
    return board.machine.memory.read(1, spa, size)


def test_printed_vectors() -> None:
    board = held(bytes(PAGE))
    for count, tag, start in (
        (0, "ce6c14a95fcb4a550918ef286dc4bb6a", "0ebcb5deb52c83bd08a8a935182c9199"),
        (1, "96060880f97e4efca1859f2bb2c050ec", ""),
    ):
        assert swap("OUT", board, FREE, OUT, count, software_data=77 + count) is Status.SUCCESS
        software, iv, found, flags, masks = entry(board, count)
        assert (software, iv, found.hex()) == (77 + count, count, tag)
        assert board.cpu.read(OUT, PAGE).hex().startswith(start)
        assert flags == (0b00011 if count == 0 else 0b00001) | 0x400000, "validated when it was Pre-Swap"
        assert masks == 0xF
        assert board.state(FREE) == PageState.PRE_GUEST
    assert board.psp.context(GCTX).oek_iv_count == 2
    assert plain(board, FREE) == bytes(PAGE), "the content stays"


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_data_comes_back(large: bool, in_place: bool, root: bool) -> None:
    size = 2 * MIB if large else PAGE
    data, slot = bytes(range(1, 250)) * (size // 249 + 1), None if root else 5
    board = held(data[:size], large=large, vmpl1_perms=3, vmpl3_perms=1)
    before = board.cpu.rmp_entry(FREE >> 12)
    out = {"page_size": int(large)}
    assert swap("OUT", board, FREE, OUT, slot, **out) is Status.SUCCESS
    sealed = board.cpu.read(OUT, size)
    pre_guest(board, BACK, 0x800000, large)
    if in_place:
        board.machine.dram.write(BACK, sealed)
    src = BACK if in_place else OUT
    assert swap("IN", board, src, BACK, slot, swap_in_place=int(in_place), **out) is Status.SUCCESS
    assert plain(board, BACK, size) == data[:size]
    assert board.cpu.read(BACK, size) not in (data[:size], sealed)
    assert board.cpu.rmp_entry(BACK >> 12) == before.replace(lock=1), "guest address, permissions, validation, size"
    assert swap("IN", board, OUT, BACK, slot, **out) is Status.INVALID_MDATA_ENTRY, "an entry serves once"
    board.ok(Command.SNP_PAGE_RECLAIM, page=BACK >> 12, page_size=int(large))
    assert board.state(BACK) == PageState.GUEST_VALID


def test_a_vmsa_comes_back_as_one() -> None:
    board = held(kind=LaunchPage.VMSA)
    content = plain(board, FREE)
    assert swap("OUT", board, FREE, OUT, kind=VMSA) is Status.SUCCESS
    pre_guest(board, BACK)
    assert swap("IN", board, OUT, BACK, kind=DATA) is Status.INVALID_MDATA_ENTRY
    assert swap("IN", board, OUT, BACK, kind=VMSA) is Status.SUCCESS
    assert (board.cpu.rmp_entry(BACK >> 12).vmsa, plain(board, BACK)) == (1, content)


def test_the_type_is_what_the_host_says() -> None:
    """Quirk: a VMSA that goes out as data comes back as data, and cannot be run any more."""
    board = held(kind=LaunchPage.VMSA)
    assert swap("OUT", board, FREE, OUT) is Status.SUCCESS
    pre_guest(board, BACK)
    assert swap("IN", board, OUT, BACK) is Status.SUCCESS
    assert board.cpu.rmp_entry(BACK >> 12).vmsa == 0


def test_a_metadata_page_travels_by_the_root_entry() -> None:
    board = held()
    assert swap("OUT", board, FREE, OUT, 63) is Status.SUCCESS
    page, saved = board.cpu.read(MDATA, PAGE), board.cpu.read(OUT, PAGE)
    board.assign(BACK, FIRMWARE)
    assert swap("OUT", board, MDATA, BACK, None, METADATA) is Status.SUCCESS
    root = board.psp.context(GCTX).root_md_entry
    assert (root.valid, root.metadata, root.gfn, root.vmpl_permissions, root.page_validated) == (1, 1, 2**52 - 1, 0, 0)
    assert AESGCM(OEK).encrypt(struct.pack("<Q4x", 1), page, None)[:-16] == board.cpu.read(BACK, PAGE)
    assert board.state(MDATA) == PageState.FIRMWARE
    assert swap("IN", board, BACK, MDATA, None, METADATA) is Status.SUCCESS
    assert board.cpu.read(MDATA, PAGE) == page
    assert board.state(MDATA) == PageState.METADATA
    pre_guest(board, FREE + MIB)
    assert (board.cpu.read(OUT, PAGE), swap("IN", board, OUT, FREE + MIB, 63)) == (saved, Status.SUCCESS)
    assert plain(board, FREE + MIB) == PATTERN
    assert swap("IN", board, BACK, OUT, None, METADATA) is Status.INVALID_MDATA_ENTRY


@pytest.mark.parametrize("large", [False, True])
def test_md_init_empties_the_page(large: bool) -> None:
    board = held()
    board.machine.dram.write(BACK, b"left over" * 100)
    board.assign(BACK, replace(FIRMWARE, large=large))
    board.ok(Command.SNP_PAGE_MD_INIT, gctx_paddr=GCTX, page_paddr=BACK)
    assert board.cpu.read(BACK, 2 * MIB if large else PAGE).count(0) == (2 * MIB if large else PAGE)
    entry_ = board.cpu.rmp_entry(BACK >> 12)
    assert (entry_.gfn, entry_.asid, entry_.page_size) == (1 << 36 | GCTX >> 12, 0, large)
    assert board.state(BACK) == PageState.METADATA


# What is wrong is refused.


def two_out() -> tuple[Board, list[bytes]]:
    """A page swapped out twice, by the first two entries, its content changed between: the sealed pages."""
    board, pages = held(), list[bytes]()
    for slot, content in enumerate((PATTERN, PATTERN[::-1])):
        board.machine.memory.write(1, FREE, content)
        assert swap("OUT", board, FREE, OUT, slot) is Status.SUCCESS
        pages.append(board.cpu.read(OUT, PAGE))
    pre_guest(board, BACK)
    return board, pages


def refused(board: Board, status: Status, src: int = OUT, dst: int = BACK, slot: int = 0, **more: Any) -> None:
    """SWAP_IN is refused and nothing changes."""
    fields = {"gctx_paddr": GCTX, "src_paddr": src, "dst_paddr": dst, "mdata_paddr": MDATA + 64 * slot, **more}
    assert_refused(Attempt(board, Command.SNP_PAGE_SWAP_IN, fields), status)


def test_an_older_page_does_not_fit_a_newer_entry() -> None:
    board, pages = two_out()
    board.machine.dram.write(OUT, pages[0])
    refused(board, Status.BAD_MEASUREMENT, slot=1)
    board.machine.dram.write(OUT, pages[1])
    refused(board, Status.BAD_MEASUREMENT, slot=0)
    assert swap("IN", board, OUT, BACK, 1) is Status.SUCCESS
    assert plain(board, BACK) == PATTERN[::-1]
    assert board.state(BACK) == PageState.PRE_GUEST, "as when it went out: no longer validated"


@pytest.mark.parametrize("position", [0, 16, 2048, PAGE - 1])
def test_every_bit_of_a_sealed_page_counts(position: int) -> None:
    board, pages = two_out()
    spoilt = bytearray(pages[1])
    spoilt[position] ^= 1
    board.machine.dram.write(OUT, bytes(spoilt))
    refused(board, Status.BAD_MEASUREMENT, slot=1)


def test_the_page_of_another_guest_does_not_open() -> None:
    board, _ = two_out()
    context = board.psp.context(GCTX)
    board.psp.save_context(GCTX, context.replace(oek=OEK[::-1]))
    refused(board, Status.BAD_MEASUREMENT, slot=1)


def test_numbers_are_used_up() -> None:
    board = held()
    board.psp.save_context(GCTX, board.psp.context(GCTX).replace(oek_iv_count=2**64 - 3))
    assert swap("OUT", board, FREE, OUT) is Status.SUCCESS
    assert swap("OUT", board, FREE, OUT, 1) is Status.AEAD_OFLOW


@pytest.mark.parametrize("command", ["SNP_PAGE_SWAP_OUT", "SNP_PAGE_SWAP_IN", "SNP_PAGE_MOVE"])
def test_a_policy_of_1_58_forbids_it(command: str) -> None:
    board = held()
    context = board.psp.context(GCTX)
    board.psp.save_context(GCTX, context.replace(policy=context.policy | 1 << 25))
    place = {} if command == "SNP_PAGE_MOVE" else {"mdata_paddr": MDATA}
    fields = {"gctx_paddr": GCTX, "src_paddr": FREE, "dst_paddr": OUT, **place}
    assert_refused(Attempt(board, Command[command], fields), Status.POLICY_FAILURE)


@pytest.mark.parametrize(("revision", "status"), [("1.55", Status.POLICY_FAILURE), ("1.58", Status.SUCCESS)])
def test_only_1_58_knows_that_policy(revision: str, status: Status) -> None:
    board = Board().initialise()
    board.psp.release = replace(board.psp.release, abi=release(revision))
    board.create()
    assert board.command(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=DEFAULT_POLICY | 1 << 25) is status


# Move.


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("valid", [True, False])
def test_a_page_moves_with_all_that_is_said_of_it(large: bool, valid: bool) -> None:
    size = 2 * MIB if large else PAGE
    board = held(PATTERN, large=large, vmpl2_perms=7)
    if not valid:
        assert swap("OUT", board, FREE, OUT, page_size=int(large)) is Status.SUCCESS
    before, content = board.cpu.rmp_entry(FREE >> 12), plain(board, FREE, size)
    pre_guest(board, BACK, 0x800000, large)
    board.ok(Command.SNP_PAGE_MOVE, gctx_paddr=GCTX, src_paddr=FREE, dst_paddr=BACK, page_size=int(large))
    assert plain(board, BACK, size) == content
    assert board.machine.dram.read(BACK, PAGE) != board.machine.dram.read(FREE, PAGE), "another tweak"
    moved = board.cpu.rmp_entry(BACK >> 12)
    assert moved == before.replace(immutable=0, lock=0)
    assert board.state(BACK) == (PageState.GUEST_VALID if valid else PageState.GUEST_INVALID)
    assert board.state(FREE) == PageState.GUEST_INVALID
    assert plain(board, FREE, size) == content, "not wiped"


def test_a_metadata_page_moves() -> None:
    board = held()
    assert swap("OUT", board, FREE, OUT, 3) is Status.SUCCESS
    content = board.cpu.read(MDATA, PAGE)
    board.assign(BACK, FIRMWARE)
    board.ok(Command.SNP_PAGE_MOVE, gctx_paddr=GCTX, src_paddr=MDATA, dst_paddr=BACK)
    assert (board.state(MDATA), board.state(BACK)) == (PageState.FIRMWARE, PageState.METADATA)
    assert board.cpu.read(BACK, PAGE) == content


# Debugging.


@pytest.mark.parametrize("kind", [LaunchPage.NORMAL, LaunchPage.VMSA])
def test_debugging_reads_and_writes(kind: LaunchPage) -> None:
    board = held(kind=kind)
    board.ok(Command.SNP_DBG_DECRYPT, gctx_paddr=GCTX, src_paddr=FREE, dst_paddr=OUT)
    assert board.cpu.read(OUT, PAGE) == plain(board, FREE)
    board.machine.dram.write(BACK, b"%" * PAGE)
    board.ok(Command.SNP_DBG_ENCRYPT, gctx_paddr=GCTX, src_paddr=BACK, dst_paddr=FREE)
    assert plain(board, FREE) == b"%" * PAGE


REG_PROT = 1 << 14


@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_protected_registers_are_shown_and_hidden_again(name: str) -> None:
    """The registers of the tweak bitmap are XORed with a random nonce, which stands in the page."""
    given = PATTERN[:0x3B0] + struct.pack("<Q", REG_PROT) + PATTERN[0x3B8:]
    board = held(given, LaunchPage.VMSA, name=name)
    inside = plain(board, FREE)
    board.ok(Command.SNP_DBG_DECRYPT, gctx_paddr=GCTX, src_paddr=FREE, dst_paddr=OUT)
    shown = board.cpu.read(OUT, PAGE)
    nonce = inside[0x300:0x308]
    assert shown == given[:0x300] + nonce + given[0x308:0x380] + bytes(8) + b"\xff" * 8 + given[0x390:]
    assert nonce not in (given[0x300:0x308], bytes(8))
    hidden = bytes(a ^ b for a, b in zip(shown[0x178:0x180], nonce, strict=True))
    assert (inside[0x178:0x180], inside[0xD0:0xD8]) == (hidden, shown[0xD0:0xD8]), "RIP is hidden, EFER is not"
    board.machine.dram.write(BACK, shown)
    board.ok(Command.SNP_DBG_ENCRYPT, gctx_paddr=GCTX, src_paddr=BACK, dst_paddr=FREE)
    assert plain(board, FREE) == inside


def test_debugging_reads_a_part_of_a_large_page() -> None:
    board = held(bytes(PAGE * 3) + PATTERN, large=True)
    board.assign(BACK, FIRMWARE)
    board.ok(Command.SNP_DBG_DECRYPT, gctx_paddr=GCTX, src_paddr=FREE + 3 * PAGE, dst_paddr=BACK)
    assert board.cpu.read(BACK, PAGE) == PATTERN
