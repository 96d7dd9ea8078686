"""How a page comes from one state to another: who moves it, by which instruction or firmware command.

Only what documents name: RMPUPDATE can also go the way over Hypervisor in one step. Sources: SNP ABI, page states; APM2
15.36; RMPUPDATE's effect on Validated 15.36.7.
"""

from dataclasses import dataclass
from enum import StrEnum

from snpbook.spec.commands import Command
from snpbook.spec.pages import PageState


class Mover(StrEnum):
    """Who can move a page."""

    HOST = "host"
    GUEST = "guest"
    FIRMWARE = "firmware"


@dataclass(frozen=True, slots=True)
class Transition:
    """One way from a state to another; `by` is the name of the instruction or command, `note` what it is given."""

    source: PageState
    target: PageState
    mover: Mover
    by: str
    note: str = ""


def _host(source: PageState, target: PageState, note: str) -> Transition:
    return Transition(source, target, Mover.HOST, "RMPUPDATE", note)


def _firmware(source: PageState, target: PageState, command: Command, note: str = "") -> Transition:
    return Transition(source, target, Mover.FIRMWARE, command.name, note)


PAGE_TRANSITIONS = (
    _host(PageState.HYPERVISOR, PageState.GUEST_INVALID, "assigned, with an ASID"),
    _host(PageState.GUEST_INVALID, PageState.HYPERVISOR, "not assigned"),
    _host(PageState.GUEST_VALID, PageState.HYPERVISOR, "not assigned"),
    _host(PageState.GUEST_VALID, PageState.GUEST_INVALID, "another owner, GPA or size"),
    _host(PageState.HYPERVISOR, PageState.PRE_GUEST, "assigned, with an ASID, immutable"),
    _host(PageState.GUEST_INVALID, PageState.PRE_GUEST, "immutable"),
    _host(PageState.GUEST_VALID, PageState.PRE_SWAP, "immutable"),
    _host(PageState.HYPERVISOR, PageState.FIRMWARE, "assigned, ASID 0, immutable"),
    _host(PageState.RECLAIM, PageState.HYPERVISOR, "not assigned"),
    Transition(PageState.GUEST_INVALID, PageState.GUEST_VALID, Mover.GUEST, "PVALIDATE", "validate"),
    Transition(PageState.GUEST_VALID, PageState.GUEST_INVALID, Mover.GUEST, "PVALIDATE", "rescind"),
    _firmware(PageState.PRE_GUEST, PageState.GUEST_VALID, Command.SNP_LAUNCH_UPDATE, "measured and encrypted"),
    _firmware(PageState.FIRMWARE, PageState.CONTEXT, Command.SNP_GCTX_CREATE),
    _firmware(PageState.CONTEXT, PageState.FIRMWARE, Command.SNP_DECOMMISSION),
    _firmware(PageState.FIRMWARE, PageState.RECLAIM, Command.SNP_PAGE_RECLAIM),
    _firmware(PageState.PRE_GUEST, PageState.GUEST_INVALID, Command.SNP_PAGE_RECLAIM),
    _firmware(PageState.PRE_SWAP, PageState.GUEST_VALID, Command.SNP_PAGE_RECLAIM),
)
"""The life of a page. No row has HV-Fixed and Firmware-IOMMU, which the firmware makes and which stay, and Metadata."""
