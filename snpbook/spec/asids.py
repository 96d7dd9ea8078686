"""ASIDs: the life cycle of one ASID on one core complex, and which ASIDs are whose.

A guest that is activated while it launches waits with its ASID allocated, and cannot run before LAUNCH_FINISH.
Source: firmware 1.55.25 (SNP ABI, SNP_ACTIVATE and SNP_DF_FLUSH).
"""

from collections.abc import Mapping
from enum import Enum, IntEnum


class GuestKind(Enum):
    """What a guest is, as far as its ASID goes: SEV-ES and SNP guests have those below MinSevNoEsAsid."""

    SNP = "SNP guests"
    SEV_ES = "SEV-ES guests"
    SEV = "SEV guests without encrypted registers"


class AsidState(IntEnum):
    """One ASID on one core complex; the firmware's own numbers are not published (MODEL)."""

    CLEAN = 0
    DIRTY = 1
    ALLOCATED = 2
    IN_USE = 3


class AsidEvent(Enum):
    """What moves an ASID on a core complex."""

    INITIALISE = "SNP_INIT, SNP_INIT_EX; legacy INIT unless SNP is initialised"
    FLUSH = "DF_FLUSH or SNP_DF_FLUSH, each core of the complex having done WBINVD"
    ACTIVATE_LAUNCHING = "ACTIVATE of a guest whose launch is not finished"
    ACTIVATE_RUNNING = "ACTIVATE of a guest whose launch is finished"
    FINISH = "LAUNCH_FINISH"
    RELEASE = "DEACTIVATE, DECOMMISSION, legacy SHUTDOWN"


_S, _E = AsidState, AsidEvent

ASID_TRANSITIONS: Mapping[tuple[AsidState, AsidEvent], AsidState] = {
    **{(state, _E.INITIALISE): _S.DIRTY for state in _S},
    (_S.DIRTY, _E.FLUSH): _S.CLEAN,
    (_S.CLEAN, _E.ACTIVATE_LAUNCHING): _S.ALLOCATED,
    (_S.CLEAN, _E.ACTIVATE_RUNNING): _S.IN_USE,
    (_S.ALLOCATED, _E.FINISH): _S.IN_USE,
    (_S.ALLOCATED, _E.RELEASE): _S.CLEAN,
    (_S.IN_USE, _E.RELEASE): _S.DIRTY,
}
"""A pair that is missing leaves the ASID as it is; what refuses an activation is the command's to check.

Leaving IN_USE invalidates the ASID and forgets that the complex's cores did WBINVD; the key stays in its slot.
"""

CORES_PER_CCX = 8
APIC_ID_LIMIT = 512
APIC_IDS_MAX = 1024
"""ACTIVATE_EX lists at most so many APIC ids, each below the limit."""
