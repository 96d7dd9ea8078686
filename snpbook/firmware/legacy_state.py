"""What the chip keeps for SEV and SEV-ES: the legacy platform's state, its identity and its guests by handle.

Memory keys are in the encryption engine and checksums of VMSA pages in the machine; nothing of this is in DRAM.
Source: SEV API (platform and guest context).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from snpbook.spec.commands import Command
from snpbook.spec.layout import Record
from snpbook.spec.legacy_launch import LEGACY_DIGEST_SIZE
from snpbook.spec.policy import LEGACY_POLICY
from snpbook.spec.states import (
    LEGACY_GUEST_TRANSITIONS,
    LEGACY_PLATFORM_TRANSITIONS,
    LegacyGuestState,
    LegacyPlatformState,
)
from snpbook.spec.status import FirmwareRefusal, Status, require


@dataclass(frozen=True, slots=True)
class LaunchDigest:
    """SHA-256 of what a launch has measured so far; `hash` goes on from there and is never changed."""

    value: bytes = sha256().digest()
    hash: Any = field(default_factory=sha256, compare=False, repr=False)

    def extended(self, data: bytes) -> LaunchDigest:
        further = self.hash.copy()
        further.update(data)
        return LaunchDigest(further.digest(), further)


@dataclass(frozen=True, slots=True)
class TransportKeys:
    """What a guest's owner or the platform at the other end shares with this one: TEK and TIK."""

    encryption: bytes = field(default=bytes(16), repr=False)
    integrity: bytes = field(default=bytes(16), repr=False)


@dataclass(frozen=True, slots=True)
class LegacyGuest:
    """A guest behind a handle. `asid` is 0 while it has none, `measure` what LAUNCH_MEASURE answered."""

    state: LegacyGuestState
    policy_word: int
    vek_seed: bytes = field(repr=False)
    oek: bytes = field(repr=False)
    transport: TransportKeys = TransportKeys()
    asid: int = 0
    digest: LaunchDigest = LaunchDigest()
    measure: bytes = bytes(LEGACY_DIGEST_SIZE)
    swapped: int = 0
    """Pages that were swapped out: the next nonce of the offline key."""

    @property
    def policy(self) -> Record:
        return LEGACY_POLICY.unpack(self.policy_word.to_bytes(LEGACY_POLICY.size, "little"))

    def after(self, command: Command) -> LegacyGuestState:
        """The state to which a command leads; INVALID_GUEST_STATE where this one does not admit it."""
        found = LEGACY_GUEST_TRANSITIONS.get((self.state, command))
        if found is None:
            admitted = " or ".join(state.name for state, known in LEGACY_GUEST_TRANSITIONS if known is command)
            raise FirmwareRefusal(Status.INVALID_GUEST_STATE, "guest state", admitted, self.state.name, "SEV")
        return found

    def require_asid(self) -> None:
        """INACTIVE unless the guest has an ASID, and so its key is installed."""
        require(self.asid != 0, Status.INACTIVE, "the guest has an ASID", "an ASID", 0, "SEV")


class LegacyPlatform:
    """The platform of the legacy commands; `flash` is the chip's own persistent storage."""

    def __init__(self) -> None:
        self.flash: Record | None = None
        self.reset()

    def reset(self) -> None:
        """Nothing but the flash outlives a shutdown."""
        self.state = LegacyPlatformState.UNINIT
        self.tmr: tuple[int, int] | None = None
        """The memory that INIT took for SEV-ES (first byte, end); None where SEV alone is initialised."""
        self.nv_area: int | None = None
        """Where persistent data is kept instead of the flash."""
        self.identity: Record | None = None
        """Keys and certificates as `PERSISTENT_DATA`, while the platform is initialised."""
        self.guests: dict[int, LegacyGuest] = {}

    def __repr__(self) -> str:
        return f"LegacyPlatform({self.state.name}, {len(self.guests)} guests)"

    @property
    def es(self) -> bool:
        """Whether SEV-ES is initialised too."""
        return self.tmr is not None

    def after(self, command: Command) -> LegacyPlatformState:
        """The state to which a command leads; INVALID_PLATFORM_STATE where this one does not admit it."""
        found = LEGACY_PLATFORM_TRANSITIONS.get((self.state, command))
        if found is None:
            admitted = " or ".join(state.name for state, known in LEGACY_PLATFORM_TRANSITIONS if known is command)
            raise FirmwareRefusal(
                Status.INVALID_PLATFORM_STATE, "legacy platform state", admitted, self.state.name, "SEV"
            )
        return found

    def guest(self, handle: int) -> LegacyGuest:
        """The guest behind a handle (INVALID_GUEST)."""
        require(handle in self.guests, Status.INVALID_GUEST, "handle", "one that is given out", handle, "SEV")
        return self.guests[handle]
