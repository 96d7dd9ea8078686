"""Legacy secrets, sending, receiving and swap: rows of the firmware sheet's section 1.3 as ordered checks.

What packets, certificates and sessions are is told by what they mean. Above each command stands what the sheet says of
it. Sources: firmware sheet 1.2, 1.3, 5.6, 5.7.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.reference.firmware_legacy_guests import (
    BAD_HANDLE,
    DOMAIN,
    ES_ASID,
    HANDLE,
    NO_ASID,
    NO_ES,
    NOSEND,
    PLAIN_ASID,
    SEV,
    WORKING,
    guest_of,
    legacy_guest,
    moved,
    of_handle,
    state_row,
    with_pages,
)  # fmt: skip
from tests.reference.firmware_legacy_platform import buffer_reclaimed, data_rows, output_row, writes_its_buffer
from tests.reference.firmware_rows import Row, Spec, ask, both
from tests.reference.firmware_world import API, DST, IN_RMP, MDATA, MIB, OUT, PAGE, SRC, Request, World

MOST = 0x5000
PACKET = {
    "handle": (0, 32), "hdr_paddr": (8 * 8, 64), "hdr_len": (0x10 * 8, 32), "guest_paddr": (0x18 * 8, 64),
    "guest_len": (0x20 * 8, 32), "trans_paddr": (0x28 * 8, 64), "trans_len": (0x30 * 8, 32),
}  # fmt: skip


def _packet(state: str, held: int, *outputs: int) -> tuple[World, Request]:
    case = of_handle(
        state, held, hdr_paddr=OUT, hdr_len=0x34, guest_paddr=SRC, guest_len=0x1000, trans_paddr=DST, trans_len=0x1000
    )
    return with_pages(case, *outputs, mac=True, compressed=False, crc=True)


def _header(leaves: str = "") -> Row:
    return Row("header length", 0x04, lambda w, r: r.hdr_len < 0x34, [ask(hdr_len=0), ask(hdr_len=0x33)], leaves)


UNALIGNED = Row(
    "guest address not 16-byte aligned", 0x09, lambda w, r: r.guest_paddr % 16 != 0,
    [ask(guest_paddr=SRC + 8), ask(guest_paddr=IN_RMP + 8)],
)  # fmt: skip
SAME_LENGTHS = Row(
    "lengths", 0x04,
    lambda w, r: r.guest_len != r.trans_len or not 0 < r.guest_len <= MOST or r.guest_len % 16 != 0,
    [ask(guest_len=0), ask(trans_len=0), ask(guest_len=0, trans_len=0), ask(guest_len=0x18, trans_len=0x18),
     ask(guest_len=MOST + 16, trans_len=MOST + 16)],
)  # fmt: skip
COMPRESSED = Row("compressed", 0x15, lambda w, r: r.compressed, [ask(compressed=True)])
MAC = Row("MAC", 0x0B, lambda w, r: not r.mac, [ask(mac=False)])


def _lengths(name: str) -> Callable[[Request], int]:
    return lambda r: min(max(int(getattr(r, name)), 1), MOST)


# LAUNCH_SECRET 34: H 8:hdr 10:len=34h 18:guest 20:len 28:trans 30:len. LSECRET. 01, 10, 09 guest addr not 16-B; 04
# lens differ / 0 / >5000h / not 16x; 02; 08; 1A; 0B MAC; 15 compressed (after the MAC); repeatable
LAUNCH_SECRET = Spec(
    0x34, lambda: _packet("LSECRET", PLAIN_ASID, SRC),
    [
        WORKING, BAD_HANDLE, UNALIGNED, SAME_LENGTHS, state_row("LSECRET"), NO_ASID,
        *data_rows("guest_paddr", _lengths("guest_len"), written=True),
        *data_rows("trans_paddr", _lengths("trans_len"), written=False), MAC, COMPRESSED,
    ],
    size=0x34, buffer=PACKET,
)  # fmt: skip

# SEND_START 40: H 4:policy(out) 8:pdh 10:len 18:plat 20:len 28:amd 30:len 38:session 40:len. RUNNING. 10, 04 session
# len != 80h (written back), 02, 07 NOSEND; SEV policy: lengths 04, ARK-ASK-CEK-PEK-PDH 06/0A, receiver PEK API below
# policy 07; 1A; DOMAIN: OCA-PEK-PDH, other OCA 07; -> SUPDATE; no ASID needed. Here the policy asks for both chains.


def _send_start() -> tuple[World, Request]:
    case = of_handle(
        "RUNNING", 0, policy=0, pdh_paddr=SRC, pdh_len=2084, plat_paddr=SRC + PAGE, plat_len=3 * 2084,
        amd_paddr=SRC + 4 * PAGE, amd_len=0xC80, session_paddr=OUT, session_len=0x80,
    )  # fmt: skip
    case[0].handles[HANDLE].policy = SEV | DOMAIN
    return with_pages(case, OUT, chain="good", receiver_api=API, oca="own")


def _sev(w: World, r: Request) -> bool:
    return bool(guest_of(w, r).policy & SEV)


def _too_old(w: World, r: Request) -> bool:
    policy = guest_of(w, r).policy
    return _sev(w, r) and r.receiver_api < (policy >> 16 & 0xFF, policy >> 24)


SEND_START = Spec(
    0x40, _send_start,
    writes_its_buffer([
        WORKING, BAD_HANDLE,
        Row("session length", 0x04, lambda w, r: r.session_len != 0x80,
            [ask(session_len=0), ask(session_len=0x7F), ask(session_len=0x81)], "the length that is needed"),
        state_row("RUNNING"),
        Row("NOSEND", 0x07, lambda w, r: guest_of(w, r).policy & NOSEND, [legacy_guest(policy=SEV | NOSEND)]),
        Row("certificate lengths", 0x04, lambda w, r: _sev(w, r) and (r.pdh_len != 2084 or r.plat_len != 3 * 2084),
            [ask(pdh_len=0), ask(plat_len=2084)]),
        Row("chain: certificate", 0x06, lambda w, r: _sev(w, r) and r.chain == "usage", [ask(chain="usage")],
            group="chain"),
        Row("chain: signature", 0x0A, lambda w, r: _sev(w, r) and r.chain == "signature", [ask(chain="signature")],
            group="chain"),
        Row("receiver's API", 0x07, _too_old,
            [both(legacy_guest(policy=SEV | 1 << 16 | 40 << 24), ask(receiver_api=(1, 39)))]),
        *data_rows("session_paddr", 0x80, written=True),
        Row("another OCA", 0x07, lambda w, r: guest_of(w, r).policy & DOMAIN and r.oca != "own", [ask(oca="another")]),
    ]),
    moved("SUPDATE", buffer_too=True), 0x44,
    buffer={
        "handle": (0, 32), "policy": (32, 32), "pdh_paddr": (64, 64), "pdh_len": (128, 32),
        "plat_paddr": (0x18 * 8, 64), "plat_len": (0x20 * 8, 32),
        "amd_paddr": (0x28 * 8, 64), "amd_len": (0x30 * 8, 32),
        "session_paddr": (0x38 * 8, 64), "session_len": (0x40 * 8, 32),
    },
)  # fmt: skip

# SEND_UPDATE_DATA / _VMSA 41/42: as LAUNCH_SECRET, hdr len>=34h. SUPDATE. hdr len 04 (before handle), 10, 02, 15 VMSA
# without ES, 08, 04 (0, >5000h, not 16x, trans < guest), 09, 1A, VMSA CRC 16. The header's length is written back
# (1.2, rule 2).


def _send_update(number: int, *es: Row) -> Spec:
    lengths = Row(
        "lengths", 0x04,
        lambda w, r: not 0 < r.guest_len <= MOST or r.guest_len % 16 != 0 or r.trans_len < r.guest_len,
        [ask(guest_len=0), ask(guest_len=0x18), ask(guest_len=MOST + 16, trans_len=MOST + 16), ask(trans_len=0xFF0)],
    )  # fmt: skip
    crc = [Row("VMSA CRC", 0x16, lambda w, r: not r.crc, [ask(crc=False)])] if es else []
    return Spec(
        number, lambda: _packet("SUPDATE", ES_ASID if es else PLAIN_ASID, OUT, DST),
        writes_its_buffer([
            WORKING, _header("the length that is needed"), BAD_HANDLE, state_row("SUPDATE"), *es, NO_ASID, lengths,
            UNALIGNED, *data_rows("guest_paddr", _lengths("guest_len"), written=False),
            *data_rows("hdr_paddr", 0x34, written=True),
            *data_rows("trans_paddr", _lengths("trans_len"), written=True), *crc,
        ]),
        buffer_reclaimed, 0x34, buffer=PACKET,
    )  # fmt: skip


# RECEIVE_UPDATE_DATA / _VMSA 51/52: as 41. RUPDATE. 02, 15, 08, 04 (lens differ, 0, >5000h), 09, 1A, 15 compressed, 0B


def _receive_update(number: int, *es: Row) -> Spec:
    return Spec(
        number, lambda: _packet("RUPDATE", ES_ASID if es else PLAIN_ASID, SRC),
        [
            WORKING, BAD_HANDLE, state_row("RUPDATE"), *es, NO_ASID, SAME_LENGTHS, UNALIGNED,
            *data_rows("guest_paddr", _lengths("guest_len"), written=True), COMPRESSED, MAC,
        ],
        size=0x34, buffer=PACKET,
    )  # fmt: skip


# SWAP_OUT / SWAP_IN 70/71: H 4:bits(0 size,2:1 type,3 in-place) 8:src 10:dst 18:mdata [20:sw_data]. W. 09 range/align
# (mdata 64 B; SWAP_IN 2M dst only 4K), 16 overlap, VMSA not 4K, MDATA mismatch, VMSA CRC vs type; 10; 08; 1D; 1A; 0B.
# Read as (unconfirmed): the CRC, which takes the guest's key, as soon as there is one; another type than data or VMSA
# answers as a VMSA of 2 MB does; a range in no DRAM is 03 as everywhere (1.2, rule 5).
SWAP_BUFFER = {
    "handle": (0, 32), "bits": (32, 32), "src_paddr": (64, 64), "dst_paddr": (128, 64), "mdata_paddr": (0x18 * 8, 64),
}  # fmt: skip
VMSA_OF_2M = 1 | 2 << 1


def _swap_rows(*middle: Row, dst_of_2m_on_any_page: bool = False) -> list[Row]:
    def span(r: Request) -> int:
        return 2 * MIB if r.bits & 1 else PAGE

    def overlap(w: World, r: Request) -> bool:
        return abs(r.src_paddr - r.dst_paddr) < span(r) or any(0 <= r.mdata_paddr - at < span(r) for at in _two(r))

    return [
        WORKING, *data_rows("src_paddr", span, written=False), *data_rows("dst_paddr", span, written=False),
        *data_rows("mdata_paddr", 64, written=False),
        Row("unaligned", 0x09,
            lambda w, r: r.mdata_paddr % 64 or r.src_paddr % span(r)
            or r.dst_paddr % (PAGE if dst_of_2m_on_any_page else span(r)),
            [ask(mdata_paddr=MDATA + 32), ask(src_paddr=SRC + 64), ask(dst_paddr=DST + 64)]),
        Row("overlap", 0x16, overlap, [ask(mdata_paddr=SRC), ask(dst_paddr=SRC)]),
        Row("VMSA of 2 MB", 0x16, lambda w, r: r.bits & 7 == VMSA_OF_2M, [ask(bits=VMSA_OF_2M)]),
        Row("unknown type", 0x16, lambda w, r: r.bits >> 1 & 3 not in (0, 2), [ask(bits=1 << 1), ask(bits=3 << 1)]),
        *middle[:1], BAD_HANDLE, NO_ASID, *middle[1:],
    ]  # fmt: skip


def _two(r: Request) -> tuple[int, int]:
    return r.src_paddr, r.dst_paddr


SWAP_OUT = Spec(
    0x70,
    lambda: with_pages(
        of_handle("RUNNING", bits=0, src_paddr=SRC, dst_paddr=DST, mdata_paddr=MDATA, software_data=0),
        DST, MDATA, ivs=True, crc=True,
    ),
    writes_its_buffer([
        *_swap_rows(), Row("CRC of a page that is no VMSA", 0x16, lambda w, r: not r.crc, [ask(crc=False)]),
        Row("IVs used up", 0x1D, lambda w, r: not r.ivs, [ask(ivs=False)]),
        output_row("dst_paddr"), output_row("mdata_paddr"),
    ]),
    buffer_reclaimed, 0x28, buffer={**SWAP_BUFFER, "software_data": (0x20 * 8, 64)},
)  # fmt: skip
SWAP_IN = Spec(
    0x71,
    lambda: with_pages(
        of_handle("RUNNING", bits=0, src_paddr=SRC, dst_paddr=DST, mdata_paddr=MDATA), DST, mdata="good", tag=True
    ),
    [
        *_swap_rows(
            Row("MDATA mismatch", 0x16, lambda w, r: r.mdata != "good", [ask(mdata="size"), ask(mdata="type")]),
            dst_of_2m_on_any_page=True,
        ),
        output_row("dst_paddr"),
        Row("tag", 0x0B, lambda w, r: not r.tag, [ask(tag=False)]),
    ],
    size=0x20, buffer=SWAP_BUFFER,
)  # fmt: skip

SPECS = {
    "LAUNCH_SECRET": LAUNCH_SECRET, "SEND_START": SEND_START, "SEND_UPDATE_DATA": _send_update(0x41),
    "SEND_UPDATE_VMSA": _send_update(0x42, NO_ES), "RECEIVE_UPDATE_DATA": _receive_update(0x51),
    "RECEIVE_UPDATE_VMSA": _receive_update(0x52, NO_ES), "SWAP_OUT": SWAP_OUT, "SWAP_IN": SWAP_IN,
}  # fmt: skip
