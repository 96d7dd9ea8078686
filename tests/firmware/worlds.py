"""Worlds of the firmware's oracle made real: a board brought there by legal steps, the rest poked in behind its back.

What a board cannot be brought to raises `Unrealisable` with the reason. A command that reads memory beyond its
buffer has a function in `MEMORY`, which writes there what the request says it means.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from snpbook.hardware.host_instructions import FIRMWARE, NewState
from snpbook.hardware.msr import bios_settings
from snpbook.hardware.rmp import decode_states
from snpbook.spec.commands import Command
from snpbook.spec.context import FIRMWARE_KEY_ID, GUEST_CONTEXT
from snpbook.spec.firmware_image import ImageType
from snpbook.spec.layout import Record
from snpbook.spec.msr import Msr
from snpbook.spec.pages import PageState
from snpbook.spec.platform import Fault
from snpbook.spec.policy import Tcb
from snpbook.spec.releases import release
from snpbook.spec.states import GuestState, LegacyPlatformState, PlatformState
from snpbook.spec.swap import MDATA_ENTRY
from snpbook.vendor.images import firmware_image
from snpbook.vendor.vlek import wrapped_vlek
from tests.firmware.legacy_worlds import LEGACY_MEMORY, describe_legacy, observe_legacy, realise_legacy
from tests.firmware.test_identity import AUTHOR_KEY, ID_KEY, STRANGER, id_block, public_key, signature
from tests.firmware.test_requests import report_request, seal
from tests.machines import Board
from tests.reference.firmware_world import GCTX, OF_GUESTS, PAGE, POLICY, Guest, Mdata, Page, Request, World

ASID_STATES = {"CLEAN": 0, "DIRTY": 1, "ALLOCATED": 2, "IN_USE": 3}


FAULTS = {
    "diag mode": Fault.DIAGNOSTIC_MODE, "old boot loader": Fault.OLD_BOOT_LOADER, "unlocked part": Fault.UNLOCKED_PART,
    "no UMC encryption": Fault.NO_UMC_ENCRYPTION, "no ack": Fault.NO_ANSWER, "no ACTIVATE_EX": Fault.NO_ACTIVATE_EX,
    "unsafe": Fault.UNSAFE_HARDWARE,
}  # fmt: skip


class Unrealisable(Exception):
    """A board has no such state, or the firmware no such command to bring it there."""


def realise(w: World) -> Board:
    """A board in the state that a world describes."""
    if unknown := w.faults - FAULTS.keys() - {"RMP build"}:
        raise Unrealisable(f"a fault of the chip: {', '.join(sorted(unknown))}")
    board = Board(cores=len(w.cores), sockets=w.sockets)
    if w.iommu_enforced:
        board.initialise()
        for gctx, guest in w.guests.items():
            _make_guest(board, w, gctx, guest)
        pages = {
            address: page for address, page in w.pages.items()
            if not (page.state == "CONTEXT" and address in w.guests and not page.large)
        }  # fmt: skip
        _assign(board, pages)
        for address, page in pages.items():
            _make_page(board, address, page)
    else:
        _set_registers(board, w)
    psp = board.psp
    psp.state = PlatformState[w.snp]
    psp.legacy.state = LegacyPlatformState[w.legacy]
    psp.guest_count = w.guest_count
    psp.rmp_tcb = psp.current_tcb if w.rmp_initialised else None
    if w.rmp_initialised and w.rmp_tcb_changed:
        psp.rmp_tcb = replace(psp.current_tcb, snp=psp.current_tcb.snp - 1)
    psp.faults |= {FAULTS[name] for name in w.faults & FAULTS.keys()}
    realise_legacy(board, w)
    psp.asids.states[:] = 0
    for states, row in zip(w.asids, psp.asids.states, strict=True):
        for asid, state in states.items():
            row[asid] = ASID_STATES[state]
    for core, wanted in zip(board.machine.cores, w.cores, strict=True):
        core.wbinvd_done = wanted.wbinvd
    return board


def _set_registers(board: Board, w: World) -> None:
    """What the BIOS and the kernel left in the registers before SNP_INIT.

    Building the table fails on a board whose system management memory reaches into it.
    """
    memory = board.machine.map
    if "RMP build" in w.faults:
        memory = board.machine.map = replace(memory, tseg=(w.rmp[0], w.tseg[1]))
    booted = bios_settings(board.machine.product, memory.top, memory.top, memory.tseg, memory.rmp)
    for core, wanted in zip(board.machine.cores, w.cores, strict=True):
        core.set_by_bios({
            Msr.MTRR_FIX_64K_00000: wanted.mtrr_fixed, Msr.IORR_BASE0: wanted.iorr, Msr.TOP_MEM: wanted.tom,
            Msr.TOP_MEM2: wanted.tom2, Msr.HWCR: wanted.hwcr, Msr.TSEG_MASK: booted[Msr.TSEG_MASK],
            Msr.TSEG_BASE: booted[Msr.TSEG_BASE] if wanted.tseg == w.tseg[0] else wanted.tseg,
            Msr.RMP_BASE: wanted.rmp_base, Msr.RMP_END: wanted.rmp_end, Msr.VM_HSAVE_PA: wanted.hsave,
            Msr.SYSCFG: wanted.syscfg,
        })  # fmt: skip
        core.in_guest, core.in_smm = bool(wanted.debug_status & 1 << 2), bool(wanted.debug_status & 1 << 7)


def _make_guest(board: Board, w: World, gctx: int, guest: Guest) -> None:
    """A guest as the commands make it, its context then patched to what was asked for."""
    board.assign(gctx, FIRMWARE)
    board.ok(Command.SNP_GCTX_CREATE, gctx_paddr=gctx)
    if guest.gstate != "INIT":
        board.ok(Command.SNP_LAUNCH_START, gctx_paddr=gctx, policy=POLICY)
        board.ok(Command.SNP_ACTIVATE, gctx_paddr=gctx, asid=guest.asid or (98 if gctx == GCTX else 97))
    if guest.gstate == "RUNNING":
        board.ok(Command.SNP_LAUNCH_FINISH, gctx_paddr=gctx)
    context = board.psp.context(gctx)
    values: dict[str, Any] = {"state": GuestState[guest.gstate], "asid": guest.asid, "policy": guest.policy}
    held = [states.get(guest.asid) in ("ALLOCATED", "IN_USE") for states in w.asids]
    values["ccx_mask"] = sum(1 << number for number, here in enumerate(held) if here and guest.asid)
    values |= {f"msg_count{number}": count for number, count in enumerate(guest.msg_count)}
    values |= {"imi_en": int(guest.imi_en), "vcek_dis": int(guest.vcek_dis)}
    values |= {"oek_iv_count": guest.iv_count, "root_md_entry": MDATA_ENTRY.unpack(mdata_entry(guest.root))}
    if guest.ma is not None:
        values["ma_paddr"] = guest.ma
    board.psp.save_context(gctx, context.replace(**values))


def _assign(board: Board, pages: dict[int, Page]) -> None:
    """RMPUPDATE as far as it goes: pages in a row of one guest, at guest addresses in a row, at once."""
    runs: list[tuple[int, Page, int]] = []
    for address, page in pages.items():
        if page.state in ("HYPERVISOR", "HV_FIXED"):
            continue
        start, first, count = runs[-1] if runs else (0, page, 0)
        follows = (address, page.gfn, page.asid) == (start + count * PAGE, first.gfn + count, first.asid)
        if runs and follows and not page.large and not first.large:
            runs[-1] = start, first, count + 1
        else:
            runs.append((address, page, 1))
    for start, first, count in runs:
        before = int(board.machine.rmp.load(np.array([start >> 12], np.uint64))[0, 0])
        if not before & 0b101:  # neither assigned, in a 2 MB page perhaps, nor immutable
            board.assign(start, NewState(assigned=True, asid=first.asid, large=first.large), first.gfn << 12, count)


def _make_page(board: Board, address: int, page: Page) -> None:
    """The bits that only the firmware or a guest sets."""
    number = np.array([address >> 12], np.uint64)
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


def mdata_entry(m: Mdata, tag: bytes = bytes(16), gfn: int = 0x200, iv: int = 5) -> bytes:
    """A metadata entry as 9.4 has it, of a page with VMPL0's permissions only."""
    flags = m.valid | m.validated << 1 | m.vmsa << 2 | m.metadata << 3 | m.large << 4
    return struct.pack("<QQ16sQQ16x", 0, iv, tag, flags | gfn << 12, 0xF)


def _activate_ex(board: Board, w: World, r: Request) -> None:
    _write(board, r.ids_paddr, struct.pack(f"<{len(r.apic_ids)}I", *r.apic_ids))


def _swap_in(board: Board, w: World, r: Request) -> None:
    """A page that was swapped out, and its entry in memory or in the context."""
    context = context_of(board)
    entry: Mdata = w.guests[GCTX].root if r.root_mdata_en else r.mdata
    sealed = AESGCM(context.oek).encrypt(struct.pack("<Q4x", 5), bytes(2 << 20 if r.page_size else PAGE), None)
    _write(board, r.src_paddr & -PAGE, sealed[:-16])
    tag = sealed[-16:] if entry.tag else bytes([sealed[-16] ^ 1]) + sealed[-15:]
    packed = mdata_entry(entry, tag)
    if r.root_mdata_en:
        board.psp.save_context(GCTX, context.replace(root_md_entry=MDATA_ENTRY.unpack(packed)))
    else:
        _write(board, r.mdata_paddr, packed)


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


def _init_ex(board: Board, w: World, r: Request) -> None:
    _write(board, r.list_paddr & -PAGE, bytes(PAGE))


def _set_state(board: Board, w: World, r: Request) -> None:
    one = struct.pack("<QII", r.base, r.pages, 0)
    _write(board, r.list_paddr, struct.pack("<II", r.count, r.list_reserved) + one)


def _vlek_load(board: Board, w: World, r: Request) -> None:
    tcb = board.psp.reported_tcb
    step = {"reported": 0, "lower": -1, "higher": 1}[r.blob_tcb]
    blob = wrapped_vlek("a provider", board.psp.chip, replace(tcb, microcode=tcb.microcode + step), bytes(12))
    _write(board, r.paddr, blob if r.tag else blob[:0x1A0] + bytes([blob[0x1A0] ^ 1]) + blob[0x1A1:])


def _download(board: Board, w: World, r: Request) -> None:
    named: dict[str, Any] = {
        "rollback": {"svn": 23}, "unsupported": {"product": "genoa"}, "wrong type": {"kind": ImageType.BOOT_LOADER},
        "memory": {"memory": 1 << 30}, "refuses the state": {"refuses_state": True},
        "not restored": {"refuses_state": True},
    }  # fmt: skip
    good = {"product": "milan", "release": release("1.58"), "build": 65, "svn": 25, "size": max(r.fw_len, 0xD0)}
    image = firmware_image(**{**good, **named.get(r.image, {})})
    faults = {"broadcast": Fault.NO_ANSWER, "not restored": Fault.NO_RESTORE}
    board.psp.faults |= {faults[r.image]} if r.image in faults else set()
    _write(board, r.fw_paddr, image[:-1] + bytes([image[-1] ^ 1]) if r.image == "signature" else image)


def _write(board: Board, address: int, data: bytes) -> None:
    """Write where there is plain DRAM to write to; elsewhere the firmware is to refuse the address."""
    if address + len(data) <= 47 << 20 and not 0xA0000 <= address < 0xC0000:
        board.machine.dram.write(address, data)


MEMORY: dict[str, Callable[[Board, World, Request], None]] = {
    "SNP_LAUNCH_UPDATE": _launch_update, "SNP_LAUNCH_FINISH": _launch_finish, "SNP_GUEST_REQUEST": _guest_request,
    "SNP_ACTIVATE_EX": _activate_ex, "SNP_PAGE_SWAP_IN": _swap_in, "SNP_INIT_EX": _init_ex,
    "SNP_PAGE_SET_STATE": _set_state, "SNP_VLEK_LOAD": _vlek_load, "SNP_DOWNLOAD_FIRMWARE_EX": _download,
    "DOWNLOAD_FIRMWARE": _download, **LEGACY_MEMORY,
}  # fmt: skip


def observe(board: Board, w: World) -> dict[str, object]:
    """What a board shows of the things that a world names, in the world's words."""
    psp = board.psp
    seen: dict[str, object] = {"snp": psp.state.name, "guest_count": psp.guest_count, **observe_legacy(board)}
    seen["table"] = psp.rmp_built, board.machine.iommu.snp_enabled
    seen["identity"] = psp.mask_chip_id, psp.mask_chip_key, psp.vlek is not None
    seen["TCBs"] = _parts(psp.committed_tcb), psp.configured_tcb and _parts(psp.configured_tcb)
    seen["cores"] = [(core.wbinvd_done, core.rdmsr(Msr.SYSCFG)) for core in board.machine.cores]
    names = {number: name for name, number in ASID_STATES.items()}
    for ccx, row in enumerate(psp.asids.states):
        seen[f"ASIDs of complex {ccx}"] = {asid: names[int(s)] for asid, s in enumerate(row) if asid and s}
    for address in w.pages:
        state = PageState(int(decode_states(board.machine.rmp.load(range(address >> 12, (address >> 12) + 1)))[0])).name
        entry = board.cpu.rmp_entry(address >> 12)
        owner = (entry.gfn & (1 << 36) - 1) << 12 if state == "METADATA" else 0
        gfn, masks = (entry.gfn, (entry.vmpl1, entry.vmpl2, entry.vmpl3)) if entry.asid else (0, (0, 0, 0))
        vmsa = bool(entry.vmsa) and state != "RECLAIM"
        seen[f"page {address:#x}"] = (state, bool(entry.page_size), entry.asid, gfn, vmsa, owner, masks)
    for gctx in w.guests:
        context = context_of(board, gctx)
        block = any(context.id_block)
        counts = [getattr(context, f"msg_count{number}") for number in range(4)]
        flags = context.imi_en, context.vcek_dis, context.oek_iv_count, context.root_md_entry.valid
        agent = None if context.ma_paddr in (0, 2**64 - 1) else context.ma_paddr
        seen[f"guest {gctx:#x}"] = (context.state.name, context.asid, context.policy, counts, block, flags, agent)
    return seen


def _parts(tcb: Tcb) -> tuple[int, int, int, int]:
    return tcb.bootloader, tcb.tee, tcb.snp, tcb.microcode


def described(w: World) -> dict[str, object]:
    """The same of a world."""
    seen: dict[str, object] = {"snp": w.snp, "guest_count": w.guest_count, **describe_legacy(w)}
    seen["table"] = w.rmp_initialised, w.iommu_enforced
    seen["identity"] = w.mask_chip_id, w.mask_chip_key, w.vlek
    seen["TCBs"] = w.committed, w.configured
    seen["cores"] = [(core.wbinvd, core.syscfg) for core in w.cores]
    for ccx, states in enumerate(w.asids):
        seen[f"ASIDs of complex {ccx}"] = {asid: s for asid, s in sorted(states.items()) if s != "CLEAN"}
    for address, page in w.pages.items():
        of_guest = page.state in OF_GUESTS
        gfn, vmpl = (page.gfn, page.vmpl) if of_guest else (0, (0, 0, 0))
        vmsa = page.state == "CONTEXT" or (page.vmsa and of_guest)
        seen[f"page {address:#x}"] = (page.state, page.large, page.asid, gfn, vmsa, page.owner, vmpl)
    for gctx, guest in w.guests.items():
        flags = guest.imi_en, guest.vcek_dis, guest.iv_count, guest.root.valid
        seen[f"guest {gctx:#x}"] = (
            guest.gstate, guest.asid, guest.policy, guest.msg_count, guest.id_block, flags, guest.ma
        )  # fmt: skip
    return seen
