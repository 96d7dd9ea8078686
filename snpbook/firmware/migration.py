"""Migration messages: EXPORT, IMPORT, ABSORB, ABSORB_NOMA, VMRK: a guest's context on its way to another machine.

A migration agent is a guest that others name at their launch, or that imports them; what of a context it carries has
a published layout (`GUEST_CONTEXT_EXPORT`). Source: SNP ABI, the messages; order of checks of firmware 1.55.25.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snpbook.firmware.guests import decommission
from snpbook.firmware.pages import without_c_bit
from snpbook.firmware.processor import SecureProcessor
from snpbook.firmware.sender import Sender
from snpbook.spec.context import EXPORT_VERSION, GUEST_CONTEXT_EXPORT, NO_AGENT
from snpbook.spec.layout import Layout, Record
from snpbook.spec.messages import MessageType
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.payloads import (
    ABSORB_NOMA_REQUEST,
    ABSORB_REQUEST,
    EXPORT_REQUEST,
    EXPORT_RESPONSE,
    IMPORT_REQUEST,
    STATUS_RESPONSE,
    VMRK_REQUEST,
)
from snpbook.spec.states import MESSAGE_TRANSITIONS, GuestState
from snpbook.spec.status import FirmwareRefusal, Status, require

_IDENTITY = ("id_block", "id_block_en", "author_key_en", "id_key_digest", "author_key_digest", "report_id")
"""What a guest keeps of its own when it absorbs an image without an agent."""
_NOT_TAKEN = ("state", "vcek_dis")
"""Exported fields that no incoming context takes over: VCEK_DIS is lost (quirk of 1.55.25)."""


def export_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_EXPORT_REQ: a running guest's context, to its agent or to itself; without IMI_EN the guest ends with it."""
    try:
        # CHECKS
        request = _unpack(EXPORT_REQUEST, message)
        gctx, target = _target(psp, request)
        _next_state(target, MessageType.EXPORT_REQ)
        itself = gctx == sender.gctx and target.ma_paddr == NO_AGENT and sender.vmpck == 0
        require(itself or _is_agent(sender, target), Status.INVALID_GUEST, "the agent asks, or the guest for itself")
    except FirmwareRefusal as refusal:
        return EXPORT_RESPONSE.pack(status=refusal.status)

    # ACTION
    names = [name for name in GUEST_CONTEXT_EXPORT.fields if name != "root_md_entry" or not request.imi_en]
    exported = GUEST_CONTEXT_EXPORT.record(**{name: getattr(target, name) for name in names})
    if not request.imi_en:
        decommission(psp, gctx, target)

    # ANSWER
    size = GUEST_CONTEXT_EXPORT.size
    return EXPORT_RESPONSE.pack(status=Status.SUCCESS, gctx_size=size, gctx_version=EXPORT_VERSION, gctx=exported)


def import_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_IMPORT_REQ: an exported context becomes a running guest, whose agent the sender is from now on."""

    def act() -> None:
        # CHECKS
        request = _unpack(IMPORT_REQUEST, message)
        _check_form(request)
        gctx, target = _target(psp, request)
        state = _next_state(target, MessageType.IMPORT_REQ)
        _check_root(request.gctx)

        # ACTION
        taken = _taken(request.gctx) | {"report_id": psp.rng(len(target.report_id))}
        agent = {"ma_paddr": sender.gctx, "report_id_ma": sender.context.report_id}
        psp.save_context(gctx, target.replace(state=state, **taken, **agent))

    return _answer(act)


def absorb_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_ABSORB_REQ: a launch with an incoming migration image becomes the guest that was exported.

    That the sender must be the target's agent is inferred: it is stated of MSG_VMRK_REQ.
    """

    def act() -> None:
        # CHECKS
        request = _unpack(ABSORB_REQUEST, message)
        gctx, target = _target(psp, request)
        state = _next_state(target, MessageType.ABSORB_REQ)
        require(bool(target.imi_en), Status.INVALID_GUEST_STATE, "an incoming migration image", "IMI_EN=1", 0)
        require(_is_agent(sender, target), Status.INVALID_GUEST, "the sender is the guest's agent")
        _check_root(request.gctx)
        _check_image(request.gctx.imd, target.launch_digest)
        _check_form(request)

        # ACTION
        taken = _taken(request.gctx) | {"report_id": target.report_id}
        psp.save_context(gctx, target.replace(state=state, imi_en=0, **taken))
        if target.asid:
            psp.asids.finish(target.asid)

    return _answer(act)


def absorb_noma_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_ABSORB_NOMA_REQ: a running guest without agent, made of the image alone, becomes the exported guest."""

    def act() -> None:
        # CHECKS
        request, own = _unpack(ABSORB_NOMA_REQUEST, message), sender.context
        require(own.ma_paddr == NO_AGENT, Status.INVALID_GUEST, "the guest has no agent", "none", own.ma_paddr)
        _check_image(request.gctx.imd, own.launch_digest)
        _check_image(own.imd, own.launch_digest)
        _check_form(request)

        # ACTION
        kept = {name: getattr(own, name) for name in _IDENTITY}
        psp.save_context(sender.gctx, own.replace(**_taken(request.gctx) | kept))

    return _answer(act)


def vmrk_request(psp: SecureProcessor, sender: Sender, message: bytes) -> bytes:
    """MSG_VMRK_REQ: an agent gives a guest that it has in launch the root of keys which move with it."""

    def act() -> None:
        # CHECKS
        require(sender.vmpck == 0, Status.INVALID_PARAM, "VMPCK", 0, sender.vmpck)
        request = _unpack(VMRK_REQUEST, message)
        gctx, target = _target(psp, request)
        state = _next_state(target, MessageType.VMRK_REQ)
        require(not target.imi_en, Status.INVALID_GUEST_STATE, "no incoming migration image", "IMI_EN=0", 1)
        require(_is_agent(sender, target), Status.INVALID_GUEST, "the sender is the guest's agent")

        # ACTION
        psp.save_context(gctx, target.replace(state=state, vmrk=request.vmrk))

    return _answer(act)


def _answer(act: Callable[[], None]) -> bytes:
    """The status of a message that is answered by nothing else."""
    try:
        act()
    except FirmwareRefusal as refusal:
        return STATUS_RESPONSE.pack(status=refusal.status)
    return STATUS_RESPONSE.pack(status=Status.SUCCESS)


def _unpack(layout: Layout, message: bytes) -> Record:
    data = message.ljust(layout.size, b"\0")[: layout.size]
    stray = layout.reserved_set(data)
    require(not stray, Status.INVALID_PARAM, "reserved bytes of the request are zero", 0, stray)
    return layout.unpack(data)


def _target(psp: SecureProcessor, request: Record) -> tuple[int, Record]:
    """The context that a message names, and its address; anything else there is INVALID_GUEST."""
    gctx = without_c_bit(psp, request.gctx_paddr)
    try:
        require(gctx % PAGE_SIZE == 0, Status.INVALID_GUEST, "gctx_paddr is page-aligned", 0, gctx % PAGE_SIZE)
        return gctx, psp.context(gctx)
    except FirmwareRefusal as refusal:
        raise FirmwareRefusal(Status.INVALID_GUEST, refusal.rule, refusal.expected, refusal.found) from None


def _next_state(target: Record, message: MessageType) -> GuestState:
    after = MESSAGE_TRANSITIONS.get((target.state, message))
    if after is None:
        wanted = next(state.name for state, known in MESSAGE_TRANSITIONS if known is message)
        raise FirmwareRefusal(Status.INVALID_GUEST_STATE, "state of the guest that is named", wanted, target.state)
    return after


def _is_agent(sender: Sender, target: Record) -> bool:
    """Whether the sender is the target's agent, and still the guest that it was."""
    return bool(target.ma_paddr == sender.gctx and target.report_id_ma == sender.context.report_id)


def _check_form(request: Record) -> None:
    found = request.gctx_version, request.gctx_size
    wanted = EXPORT_VERSION, GUEST_CONTEXT_EXPORT.size
    require(found == wanted, Status.INVALID_PARAM, "version and size of the context", wanted, found)


def _check_root(incoming: Record) -> None:
    require(bool(incoming.root_md_entry.valid), Status.INVALID_MDATA_ENTRY, "the root entry is valid", 1, 0)


def _check_image(incoming: bytes, own: bytes) -> None:
    require(incoming == own, Status.BAD_MEASUREMENT, "the image is that of the exported guest", own, incoming)


def _taken(incoming: Record) -> dict[str, Any]:
    """The fields of a context that an incoming one brings."""
    return {name: value for name, value in incoming if name not in _NOT_TAKEN}
