"""Commands on a guest's existence: SNP_GCTX_CREATE, SNP_ACTIVATE, SNP_DECOMMISSION. Source: SNP ABI."""

from __future__ import annotations

import numpy as np

from snpbook.firmware.keys import memory_key
from snpbook.firmware.pages import check_address, make_context, make_firmware, require_small, require_state
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.rmp import U64
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import Command
from snpbook.spec.context import GUEST_CONTEXT
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.policy import POLICY
from snpbook.spec.rmp import ASID_COUNTERS
from snpbook.spec.states import GuestState
from snpbook.spec.status import Status, require


def snp_gctx_create(psp: SecureProcessor, buffer: Record) -> None:
    """Turn a firmware page into the context of a new guest, with a new memory key seed."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    spa = check_address(psp, buffer.gctx_paddr, PAGE_SIZE, "gctx_paddr")
    require_state(psp, spa, "gctx_paddr", PageState.FIRMWARE)
    require_small(psp, spa, "gctx_paddr")

    # ACTION
    context = GUEST_CONTEXT.record(state=GuestState.INIT, vek_seed=psp.rng(32), launch_tcb=int(psp.committed_tcb))
    make_context(psp, spa)
    psp.save_context(spa, context)


def snp_activate(psp: SecureProcessor, buffer: Record) -> None:
    """Bind a guest to an ASID and install its memory key there."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)
    running = psp.next_state(context, Command.SNP_ACTIVATE) is GuestState.RUNNING
    asid = buffer.asid
    require(asid < ASID_COUNTERS, Status.INVALID_ASID, "ASID has a page counter", ASID_COUNTERS, asid)
    owned = psp.machine.rmp.counters(asid)
    require(owned == 0, Status.INVALID_CONFIG, "no page carries the ASID", 0, owned)
    psp.asids.check_activate(asid, context.asid)

    # ACTION
    key = memory_key(context.vek_seed, psp.machine.product.memory_key_size)
    psp.machine.encryption.install(asid, key)
    psp.asids.set(asid, AsidState.IN_USE if running else AsidState.ALLOCATED)
    if running:
        psp.machine.runnable.add(asid)
    psp.save_context(buffer.gctx_paddr, context.replace(asid=asid))


def snp_decommission(psp: SecureProcessor, buffer: Record) -> None:
    """End a guest: its ASID is released, its context page is the firmware's plain page again.

    The guest's own pages stay assigned; the ASID cannot be activated before they are reassigned.
    """
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)

    # ACTION
    if context.asid:
        psp.asids.release(context.asid)
        psp.machine.runnable.discard(context.asid)
    if context.state is not GuestState.INIT:
        psp.guest_count -= 1
    spa = check_address(psp, buffer.gctx_paddr, PAGE_SIZE, "gctx_paddr")
    psp.machine.memory.write_pages(
        KeyId.UNENCRYPTED, np.array([spa >> PAGE_SHIFT], U64), np.zeros((1, PAGE_SIZE), np.uint8)
    )
    make_firmware(psp, spa)


def check_policy(psp: SecureProcessor, policy: int) -> None:
    """The rules of SNP_LAUNCH_START on a guest policy (POLICY_FAILURE), in order."""
    data = policy.to_bytes(8, "little")
    wanted, abi = POLICY.unpack(data), psp.release.abi
    require(wanted.one == 1, Status.POLICY_FAILURE, "policy bit 17 is one", 1, 0)
    smt_on = psp.release.platform_info & 1
    require(wanted.smt or not smt_on, Status.POLICY_FAILURE, "SMT is on, so the policy must allow it", 1, wanted.smt)
    version, minimum = (abi.major, abi.minor), (wanted.abi_major, wanted.abi_minor)
    require(minimum <= version, Status.POLICY_FAILURE, "the firmware's ABI is new enough", minimum, version)
    unknown = policy & ~abi.policy_bits
    require(unknown == 0, Status.POLICY_FAILURE, "reserved policy bits are zero", 0, unknown)
