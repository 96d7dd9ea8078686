"""The state machines of platforms and guests, as literal tables that the firmware fires and notebooks draw.

A pair that a table lacks is refused: with INVALID_PLATFORM_STATE by a platform's, INVALID_GUEST_STATE by a guest's.
Sources: SNP ABI and SEV API (states), firmware 1.55.25.
"""

from collections.abc import Mapping
from enum import IntEnum

from snpbook.spec.commands import Command
from snpbook.spec.messages import MessageType


class PlatformState(IntEnum):
    """Whether SNP is initialised."""

    UNINIT = 0
    INIT = 1


class LegacyPlatformState(IntEnum):
    """The legacy platform: WORKING while it has guests."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class GuestState(IntEnum):
    """GSTATE: how far a guest's life has come."""

    INIT = 0
    LAUNCH = 1
    RUNNING = 2


class LegacyGuestState(IntEnum):
    """The state of a legacy guest; UNINIT is that of a handle without a guest."""

    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6


_C, _P, _L, _G, _H = Command, PlatformState, LegacyPlatformState, GuestState, LegacyGuestState

PLATFORM_TRANSITIONS: Mapping[tuple[PlatformState, Command], PlatformState] = {
    (_P.UNINIT, _C.SNP_INIT): _P.INIT,
    (_P.UNINIT, _C.SNP_INIT_EX): _P.INIT,
    (_P.INIT, _C.SNP_SHUTDOWN): _P.UNINIT,
    (_P.INIT, _C.SNP_SHUTDOWN_EX): _P.UNINIT,
    (_P.UNINIT, _C.SNP_SHUTDOWN): _P.UNINIT,
    (_P.UNINIT, _C.SNP_SHUTDOWN_EX): _P.UNINIT,
}
"""Commands that move the SNP platform; a shutdown of one that is down already succeeds."""

SNP_IN_ANY_STATE = frozenset({
    _C.SNP_PLATFORM_STATUS, _C.SNP_DF_FLUSH, _C.SNP_CONFIG, _C.SNP_COMMIT, _C.SNP_VLEK_LOAD, _C.SNP_FEATURE_INFO,
    _C.SNP_DOWNLOAD_FIRMWARE_EX, _C.SNP_VERIFY_MITIGATION,
})  # fmt: skip
"""SNP commands that no platform state refuses (VERIFY_MITIGATION: inferred); all others but those above need INIT."""

LEGACY_PLATFORM_TRANSITIONS: Mapping[tuple[LegacyPlatformState, Command], LegacyPlatformState] = {
    (_L.UNINIT, _C.INIT): _L.INIT,
    (_L.UNINIT, _C.INIT_EX): _L.INIT,
    (_L.UNINIT, _C.PLATFORM_RESET): _L.UNINIT,
    (_L.UNINIT, _C.DOWNLOAD_FIRMWARE): _L.UNINIT,
    (_L.INIT, _C.PEK_GEN): _L.INIT,
    (_L.INIT, _C.PEK_CERT_IMPORT): _L.INIT,
    **{
        (state, command): state
        for state in (_L.INIT, _L.WORKING)
        for command in (_C.PEK_CSR, _C.PDH_CERT_EXPORT, _C.PDH_GEN, _C.GUEST_STATUS)
    },
    **{(state, _C.LAUNCH_START): _L.WORKING for state in (_L.INIT, _L.WORKING)},
    **{(state, _C.RECEIVE_START): _L.WORKING for state in (_L.INIT, _L.WORKING)},
    **{
        (_L.WORKING, command): _L.WORKING
        for command in (
            _C.DECOMMISSION, _C.ACTIVATE, _C.DEACTIVATE, _C.COPY, _C.ACTIVATE_EX, _C.LAUNCH_UPDATE_DATA,
            _C.LAUNCH_UPDATE_VMSA, _C.LAUNCH_MEASURE, _C.LAUNCH_SECRET, _C.LAUNCH_FINISH, _C.ATTESTATION, _C.SEND_START,
            _C.SEND_UPDATE_DATA, _C.SEND_UPDATE_VMSA, _C.SEND_FINISH, _C.SEND_CANCEL, _C.RECEIVE_UPDATE_DATA,
            _C.RECEIVE_UPDATE_VMSA, _C.RECEIVE_FINISH, _C.DBG_DECRYPT, _C.DBG_ENCRYPT, _C.SWAP_OUT, _C.SWAP_IN,
        )
    },
    **{(state, _C.SHUTDOWN): _L.UNINIT for state in _L},
    **{
        (state, command): state
        for state in _L
        for command in (_C.PLATFORM_STATUS, _C.DF_FLUSH, _C.GET_ID, _C.NOP)
    },
}  # fmt: skip
"""The legacy platform. DECOMMISSION of the last guest leads to `AFTER_LAST_GUEST` instead.

DOWNLOAD_FIRMWARE wants SNP uninitialised too; RING_BUFFER asks for INIT or WORKING here, or INIT there.
"""
AFTER_LAST_GUEST = LegacyPlatformState.INIT

GUEST_TRANSITIONS: Mapping[tuple[GuestState, Command], GuestState] = {
    (_G.INIT, _C.SNP_LAUNCH_START): _G.LAUNCH,
    (_G.LAUNCH, _C.SNP_LAUNCH_UPDATE): _G.LAUNCH,
    (_G.LAUNCH, _C.SNP_LAUNCH_FINISH): _G.RUNNING,
    (_G.RUNNING, _C.SNP_GUEST_REQUEST): _G.RUNNING,
    **{
        (state, command): state
        for state in (_G.LAUNCH, _G.RUNNING)
        for command in (
            _C.SNP_ACTIVATE, _C.SNP_ACTIVATE_EX, _C.SNP_PAGE_SWAP_OUT, _C.SNP_PAGE_SWAP_IN, _C.SNP_PAGE_MOVE,
            _C.SNP_PAGE_MD_INIT,
        )
    },
}  # fmt: skip
"""Which commands a guest's state admits and where they lead.

GCTX_CREATE makes a context in INIT; DECOMMISSION is admitted in every state and ends it. With IMI_EN, LAUNCH_FINISH
is refused: an incoming migration image ends by MSG_ABSORB.
"""

GUEST_IN_ANY_STATE = frozenset({
    _C.SNP_DECOMMISSION, _C.SNP_GUEST_STATUS, _C.SNP_DBG_DECRYPT, _C.SNP_DBG_ENCRYPT,
})  # fmt: skip
"""Commands that name a guest and that no GSTATE refuses."""

MESSAGE_TRANSITIONS: Mapping[tuple[GuestState, MessageType], GuestState] = {
    (_G.RUNNING, MessageType.EXPORT_REQ): _G.RUNNING,
    (_G.INIT, MessageType.IMPORT_REQ): _G.RUNNING,
    (_G.LAUNCH, MessageType.ABSORB_REQ): _G.RUNNING,
    (_G.LAUNCH, MessageType.VMRK_REQ): _G.LAUNCH,
}
"""The state of the guest that a migration message names. EXPORT without IMI_EN decommissions that guest; ABSORB wants
a launch with IMI_EN, VMRK one without.
"""

LEGACY_GUEST_TRANSITIONS: Mapping[tuple[LegacyGuestState, Command], LegacyGuestState] = {
    (_H.UNINIT, _C.LAUNCH_START): _H.LUPDATE,
    (_H.LUPDATE, _C.LAUNCH_UPDATE_DATA): _H.LUPDATE,
    (_H.LUPDATE, _C.LAUNCH_UPDATE_VMSA): _H.LUPDATE,
    (_H.LUPDATE, _C.LAUNCH_MEASURE): _H.LSECRET,
    (_H.LSECRET, _C.LAUNCH_SECRET): _H.LSECRET,
    (_H.LSECRET, _C.LAUNCH_FINISH): _H.RUNNING,
    (_H.RUNNING, _C.SEND_START): _H.SUPDATE,
    (_H.SUPDATE, _C.SEND_UPDATE_DATA): _H.SUPDATE,
    (_H.SUPDATE, _C.SEND_UPDATE_VMSA): _H.SUPDATE,
    (_H.SUPDATE, _C.SEND_FINISH): _H.SENT,
    (_H.SUPDATE, _C.SEND_CANCEL): _H.RUNNING,
    (_H.UNINIT, _C.RECEIVE_START): _H.RUPDATE,
    (_H.RUPDATE, _C.RECEIVE_UPDATE_DATA): _H.RUPDATE,
    (_H.RUPDATE, _C.RECEIVE_UPDATE_VMSA): _H.RUPDATE,
    (_H.RUPDATE, _C.RECEIVE_FINISH): _H.RUNNING,
    **{(state, _C.ATTESTATION): state for state in (_H.LSECRET, _H.RUNNING, _H.SUPDATE, _H.SENT)},
    **{
        (state, command): state
        for state in _H
        if state not in (_H.UNINIT, _H.SENT)
        for command in (_C.ACTIVATE, _C.ACTIVATE_EX)
    },
}
"""Which commands a legacy guest's state admits and where they lead; DECOMMISSION ends a guest in every state."""

LEGACY_GUEST_IN_ANY_STATE = frozenset({
    _C.DECOMMISSION, _C.DEACTIVATE, _C.GUEST_STATUS, _C.COPY, _C.DBG_DECRYPT, _C.DBG_ENCRYPT, _C.SWAP_OUT, _C.SWAP_IN,
})  # fmt: skip
"""Commands that name a guest and that no state of it refuses."""
