"""Why a guest asks to be ended: the reason set and the reason in a termination request.

Set 0 is the GHCB specification's. Set 1 is each guest's own: these are Linux's, with which the numbers of OVMF's reset
vector collide. Sources: Linux asm/sev-common.h; OVMF AmdSev.asm.
"""

from __future__ import annotations

from enum import IntEnum

from snpbook.spec.ghcb import TERMINATE, MsrCode


class GeneralReason(IntEnum):
    """Set 0."""

    GENERAL = 0
    PROTOCOL = 1
    SNP_FEATURES = 2


class Reason(IntEnum):
    """Set 1 as Linux uses it; the last three are newer than Linux 6.12."""

    REGISTER = 0
    PSC = 1
    PVALIDATE = 2
    NOT_VMPL0 = 3
    CPUID = 4
    CPUID_HV = 5
    SECRETS_PAGE = 6
    NO_SVSM = 7
    SVSM_VMPL0 = 8
    SVSM_CAA = 9
    SECURE_TSC = 10
    SVSM_CA_REMAP_FAIL = 11
    SAVIC_FAIL = 12


class OvmfReason(IntEnum):
    """Set 1 as OVMF's reset vector uses it."""

    NOT_CPUID = 1
    UNEXPECTED_RESPONSE = 2


GENERAL_SET, GUEST_SET = 0, 1
EVENT_REASON_SHIFT = 4
"""SW_EXITINFO1 of the termination event: the set in bits 3:0, the reason in bits 11:4."""


def ended(ghcb_msr: int) -> str:
    """Why a guest asked to be ended, by the value of its GHCB MSR; reasons of set 1 are read as Linux's."""
    request = TERMINATE.unpack(ghcb_msr.to_bytes(TERMINATE.size, "little"))
    if request.code != MsrCode.TERMINATE:
        return "by its GHCB"
    names = {GENERAL_SET: GeneralReason, GUEST_SET: Reason}.get(request.reason_set)
    known = names is not None and request.reason in names._value2member_map_
    name = names(request.reason).name if names is not None and known else "unknown"
    return f"reason {request.reason_set}:{request.reason} ({name})"
