"""AMD's key service for providers: their hashsticks, sealed for one chip at one TCB as SNP_VLEK_LOAD takes them.

Source: SNP ABI, SNP_VLEK_LOAD. How AMD derives a provider's sticks is not published: they come from a seed (MODEL).
"""

from __future__ import annotations

from snpbook.firmware.keys import Chip, hashsticks, kdf, wrap_vlek
from snpbook.spec.key_derivation import HASHSTICK_SIZE
from snpbook.spec.platform import WRAPPED_VLEK, WRAPPED_VLEK_AAD
from snpbook.spec.policy import Tcb


def provider_sticks(provider: str, tcb: Tcb) -> tuple[bytes, ...]:
    """A provider's hashsticks at a TCB, the last of which roots its VLEK."""
    return hashsticks(kdf(provider.encode(), "snpbook-provider-hashstick-seed", b"", HASHSTICK_SIZE), tcb)


def wrapped_vlek(provider: str, chip: Chip, tcb: Tcb, iv: bytes) -> bytes:
    """The blob for one chip; `iv` are 12 bytes that are never used again for it."""
    unsealed = WRAPPED_VLEK.record(iv=iv, tcb=int(tcb))
    aad = bytes(unsealed)[slice(*WRAPPED_VLEK_AAD)]
    wrapped, tag = wrap_vlek(chip.hashstick(tcb), b"".join(provider_sticks(provider, tcb)), iv, aad)
    return bytes(unsealed.replace(wrapped=wrapped, tag=tag))
