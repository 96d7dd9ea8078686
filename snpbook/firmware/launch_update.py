"""SNP_LAUNCH_UPDATE: pages become the guest's own, measured and encrypted. Source: SNP ABI.

A run of commands is checked page by page in arrays: what stands before the first failing page is done, as if the
commands had come one by one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from snpbook.firmware.cpuid_policing import police_page
from snpbook.firmware.digest import NO_CONTENTS, extend, page_contents
from snpbook.firmware.pages import check_run, first_refusal, look_up, make_guest_valid, without_c_bit
from snpbook.firmware.processor import SecureProcessor, wrong_guest_state
from snpbook.firmware.tsc import tsc_scale
from snpbook.hardware.dram import Bytes, Words, page_numbers
from snpbook.hardware.rmp import U64
from snpbook.hardware.save_area import tweak
from snpbook.spec import rmp as spec
from snpbook.spec.commands import Command
from snpbook.spec.cpuid import SevCapability
from snpbook.spec.encryption import KeyId
from snpbook.spec.launch import SECRETS_PAGE, VMSA_TWEAK_BITMAP
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE, LaunchPage, PageSize, PageState
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.states import GUEST_TRANSITIONS
from snpbook.spec.status import FirmwareRefusal, Status
from snpbook.spec.vmsa import GUEST_FIELDS_AT_LAUNCH, UNMEASURED_FROM, UNMEASURED_TO, VMSA

_TSC_FIELDS = slice(UNMEASURED_FROM, UNMEASURED_TO)
_FEATURES = slice(VMSA.offset("sev_features"), VMSA.offset("sev_features") + 8)
_NONCE = slice(VMSA.offset("reg_prot_nonce"), VMSA.offset("reg_prot_nonce") + 8)
_SMALL_ONLY = (LaunchPage.VMSA, LaunchPage.SECRETS, LaunchPage.CPUID)


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
        names = ("launch_digest", "imd") if buffer.imi_page else ("launch_digest",)
        digests = {name: extend(getattr(context, name), kind, gpas, contents, perms, buffer.imi_page) for name in names}
        psp.save_context(buffer.gctx_paddr, context.replace(**digests))

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
        check(Status.INVALID_PARAM, "a page of an IMI", bool(context.imi_en and not buffer.imi_page), "IMI_PAGE=1", 0),
    ]
    stop, refusal = first_refusal(checks, len(pages))
    if kind is LaunchPage.CPUID:
        for index, page in enumerate(pages[:stop].tolist()):
            if (why := police_page(psp, page)) is not None:
                return index, why
    return stop, refusal


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
            measured = np.array(machine.memory.read_pages(KeyId.UNENCRYPTED, pages))
            measured[:, _TSC_FIELDS] = 0
            machine.memory.write_pages(asid, pages, _vmsas(psp, context, pages))
            return page_contents(measured)


def _vmsas(psp: SecureProcessor, context: Record, pages: range | Words) -> Bytes:
    """VMSA pages as a guest is to start with them: what the host wrote, but for what it must not know or choose."""
    state = np.array(psp.machine.memory.read_pages(KeyId.UNENCRYPTED, pages))
    product = psp.machine.product
    features = state[:, _FEATURES].copy().view("<u8")[:, 0] & U64(product.sev_features)
    scale = tsc_scale(product, context.desired_tsc_khz)
    fields = np.array([scale, context.tsc_offset], "<u8").view(np.uint8)
    state[features & U64(SevFeatures.SECURE_TSC) != 0, _TSC_FIELDS] = fields
    for offset, value in GUEST_FIELDS_AT_LAUNCH.items():
        state[:, offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    for index in np.flatnonzero(features & U64(SevFeatures.VMSA_REG_PROT)):
        row = state[index]
        row[_NONCE] = np.frombuffer(psp.rng(VMSA.fields["reg_prot_nonce"].size), np.uint8)
        row[:] = np.frombuffer(tweak(row.tobytes()), np.uint8)
    return state


def _secrets(psp: SecureProcessor, context: Record) -> bytes:
    """The secrets page: the guest's message keys and what it cannot learn safely from the host."""
    keys = {name: getattr(context, name) for name in ("vmpck0", "vmpck1", "vmpck2", "vmpck3")}
    product = psp.machine.product
    protects = SevCapability.VMSA_REG_PROT in product.capabilities
    return SECRETS_PAGE.pack(
        version=psp.release.abi.secrets_version,
        imi_en=context.imi_en,
        fms=int(product.signature),
        gosvw=context.gosvw,
        vmsa_tweak_bitmap=VMSA_TWEAK_BITMAP if protects else bytes(len(VMSA_TWEAK_BITMAP)),
        tsc_factor=product.tsc_factor,
        launch_mit_vector=context.launch_mit_vector,
        **keys,
    )
