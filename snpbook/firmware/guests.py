"""Commands on a guest's existence: SNP_GCTX_CREATE, SNP_GUEST_STATUS, SNP_ACTIVATE[_EX], SNP_DECOMMISSION.

A guest of one socket (SINGLE_SOCKET) may be active on the core complexes of one socket alone.
Source: SNP ABI; the order of checks is that of firmware 1.55.25.
"""

from __future__ import annotations

import numpy as np

from snpbook.firmware.buffers import read_input
from snpbook.firmware.keys import memory_key
from snpbook.firmware.pages import (
    check_address,
    make_context,
    make_firmware,
    refused_address,
    require_small,
    require_state,
    state_of,
    without_c_bit,
)
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.rmp import U64
from snpbook.spec.asids import APIC_IDS_MAX
from snpbook.spec.commands import Command
from snpbook.spec.context import GUEST_CONTEXT, NO_AGENT
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.platform import GUEST_STATUS, Fault
from snpbook.spec.policy import guest_policy
from snpbook.spec.rmp import ASID_COUNTERS
from snpbook.spec.snp_buffers import SNP_ACTIVATE_EX
from snpbook.spec.states import GuestState
from snpbook.spec.status import Status, require

_APIC_ID_SIZE = 4


def snp_gctx_create(psp: SecureProcessor, buffer: Record) -> None:
    """Turn a firmware page into the context of a new guest, with a new memory key seed."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    spa = without_c_bit(psp, buffer.gctx_paddr)
    bad_address = refused_address(psp, spa, PAGE_SIZE, "gctx_paddr", lookup=True)
    outside_dram = bad_address is not None and bad_address.status is Status.INVALID_CONFIG
    if bad_address is not None and not outside_dram:
        raise bad_address
    require_state(psp, spa, "gctx_paddr", PageState.FIRMWARE)
    require_small(psp, spa, "gctx_paddr")
    if bad_address is not None:  # other commands ask for DRAM before they look the page up
        raise bad_address

    # ACTION
    context = GUEST_CONTEXT.record(state=GuestState.INIT, vek_seed=psp.rng(32), launch_tcb=int(psp.committed_tcb))
    make_context(psp, spa)
    psp.save_context(spa, context)


def snp_guest_status(psp: SecureProcessor, buffer: Record) -> None:
    """Tell the host what a guest is: its policy, ASID and state."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    end = buffer.status_paddr % PAGE_SIZE + GUEST_STATUS.size
    require(end <= PAGE_SIZE, Status.INVALID_PARAM, "status_paddr stays in one page", PAGE_SIZE, end)
    psp.require_initialised()
    spa = check_address(psp, buffer.status_paddr, GUEST_STATUS.size, "status_paddr")
    context = psp.context(buffer.gctx_paddr)
    require_state(psp, spa, "status_paddr", PageState.FIRMWARE, PageState.DEFAULT)

    # ANSWER
    values = {"policy": context.policy, "asid": context.asid, "state": context.state, "vcek_dis": context.vcek_dis}
    psp.machine.memory.write(KeyId.UNENCRYPTED, spa, GUEST_STATUS.pack(**values))


def snp_activate(psp: SecureProcessor, buffer: Record) -> None:
    """Bind a guest to an ASID on every core complex and install its memory key there."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)
    state = psp.next_state(context, Command.SNP_ACTIVATE)
    _require_no_pages(psp, buffer.asid)
    sockets = psp.machine.sockets
    single = guest_policy(context.policy).single_socket
    require(not single or sockets == 1, Status.POLICY_FAILURE, "SINGLE_SOCKET on all complexes", "one socket", sockets)
    psp.asids.check_activate(buffer.asid, context.asid)

    # ACTION
    _activate(psp, buffer.gctx_paddr, context.replace(state=state, asid=buffer.asid), range(psp.asids.complexes))


def snp_activate_ex(psp: SecureProcessor, buffer: Record) -> None:
    """Bind a guest to an ASID on the core complexes of some cores; later calls with the same ASID add further ones.

    APIC ids are the numbers of cores (MODEL).
    """
    # CHECKS
    size = SNP_ACTIVATE_EX.size
    require(buffer.length == size, Status.INVALID_PARAM, "length of the buffer", size, buffer.length)
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)
    state = psp.next_state(context, Command.SNP_ACTIVATE_EX)
    asid = buffer.asid
    if context.asid == 0:
        _require_no_pages(psp, asid)
    complexes = check_apic_ids(psp, asid, buffer.numids, buffer.ids_paddr)
    _check_sockets(psp, context, complexes)
    psp.asids.check_activate(asid, context.asid, again=True)

    # ACTION
    _activate(psp, buffer.gctx_paddr, context.replace(state=state, asid=asid), complexes)


def _require_no_pages(psp: SecureProcessor, asid: int) -> None:
    """Pages of an earlier guest would be readable under the new key's ASID."""
    require(asid < ASID_COUNTERS, Status.INVALID_ASID, "ASID has a page counter", ASID_COUNTERS, asid)
    owned = psp.machine.rmp.counters(asid)
    require(owned == 0, Status.INVALID_CONFIG, "no page carries the ASID", 0, owned)


def check_apic_ids(psp: SecureProcessor, asid: int, count: int, address: int) -> set[int]:
    """What ACTIVATE_EX, the legacy one too, asks of an ASID and a list of APIC ids: the complexes of those cores."""
    require(0 < asid <= psp.asids.limit, Status.INVALID_ASID, "ASID in range", f"1..{psp.asids.limit}", asid)
    able = Fault.NO_ACTIVATE_EX not in psp.faults
    require(able, Status.UNSUPPORTED, "the part activates ASIDs on some complexes alone")
    require(0 < count <= APIC_IDS_MAX, Status.INVALID_PARAM, "number of APIC ids", f"1..{APIC_IDS_MAX}", count)
    ids: list[int] = np.frombuffer(read_input(psp, address, count * _APIC_ID_SIZE, "ids_paddr"), "<u4").tolist()
    absent = [number for number in ids if number >= len(psp.machine.cores)]
    require(not absent, Status.INVALID_CONFIG, "APIC ids are those of cores", len(psp.machine.cores), absent)
    return {psp.machine.cores[number].ccx for number in ids}


def _check_sockets(psp: SecureProcessor, context: Record, complexes: set[int]) -> None:
    """A guest of one socket stays on that of its migration agent, which must be active, and on its own."""
    if not guest_policy(context.policy).single_socket:
        return
    wanted = _sockets(psp, sum(1 << number for number in complexes)) | _sockets(psp, context.ccx_mask)
    if context.ma_paddr != NO_AGENT:
        there = state_of(psp, context.ma_paddr) is PageState.CONTEXT
        agent = psp.context(context.ma_paddr) if there else None
        asid = agent.asid if agent else 0
        require(asid != 0, Status.POLICY_FAILURE, "the migration agent is active", "an ASID", asid)
        wanted |= _sockets(psp, agent.ccx_mask if agent else 0)
    require(len(wanted) < 2, Status.POLICY_FAILURE, "SINGLE_SOCKET: all complexes on one", "one socket", sorted(wanted))


def _sockets(psp: SecureProcessor, mask: int) -> set[int]:
    """The sockets of the core complexes whose bits a mask has."""
    cores = psp.machine.cores
    return {core.socket for core in cores if mask >> core.ccx & 1}


def _activate(psp: SecureProcessor, gctx: int, context: Record, complexes: range | set[int]) -> None:
    """Install the guest's key for its ASID; a guest that is past its launch may run at once."""
    asid, running = context.asid, context.state is GuestState.RUNNING
    psp.machine.encryption.install(asid, memory_key(context.vek_seed, psp.machine.product.memory_key_size))
    psp.asids.activate(asid, running=running, complexes=complexes)
    mask = context.ccx_mask | sum(1 << number for number in complexes)
    psp.save_context(gctx, context.replace(ccx_mask=mask))


def snp_decommission(psp: SecureProcessor, buffer: Record) -> None:
    """End a guest: its ASID is released, its context page is the firmware's plain page again.

    The guest's own pages stay assigned; the ASID cannot be activated before they are reassigned.
    """
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)

    # ACTION
    decommission(psp, buffer.gctx_paddr, context)


def decommission(psp: SecureProcessor, gctx: int, context: Record) -> None:
    """What SNP_DECOMMISSION and MSG_EXPORT_REQ do to a guest."""
    if context.asid:
        psp.asids.release(context.asid)
    if context.state is not GuestState.INIT:
        psp.guest_count = max(psp.guest_count - 1, 0)  # an imported guest was never counted
    spa = without_c_bit(psp, gctx)
    psp.machine.memory.write_pages(
        KeyId.UNENCRYPTED, np.array([spa >> PAGE_SHIFT], U64), np.zeros((1, PAGE_SIZE), np.uint8)
    )
    make_firmware(psp, spa)
    psp.note_guest(spa, None)
