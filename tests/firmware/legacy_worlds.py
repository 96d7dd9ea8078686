"""The legacy part of worlds made real: platform state, identity and handles, and what memory holds for the commands."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.firmware.keys import memory_key
from snpbook.firmware.legacy_keys import is_owned, new_identity
from snpbook.firmware.legacy_state import LegacyGuest, TransportKeys
from snpbook.hardware.save_area import seal
from snpbook.spec.layout import Record
from snpbook.spec.sev_certificates import SCALAR_SIZE
from snpbook.spec.states import LegacyGuestState
from snpbook.vendor.sev_ca import SevCa
from tests.firmware import legacy_owner as other
from tests.firmware.legacy_owner import Owner
from tests.machines import Board
from tests.reference.firmware_world import MIB, PAGE, Request, World

OWNER = Owner()
TMR = (40 * MIB, 42 * MIB)
SEED, OEK = b"s" * 32, b"o" * 32
Memory = Callable[[Board, World, Request], None]


@cache
def identity() -> Record:
    """The identity of every board: they have the same chip and draw the same."""
    return new_identity(Board().psp)


def realise_legacy(board: Board, w: World) -> None:
    """The legacy platform, its identity and its guests, poked in."""
    legacy, machine = board.psp.legacy, board.machine
    if w.legacy != "UNINIT":
        legacy.identity = identity().replace(oca_key=bytes(SCALAR_SIZE)) if w.owned else identity()
        legacy.tmr = TMR if w.legacy_es else None
    transport = TransportKeys(OWNER.tek, OWNER.tik)
    for handle, guest in w.handles.items():
        state = LegacyGuestState[guest.state]
        legacy.guests[handle] = LegacyGuest(state, guest.policy, SEED, OEK, transport, guest.asid)
        if guest.asid:
            machine.encryption.install(guest.asid, memory_key(SEED, machine.product.memory_key_size))


def observe_legacy(board: Board) -> dict[str, object]:
    """What a board shows of it, in the world's words."""
    legacy = board.psp.legacy
    handles = {handle: (g.state.name, g.asid, g.policy_word) for handle, g in legacy.guests.items()}
    return {"legacy": legacy.state.name, "owned": is_owned(legacy.identity), "handles": handles}


def describe_legacy(w: World) -> dict[str, object]:
    """The same of a world."""
    handles = {handle: (guest.state, guest.asid, guest.policy) for handle, guest in w.handles.items()}
    return {"legacy": w.legacy, "owned": w.owned and w.legacy != "UNINIT", "handles": handles}


def write(board: Board, address: int, data: bytes) -> bool:
    """Write where there is plain DRAM to write to; elsewhere the firmware is to refuse the address."""
    good = address + len(data) <= 47 * MIB and not 0xA0000 <= address < 0xC0000
    if good:
        board.machine.dram.write(address, data)
    return good


def _init_ex(board: Board, w: World, r: Request) -> None:
    write(board, r.nv_paddr, (b"\xff" if r.nv == "good" else b"\x01") * 0x8000)


def _pek_cert_import(board: Board, w: World, r: Request) -> None:
    owner = other.key(2)
    own = identity().pek[: other.SIGNED]
    pek = {"not a PEK": other.body(other.PDH, owner.public_key()), "another body": own[:4] + b"\x09" + own[5:]}
    oca = other.cert(other.body(other.PEK if r.oca == "not an OCA" else other.OCA, owner.public_key()),
                     (other.OCA, other.key(3) if r.oca == "signature" else owner))  # fmt: skip
    write(board, r.oca_paddr, oca)
    signer = other.key(3) if r.pek == "signature" else owner
    write(board, r.pek_paddr, other.cert(pek.get(r.pek, own), (other.OCA, signer)))


def _activate_ex(board: Board, w: World, r: Request) -> None:
    write(board, r.ids_paddr, struct.pack(f"<{len(r.apic_ids)}I", *r.apic_ids))


def _start(board: Board, w: World, r: Request) -> None:
    usage = other.PEK if r.cert == "usage" else other.PDH
    algo = {"usage": other.ECDH_SHA256, "algorithm": other.ECDSA_SHA256}.get(r.cert, 0)
    write(board, r.dh_cert_paddr, OWNER.certificate(usage, algo))
    session = OWNER.session(identity().pdh, r.policy, wrap_mac=r.wrap_mac, policy_mac=r.policy_mac)
    write(board, r.session_paddr, session)


def _packet(context: int) -> Memory:
    def act(board: Board, w: World, r: Request) -> None:
        header, body = OWNER.packet(b"p" * r.guest_len, context, bytes(32) if context == 1 else b"", flags=r.compressed)
        if not r.mac:
            header = header[:-1] + bytes([header[-1] ^ 1])
        write(board, r.hdr_paddr, header)
        write(board, r.trans_paddr, body)

    return act


@cache
def _receiver(chain: str, api: tuple[int, int], oca: str) -> tuple[bytes, bytes, bytes]:
    """PDH, platform chain and AMD's certificates of another platform of ours, or with a defect."""
    own = ec.derive_private_key(int.from_bytes(identity().oca_key, "big"), ec.SECP384R1())
    owner, ca = own if oca == "own" else other.key(4), SevCa("milan")
    pek, cek, pdh = other.key(5), other.key(6), other.key(7)
    pdh_cert = other.cert(other.body(other.PDH, pdh.public_key()), (other.PEK, pek))
    pek_cert = other.cert(other.body(other.PEK, pek.public_key(), api), (other.OCA, owner), (other.CEK, cek))
    oca_cert = other.cert(other.body(other.OCA, owner.public_key()), (other.OCA, owner))
    cek_cert = ca.sign_cek(other.cert(other.body(other.CEK, cek.public_key())))
    if chain == "signature":
        cek_cert = cek_cert[:0x41C] + bytes([cek_cert[0x41C] ^ 1]) + cek_cert[0x41D:]
    if chain == "usage":
        cek_cert = cek_cert[:8] + struct.pack("<I", other.PDH) + cek_cert[12:]
    return pdh_cert, pek_cert + oca_cert + cek_cert, ca.chain


def _send_start(board: Board, w: World, r: Request) -> None:
    pdh, chain, amd = _receiver(r.chain, r.receiver_api, r.oca)
    write(board, r.pdh_paddr, pdh)
    write(board, r.plat_paddr, chain)
    write(board, r.amd_paddr, amd)


def _send_update_vmsa(board: Board, w: World, r: Request) -> None:
    guest = board.psp.legacy.guests.get(r.handle)
    if r.crc and guest is not None and guest.asid and write(board, r.guest_paddr, b""):
        seal(board.machine, guest.asid, r.guest_paddr // PAGE)


def _swap_out(board: Board, w: World, r: Request) -> None:
    held = w.handles[r.handle].asid if r.handle in w.handles else 0
    if not r.crc and held and write(board, r.src_paddr, b""):
        seal(board.machine, held, r.src_paddr // PAGE)
    for handle, guest in board.psp.legacy.guests.items():
        if not r.ivs:
            values = {name: getattr(guest, name) for name in LegacyGuest.__slots__}
            board.psp.legacy.guests[handle] = LegacyGuest(**values | {"swapped": 2**64 - 2})


def _swap_in(board: Board, w: World, r: Request) -> None:
    kind = {"size": r.bits & 7 ^ 1, "type": r.bits & 7 ^ 4}.get(r.mdata, r.bits & 7)
    entry = struct.pack("<QQ44xI", 0, 3, kind)
    size = 2 * MIB if r.bits & 1 else PAGE
    sealed = AESGCM(OEK).encrypt(struct.pack("<Q4x", 3), bytes(size), entry)
    write(board, r.src_paddr, sealed[:-16])
    tag = sealed[-16:] if r.tag else bytes(16)
    write(board, r.mdata_paddr, entry[:16] + tag + entry[32:])


LEGACY_MEMORY: dict[str, Memory] = {
    "INIT_EX": _init_ex, "PEK_CERT_IMPORT": _pek_cert_import, "ACTIVATE_EX": _activate_ex, "LAUNCH_START": _start,
    "RECEIVE_START": _start, "LAUNCH_SECRET": _packet(1), "RECEIVE_UPDATE_DATA": _packet(2),
    "RECEIVE_UPDATE_VMSA": _packet(2), "SEND_START": _send_start, "SEND_UPDATE_VMSA": _send_update_vmsa,
    "SWAP_OUT": _swap_out, "SWAP_IN": _swap_in,
}  # fmt: skip
