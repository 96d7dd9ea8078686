"""SNP_DBG_DECRYPT and SNP_DBG_ENCRYPT: the host reads and writes the memory of a guest whose policy lets it.

A VMSA with protected registers is shown as the guest's registers are, and hidden again. Always 4 KB: of a 2 MB page the
part that is named. Source: SNP ABI; order of checks of firmware 1.55.25.
"""

from __future__ import annotations

from snpbook.firmware.pages import Entry, check_address, entry_of, require_state
from snpbook.firmware.processor import SecureProcessor
from snpbook.hardware.save_area import tweak
from snpbook.spec import rmp as spec
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SIZE, PageState
from snpbook.spec.policy import guest_policy
from snpbook.spec.sev_features import SevFeatures
from snpbook.spec.status import Status, require
from snpbook.spec.vmsa import VMSA

_FEATURES = VMSA.fields["sev_features"]


def snp_dbg_decrypt(psp: SecureProcessor, buffer: Record) -> None:
    """Copy a guest's page, in the clear, into a firmware page, which the host then reclaims."""
    # CHECKS
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr, src_paddr=buffer.src_paddr, dst_paddr=buffer.dst_paddr)
    psp.require_initialised()
    src = check_address(psp, buffer.src_paddr, PAGE_SIZE, "src_paddr")
    dst = check_address(psp, buffer.dst_paddr, PAGE_SIZE, "dst_paddr")
    context = psp.context(buffer.gctx_paddr)
    guests = (PageState.PRE_GUEST, PageState.PRE_SWAP, PageState.GUEST_INVALID, PageState.GUEST_VALID)
    require_state(psp, src, "src_paddr", *guests)
    require_state(psp, dst, "dst_paddr", PageState.FIRMWARE)
    page = entry_of(psp, src)
    _check_guest(context, page)

    # ACTION
    plain = psp.machine.memory.read(context.asid, src, PAGE_SIZE)
    psp.machine.memory.write(KeyId.UNENCRYPTED, dst, _tweaked(psp, page, plain))


def snp_dbg_encrypt(psp: SecureProcessor, buffer: Record) -> None:
    """Write a page that the host has, whatever its state, into a guest's page that the host has taken hold of."""
    # CHECKS
    psp.require_initialised()
    psp.page_aligned(gctx_paddr=buffer.gctx_paddr, src_paddr=buffer.src_paddr, dst_paddr=buffer.dst_paddr)
    src = check_address(psp, buffer.src_paddr, PAGE_SIZE, "src_paddr", lookup=False)
    dst = check_address(psp, buffer.dst_paddr, PAGE_SIZE, "dst_paddr")
    context = psp.context(buffer.gctx_paddr)
    require_state(psp, dst, "dst_paddr", PageState.PRE_GUEST, PageState.PRE_SWAP)
    page = entry_of(psp, dst)
    _check_guest(context, page)

    # ACTION
    plain = psp.machine.memory.read(KeyId.UNENCRYPTED, src, PAGE_SIZE)
    psp.machine.memory.write(context.asid, dst, _tweaked(psp, page, plain))


def _check_guest(context: Record, page: Entry) -> None:
    require(page.asid == context.asid, Status.INVALID_PAGE_OWNER, "page owner", context.asid, page.asid)
    policy = guest_policy(context.policy)
    require(bool(policy.debug), Status.POLICY_FAILURE, "the policy allows debugging", 1, 0)
    require(context.asid != 0, Status.INACTIVE, "the guest has an ASID", "an ASID", 0)


def _tweaked(psp: SecureProcessor, page: Entry, data: bytes) -> bytes:
    """A VMSA with VmsaRegProt, its registers hidden or shown by the nonce that it holds; any other page as it is."""
    features = int.from_bytes(data[_FEATURES.offset : _FEATURES.offset + _FEATURES.size], "little")
    known = psp.machine.product.sev_features & SevFeatures.VMSA_REG_PROT
    protected = page.low & spec.VMSA and features & known
    return tweak(data) if protected else data
