"""Worlds of the firmware's oracle made real: a board brought there by legal steps, the rest poked in behind its back.

What a board cannot be brought to raises `Unrealisable` with the reason. A command that reads memory beyond its
buffer has a function in `MEMORY`, which writes there what the request says it means.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.spec.commands import Command
from snpbook.spec.context import FIRMWARE_KEY_ID, GUEST_CONTEXT
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.states import GuestState, PlatformState
from tests.firmware.test_identity import AUTHOR_KEY, ID_KEY, STRANGER, id_block, public_key, signature
from tests.firmware.test_requests import report_request, seal
from tests.machines import Board
from tests.reference.firmware_world import GCTX, OF_GUESTS, PAGE, POLICY, Guest, Page, Request, World

ASID_STATES = {"CLEAN": 0, "DIRTY": 1, "ALLOCATED": 2, "IN_USE": 3}


class Unrealisable(Exception):
    """A board has no such state, or the firmware no such command to bring it there."""


def realise(w: World) -> Board:
    """A board in the state that a world describes."""
    if w.faults:
        raise Unrealisable(f"a fault of the chip: {', '.join(sorted(w.faults))}")
    if w.sockets > 1:
        raise Unrealisable("a second socket")
    if w.legacy != "UNINIT":
        raise Unrealisable("a legacy platform state")
    board = Board(cores=len(w.cores))
    if w.iommu_enforced:
        board.initialise()
        for gctx, guest in w.guests.items():
            _make_guest(board, gctx, guest)
        for address, page in w.pages.items():
            if not (page.state == "CONTEXT" and address in w.guests and not page.large):
                _make_page(board, address, page)
    else:
        _set_registers(board, w)
    psp = board.psp
    psp.state = PlatformState[w.snp]
    psp.rmp_built, psp.guest_count = w.rmp_initialised, w.guest_count
    if w.rmp_tcb_changed:
        raise Unrealisable("a TCB changed since the RMP was built")
    psp.asids.states[:] = 0
    for states, row in zip(w.asids, psp.asids.states, strict=True):
        for asid, state in states.items():
            row[asid] = ASID_STATES[state]
    for core, wanted in zip(board.machine.cores, w.cores, strict=True):
        core.wbinvd_done = wanted.wbinvd
    return board


def _set_registers(board: Board, w: World) -> None:
    """What the BIOS and the kernel left in the registers before SNP_INIT; SYSCFG last, for it locks others."""
    for core, wanted in zip(board.machine.cores, w.cores, strict=True):
        core.set_by_bios({
            Msr.MTRR_FIX_64K_00000: wanted.mtrr_fixed, Msr.IORR_BASE0: wanted.iorr, Msr.TOP_MEM: wanted.tom,
            Msr.TOP_MEM2: wanted.tom2, Msr.TSEG_BASE: wanted.tseg, Msr.HWCR: wanted.hwcr,
            Msr.RMP_BASE: wanted.rmp_base, Msr.RMP_END: wanted.rmp_end, Msr.VM_HSAVE_PA: wanted.hsave,
            Msr.SYSCFG: wanted.syscfg,
        })  # fmt: skip
        core.in_guest, core.in_smm = bool(wanted.debug_status & 1 << 2), bool(wanted.debug_status & 1 << 7)


def _make_guest(board: Board, gctx: int, guest: Guest) -> None:
    """A guest as the commands make it, its context then patched to what was asked for."""
    board.assign(gctx, FIRMWARE)
    board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=gctx)
    if guest.gstate != "INIT":
        board.ok(Command.SNP_LAUNCH_START, gctx_paddr=gctx, policy=POLICY)
        board.ok(Command.SNP_ACTIVATE, gctx_paddr=gctx, asid=guest.asid or 98)
    if guest.gstate == "RUNNING":
        board.ok(Command.SNP_LAUNCH_FINISH, gctx_paddr=gctx)
    context = board.psp.context(gctx)
    values: dict[str, Any] = {"state": GuestState[guest.gstate], "asid": guest.asid, "policy": guest.policy}
    values |= {f"msg_count{number}": count for number, count in enumerate(guest.msg_count)}
    values |= {"imi_en": int(guest.imi_en), "vcek_dis": int(guest.vcek_dis)}
    if guest.ma is not None:
        values["ma_gctx_paddr"] = guest.ma
    if guest.iv_count:
        values["oek_iv_count"] = guest.iv_count
    if missing := values.keys() - GUEST_CONTEXT.fields.keys():
        raise Unrealisable(f"a guest context with {', '.join(sorted(missing))}")
    board.psp.save_context(gctx, context.replace(**values))


def _make_page(board: Board, address: int, page: Page) -> None:
    """RMPUPDATE as far as it goes, then the bits that only the firmware or a guest sets."""
    number = np.array([address >> 12], np.uint64)
    before = int(board.machine.rmp.load(number)[0, 0])
    if page.state != "HYPERVISOR" and page.state != "HV_FIXED" and not before & 1:
        board.assign(address, NewState(assigned=True, asid=page.asid, large=page.large), page.gfn << 12)
    held = page.state in ("HV_FIXED", "FIRMWARE", "CONTEXT", "METADATA", "PRE_GUEST", "PRE_SWAP")
    assigned = page.state not in ("HYPERVISOR", "HV_FIXED")
    gfn = 1 << 36 | page.owner >> 12 if page.state == "METADATA" else page.gfn * (page.state in OF_GUESTS)
    low = assigned << 0 | page.large << 1 | held << 2 | gfn << 12 | page.asid << 51
    low |= (page.vmsa or page.state == "CONTEXT") << 61 | (page.state in ("PRE_SWAP", "GUEST_VALID")) << 62
    low |= (held and assigned) << 63
    entry = board.machine.rmp.load(number).copy()
    entry[0, 0] = np.uint64(low | (int(entry[0, 0]) & 0x1FF << 3))
    if page.state in OF_GUESTS:
        entry[0, 1] = np.uint64(0xF | sum(mask << 8 * (n + 1) for n, mask in enumerate(page.vmpl)))
    board.machine.rmp.store(number, entry)


# What memory holds beside the command buffer.


def context_of(board: Board, gctx: int = GCTX) -> Record:
    """A guest's context, whatever the state of its page is."""
    page = board.machine.memory.read_pages(FIRMWARE_KEY_ID, range(gctx >> 12, (gctx >> 12) + 1))
    return GUEST_CONTEXT.unpack(page.tobytes())


def _launch_update(board: Board, w: World, r: Request) -> None:
    pages = {
        "good": b"", "count": struct.pack("<I", 65), "reserved": struct.pack("<IIQ", 1, 0, 1),
        "violation": struct.pack("<I12xII16x4I8x", 1, 0, 0, 0xFFFF, 0, 0, 0),  # leaf 0: a higher limit than the host's
    }  # fmt: skip
    if r.cpuid != "good":
        _write(board, r.page_paddr & -PAGE, pages[r.cpuid])


def _launch_finish(board: Board, w: World, r: Request) -> None:
    if not (w.guests and r.id_block_en):
        return
    digest = context_of(board).launch_digest
    digest = digest if r.same_ld else bytes([digest[0] ^ 1]) + digest[1:]
    block = id_block(digest, w.guests[GCTX].policy ^ (0 if r.same_policy else 1 << 19))
    id_key, author_key = public_key(ID_KEY, r.id_key.curve), public_key(AUTHOR_KEY, r.author_key.curve)
    if not r.id_key.on_curve:
        id_key = id_key[:4] + bytes([id_key[4] ^ 1]) + id_key[5:]
    if not r.author_key.on_curve:
        author_key = author_key[:4] + bytes([author_key[4] ^ 1]) + author_key[5:]
    auth = struct.pack("<II56x", r.id_key.algo, r.author_key.algo)
    auth += signature(ID_KEY if r.id_key.right else STRANGER, block) + id_key
    auth = auth.ljust(0x680, b"\0") + signature(AUTHOR_KEY if r.author_key.right else STRANGER, id_key) + author_key
    _write(board, r.id_block_paddr, block)
    _write(board, r.id_auth_paddr, auth.ljust(0x1000, b"\0"))


def _guest_request(board: Board, w: World, r: Request) -> None:
    assert board.psp.vcek, "derived before and not by the command: the processor remembers it"
    m, context = r.message, context_of(board)
    key, count = getattr(context, f"vmpck{m.vmpck % 4}"), getattr(context, f"msg_count{m.vmpck % 4}")
    body = report_request().ljust(m.size, b"\0") if m.size % 16 == 0 and m.size else report_request()
    message = seal(
        key, body, seqno=(count + m.ahead) % 2**64, vmpck=m.vmpck, kind=m.kind, version=m.version, algo=m.algo,
        hdr_version=m.hdr_version, hdr_size=m.hdr_size, size=m.size, flip=None if m.tag else 0,
    )  # fmt: skip
    _write(board, r.request_paddr, message[: PAGE - r.request_paddr % PAGE])


def _write(board: Board, address: int, data: bytes) -> None:
    """Write where there is plain DRAM to write to; elsewhere the firmware is to refuse the address."""
    if address + len(data) <= 47 << 20 and not 0xA0000 <= address < 0xC0000:
        board.machine.dram.write(address, data)


MEMORY: dict[str, Callable[[Board, World, Request], None]] = {
    "SNP_LAUNCH_UPDATE": _launch_update, "SNP_LAUNCH_FINISH": _launch_finish, "SNP_GUEST_REQUEST": _guest_request,
}  # fmt: skip


def observe(board: Board, w: World) -> dict[str, object]:
    """What a board shows of the things that a world names, in the world's words."""
    psp = board.psp
    seen: dict[str, object] = {"snp": psp.state.name, "guest_count": psp.guest_count}
    names = {number: name for name, number in ASID_STATES.items()}
    for ccx, row in enumerate(psp.asids.states):
        seen[f"ASIDs of complex {ccx}"] = {asid: names[int(s)] for asid, s in enumerate(row) if asid and s}
    for address in w.pages:
        state = board.machine.rmp.state(address >> 12).name
        entry = board.cpu.rmp_entry(address >> 12)
        seen[f"page {address:#x}"] = (state, bool(entry.page_size), entry.asid)
    for gctx in w.guests:
        context = context_of(board, gctx)
        block = any(context.id_block)
        counts = [getattr(context, f"msg_count{number}") for number in range(4)]
        seen[f"guest {gctx:#x}"] = (context.state.name, context.asid, context.policy, counts, block)
    return seen


def described(w: World) -> dict[str, object]:
    """The same of a world."""
    seen: dict[str, object] = {"snp": w.snp, "guest_count": w.guest_count}
    for ccx, states in enumerate(w.asids):
        seen[f"ASIDs of complex {ccx}"] = {asid: s for asid, s in sorted(states.items()) if s != "CLEAN"}
    for address, page in w.pages.items():
        seen[f"page {address:#x}"] = (page.state, page.large, page.asid)
    for gctx, guest in w.guests.items():
        seen[f"guest {gctx:#x}"] = (guest.gstate, guest.asid, guest.policy, guest.msg_count, guest.id_block)
    return seen
