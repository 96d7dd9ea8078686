"""MSG_KEY_REQ: keys that a guest derives from the chip's, a provider's or its migration agent's root.

Source: SNP ABI (MSG_KEY_REQ), firmware 1.55.25. Version 2 with the launch mitigation vector is of ABI 1.58; where the
vector is mixed in is not published (MODEL: behind the mix of version 1).
"""

from __future__ import annotations

from snpbook.firmware.attestation import selects_vlek
from snpbook.firmware.keys import kdf
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.sender import Sender
from snpbook.spec.key_derivation import (
    GUEST_KEY_LABEL,
    GUEST_KEY_SIZE,
    KEY_MIX,
    MIXED_DIGEST_SIZE,
    GuestField,
    IdKeySelect,
    RootKey,
)
from snpbook.spec.launch import ID_BLOCK
from snpbook.spec.layout import Record
from snpbook.spec.payloads import KEY_REQUEST, KEY_REQUEST_V2, KEY_RESPONSE
from snpbook.spec.policy import Tcb
from snpbook.spec.status import FirmwareRefusal, Status, require


def key_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_KEY_REQ: 32 bytes of key, or STATUS and zeros."""
    layout = KEY_REQUEST if sender.version == 1 else KEY_REQUEST_V2
    data = message.ljust(layout.size, b"\0")[: layout.size]
    request, context = layout.unpack(data), sender.context
    try:
        # CHECKS
        stray = layout.reserved_set(data)
        require(not stray, Status.INVALID_PARAM, "reserved bytes of the request are zero", 0, stray)
        provider = selects_vlek(psp, context, request.key_sel)
        masked = psp.mask_chip_key and request.root_key_select is RootKey.VEK
        require(not masked, Status.INVALID_KEY, "the chip's keys are not masked", "MASK_CHIP_KEY=0", 1)
        sender.check_vmpl(request.vmpl)
        selected = _selected(request, sender.version)
        tcb = _requested_tcb(psp, request) if GuestField.TCB_VERSION in selected else psp.vcek_tcb
        if GuestField.GUEST_SVN in selected:
            svn, asked = ID_BLOCK.unpack(context.id_block).guest_svn, request.guest_svn
            require(asked <= svn, Status.INVALID_PARAM, "GUEST_SVN is not above the guest's", svn, asked)
    except FirmwareRefusal as refusal:
        return KEY_RESPONSE.pack(status=refusal.status)

    # ANSWER
    root: bytes = context.vmrk
    if request.root_key_select is RootKey.VEK:
        root = psp.vlek if provider and psp.vlek is not None else psp.chip.hashstick(tcb)
    key = kdf(root, GUEST_KEY_LABEL, _mix(context, request, selected), GUEST_KEY_SIZE)
    return KEY_RESPONSE.pack(status=Status.SUCCESS, derived_key=key)


def _selected(request: Record, version: int) -> GuestField:
    """GUEST_FIELD_SELECT; that bit 6 needs version 2 of the message is inferred."""
    known = sum(GuestField) if version > 1 else sum(GuestField) - GuestField.LAUNCH_MIT_VECTOR
    unknown = request.guest_field_select & ~known
    require(unknown == 0, Status.INVALID_PARAM, "GUEST_FIELD_SELECT has no other bits", 0, unknown)
    return GuestField(request.guest_field_select)


def _requested_tcb(psp: SecureProcessor, request: Record) -> Tcb:
    """The TCB whose hashstick is asked for: none of its components above the committed one's."""
    committed, asked = psp.committed_tcb, request.tcb_version
    tcb = Tcb.from_int(asked, turin=committed.fmc is not None)
    good = int(tcb) == asked and committed.at_least(tcb)
    require(good, Status.INVALID_PARAM, "TCB_VERSION is not above the committed one", int(committed), asked)
    return tcb


def _mix(context: Record, request: Record, selected: GuestField) -> bytes:
    """What goes into the key: VMPL, host data and key digest always, the rest if selected."""
    identity = ID_BLOCK.unpack(context.id_block)
    choices = {
        GuestField.POLICY: {"policy": context.policy},
        GuestField.IMAGE_ID: {"image_id": identity.image_id},
        GuestField.FAMILY_ID: {"family_id": identity.family_id},
        GuestField.MEASUREMENT: {"measurement": context.launch_digest[:MIXED_DIGEST_SIZE]},
        GuestField.GUEST_SVN: {"guest_svn": request.guest_svn},
        GuestField.TCB_VERSION: {"tcb_version": request.tcb_version},
    }
    fields = {name: value for field, chosen in choices.items() if field in selected for name, value in chosen.items()}
    owner, digest = IdKeySelect.NONE, bytes(MIXED_DIGEST_SIZE)
    if context.author_key_en:
        owner, digest = IdKeySelect.AUTHOR_KEY, context.author_key_digest[:MIXED_DIGEST_SIZE]
    elif context.id_block_en:
        owner, digest = IdKeySelect.ID_KEY, context.id_key_digest[:MIXED_DIGEST_SIZE]
    mix = KEY_MIX.pack(
        root_key_select=request.root_key_select,
        id_key_select=owner,
        guest_field_select=selected,
        vmpl=request.vmpl,
        host_data=context.host_data,
        key_digest=digest,
        **fields,
    )
    if GuestField.LAUNCH_MIT_VECTOR in selected:
        mix += request.launch_mit_vector.to_bytes(8, "little")
    return mix
