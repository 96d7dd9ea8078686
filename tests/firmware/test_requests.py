"""SNP_GUEST_REQUEST: the envelope check by check, the counters, and the attestation report field by field."""

from __future__ import annotations

import struct
from hashlib import sha256, sha384
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.hardware.host_instructions import FIRMWARE, HYPERVISOR, NewState
from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState
from snpbook.spec.policy import DEFAULT_POLICY
from snpbook.spec.states import PlatformState
from snpbook.spec.status import Status
from tests.firmware.rows import Attempt, Row, assert_refused, double, lookup_rows, single
from tests.firmware.test_guests import LOW, NO_CONTEXT, OFF
from tests.firmware.test_identity import AUTHOR_KEY, FAMILY, ID_KEY, IMAGE, id_auth, id_block, public_key
from tests.machines import FREE, GCTX, MIB, PAGE, Board, World

REQUEST, RESPONSE = 20 * MIB, 24 * MIB
"""2 MB apart, so that either may lie in a 2 MB entry."""
REPORT_DATA = bytes(range(64))
LARGE = NewState(assigned=True, immutable=True, large=True)
GUEST_LARGE = NewState(assigned=True, asid=3, large=True)


def report_request(data: bytes = REPORT_DATA, vmpl: int = 0, key_sel: int = 0, reserved: bytes = bytes(24)) -> bytes:
    return struct.pack("<64sII", data, vmpl, key_sel) + reserved


def seal(
    key: bytes, body: bytes, *, seqno: int = 1, vmpck: int = 0, kind: int = 5, version: int = 1, algo: int = 1,
    hdr_version: int = 1, hdr_size: int = 0x60, size: int | None = None, flip: int | None = None,
) -> bytes:  # fmt: skip
    """A message as the sheet's table has it; `flip` changes a byte after sealing."""
    rest = struct.pack(
        "<BBHBBHIB35x", algo, hdr_version, hdr_size, kind, version, len(body) if size is None else size, 0, vmpck
    )
    sealed = AESGCM(key).encrypt(struct.pack("<Q4x", seqno), body, rest)
    message = bytearray(struct.pack("<16s16xQ8x", sealed[-16:], seqno) + rest + sealed[:-16])
    if flip is not None:
        message[flip] ^= 1
    return bytes(message)


def unseal(key: bytes, page: bytes) -> tuple[tuple[int, ...], bytes]:
    """(sequence number, algorithm, header version, size, type, version, key number) and the body of a response."""
    (seqno,) = struct.unpack_from("<Q", page, 0x20)
    algo, hdr_version, hdr_size, kind, version, size = struct.unpack_from("<BBHBBH", page, 0x30)
    assert page[0x10:0x20] == bytes(16)
    assert page[0x28:0x30] == bytes(8)
    body = AESGCM(key).decrypt(struct.pack("<Q4x", seqno), page[0x60 : 0x60 + size] + page[:16], page[0x30:0x60])
    return (seqno, algo, hdr_version, hdr_size, kind, version, page[0x3C]), body


def running(guest: str = "RUNNING", name: str = "milan", **finish: Any) -> Board:
    board = Board(name).initialise()
    board.start()
    board.add(FREE, 0x1000)
    if guest == "RUNNING":
        board.finish(**finish)
    return board


def key_of(board: Board, vmpck: int = 0) -> bytes:
    key: bytes = getattr(board.psp.context(GCTX), f"vmpck{vmpck}")
    return key


def guest_request(
    low: int = 0, off: bool = False, gctx: int = GCTX, guest: str = "RUNNING", request: int = REQUEST,
    response: int = RESPONSE, request_in: int = 0, response_in: int = 0, request_new: NewState = HYPERVISOR,
    response_new: NewState = FIRMWARE, count: int = 0, **header: Any,
) -> Attempt:  # fmt: skip
    board = running(guest)
    context = board.psp.context(GCTX)
    if count:
        board.psp.save_context(GCTX, context.replace(msg_count0=count))
    message = seal(context.vmpck0, report_request(), **{"seqno": count + 1, **header})
    board.machine.dram.write(REQUEST + request_in, message[: PAGE - request_in])
    board.assign(REQUEST, request_new)
    board.assign(RESPONSE, response_new)
    if off:
        board.psp.state = PlatformState.UNINIT
    places = {"request_paddr": request + request_in, "response_paddr": response + response_in}
    return Attempt(board, Command.SNP_GUEST_REQUEST, {"gctx_paddr": gctx + low, **places})


FIT = PAGE - 0x60 - 0x4C0
ROWS = [
    LOW,
    OFF,
    *lookup_rows("request"),
    *lookup_rows("response"),
    NO_CONTEXT,
    Row("response page Hypervisor", Status.INVALID_PAGE_STATE, {"response_new": HYPERVISOR}),
    Row("response page Guest-Invalid", Status.INVALID_PAGE_STATE, {"response_new": NewState(assigned=True, asid=3)}),
    Row("request page of 2 MB", Status.INVALID_PAGE_SIZE, {"request_new": GUEST_LARGE}),
    Row("response page of 2 MB", Status.INVALID_PAGE_SIZE, {"response_new": LARGE}),
    Row("guest LAUNCH", Status.INVALID_GUEST_STATE, {"guest": "LAUNCH"}),
    Row("header crosses its page", Status.INVALID_PARAM, {"request_in": PAGE - 0x5F}),
    Row("header version", Status.INVALID_PARAM, {"hdr_version": 2}),
    Row("header size", Status.INVALID_PARAM, {"hdr_size": 0x61}),
    Row("algorithm", Status.INVALID_PARAM, {"algo": 0}),
    Row("size 0", Status.INVALID_PARAM, {"size": 0}),
    Row("size no multiple of 16", Status.INVALID_PARAM, {"size": 0x58}),
    Row("payload crosses its page", Status.INVALID_PARAM, {"request_in": PAGE - 0xB0}),
    Row("key 4", Status.INVALID_PARAM, {"vmpck": 4}),
    Row("tag", Status.BAD_MEASUREMENT, {"flip": 0}),
    Row("counter used up", Status.AEAD_OFLOW, {"count": 2**64 - 2}),
    Row("replayed number", Status.AEAD_OFLOW, {"seqno": 0}),
    Row("number skipped", Status.AEAD_OFLOW, {"seqno": 2}),
    Row("message version 0", Status.INVALID_PARAM, {"version": 0}),
    Row("message version 2", Status.INVALID_PARAM, {"version": 2}),
    Row("message type 0", Status.INVALID_PARAM, {"kind": 0}),
    Row("message type of a response", Status.INVALID_PARAM, {"kind": 6}),
    Row("message type 200", Status.INVALID_PARAM, {"kind": 200}),
    Row("response leaves its page", Status.INVALID_PARAM, {"response_in": FIT + 1}),
]


@single(ROWS)
def test_request_refuses(row: Row) -> None:
    assert_refused(guest_request(**row.options), row.status)


@double(ROWS)
def test_request_checks_in_order(first: Row, second: Row) -> None:
    assert_refused(guest_request(**first.options, **second.options), first.status)


@pytest.mark.parametrize("position", [*range(16), *range(0x30, 0x60), 0x60, 0xBF])
def test_every_protected_byte_counts(position: int) -> None:
    """Tag, header from 0x30 on, payload: a change is found, by its own check or by the tag."""
    assert guest_request(flip=position).issue() in (Status.BAD_MEASUREMENT, Status.INVALID_PARAM)


@pytest.mark.parametrize(("request_in", "response_in"), [(0, 0), (1, 3), (PAGE - 0xC0, FIT), (0x333, 0x222)])
@pytest.mark.parametrize("request_new", [HYPERVISOR, FIRMWARE, NewState(assigned=True, asid=3)])
def test_request_and_response_need_only_fit_their_pages(
    request_in: int, response_in: int, request_new: NewState
) -> None:
    built = guest_request(request_in=request_in, response_in=response_in, request_new=request_new)
    before = World.of(built.board)
    assert built.issue() is Status.SUCCESS
    raw = built.board.cpu.read(RESPONSE + response_in, 0x520)
    header, body = unseal(key_of(built.board), raw)
    assert header == (2, 1, 1, 0x60, 6, 1, 0)
    assert struct.unpack_from("<II", body) == (0, 0x4A0)
    assert body[8:0x20] == bytes(0x18)
    assert built.board.state(RESPONSE) == PageState.FIRMWARE
    after = World.of(built.board)
    assert before.rest == after.rest
    rsp = before.memory.get(RESPONSE // (2 * MIB))
    assert rsp is None
    written = after.memory[RESPONSE // (2 * MIB)]
    assert not written[:response_in].any()
    assert not written[response_in + 0x520 :].any()


# Counters.


def ask(board: Board, message: bytes) -> Status:
    board.machine.dram.write(REQUEST, message.ljust(PAGE, b"\0"))
    if board.state(RESPONSE) != PageState.FIRMWARE:
        board.assign(RESPONSE, FIRMWARE)
    fields = {"gctx_paddr": GCTX, "request_paddr": REQUEST, "response_paddr": RESPONSE}
    return board.command(Command.SNP_GUEST_REQUEST, **fields)


def answer(board: Board, vmpck: int = 0) -> tuple[tuple[int, ...], bytes]:
    return unseal(key_of(board, vmpck), board.cpu.read(RESPONSE, 0x520))


def test_each_exchange_costs_two_numbers_and_each_key_has_its_own() -> None:
    board = running()
    for vmpck in range(4):
        key = key_of(board, vmpck)
        for seqno in (1, 3, 5):
            message = seal(key, report_request(vmpl=vmpck), seqno=seqno, vmpck=vmpck)
            assert ask(board, message) is Status.SUCCESS
            assert answer(board, vmpck)[0] == (seqno + 1, 1, 1, 0x60, 6, 1, vmpck)
            before = World.of(board)
            assert ask(board, message) is Status.AEAD_OFLOW, "replayed"
            assert World.of(board) == before
    context = board.psp.context(GCTX)
    assert [getattr(context, f"msg_count{vmpck}") for vmpck in range(4)] == [6, 6, 6, 6]


def test_a_failed_envelope_costs_nothing() -> None:
    board = running()
    key = key_of(board)
    assert ask(board, seal(key, report_request(), flip=3)) is Status.BAD_MEASUREMENT
    assert ask(board, seal(key, report_request(), kind=2)) is Status.INVALID_PARAM
    assert ask(board, seal(key_of(board, 1), report_request())) is Status.BAD_MEASUREMENT, "another key's"
    assert ask(board, seal(key, report_request())) is Status.SUCCESS


REFUSED = [
    (report_request(reserved=b"\1" + bytes(23)), 0, Status.INVALID_PARAM),
    (report_request(reserved=bytes(23) + b"\1"), 0, Status.INVALID_PARAM),
    (report_request(key_sel=4), 0, Status.INVALID_PARAM),
    (report_request(key_sel=3), 0, Status.INVALID_KEY),
    (report_request(key_sel=2), 0, Status.INVALID_KEY),
    (report_request(vmpl=0), 1, Status.INVALID_PARAM),
    (report_request(vmpl=2), 3, Status.INVALID_PARAM),
    (report_request(vmpl=0, key_sel=3), 1, Status.INVALID_KEY),
    (report_request(vmpl=0, key_sel=3, reserved=b"\1" * 24), 1, Status.INVALID_PARAM),
]


@pytest.mark.parametrize(("body", "vmpck", "status"), REFUSED)
def test_a_refused_payload_is_answered_inside_and_costs_two(body: bytes, vmpck: int, status: Status) -> None:
    board = running()
    assert ask(board, seal(key_of(board, vmpck), body, vmpck=vmpck)) is Status.SUCCESS
    header, reply = answer(board, vmpck)
    assert header[0] == 2
    assert struct.unpack_from("<II", reply) == (status, 0x4A0)
    assert reply[8:] == bytes(0x4B8), "a report of zeros"
    again = seal(key_of(board, vmpck), report_request(vmpl=vmpck), vmpck=vmpck, seqno=3)
    assert ask(board, again) is Status.SUCCESS


@pytest.mark.parametrize("key_sel", [0, 1])
def test_vcek_disabled_means_no_key(key_sel: int) -> None:
    board = running(vcek_dis=1)
    assert ask(board, seal(key_of(board), report_request(key_sel=key_sel))) is Status.SUCCESS
    assert answer(board)[1][:4] == Status.INVALID_KEY.to_bytes(4, "little")


@pytest.mark.parametrize("vmpl", [0, 1, 3, 4, 2**32 - 1])
def test_a_less_privileged_vmpl_is_reported_as_asked(vmpl: int) -> None:
    board = running()
    assert ask(board, seal(key_of(board), report_request(vmpl=vmpl))) is Status.SUCCESS
    assert answer(board)[1][0x20 + 0x30 :][:4] == vmpl.to_bytes(4, "little")


@pytest.mark.parametrize("size", [16, 64, 80, 0x80])
def test_missing_bytes_of_a_request_read_as_zero(size: int) -> None:
    """The firmware does not compare the size with the type."""
    board = running()
    body = report_request().ljust(0x80, b"\xff")[:size]
    assert ask(board, seal(key_of(board), body)) is Status.SUCCESS
    report = answer(board)[1][0x20:]
    assert report[0x50:0x90] == REPORT_DATA[:size].ljust(64, b"\0")


# The report.


def le(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def report_of(board: Board, **request: Any) -> bytes:
    assert ask(board, seal(key_of(board), report_request(**request))) is Status.SUCCESS
    return answer(board)[1][0x20:]


@pytest.mark.parametrize("name", ["milan", "genoa"])
def test_report_field_by_field(name: str) -> None:
    policy = DEFAULT_POLICY | 1 << 18
    board = Board(name).initialise()
    board.start(policy=policy)
    board.add(FREE, 0x1000)
    digest = board.psp.context(GCTX).launch_digest
    block = id_block(digest, policy, svn=0x1234)
    board.machine.dram.write(FREE + PAGE, block)
    board.machine.dram.write(FREE + 2 * PAGE, id_auth(block))
    host_data = bytes(range(100, 132))
    places = {"id_block_paddr": FREE + PAGE, "id_auth_paddr": FREE + 2 * PAGE}
    board.finish(id_block_en=1, auth_key_en=1, host_data=host_data, **places)
    report, context, product = report_of(board, vmpl=2), board.psp.context(GCTX), board.machine.product
    tcb = {"milan": bytes([4, 0, 0, 0, 0, 0, 24, 0xDB]), "genoa": bytes([10, 0, 0, 0, 0, 0, 23, 0x54])}[name]
    build = {"milan": 29, "genoa": 40}[name]
    cpuid = {"milan": bytes([0x19, 1, 1]), "genoa": bytes([0x19, 0x11, product.signature.stepping])}[name]
    assert len(report) == 0x4A0
    assert le(report[0x000:0x004]) == 3
    assert le(report[0x004:0x008]) == 0x1234
    assert le(report[0x008:0x010]) == policy
    assert report[0x010:0x030] == FAMILY + IMAGE
    assert le(report[0x030:0x034]) == 2
    assert le(report[0x034:0x038]) == 1
    assert report[0x038:0x040] == tcb
    assert le(report[0x040:0x048]) == product.firmware.platform_info
    assert le(report[0x048:0x04C]) == 1, "AUTHOR_KEY_EN, VCEK"
    assert report[0x04C:0x050] == bytes(4)
    assert report[0x050:0x090] == REPORT_DATA
    assert report[0x090:0x0C0] == digest
    assert report[0x0C0:0x0E0] == host_data
    assert report[0x0E0:0x110] == sha384(public_key(ID_KEY)).digest()
    assert report[0x110:0x140] == sha384(public_key(AUTHOR_KEY)).digest()
    assert report[0x140:0x160] == context.report_id
    assert report[0x160:0x180] == b"\xff" * 32
    assert report[0x180:0x188] == tcb
    assert report[0x188:0x18B] == cpuid
    assert report[0x18B:0x1A0] == bytes(0x15)
    assert report[0x1A0:0x1E0] == board.psp.chip.chip_id
    assert report[0x1E0:0x1E8] == tcb
    assert report[0x1E8:0x1F0] == bytes([build, 55, 1, 0, build, 55, 1, 0])
    assert report[0x1F0:0x1F8] == tcb
    assert report[0x1F8:0x2A0] == bytes(0xA8)
    assert report[0x330:0x4A0] == bytes(0x170)
    assert report[0x2A0 + 48 : 0x2E8] == report[0x2E8 + 48 : 0x330] == bytes(24)
    r, s = le(report[0x2A0:0x2E8]), le(report[0x2E8:0x330])
    vcek = board.psp.chip.vcek(board.psp.reported_tcb).public_key()
    vcek.verify(encode_dss_signature(r, s), report[:0x2A0], ec.ECDSA(hashes.SHA384()))


def test_report_without_an_id_block() -> None:
    report = report_of(running())
    assert report[0x004:0x008] + report[0x010:0x030] == bytes(0x24)
    assert report[0x048:0x04C] == bytes(4)
    assert report[0x0C0:0x140] == bytes(0x80)


def test_author_key_without_an_id_block_shows_only_its_flag() -> None:
    report = report_of(running(auth_key_en=1))
    assert report[0x048:0x04C] == bytes([1, 0, 0, 0])
    assert report[0x0E0:0x140] == bytes(0x60)


def test_equal_questions_get_equal_reports() -> None:
    board = running()
    first = report_of(board)
    assert ask(board, seal(key_of(board), report_request(), seqno=3)) is Status.SUCCESS
    assert answer(board)[1][0x20:] == first, "the nonce of the signature is RFC 6979's"


def test_printed_message() -> None:
    """The vector of the sheet: the bytes of a sealed request, and that the firmware opens it."""
    key = bytes(range(32))
    message = seal(key, report_request())
    assert message[:16].hex() == "0f354f26b13f7433d3674d8eebcaf847"
    assert message[0x60:0x70].hex() == "e22d803ca0aaea00420d0fc830cc86c4"
    assert len(message) == 0xC0
    assert sha256(message).hexdigest() == "37986d2e2816e933c1e342b05eac83a78b121d632b6090da8dff837967ad24aa"
    board = running()
    board.psp.save_context(GCTX, board.psp.context(GCTX).replace(vmpck0=key))
    assert ask(board, message) is Status.SUCCESS
    assert answer(board)[1][0x20 + 0x50 :][:64] == REPORT_DATA
