"""What a launch may have besides: a migration agent, a migration image, a clock of its own; and GUEST_STATUS."""

from __future__ import annotations

import struct
from dataclasses import replace
from hashlib import sha384
from typing import Any

import pytest

from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command
from snpbook.spec.pages import LaunchPage, PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.releases import release
from snpbook.spec.status import Status
from tests.firmware.rows import Attempt, assert_refused
from tests.firmware.test_launch import PATTERN, page_info, plain
from tests.firmware.test_messages import REPORT, exchange, report_request
from tests.machines import FREE, GCTX, PAGE, Board

AGENT = GCTX + PAGE
MIGRATE_MA, SINGLE_SOCKET = 1 << 18, 1 << 20


def with_agent(policy: int = DEFAULT_POLICY) -> Board:
    board = Board().initialise()
    board.start(AGENT, 9, policy)
    board.finish(AGENT)
    board.create()
    return board


# Agents.


def test_an_agent_is_named_in_reports() -> None:
    board = with_agent()
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=0x70000, ma_en=1, ma_gctx_paddr=AGENT)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1)
    board.finish()
    context, agent = board.psp.context(GCTX), board.psp.context(AGENT)
    assert (context.ma_paddr, context.report_id_ma) == (AGENT, agent.report_id)
    assert exchange(board, REPORT, report_request())[0x20 + 0x160 :][:32] == agent.report_id
    assert agent.ma_paddr == 2**64 - 1


def test_an_activation_wants_the_agent_of_one_socket_active() -> None:
    """ACTIVATE_EX with SINGLE_SOCKET: the agent must have an ASID; when it is gone it has none."""
    board = with_agent(DEFAULT_POLICY | SINGLE_SOCKET)
    policy = DEFAULT_POLICY | MIGRATE_MA | SINGLE_SOCKET
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=policy, ma_en=1, ma_gctx_paddr=AGENT)
    board.machine.dram.write(FREE, struct.pack("<2I", 0, 1))
    fields = {"length": 0x20, "gctx_paddr": GCTX, "asid": 1, "numids": 2, "ids_paddr": FREE}
    kept = board.psp.context(AGENT)
    board.psp.save_context(AGENT, kept.replace(asid=0))
    assert_refused(Attempt(board, Command.SNP_ACTIVATE_EX, fields), Status.POLICY_FAILURE)
    board.psp.save_context(AGENT, kept)
    board.ok(Command.SNP_ACTIVATE_EX, **fields)


def test_activation_by_complexes_adds_up() -> None:
    board = Board(cores=24).initialise()
    board.start(asid=0)

    def activate(asid: int, *ids: int) -> Status:
        board.machine.dram.write(FREE, struct.pack(f"<{len(ids)}I", *ids))
        fields = {"length": 0x20, "gctx_paddr": GCTX, "asid": asid, "numids": len(ids), "ids_paddr": FREE}
        return board.command(Command.SNP_ACTIVATE_EX, **fields)

    assert activate(3, 17, 23) is Status.SUCCESS
    assert board.psp.asids.states[:, 3].tolist() == [0, 0, 2]
    board.add(FREE + PAGE, 0x1000, asid=3)
    assert activate(3, 0) is Status.SUCCESS, "again, although pages carry the ASID"
    assert activate(4, 0) is Status.ACTIVE
    assert activate(3, 24) is Status.INVALID_CONFIG
    assert board.psp.asids.states[:, 3].tolist() == [2, 0, 2]
    assert board.psp.context(GCTX).ccx_mask == 0b101
    board.finish()
    assert board.psp.asids.states[:, 3].tolist() == [3, 0, 3]
    assert activate(3, 8) is Status.SUCCESS
    assert board.psp.asids.states[:, 3].tolist() == [3, 3, 3]


# Policies of newer releases.


@pytest.mark.parametrize(("bit", "name", "right"), [
    (22, "genoa", True), (22, "milan", False), (23, "genoa", False), (24, "genoa", False), (21, "milan", True),
])  # fmt: skip
def test_policies_of_1_58(bit: int, name: str, right: bool) -> None:
    board = Board(name).initialise()
    board.psp.release = replace(board.psp.release, abi=release("1.58"))
    board.create()
    attempt = Attempt(board, Command.SNP_LAUNCH_START, {"gctx_paddr": GCTX, "policy": DEFAULT_POLICY | 1 << bit})
    if right:
        assert attempt.issue() is Status.SUCCESS
        return
    assert_refused(attempt, Status.POLICY_FAILURE)
    board.psp.rapl_disabled, board.machine.hidden_asids = bit == 23, 9 * (bit == 24)
    assert attempt.issue() is (Status.POLICY_FAILURE if bit == 22 else Status.SUCCESS)


# Images.


def test_a_migration_image_has_a_digest_of_its_own() -> None:
    board = Board().initialise()
    board.start()
    board.machine.dram.write(FREE, PATTERN)
    board.add(FREE, 0x5000, imi_page=1)
    board.add(FREE + PAGE, 0x6000, LaunchPage.ZERO)
    board.add(FREE + 2 * PAGE, 0x7000, LaunchPage.ZERO, imi_page=1)

    def step(before: bytes, contents: bytes, kind: int, gpa: int, imi: int) -> bytes:
        return sha384(before + contents + bytes([0x70, 0, kind, imi, 0, 0, 0, 0]) + gpa.to_bytes(8, "little")).digest()

    pages = [(sha384(PATTERN).digest(), 1, 0x5000, 1), (bytes(48), 3, 0x6000, 0), (bytes(48), 3, 0x7000, 1)]
    digest = imd = bytes(48)
    for page in pages:
        digest = step(digest, *page)
        imd = step(imd, *page) if page[3] else imd
    context = board.psp.context(GCTX)
    assert (context.launch_digest, context.imd) == (digest, imd)


def test_a_launch_of_an_image_takes_nothing_else() -> None:
    board = Board().initialise()
    board.create()
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=DEFAULT_POLICY, imi_en=1)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1)
    board.assign(FREE, NewState(assigned=True, asid=1, immutable=True), 0x1000, 2)
    fields = {"gctx_paddr": GCTX, "page_paddr": FREE, "page_type": LaunchPage.SECRETS}
    assert_refused(Attempt(board, Command.SNP_LAUNCH_UPDATE, fields), Status.INVALID_PARAM)
    board.ok(Command.SNP_LAUNCH_UPDATE, **fields, imi_page=1)
    assert plain(board, FREE)[4:8] == bytes([1, 0, 0, 0]), "the secrets page says so"
    context = board.psp.context(GCTX)
    assert context.imd == context.launch_digest != bytes(48)
    assert_refused(Attempt(board, Command.SNP_LAUNCH_FINISH, {"gctx_paddr": GCTX}), Status.INVALID_GUEST_STATE)


# The VMSA and the secrets page.


def launched(kind: LaunchPage, data: bytes, name: str = "genoa", **start: Any) -> Board:
    board = Board(name).initialise()
    board.create()
    board.ok(Command.SNP_LAUNCH_START, gctx_paddr=GCTX, policy=DEFAULT_POLICY, **start)
    board.ok(Command.SNP_ACTIVATE, gctx_paddr=GCTX, asid=1)
    board.machine.dram.write(FREE, data)
    board.add(FREE, 0x5000, kind)
    return board


@pytest.mark.parametrize("features", [0, 1 << 9, 1 << 14, 1 << 9 | 1 << 14])
def test_vmsa_features(features: int) -> None:
    """Secure TSC: the firmware's scale and offset; VmsaRegProt: the registers of the bitmap under a random nonce."""
    given = PATTERN[:0x3B0] + struct.pack("<Q", features) + PATTERN[0x3B8:]
    board = launched(LaunchPage.VMSA, given, desired_tsc_khz=2_000_000)
    measured = given[:0x2F0] + bytes(16) + given[0x300:]
    assert board.psp.context(GCTX).launch_digest == page_info(sha384(measured).digest(), 2, 0x5000)
    inside = bytearray(plain(board))
    if features & 1 << 9:
        assert inside[0x2F0:0x300] == struct.pack("<QQ", 0x140A42B182, 0)
        inside[0x2F0:0x300] = given[0x2F0:0x300]
    if features & 1 << 14:
        nonce = bytes(inside[0x300:0x308])
        assert nonce != given[0x300:0x308]
        bitmap = {5: 0x80, 7: 0x88, 0xC: 0xEE, 0xD: 0xFF, 0x10: 0xF0, 0x19: 0x3F}
        bitmap |= dict.fromkeys([*range(0x11, 0x19), *range(0x26, 0x3F)], 0xFF)
        for byte, bits in bitmap.items():
            for bit in range(8):
                if bits >> bit & 1:
                    at = 8 * (8 * byte + bit)
                    inside[at : at + 8] = bytes(a ^ b for a, b in zip(inside[at : at + 8], nonce, strict=True))
        inside[0x300:0x308] = given[0x300:0x308]
    assert bytes(inside) == given[:0x380] + bytes(8) + b"\xff" * 8 + given[0x390:]


def test_two_launches_have_two_nonces() -> None:
    given = PATTERN[:0x3B0] + struct.pack("<Q", 1 << 14) + PATTERN[0x3B8:]
    board = launched(LaunchPage.VMSA, given)
    board.machine.dram.write(FREE + PAGE, given)
    board.add(FREE + PAGE, 0x6000, LaunchPage.VMSA)
    assert plain(board)[0x300:0x308] != plain(board, FREE + PAGE)[0x300:0x308]


@pytest.mark.parametrize(("revision", "version", "vector"), [("1.51", 2, 0), ("1.55", 3, 0), ("1.58", 3, 0x15)])
def test_secrets_page_by_release(revision: str, version: int, vector: int) -> None:
    board = Board("genoa").initialise()
    board.psp.release, board.psp.mitigations = replace(board.psp.release, abi=release(revision)), vector
    board.start()
    board.add(FREE, 0x5000, LaunchPage.SECRETS)
    raw = plain(board)
    assert raw[:4] == struct.pack("<I", version)
    assert raw[0x105] == 0x80
    assert raw[0x13F] == 0
    assert raw[0x160:0x164] == struct.pack("<I", 200)
    assert raw[0x168:0x170] == struct.pack("<Q", vector)


# What the host is told.


@pytest.mark.parametrize(("guest", "asid", "state"), [("INIT", 0, 0), ("LAUNCH", 1, 1), ("RUNNING", 1, 2)])
def test_guest_status(guest: str, asid: int, state: int) -> None:
    board = Board().initialise()
    policy = DEFAULT_POLICY | MIGRATE_MA
    if guest == "INIT":
        board.create()
    else:
        board.start(policy=policy)
    if guest == "RUNNING":
        board.finish(vcek_dis=1)
    board.assign(FREE, FIRMWARE)
    board.ok(Command.SNP_GUEST_STATUS, gctx_paddr=GCTX, status_paddr=FREE + 0xFE0)
    told = struct.pack("<QIBxxxI12x", policy if guest != "INIT" else 0, asid, state, int(guest == "RUNNING"))
    assert board.cpu.read(FREE, PAGE) == bytes(0xFE0) + told
    assert board.state(FREE) == PageState.FIRMWARE
