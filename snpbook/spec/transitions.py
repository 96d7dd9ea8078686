"""How a page comes from one state to another: who moves it, by which instruction or firmware command.

Of RMPUPDATE only what documents name: it can also go the way over Hypervisor in one step. Of the firmware everything:
`PAGE_MOVES` is the same table by commands. Sources: SNP ABI, page states; APM2 15.36; RMPUPDATE's effect on Validated
15.36.7; firmware 1.55.25 for pages of command buffers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import WRITES_COMMAND_BUFFER
from snpbook.spec.pages import PageState


class Mover(StrEnum):
    """Who can move a page."""

    HOST = "host"
    GUEST = "guest"
    FIRMWARE = "firmware"


@dataclass(frozen=True, slots=True)
class Transition:
    """One way from a state to another; `by` is the name of the instruction or command, `note` what it is given.

    Where `by` is `COMMAND_BUFFER`, it is any command that writes its buffer back, and the page is that of the buffer.
    """

    source: PageState
    target: PageState
    mover: Mover
    by: str
    note: str = ""


COMMAND_BUFFER = "legacy answer"


def _host(source: PageState, target: PageState, note: str) -> Transition:
    return Transition(source, target, Mover.HOST, "RMPUPDATE", note)


def _firmware(source: PageState, target: PageState, *commands: Command, note: str = "") -> tuple[Transition, ...]:
    return tuple(Transition(source, target, Mover.FIRMWARE, command.name, note) for command in commands)


def _released(source: PageState, target: PageState, note: str) -> Transition:
    return Transition(source, target, Mover.FIRMWARE, COMMAND_BUFFER, note)


_S, _C = PageState, Command


PAGE_TRANSITIONS = (
    _host(_S.HYPERVISOR, _S.GUEST_INVALID, "assigned, with an ASID"),
    _host(_S.GUEST_INVALID, _S.HYPERVISOR, "not assigned"),
    _host(_S.GUEST_VALID, _S.HYPERVISOR, "not assigned"),
    _host(_S.GUEST_VALID, _S.GUEST_INVALID, "another owner, GPA or size"),
    _host(_S.HYPERVISOR, _S.PRE_GUEST, "assigned, with an ASID, immutable"),
    _host(_S.GUEST_INVALID, _S.PRE_GUEST, "immutable"),
    _host(_S.GUEST_VALID, _S.PRE_SWAP, "immutable"),
    _host(_S.HYPERVISOR, _S.FIRMWARE, "assigned, ASID 0, immutable"),
    _host(_S.RECLAIM, _S.HYPERVISOR, "not assigned"),
    Transition(_S.GUEST_INVALID, _S.GUEST_VALID, Mover.GUEST, "PVALIDATE", "validate"),
    Transition(_S.GUEST_VALID, _S.GUEST_INVALID, Mover.GUEST, "PVALIDATE", "rescind"),
    *_firmware(_S.PRE_GUEST, _S.GUEST_VALID, _C.SNP_LAUNCH_UPDATE, note="measured and encrypted"),
    *_firmware(_S.PRE_GUEST, _S.GUEST_VALID, _C.SNP_PAGE_MOVE, note="as the destination of a Pre-Swap page"),
    *_firmware(_S.FIRMWARE, _S.CONTEXT, _C.SNP_GCTX_CREATE),
    *_firmware(_S.CONTEXT, _S.FIRMWARE, _C.SNP_DECOMMISSION),
    *_firmware(_S.CONTEXT, _S.FIRMWARE, _C.SNP_GUEST_REQUEST, note="MSG_EXPORT_REQ without IMI_EN ends the guest"),
    *_firmware(_S.FIRMWARE, _S.METADATA, _C.SNP_PAGE_MD_INIT, _C.SNP_PAGE_SWAP_IN),
    *_firmware(_S.FIRMWARE, _S.METADATA, _C.SNP_PAGE_MOVE, note="as the destination"),
    *_firmware(_S.METADATA, _S.FIRMWARE, _C.SNP_PAGE_SWAP_OUT),
    *_firmware(_S.METADATA, _S.FIRMWARE, _C.SNP_PAGE_MOVE, note="as the source"),
    *_firmware(_S.PRE_SWAP, _S.PRE_GUEST, _C.SNP_PAGE_SWAP_OUT, note="the content stays"),
    *_firmware(_S.PRE_GUEST, _S.PRE_SWAP, _C.SNP_PAGE_SWAP_IN, note="of a page that was validated"),
    *_firmware(_S.PRE_GUEST, _S.GUEST_INVALID, _C.SNP_PAGE_MOVE, note="as the source, or the destination of one"),
    *_firmware(_S.PRE_SWAP, _S.GUEST_INVALID, _C.SNP_PAGE_MOVE, note="as the source"),
    *_firmware(_S.FIRMWARE, _S.RECLAIM, _C.SNP_PAGE_RECLAIM),
    *_firmware(_S.METADATA, _S.RECLAIM, _C.SNP_PAGE_RECLAIM),
    *_firmware(_S.PRE_GUEST, _S.GUEST_INVALID, _C.SNP_PAGE_RECLAIM),
    *_firmware(_S.PRE_SWAP, _S.GUEST_VALID, _C.SNP_PAGE_RECLAIM),
    *_firmware(_S.PRE_GUEST, _S.RECLAIM, _C.SNP_PAGE_UNSMASH, note="pages 1 to 511, which the first then stands for"),
    *_firmware(_S.PRE_SWAP, _S.RECLAIM, _C.SNP_PAGE_UNSMASH, note="pages 1 to 511, which the first then stands for"),
    *_firmware(_S.FIRMWARE, _S.HV_FIXED, _C.SNP_PAGE_SET_STATE),
    _released(_S.FIRMWARE, _S.RECLAIM, "the page of the command buffer"),
)
"""The life of a page. HV-Fixed and Firmware-IOMMU pages are also made as the table is built (SNP_INIT, SNP_INIT_EX)."""

UNTESTED_BUFFERS = tuple(
    _released(source, target, "the page of the command buffer, after a plain SNP_SHUTDOWN")
    for source, target in (
        (_S.HV_FIXED, _S.HYPERVISOR), (_S.CONTEXT, _S.RECLAIM), (_S.METADATA, _S.RECLAIM),
        (_S.PRE_GUEST, _S.GUEST_INVALID), (_S.PRE_SWAP, _S.GUEST_VALID),
    )
)  # fmt: skip
"""Quirk: while SNP is off again, the firmware lets go of the buffer's page without having looked at its state."""


def _moves() -> dict[Command, frozenset[tuple[PageState, PageState]]]:
    found: dict[Command, set[tuple[PageState, PageState]]] = {command: set() for command in Command}
    for one in (*PAGE_TRANSITIONS, *UNTESTED_BUFFERS):
        if one.mover is Mover.FIRMWARE:
            commands = WRITES_COMMAND_BUFFER if one.by == COMMAND_BUFFER else (Command[one.by],)
            for command in commands:
                found[command].add((one.source, one.target))
    return {command: frozenset(ways) for command, ways in found.items()}


PAGE_MOVES: Mapping[Command, frozenset[tuple[PageState, PageState]]] = _moves()
"""Each command's ways of moving a page."""
