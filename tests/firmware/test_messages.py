"""Guest messages besides the plain report: derived keys, the choice of a signing key, CPUID, TSC_INFO."""

from __future__ import annotations

import hmac
import struct
from dataclasses import replace
from hashlib import sha384
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from snpbook.firmware.keys import attestation_key
from snpbook.spec.releases import release
from snpbook.spec.status import Status
from tests.firmware.test_identity import FAMILY, IMAGE
from tests.firmware.test_requests import REPORT_DATA, RESPONSE, ask, key_of, report_request, running, seal, unseal
from tests.machines import GCTX, Board

KEY, REPORT, CPUID, TSC_INFO = 3, 5, 1, 17
STICK = bytes(range(48))


def exchange(board: Board, kind: int, body: bytes, vmpck: int = 0, version: int = 1) -> bytes:
    """Send a message with the next number of its key: the opened payload of the response."""
    count = getattr(board.psp.context(GCTX), f"msg_count{vmpck}")
    message = seal(key_of(board, vmpck), body, seqno=count + 1, vmpck=vmpck, kind=kind, version=version)
    assert ask(board, message) is Status.SUCCESS, board.log.events[-1]
    header, answer = unseal(key_of(board, vmpck), board.cpu.read(RESPONSE, 0x1000))
    assert (header[0], header[4], header[6]) == (count + 2, kind + 1, vmpck)
    assert getattr(board.psp.context(GCTX), f"msg_count{vmpck}") == count + 2
    return answer


def changed(board: Board, **fields: Any) -> Board:
    """Other fields of the guest's context, behind the firmware's back."""
    board.psp.save_context(GCTX, board.psp.context(GCTX).replace(**fields))
    return board


# Keys.


def key_request(
    root: int = 1, key_sel: int = 0, select: int = 0, vmpl: int = 0, svn: int = 0, tcb: int = 0, stray: int = 0
) -> bytes:
    return struct.pack("<IIQIIQ", root | key_sel << 1 | stray << 3, 0, select, vmpl, svn, tcb)


def derive(board: Board, *, vmpck: int = 0, version: int = 1, tail: bytes = b"", **request: Any) -> tuple[int, bytes]:
    answer = exchange(board, KEY, key_request(**request) + tail, vmpck, version)
    assert len(answer) == 0x40
    assert answer[4:0x20] == bytes(0x1C)
    return int.from_bytes(answer[:4], "little"), answer[0x20:]


def expected(root: bytes, mix: bytes, size: int = 0xA8) -> bytes:
    """SP 800-108 once more: one block of HMAC-SHA256, counter and length little-endian."""
    assert len(mix) == size
    return hmac.digest(root, struct.pack("<I", 1) + b"gmsg-keyreq\0" + mix + struct.pack("<I", 256), "sha256")


def mix(
    root: int, owner: int = 0, select: int = 0, vmpl: int = 0, svn: int = 0, tcb: int = 0, policy: int = 0,
    image: bytes = bytes(16), family: bytes = bytes(16), measurement: bytes = bytes(48), host: bytes = bytes(32),
    digest: bytes = bytes(48),
) -> bytes:  # fmt: skip
    head = struct.pack("<IIQIIQQ", root | owner << 1, 0, select, vmpl, svn, tcb, policy)
    return head + image + family + measurement[:32] + host + digest[:32]


PRINTED = [
    ({}, {}, "6993a6a3e44681e220ed2d38af1d846b5b6a644e2755062c0566a597378cac9b"),
    (
        {"select": 0x39, "vmpl": 1},
        {"policy": 0x30000, "launch_digest": sha384(b"x").digest()},
        "0818a6d09a8a989604c3c45604e541dac23d1658598a7f462ef43b6011e6e20e",
    ),
]


@pytest.mark.parametrize(("request_", "context", "key"), PRINTED)
def test_printed_keys(request_: dict[str, Any], context: dict[str, Any], key: str) -> None:
    board = changed(running(), vmrk=bytes(range(32)), **context)
    assert derive(board, **request_) == (0, bytes.fromhex(key))


SELECTED = {
    0: {}, 1: {"policy": 0x30000}, 2: {"image": IMAGE}, 4: {"family": FAMILY}, 8: {"measurement": b"m" * 48},
    16: {"svn": 3}, 32: {"tcb": 0x0100000000000001},
    63: {"policy": 0x30000, "image": IMAGE, "family": FAMILY, "measurement": b"m" * 48, "svn": 3,
         "tcb": 0x0100000000000001},
}  # fmt: skip


@pytest.mark.parametrize("select", SELECTED)
@pytest.mark.parametrize("root", [0, 1])
@pytest.mark.parametrize("owner", [0, 1, 2])
def test_what_is_selected_is_mixed_in(select: int, root: int, owner: int) -> None:
    block = struct.pack("<48s16s16sIIQ", bytes(48), FAMILY, IMAGE, 1, 5, 0x30000)
    board = changed(
        running(), id_block=block, id_block_en=int(owner > 0), author_key_en=int(owner > 1), host_data=b"h" * 32,
        id_key_digest=b"i" * 48, author_key_digest=b"a" * 48, launch_digest=b"m" * 48,
    )  # fmt: skip
    digest = [bytes(48), b"i" * 48, b"a" * 48][owner]
    wanted = mix(root, owner, select, 2, host=b"h" * 32, digest=digest, **SELECTED[select])
    tcb = board.psp.vcek_tcb
    if select & 32:
        tcb = replace(tcb, bootloader=1, tee=0, snp=0, microcode=1)
    secret = board.psp.context(GCTX).vmrk if root else board.psp.chip.hashstick(tcb)
    got = derive(board, root=root, select=select, vmpl=2, svn=3, tcb=0x0100000000000001, vmpck=1)
    assert got == (0, expected(secret, wanted))


KEY_REFUSED = [
    ("reserved", {"stray": 1, "key_sel": 3}, {}, Status.INVALID_PARAM),
    ("no such key", {"key_sel": 3, "vmpl": 0, "vmpck": 1}, {}, Status.INVALID_KEY),
    ("no VLEK", {"key_sel": 2}, {}, Status.INVALID_KEY),
    ("VCEK disabled", {"key_sel": 1}, {"vcek_dis": 1}, Status.INVALID_KEY),
    ("VCEK disabled, no VLEK", {"key_sel": 0}, {"vcek_dis": 1}, Status.INVALID_KEY),
    ("VMPL", {"vmpl": 0, "vmpck": 1, "select": 1 << 7}, {}, Status.INVALID_PARAM),
    ("field 6 in version 1", {"select": 1 << 6}, {}, Status.INVALID_PARAM),
    ("field 63", {"select": 1 << 63}, {}, Status.INVALID_PARAM),
    ("bootloader above", {"select": 32, "tcb": 5}, {}, Status.INVALID_PARAM),
    ("microcode above", {"select": 32, "tcb": 0xDC << 56}, {}, Status.INVALID_PARAM),
    ("reserved byte of the TCB", {"select": 32, "tcb": 1 << 24}, {}, Status.INVALID_PARAM),
    ("SVN above", {"select": 16, "svn": 1}, {}, Status.INVALID_PARAM),
]


@pytest.mark.parametrize(("name", "request_", "context", "status"), KEY_REFUSED, ids=[row[0] for row in KEY_REFUSED])
def test_refused_keys(name: str, request_: dict[str, Any], context: dict[str, Any], status: Status) -> None:
    assert derive(changed(running(), **context), **request_) == (status, bytes(32))


def test_what_is_not_selected_is_not_checked() -> None:
    assert derive(running(), svn=7, tcb=2**64 - 1)[0] == 0


@pytest.mark.parametrize("vlek", [False, True])
def test_a_masked_chip_key_roots_no_key(vlek: bool) -> None:
    board = running()
    board.psp.mask_chip_key, board.psp.vlek = True, STICK if vlek else None
    assert derive(board, root=0) == (Status.INVALID_KEY, bytes(32))
    assert derive(board, root=1)[0] == 0


def test_a_vlek_roots_keys() -> None:
    board = changed(running(), vcek_dis=1)
    board.psp.vlek = STICK
    tcb = 0x0100000000000001
    for key_sel in (0, 2):
        wanted = expected(STICK, mix(0, select=32, tcb=tcb))
        assert derive(board, root=0, key_sel=key_sel, select=32, tcb=tcb) == (0, wanted), "the TCB is only mixed in"


def test_version_2_mixes_the_mitigation_vector() -> None:
    board = running()
    vector = struct.pack("<QQ", 5, 0)
    count = board.psp.context(GCTX).msg_count0
    assert ask(board, seal(key_of(board), key_request() + vector, seqno=count + 1, kind=KEY, version=2)) is (
        Status.INVALID_PARAM
    )
    board.psp.release = replace(board.psp.release, abi=release("1.58"))
    wanted = expected(board.psp.context(GCTX).vmrk, mix(1, select=64) + struct.pack("<Q", 5), 0xB0)
    assert derive(board, select=64, version=2, tail=vector) == (0, wanted)
    assert derive(board, select=64)[0] == Status.INVALID_PARAM, "version 1 has no vector"


def test_keys_differ_by_chip_and_guest_but_not_by_time() -> None:
    board = running()
    first = derive(board, root=0)
    assert derive(board, root=0) == first
    assert derive(board, root=0, vmpl=1) != first
    assert derive(running(name="genoa"), root=0) != first
    assert derive(changed(running(), host_data=b"h" * 32), root=0) != first


# Which key signs a report.


def report(board: Board, **request: Any) -> tuple[int, bytes]:
    answer = exchange(board, REPORT, report_request(**request))
    return int.from_bytes(answer[:4], "little"), answer[0x20:]


def is_signed_by(raw: bytes, key: ec.EllipticCurvePrivateKey) -> bool:
    r, s = (int.from_bytes(raw[at : at + 72], "little") for at in (0x2A0, 0x2E8))
    try:
        key.public_key().verify(encode_dss_signature(r, s), raw[:0x2A0], ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


@pytest.mark.parametrize(("key_sel", "vlek", "masked", "signer"), [
    (0, False, False, "vcek"), (1, False, False, "vcek"), (0, True, False, "vlek"), (2, True, False, "vlek"),
    (1, True, False, "vcek"), (0, False, True, ""), (1, True, True, ""), (0, True, True, "vlek"),
])  # fmt: skip
def test_signing_key(key_sel: int, vlek: bool, masked: bool, signer: str) -> None:
    board = running()
    board.psp.vlek, board.psp.mask_chip_key = STICK if vlek else None, masked
    status, raw = report(board, key_sel=key_sel)
    number = {"vcek": 0, "vlek": 1, "": 7}[signer]
    assert (status, int.from_bytes(raw[0x48:0x4C], "little")) == (0, masked << 1 | number << 2)
    keys = {"vcek": board.psp.vcek, "vlek": attestation_key(STICK, "sev-versioned-loaded-attestation-key")}
    assert {name for name, key in keys.items() if is_signed_by(raw, key)} == ({signer} if signer else set())
    assert signer or raw[0x2A0:] == bytes(0x200)


def test_a_vlek_serves_where_the_vcek_is_disabled() -> None:
    board = changed(running(), vcek_dis=1)
    assert report(board)[0] == report(board, key_sel=1)[0] == Status.INVALID_KEY
    board.psp.vlek = STICK
    assert (report(board)[0], report(board, key_sel=1)[0]) == (0, Status.INVALID_KEY)


def test_a_masked_chip_id_is_zero() -> None:
    board = running()
    board.psp.mask_chip_id = True
    assert report(board)[1][0x1A0:0x1E0] == bytes(64)


@pytest.mark.parametrize("version", [2, 3, 5])
def test_report_versions(version: int) -> None:
    board = changed(running(), launch_mit_vector=0x11)
    board.psp.release, board.psp.mitigations = replace(board.psp.release, report_version=version), 0x22
    raw = report(board)[1]
    assert raw[:4] == struct.pack("<I", version)
    assert raw[0x50:0x90] == REPORT_DATA
    assert raw[0x188:0x18B] == (bytes(3) if version == 2 else bytes([0x19, 1, 1]))
    assert raw[0x1F8:0x208] == (struct.pack("<QQ", 0x11, 0x22) if version == 5 else bytes(16))
    assert is_signed_by(raw, board.psp.vcek)


# CPUID and the clock.


def entry(leaf: int, subleaf: int, *registers: int, tail: int = 0) -> bytes:
    return struct.pack("<IIQQIIIIQ", leaf, subleaf, 0, 0, *registers, tail)


def test_cpuid_message() -> None:
    board = running()
    table = [entry(0x40000000, 0, 1, 2, 3, 4), entry(0, 0, 0xD, 1, 2, 3), entry(2, 0, 0, 0, 0, 0)]
    body = struct.pack("<I12x", 3) + b"".join(table)
    answer = exchange(board, CPUID, body)
    assert struct.unpack_from("<IIQ", answer) == (0, 2, 0), "two of them in the ranges that are checked"
    assert answer[16:] == body[16:]
    wrong = struct.pack("<I12x", 1) + entry(0, 0, 0x11, 0, 0, 0)
    answer = exchange(board, CPUID, wrong)
    assert struct.unpack_from("<IIQ", answer) == (Status.INVALID_PARAM, 1, 0)
    assert answer[16:] == entry(0, 0, 0x10, 0, 0, 0)


@pytest.mark.parametrize("head", [(65, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_refused_cpuid_message(head: tuple[int, int, int]) -> None:
    answer = exchange(running(), CPUID, struct.pack("<IIQ", *head) + bytes(48))
    assert struct.unpack_from("<IIQ", answer) == (Status.INVALID_PARAM, 0, 0)
    assert len(answer) == 64


def test_a_cpuid_message_that_is_too_short_reads_as_zero() -> None:
    answer = exchange(running(), CPUID, struct.pack("<I12x", 2))
    assert struct.unpack("<IIQ", answer)[1] == 2


@pytest.mark.parametrize(("khz", "scale"), [(0, 0), (2_000_000, 0x140A42B182)])
def test_tsc_info(khz: int, scale: int) -> None:
    board = changed(running(name="genoa"), desired_tsc_khz=khz, tsc_offset=0x1234)
    answer = exchange(board, TSC_INFO, bytes(0x80))
    assert answer == struct.pack("<IIQQI", 0, 0, scale, 0x1234, 200).ljust(0x80, b"\0")
    answer = exchange(board, TSC_INFO, bytes(0x7F) + b"\1")
    assert answer == struct.pack("<I", Status.INVALID_PARAM).ljust(0x80, b"\0")
