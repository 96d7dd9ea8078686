"""The launch: SNP_LAUNCH_START, SNP_LAUNCH_UPDATE, SNP_LAUNCH_FINISH. Source: SNP ABI.

A run of SNP_LAUNCH_UPDATE commands is checked page by page in arrays: what stands before the first
failing page is done, as if the commands had come one by one.
"""

from __future__ import annotations

from hashlib import sha384

import numpy as np
from numpy.typing import NDArray

from snpbook.firmware.digest import NO_CONTENTS, extend, page_contents
from snpbook.firmware.guests import check_policy
from snpbook.firmware.identity import check_id_block
from snpbook.firmware.pages import check_address, check_run, first_refusal, look_up, make_guest_valid, without_c_bit
from snpbook.firmware.processor import SecureProcessor, wrong_guest_state
from snpbook.hardware.dram import Words, page_numbers
from snpbook.hardware.rmp import U64
from snpbook.spec import rmp as spec
from snpbook.spec.asids import AsidState
from snpbook.spec.commands import Command
from snpbook.spec.encryption import KeyId
from snpbook.spec.launch import CPUID_ENTRIES, CPUID_PAGE, ID_AUTH, ID_BLOCK, SECRETS_PAGE
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, LaunchPage, PageSize, PageState
from snpbook.spec.states import GUEST_TRANSITIONS
from snpbook.spec.status import FirmwareRefusal, Status, require
from snpbook.spec.vmsa import GUEST_FIELDS_AT_LAUNCH, UNMEASURED_FROM, UNMEASURED_TO

_SMALL_ONLY = (LaunchPage.VMSA, LaunchPage.SECRETS, LaunchPage.CPUID)


def snp_launch_start(psp: SecureProcessor, buffer: Record) -> None:
    """Open a launch: fix the policy, draw the guest's keys and its report id, start the digest."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)
    state = psp.next_state(context, Command.SNP_LAUNCH_START)
    agent = buffer.ma_en or buffer.imi_en
    require(not agent, Status.UNSUPPORTED, "migration agents and IMI are not modelled yet", 0, 1, "MODEL")
    check_policy(psp, buffer.policy)

    # ACTION
    psp.guest_count += 1
    names = ("oek", "vmpck0", "vmpck1", "vmpck2", "vmpck3", "vmrk", "report_id")
    started = context.replace(
        state=state,
        policy=buffer.policy,
        gosvw=buffer.gosvw,
        desired_tsc_khz=buffer.desired_tsc_khz,
        report_id_ma=b"\xff" * 32,
        **{name: psp.rng(32) for name in names},
    )
    psp.save_context(buffer.gctx_paddr, started)


def snp_launch_update(psp: SecureProcessor, buffer: Record) -> None:
    """Add one page to the launch: measure it, encrypt it with the guest's key, give it to the guest."""
    page = without_c_bit(psp, buffer.page_paddr) >> PAGE_SHIFT
    psp.page_aligned(page_paddr=buffer.page_paddr)
    _, refusal = launch_update_run(psp, buffer, range(page, page + 1))
    if refusal is not None:
        raise refusal


def launch_update_run(psp: SecureProcessor, buffer: Record, pages: range) -> tuple[int, FirmwareRefusal | None]:
    """SNP_LAUNCH_UPDATE for each page of a run: pages done, and why the next one was refused."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    large = buffer.page_size is PageSize.SIZE_2M
    each = PAGES_PER_LARGE if large else 1
    pages, bad_address = check_run(psp, pages, PAGE_SIZE, "page_paddr")
    if bad_address is not None and not pages:
        raise bad_address
    context = psp.context(buffer.gctx_paddr)
    numbers = page_numbers(pages)
    entries, states = look_up(psp, numbers)
    stop, refusal = _check_pages(psp, buffer, context, numbers, entries, states)
    kind, done = buffer.page_type, numbers[:stop]

    # ACTION
    if stop:
        small = np.add.outer(done, np.arange(each, dtype=U64)).reshape(-1)
        gfns = (entries[:stop, 0] & U64(spec.GFN)) >> U64(spec.GFN_SHIFT)
        gpas = np.add.outer(gfns, np.arange(each, dtype=U64)).reshape(-1) << U64(PAGE_SHIFT)
        target: range | Words = range(pages.start, pages.start + stop * each) if pages.step == each else small
        contents = _fill(psp, context, kind, target)
        perms = (buffer.vmpl1_perms, buffer.vmpl2_perms, buffer.vmpl3_perms)
        digest = extend(context.launch_digest, kind, gpas, contents, perms, buffer.imi_page)
        psp.save_context(buffer.gctx_paddr, context.replace(launch_digest=digest))

        # STATE
        make_guest_valid(psp, done, perms, kind is LaunchPage.VMSA)
    return stop, refusal or bad_address


def _check_pages(
    psp: SecureProcessor, buffer: Record, context: Record, pages: Words, entries: Words, states: NDArray[np.uint8]
) -> tuple[int, FirmwareRefusal | None]:
    """The checks on pages and guest, in the order of the specification."""
    large, kind, command = buffer.page_size is PageSize.SIZE_2M, buffer.page_type, Command.SNP_LAUNCH_UPDATE
    low = entries[:, 0]
    every = np.ones(len(pages), bool)

    def check(
        status: Status, rule: str, failed: NDArray[np.bool_] | bool, expected: object = "", found: object = ""
    ) -> tuple[FirmwareRefusal, NDArray[np.bool_]]:
        return FirmwareRefusal(status, rule, expected, found), every & failed

    checks = [
        check(Status.INVALID_PAGE_STATE, "page state", states != PageState.PRE_GUEST, "PRE_GUEST"),
        check(Status.INVALID_PAGE_SIZE, "RMP page size", (low & U64(spec.LARGE) != 0) != large, buffer.page_size),
        check(Status.INVALID_ADDRESS, "a 2 MB page is aligned", large & (pages % U64(PAGES_PER_LARGE) != 0), 0),
        check(Status.INVALID_PAGE_SIZE, "pages of this type are 4 KB", large and kind in _SMALL_ONLY, "4K", "2M"),
        check(Status.INVALID_PARAM, "page type is a known one", not isinstance(kind, LaunchPage), "1..6", kind),
        (wrong_guest_state(context, command), every & ((context.state, command) not in GUEST_TRANSITIONS)),
        check(Status.INACTIVE, "the guest has an ASID", context.asid == 0, "an ASID", 0),
        check(
            Status.INVALID_PAGE_OWNER,
            "page owner",
            (low & U64(spec.ASID)) >> U64(spec.ASID_SHIFT) != context.asid,
            context.asid,
        ),
    ]
    stop, refusal = first_refusal(checks, len(pages))
    if kind is LaunchPage.CPUID:
        for index in range(stop):
            if (why := _cpuid_refusal(psp, int(pages[index]))) is not None:
                return index, why
    return stop, refusal


def _cpuid_refusal(psp: SecureProcessor, page: int) -> FirmwareRefusal | None:
    """A CPUID page's header; its leaves are not compared with the processor's (LIMITATIONS)."""
    data = psp.machine.memory.read(KeyId.UNENCRYPTED, page << PAGE_SHIFT, PAGE_SIZE)
    count = CPUID_PAGE.unpack(data).count
    if count > CPUID_ENTRIES:
        return FirmwareRefusal(Status.INVALID_PARAM, "entries of the CPUID page", CPUID_ENTRIES, count)
    if stray := [offset for offset in CPUID_PAGE.reserved_set(data) if offset < CPUID_PAGE.offset("entries")]:
        return FirmwareRefusal(Status.INVALID_PARAM, "reserved bytes of the CPUID page are zero", 0, stray)
    return None


def _fill(psp: SecureProcessor, context: Record, kind: LaunchPage, pages: range | Words) -> list[bytes]:
    """Put what the type asks for into the pages, encrypted; the CONTENTS digests, one per 4 KB."""
    machine, asid = psp.machine, context.asid
    nothing = [NO_CONTENTS] * len(pages)
    match kind:
        case LaunchPage.NORMAL:
            contents = page_contents(machine.memory.read_pages(KeyId.UNENCRYPTED, pages))
            machine.memory.encrypt_in_place(asid, pages)
            return contents
        case LaunchPage.UNMEASURED | LaunchPage.CPUID:
            machine.memory.encrypt_in_place(asid, pages)
            return nothing
        case LaunchPage.ZERO:
            machine.memory.write_pages(asid, pages, np.zeros((len(pages), PAGE_SIZE), np.uint8))
            return nothing
        case LaunchPage.SECRETS:
            secrets = np.frombuffer(_secrets(psp, context), np.uint8)
            machine.memory.write_pages(asid, pages, np.broadcast_to(secrets, (len(pages), PAGE_SIZE)).copy())
            return nothing
        case LaunchPage.VMSA:
            state = np.array(machine.memory.read_pages(KeyId.UNENCRYPTED, pages))
            measured = state.copy()
            measured[:, UNMEASURED_FROM:UNMEASURED_TO] = 0
            for offset, value in GUEST_FIELDS_AT_LAUNCH.items():
                state[:, offset : offset + len(value)] = np.frombuffer(value, np.uint8)
            machine.memory.write_pages(asid, pages, state)
            return page_contents(measured)


def _secrets(psp: SecureProcessor, context: Record) -> bytes:
    """The secrets page: the guest's message keys and what it cannot learn safely from the host."""
    keys = {name: getattr(context, name) for name in ("vmpck0", "vmpck1", "vmpck2", "vmpck3")}
    product = psp.machine.product
    return SECRETS_PAGE.pack(
        version=psp.release.abi.secrets_version,
        fms=int(product.signature),
        gosvw=context.gosvw,
        tsc_factor=product.tsc_factor,
        **keys,
    )


def snp_launch_finish(psp: SecureProcessor, buffer: Record) -> None:
    """Close the launch: check the owner's ID block if there is one, and let the guest run."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr)
    psp.require_initialised()
    context = psp.context(buffer.gctx_paddr)
    state = psp.next_state(context, Command.SNP_LAUNCH_FINISH)
    require(context.asid != 0, Status.INACTIVE, "the guest has an ASID", "an ASID", 0)
    identity: dict[str, bytes] = {}
    if buffer.id_block_en:
        identity["id_block"] = _input(psp, buffer.id_block_paddr, ID_BLOCK.size, "id_block_paddr")
        auth = ID_AUTH.unpack(_input(psp, buffer.id_auth_paddr, ID_AUTH.size, "id_auth_paddr"))
        author = bool(buffer.auth_key_en)
        check_id_block(identity["id_block"], auth, author, context.launch_digest, context.policy)
        identity["id_key_digest"] = sha384(auth.id_key).digest()
        if author:
            identity["author_key_digest"] = sha384(auth.author_key).digest()

    # ACTION
    psp.asids.set(context.asid, AsidState.IN_USE)
    psp.machine.runnable.add(context.asid)

    # STATE
    finished = context.replace(
        state=state,
        host_data=buffer.host_data,
        id_block_en=buffer.id_block_en,
        author_key_en=buffer.auth_key_en,
        vcek_dis=buffer.vcek_dis,
        **identity,
    )
    psp.save_context(buffer.gctx_paddr, finished)


def _input(psp: SecureProcessor, address: int, size: int, name: str) -> bytes:
    return psp.machine.memory.read(KeyId.UNENCRYPTED, check_address(psp, address, size, name, lookup=False), size)
