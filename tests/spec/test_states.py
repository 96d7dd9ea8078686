"""The state tables against the specification's rows, typed here a second time in its own short form."""

from __future__ import annotations

import pytest

from snpbook.spec.asids import ASID_TRANSITIONS, AsidEvent, AsidState
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS, TIO_COMMANDS
from snpbook.spec.states import (
    AFTER_LAST_GUEST,
    GUEST_IN_ANY_STATE,
    GUEST_TRANSITIONS,
    LEGACY_GUEST_IN_ANY_STATE,
    LEGACY_GUEST_TRANSITIONS,
    LEGACY_PLATFORM_TRANSITIONS,
    MESSAGE_TRANSITIONS,
    PLATFORM_TRANSITIONS,
    SNP_IN_ANY_STATE,
    GuestState,
    LegacyGuestState,
    LegacyPlatformState,
    PlatformState,
)

# Which legacy platform states admit a command: U, I, W; the guest's row is that of W alone.
PLATFORM = {
    "U": "INIT INIT_EX PLATFORM_RESET DOWNLOAD_FIRMWARE",
    "I": "PEK_GEN PEK_CERT_IMPORT",
    "IW": "PEK_CSR PDH_CERT_EXPORT PDH_GEN GUEST_STATUS LAUNCH_START RECEIVE_START",
    "UIW": "SHUTDOWN PLATFORM_STATUS DF_FLUSH GET_ID NOP",
    "W": "DECOMMISSION ACTIVATE DEACTIVATE COPY ACTIVATE_EX LAUNCH_UPDATE_DATA LAUNCH_UPDATE_VMSA LAUNCH_MEASURE "
    "LAUNCH_SECRET LAUNCH_FINISH ATTESTATION SEND_START SEND_UPDATE_DATA SEND_UPDATE_VMSA SEND_FINISH SEND_CANCEL "
    "RECEIVE_UPDATE_DATA RECEIVE_UPDATE_VMSA RECEIVE_FINISH DBG_DECRYPT DBG_ENCRYPT SWAP_OUT SWAP_IN",
}
LETTERS = {"U": LegacyPlatformState.UNINIT, "I": LegacyPlatformState.INIT, "W": LegacyPlatformState.WORKING}
MOVES = {"INIT": "I", "INIT_EX": "I", "SHUTDOWN": "U", "LAUNCH_START": "W", "RECEIVE_START": "W"}


def test_legacy_platform() -> None:
    expected = {
        (LETTERS[state], Command[name]): LETTERS[MOVES.get(name, state)]
        for states, names in PLATFORM.items()
        for state in states
        for name in names.split()
    }
    assert expected == LEGACY_PLATFORM_TRANSITIONS
    assert AFTER_LAST_GUEST is LegacyPlatformState.INIT
    legacy = {command for command in Command if command < 0x80}
    assert {command for _, command in LEGACY_PLATFORM_TRANSITIONS} == legacy - {Command.RING_BUFFER}


# Which states of a legacy guest admit a command, by number, and the state after it where that is another.
LEGACY_GUEST = """
LAUNCH_START 0>1; LAUNCH_UPDATE_DATA 1; LAUNCH_UPDATE_VMSA 1; LAUNCH_MEASURE 1>2; LAUNCH_SECRET 2; LAUNCH_FINISH 2>3;
ATTESTATION 2346; SEND_START 3>4; SEND_UPDATE_DATA 4; SEND_UPDATE_VMSA 4; SEND_FINISH 4>6; SEND_CANCEL 4>3;
RECEIVE_START 0>5; RECEIVE_UPDATE_DATA 5; RECEIVE_UPDATE_VMSA 5; RECEIVE_FINISH 5>3; ACTIVATE 12345; ACTIVATE_EX 12345
"""
SNP_GUEST = """
SNP_LAUNCH_START 0>1; SNP_LAUNCH_UPDATE 1; SNP_LAUNCH_FINISH 1>2; SNP_GUEST_REQUEST 2; SNP_ACTIVATE 12;
SNP_ACTIVATE_EX 12; SNP_PAGE_SWAP_OUT 12; SNP_PAGE_SWAP_IN 12; SNP_PAGE_MOVE 12; SNP_PAGE_MD_INIT 12
"""


def rows(text: str) -> dict[tuple[int, str], int]:
    found = {}
    for part in text.split(";"):
        name, states = part.split()
        before, _, after = states.partition(">")
        found |= {(int(state), name): int(after or state) for state in before}
    return found


def test_guests() -> None:
    legacy = {(int(state), command.name): int(after) for (state, command), after in LEGACY_GUEST_TRANSITIONS.items()}
    assert legacy == rows(LEGACY_GUEST)
    snp = {(int(state), command.name): int(after) for (state, command), after in GUEST_TRANSITIONS.items()}
    assert snp == rows(SNP_GUEST)
    messages = {(int(state), message.name): int(after) for (state, message), after in MESSAGE_TRANSITIONS.items()}
    assert messages == rows("EXPORT_REQ 2; IMPORT_REQ 0>2; ABSORB_REQ 1>2; VMRK_REQ 1")


@pytest.mark.parametrize(
    ("states", "names"),
    [
        (GuestState, "INIT LAUNCH RUNNING"),
        (LegacyGuestState, "UNINIT LUPDATE LSECRET RUNNING SUPDATE RUPDATE SENT"),
        (PlatformState, "UNINIT INIT"),
        (LegacyPlatformState, "UNINIT INIT WORKING"),
    ],
)
def test_states_are_numbered_in_order(states: type[GuestState], names: str) -> None:
    assert [(state.name, int(state)) for state in states] == [(name, i) for i, name in enumerate(names.split())]


def test_each_command_on_a_guest_is_in_one_table() -> None:
    """A command that names a guest asks for states, or for none; SNP_GCTX_CREATE makes one."""
    handles = {command for command, layout in BUFFERS.items() if layout and "handle" in layout.fields}
    assert {command for _, command in LEGACY_GUEST_TRANSITIONS} | LEGACY_GUEST_IN_ANY_STATE == handles
    contexts = {command for command, layout in BUFFERS.items() if layout and "gctx_paddr" in layout.fields}
    asked = {command for _, command in GUEST_TRANSITIONS} | GUEST_IN_ANY_STATE
    assert asked == contexts - {Command.SNP_GCTX_CREATE}
    assert not {command for _, command in GUEST_TRANSITIONS} & GUEST_IN_ANY_STATE
    assert not {command for _, command in LEGACY_GUEST_TRANSITIONS} & LEGACY_GUEST_IN_ANY_STATE


def test_snp_platform() -> None:
    table = {(state.name, command.name): after.name for (state, command), after in PLATFORM_TRANSITIONS.items()}
    up, down = ("SNP_INIT", "SNP_INIT_EX"), ("SNP_SHUTDOWN", "SNP_SHUTDOWN_EX")
    assert table == {
        **{("UNINIT", name): "INIT" for name in up},
        **{(state, name): "UNINIT" for name in down for state in ("INIT", "UNINIT")},
    }
    needs = {c.name for c in Command if c >= 0x80} - {c.name for c in SNP_IN_ANY_STATE | TIO_COMMANDS} - {*up, *down}
    assert needs == {
        "SNP_DECOMMISSION", "SNP_ACTIVATE", "SNP_GUEST_STATUS", "SNP_GCTX_CREATE", "SNP_GUEST_REQUEST",
        "SNP_ACTIVATE_EX", "SNP_LAUNCH_START", "SNP_LAUNCH_UPDATE", "SNP_LAUNCH_FINISH", "SNP_DBG_DECRYPT",
        "SNP_DBG_ENCRYPT", "SNP_PAGE_SWAP_OUT", "SNP_PAGE_SWAP_IN", "SNP_PAGE_MOVE", "SNP_PAGE_MD_INIT",
        "SNP_PAGE_SET_STATE", "SNP_PAGE_RECLAIM", "SNP_PAGE_UNSMASH",
    }  # fmt: skip


def test_life_of_an_asid() -> None:
    """dirty - clean - allocated - in use - dirty, and the ways aside."""

    def after(state: str, *events: str) -> str:
        reached = AsidState[state]
        for event in events:
            reached = ASID_TRANSITIONS.get((reached, AsidEvent[event]), reached)
        return reached.name

    assert after("DIRTY", "FLUSH", "ACTIVATE_LAUNCHING", "FINISH", "RELEASE") == "DIRTY"
    assert after("CLEAN", "ACTIVATE_LAUNCHING") == "ALLOCATED"
    assert after("CLEAN", "ACTIVATE_LAUNCHING", "RELEASE") == "CLEAN"
    assert after("CLEAN", "ACTIVATE_RUNNING") == "IN_USE"
    assert after("CLEAN", "RELEASE") == after("CLEAN", "FLUSH") == after("CLEAN", "FINISH") == "CLEAN"
    assert after("DIRTY", "ACTIVATE_LAUNCHING") == after("DIRTY", "ACTIVATE_RUNNING") == "DIRTY"
    assert after("IN_USE", "FLUSH") == after("IN_USE", "FINISH") == after("ALLOCATED", "FINISH") == "IN_USE"
    assert {after(state.name, "INITIALISE") for state in AsidState} == {"DIRTY"}
