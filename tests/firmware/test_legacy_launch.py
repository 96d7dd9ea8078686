"""A legacy launch as its owner sees it, with arithmetic of his own; the vectors of the SEV API's tools."""

from __future__ import annotations

import struct
from hashlib import sha256

import pytest

from snpbook.firmware.legacy_channel import session_keys
from snpbook.firmware.legacy_launch import measurement
from snpbook.firmware.legacy_state import LegacyGuest, TransportKeys
from snpbook.hardware.save_area import is_sealed
from snpbook.spec.commands import Command
from snpbook.spec.products import FirmwareBuild
from snpbook.spec.releases import Release
from snpbook.spec.states import LegacyGuestState
from snpbook.spec.status import Status
from tests.firmware import legacy_owner as other
from tests.firmware.legacy_board import CERT, ES_ASID, PAGE, PLAIN_ASID, A, B, C, D, LegacyBoard
from tests.firmware.legacy_owner import Owner

OWNER = Owner()
NODBG, NOKS, ES = 1, 2, 4


def test_session_key_vector() -> None:
    kek, kik = session_keys(bytes(16), bytes(16))
    assert (kek.hex(), kik.hex()) == ("b6abfbfb75ea1ea74ed8750b8afdb973", "53b524bf5669a363f365c864acba8572")


def test_measure_vector() -> None:
    board = LegacyBoard()
    board.psp.release = FirmwareBuild(Release((0, 18), 0, 18), 15)
    tik = bytes.fromhex("66320db73158a35a255d051758e95ed4")
    guest = LegacyGuest(LegacyGuestState.LUPDATE, 0, bytes(32), bytes(32), TransportKeys(bytes(16), tik))
    assert guest.digest.value == sha256().digest()
    measure = measurement(board.psp, guest, bytes.fromhex("4fbe0bedbad6c86ae8f68971d103e554"))
    assert measure.hex() == "6faab2daae389bcd3405a05d6cafe33c0414f7bedd0bae19ba5f38b7fd1664ea"


def session(board: LegacyBoard, policy: int) -> tuple[bytes, bytes]:
    return OWNER.certificate(), OWNER.session(board.certificates()[0], policy)


def measured(board: LegacyBoard, handle: int) -> tuple[bytes, bytes]:
    """MEASURE and the nonce."""
    board.ok(Command.LAUNCH_MEASURE, handle=handle, paddr=D, len=0x30)
    found = board.machine.dram.read(D, 0x30)
    return found[:32], found[32:]


@pytest.mark.parametrize("name", ["naples", "rome", "milan", "genoa"])
def test_an_owner_launches_measures_and_injects_a_secret(name: str) -> None:
    board = LegacyBoard(name).start()
    policy = NODBG | NOKS
    handle = board.launch(policy, session=session(board, policy)) if name != "naples" else board.launch(
        policy, asid=7, session=session(board, policy)
    )  # fmt: skip
    asid = board.call(Command.GUEST_STATUS, handle=handle).asid
    firmware, table = bytes(range(256)) * 0x150, b"hash table of 176".ljust(176, b"!")
    for address, data in ((A, firmware), (C, table)):
        board.write(address, data)
        board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=address, len=len(data))
        assert board.machine.dram.read(address, len(data)) != data
        assert board.plain(address, len(data), asid) == data
    measure, nonce = measured(board, handle)
    assert measure == OWNER.measure(board.api, policy, sha256(firmware + table).digest(), nonce)
    secret = b"disk key".ljust(64, b"\0")
    header, body = OWNER.packet(secret, 1, measure)
    board.ok(Command.LAUNCH_SECRET, handle=handle, hdr_paddr=board.write(D, header), hdr_len=0x34,
             guest_paddr=A + PAGE, guest_len=64, trans_paddr=board.write(B, body), trans_len=64)  # fmt: skip
    assert board.plain(A, 3 * PAGE, asid) == firmware[:PAGE] + secret + firmware[PAGE + 64 : 3 * PAGE]
    board.ok(Command.LAUNCH_FINISH, handle=handle)
    assert asid in board.machine.runnable
    assert board.psp.legacy.guests[handle].transport == TransportKeys(), "the owner's keys are forgotten"


def test_a_secret_belongs_to_one_measurement() -> None:
    """What MEASURE said is part of the MAC: a secret for another launch is refused, and nothing is written."""
    board = LegacyBoard().start()
    handle = board.launch(session=session(board, 0))
    measure, _ = measured(board, handle)
    before = board.machine.dram.snapshot()
    for covered, context, status in (
        (bytes(32), 1, Status.BAD_MEASUREMENT), (measure, 2, Status.BAD_MEASUREMENT), (measure, 1, Status.SUCCESS),
    ):  # fmt: skip
        header, body = OWNER.packet(b"s" * 32, context, covered)
        board.write(D, header)
        board.write(B, body)
        fields = {"hdr_paddr": D, "hdr_len": 0x34, "trans_paddr": B, "trans_len": 32}
        assert board.command(Command.LAUNCH_SECRET, handle=handle, guest_paddr=C, guest_len=32, **fields) is status
        assert (board.machine.dram.read(C, 32) == bytes(32)) == (status is not Status.SUCCESS)
    assert before != board.machine.dram.snapshot()


def test_without_an_owner_everybody_can_make_the_measurement() -> None:
    """No certificate, no channel: the keys are zero, and reserved policy bits and versions go unchecked."""
    board = LegacyBoard().start()
    policy = 1 << 6 | 0xFF << 24
    handle = board.launch(policy)
    measure, nonce = measured(board, handle)
    assert measure == Owner(tik=bytes(16)).measure(board.api, policy, sha256().digest(), nonce)


def test_a_launch_with_registers() -> None:
    """The VMSA is measured in the clear and its checksum kept, which a later change by the host breaks."""
    board = LegacyBoard().start()
    handle = board.launch(ES, ES_ASID, session(board, ES))
    vmsa = bytes(range(256)) * 16
    board.write(C, vmsa)
    board.ok(Command.LAUNCH_UPDATE_VMSA, handle=handle, paddr=C, len=PAGE)
    assert board.plain(C, PAGE, ES_ASID) == vmsa
    assert is_sealed(board.machine, ES_ASID, C // PAGE)
    measure, nonce = measured(board, handle)
    assert measure == OWNER.measure(board.api, ES, sha256(vmsa).digest(), nonce)
    board.write(C + 16, b"!")
    assert not is_sealed(board.machine, ES_ASID, C // PAGE)
    board.ok(Command.LAUNCH_FINISH, handle=handle)


def test_a_late_failure_leaves_what_came_before() -> None:
    """A range is worked through in pieces of 20 KB: those before the bad page are measured and encrypted."""
    board = LegacyBoard().start()
    handle = board.launch(session=session(board, 0))
    last = (48 << 20) - (1 << 20)  # where the RMP would be
    start = last - 0x5000
    board.write(start, b"x" * 0x5000)
    assert board.command(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=start, len=0x5010) is Status.INVALID_ADDRESS
    assert board.plain(start, 0x5000) == b"x" * 0x5000
    measure, nonce = measured(board, handle)
    assert measure == OWNER.measure(board.api, 0, sha256(b"x" * 0x5000).digest(), nonce)


def test_where_data_goes_is_not_measured() -> None:
    """Two hosts that swap two pages show the same measurement: SEV measures contents alone."""
    board = LegacyBoard().start()
    digests = []
    for places in ((A, B), (B, A)):
        handle = board.launch(asid=PLAIN_ASID + len(digests))
        for place, data in zip(places, (b"1" * PAGE, b"2" * PAGE), strict=True):
            board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(place, data), len=PAGE)
        digests.append(board.psp.legacy.guests[handle].digest)
    assert digests[0] == digests[1]


def test_attestation_is_signed_by_the_pek() -> None:
    board = LegacyBoard().start()
    handle = board.launch(NODBG)
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(A, b"a" * PAGE), len=PAGE)
    board.finish_launch(handle)
    answer = board.call(Command.ATTESTATION, handle=handle, paddr=C, mnonce=b"m" * 16, len=0x1000)
    assert answer.len == 0xD0
    report = board.machine.dram.read(C, 0xD0)
    assert report[:0x40] == b"m" * 16 + sha256(b"a" * PAGE).digest() + struct.pack("<IIII", NODBG, 0x1002, 2, 0)
    pek = board.certificates()[1]
    other.check(other.public_of(pek), report[0x40:], report[:0x34])


def test_guests_that_share_a_key_read_each_other() -> None:
    board = LegacyBoard().start()
    first = board.launch()
    second = board.call(Command.LAUNCH_START, handle=first).handle
    board.ok(Command.ACTIVATE, handle=second, asid=PLAIN_ASID + 1)
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=first, paddr=board.write(A, b"shared" * 16), len=96)
    assert board.plain(A, 96, PLAIN_ASID + 1) == b"shared" * 16
    third = board.launch(asid=PLAIN_ASID + 2)
    assert third == 3
    assert board.plain(A, 96, PLAIN_ASID + 2) != b"shared" * 16
    private = board.launch(NOKS, PLAIN_ASID + 3)
    assert board.command(Command.LAUNCH_START, handle=private, policy=NOKS) is Status.POLICY_FAILURE
    assert board.command(Command.LAUNCH_START, handle=first, policy=NODBG) is Status.POLICY_FAILURE


def test_debugging_shows_and_writes_memory_where_the_policy_allows_it() -> None:
    board = LegacyBoard().start()
    handle = board.launch()
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(A, b"0123456789abcdef" * 2), len=32)
    board.ok(Command.DBG_DECRYPT, handle=handle, src_paddr=A, dst_paddr=B, len=32)
    assert board.machine.dram.read(B, 32) == b"0123456789abcdef" * 2
    board.ok(Command.DBG_ENCRYPT, handle=handle, src_paddr=board.write(C, b"host wrote this!"), dst_paddr=A, len=16)
    assert board.plain(A, 32) == b"host wrote this!0123456789abcdef"
    closed = board.launch(NODBG, PLAIN_ASID + 1)
    assert board.command(Command.DBG_DECRYPT, handle=closed, src_paddr=A, dst_paddr=B) is Status.POLICY_FAILURE


def test_copy_moves_memory_to_another_place() -> None:
    board = LegacyBoard().start()
    handle = board.launch()
    board.ok(Command.LAUNCH_UPDATE_DATA, handle=handle, paddr=board.write(A, b"page" * 2048), len=2 * PAGE)
    board.ok(Command.COPY, handle=handle, len=2 * PAGE, src_paddr=A, dst_paddr=B)
    assert board.plain(B, 2 * PAGE) == b"page" * 2048
    assert board.machine.dram.read(A, PAGE) != board.machine.dram.read(B, PAGE), "the tweak is the place's"
    before = board.machine.dram.read(A, 3 * PAGE)
    board.ok(Command.COPY, handle=handle, len=2 * PAGE, src_paddr=A, dst_paddr=A)
    assert board.machine.dram.read(A, 3 * PAGE) == before


def test_the_owners_certificate_must_be_one_for_key_agreement() -> None:
    board = LegacyBoard().start()
    pdh = board.certificates()[0]
    for certificate in (OWNER.certificate(other.PEK), OWNER.certificate(algo=other.ECDSA_SHA256), bytes(CERT)):
        board.write(A, certificate)
        board.write(B, OWNER.session(pdh, 0))
        fields = {"dh_cert_paddr": A, "dh_cert_len": CERT, "session_paddr": B, "session_len": 0x80}
        assert board.command(Command.LAUNCH_START, **fields) is Status.INVALID_CERTIFICATE
    assert not board.psp.legacy.guests
