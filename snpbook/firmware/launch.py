"""The ends of a launch: SNP_LAUNCH_START with the guest's policy, and SNP_LAUNCH_FINISH. Source: SNP ABI.

What lies between is `launch_update`; an incoming migration image ends by MSG_ABSORB instead. The order of checks is
that of firmware 1.55.25.
"""

from __future__ import annotations

from hashlib import sha384

from snpbook.firmware.identity import check_author, check_id_block
from snpbook.firmware.pages import check_address, state_of
from snpbook.firmware.processor import SecureProcessor
from snpbook.spec.commands import Command
from snpbook.spec.context import NO_AGENT
from snpbook.spec.encryption import KeyId
from snpbook.spec.launch import ID_AUTH, ID_BLOCK
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE, PageState
from snpbook.spec.policy import PLATFORM_INFO, guest_policy
from snpbook.spec.status import Status, require

NO_REPORT_ID = b"\xff" * 32
"""REPORT_ID_MA of a guest without a migration agent."""
_DRAWN = ("oek", "vmpck0", "vmpck1", "vmpck2", "vmpck3", "vmrk", "report_id")


def snp_launch_start(psp: SecureProcessor, buffer: Record) -> None:
    """Open a launch: fix the policy and the migration agent, draw the guest's keys, start the digest."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    if buffer.ma_en:
        psp.page_aligned(ma_gctx_paddr=buffer.ma_gctx_paddr)
    psp.require_initialised()
    agent = check_address(psp, buffer.ma_gctx_paddr, PAGE_SIZE, "ma_gctx_paddr") if buffer.ma_en else NO_AGENT
    context = psp.context(buffer.gctx_paddr)
    state = psp.next_state(context, Command.SNP_LAUNCH_START)
    found = state_of(psp, agent) if buffer.ma_en else PageState.CONTEXT
    require(found is PageState.CONTEXT, Status.INVALID_GUEST, "state of ma_gctx_paddr", "CONTEXT", found.name)
    ma = psp.context(agent) if buffer.ma_en else None
    check_policy(psp, buffer.policy, ma)

    # ACTION
    psp.guest_count += 1
    started = context.replace(
        state=state,
        policy=buffer.policy,
        imi_en=buffer.imi_en,
        gosvw=buffer.gosvw,
        desired_tsc_khz=buffer.desired_tsc_khz,
        ma_paddr=agent,
        report_id_ma=ma.report_id if ma else NO_REPORT_ID,
        launch_mit_vector=psp.mitigations,
        **{name: psp.rng(32) for name in _DRAWN},
    )
    psp.save_context(buffer.gctx_paddr, started)


def check_policy(psp: SecureProcessor, policy: int, agent: Record | None) -> None:
    """The rules of SNP_LAUNCH_START on a guest policy and on a migration agent (POLICY_FAILURE), in order.

    Where the rules of bits 22 to 24 stand among the others is not published (MODEL).
    """
    wanted, abi = guest_policy(policy), psp.release.abi
    platform = PLATFORM_INFO.unpack(psp.platform_info.to_bytes(PLATFORM_INFO.size, "little"))

    def rule(holds: bool | int, name: str, expected: object = 1, found: object = 0) -> None:
        require(bool(holds), Status.POLICY_FAILURE, name, expected, found)

    rule(wanted.one, "policy bit 17 is one")
    rule(wanted.smt or not platform.smt_en, "SMT is on, so the policy must allow it")
    version, minimum = (abi.major, abi.minor), (wanted.abi_major, wanted.abi_minor)
    rule(minimum <= version, "the firmware's ABI is new enough", minimum, version)
    unknown = policy & ~abi.policy_bits
    rule(unknown == 0, "reserved policy bits are zero", 0, unknown)
    cipher = psp.machine.product.encryption
    rule(not wanted.mem_aes_256_xts or cipher == "xts-aes-256", "memory is encrypted with AES-256-XTS", "XTS", cipher)
    rule(not wanted.rapl_dis or platform.rapl_dis, "RAPL is off")
    rule(not wanted.ciphertext_hiding or platform.ciphertext_hiding_en, "ciphertext hiding is on")
    if agent is not None:
        rule(wanted.migrate_ma, "a migration agent is allowed")
        rule(agent.ma_paddr == NO_AGENT, "the migration agent has none itself", "none", agent.ma_paddr)
        single = guest_policy(agent.policy).single_socket
        rule(single or not wanted.single_socket, "the agent of a guest of one socket is one too")


def snp_launch_finish(psp: SecureProcessor, buffer: Record) -> None:
    """Close the launch: check the owner's ID block if there is one, and let the guest run."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)
    state = psp.next_state(context, Command.SNP_LAUNCH_FINISH)
    require(not context.imi_en, Status.INVALID_GUEST_STATE, "no incoming migration image", "IMI_EN=0", 1)
    require(context.asid != 0, Status.INACTIVE, "the guest has an ASID", "an ASID", 0)
    if buffer.id_block_en:
        block = _input(psp, buffer.id_block_paddr, ID_BLOCK.size, "id_block_paddr")
        auth = ID_AUTH.unpack(_input(psp, buffer.id_auth_paddr, ID_AUTH.size, "id_auth_paddr"))
        check_id_block(block, auth, bool(buffer.auth_key_en), context.launch_digest, context.policy)
        context = context.replace(id_block=block, id_key_digest=sha384(auth.id_key).digest())
        if buffer.auth_key_en:
            psp.save_context(buffer.gctx_paddr, context)  # a failed check of the author leaves the block stored
            check_author(auth)
            context = context.replace(author_key_digest=sha384(auth.author_key).digest())

    # ACTION
    psp.asids.finish(context.asid)

    # STATE
    finished = context.replace(
        state=state,
        host_data=buffer.host_data,
        id_block_en=buffer.id_block_en,
        author_key_en=buffer.auth_key_en,
        vcek_dis=buffer.vcek_dis,
    )
    psp.save_context(buffer.gctx_paddr, finished)


def _input(psp: SecureProcessor, address: int, size: int, name: str) -> bytes:
    return psp.machine.memory.read(KeyId.UNENCRYPTED, check_address(psp, address, size, name, lookup=False), size)
