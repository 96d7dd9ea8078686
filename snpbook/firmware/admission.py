"""Which commands the states of platform and guest admit, read off the literal tables: what a front end may offer.

No command asks this file; each makes its own checks. A command that is admitted may still be refused for its operands.
"""

from __future__ import annotations

from dataclasses import dataclass

from snpbook.spec.commands import Command
from snpbook.spec.dispatch import NOT_MODELLED
from snpbook.spec.states import (
    GUEST_IN_ANY_STATE,
    GUEST_TRANSITIONS,
    LEGACY_GUEST_IN_ANY_STATE,
    LEGACY_GUEST_TRANSITIONS,
    LEGACY_PLATFORM_TRANSITIONS,
    PLATFORM_TRANSITIONS,
    SNP_IN_ANY_STATE,
    GuestState,
    LegacyGuestState,
    LegacyPlatformState,
    PlatformState,
)

_MOVERS = frozenset(command for _, command in PLATFORM_TRANSITIONS)
_ALONE = _MOVERS | {Command.SNP_DOWNLOAD_FIRMWARE_EX}
"""SNP commands that want the legacy platform to be down."""
_OF_GUESTS = GUEST_IN_ANY_STATE | {command for _, command in GUEST_TRANSITIONS}
_OF_LEGACY_GUESTS = LEGACY_GUEST_IN_ANY_STATE | {command for _, command in LEGACY_GUEST_TRANSITIONS}
_BEGINNINGS = (Command.LAUNCH_START, Command.RECEIVE_START)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the two platforms stand, and one guest of each kind; an SNP guest without a context is None."""

    snp: PlatformState
    legacy: LegacyPlatformState
    guest: GuestState | None
    legacy_guest: LegacyGuestState


def obstacle(command: Command, now: Standing) -> str:
    """The state that rules a command out, in words; empty where every state admits it."""
    if command in NOT_MODELLED:
        return f"{NOT_MODELLED[command]} is not modelled"
    return _snp(command, now) if command.name.startswith("SNP_") else _legacy(command, now)


def _snp(command: Command, now: Standing) -> str:
    if command in _MOVERS:
        admitted = (now.snp, command) in PLATFORM_TRANSITIONS
    else:
        admitted = now.snp is PlatformState.INIT or command in SNP_IN_ANY_STATE
    if not admitted:
        return f"the SNP platform is {now.snp.name}"
    if command in _ALONE and now.legacy is not LegacyPlatformState.UNINIT:
        return f"the legacy platform is {now.legacy.name}"
    if command not in _OF_GUESTS or (command in GUEST_IN_ANY_STATE and now.guest is not None):
        return ""
    if now.guest is None:
        return "there is no guest context"
    return "" if (now.guest, command) in GUEST_TRANSITIONS else f"the guest is in {now.guest.name}"


def _legacy(command: Command, now: Standing) -> str:
    if (now.legacy, command) not in LEGACY_PLATFORM_TRANSITIONS:
        return f"the legacy platform is {now.legacy.name}"
    if command is Command.DOWNLOAD_FIRMWARE and now.snp is not PlatformState.UNINIT:
        return f"the SNP platform is {now.snp.name}"
    if command not in _OF_LEGACY_GUESTS or command in (*_BEGINNINGS, Command.GUEST_STATUS):
        return ""
    if now.legacy_guest is LegacyGuestState.UNINIT:
        return "there is no guest with that handle"
    free = command in LEGACY_GUEST_IN_ANY_STATE or (now.legacy_guest, command) in LEGACY_GUEST_TRANSITIONS
    return "" if free else f"the guest is in {now.legacy_guest.name}"
