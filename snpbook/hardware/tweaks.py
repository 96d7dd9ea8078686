"""The constants of the linear tweak: T(p) is the XOR of t_i over the address bits i that are set in p.

There is no t_0 to t_3, because a block has 16 bytes. Naples has fixed constants, of which three are published; later
machines draw theirs at each boot. Sources: SEVurity, table I and section IX.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from hashlib import shake_256

from snpbook.spec.encryption import NAPLES_PATTERN_SIZE, NAPLES_PATTERNS

BLOCK_SIZE = 16
"""Bytes that AES transforms at once: the smallest unit with a ciphertext of its own."""
TWEAK_BITS = range(4, 48)
"""The address bits that have a constant: those of a block's number, up to the largest machine modelled."""


class Origin(StrEnum):
    """Where a constant comes from."""

    PUBLISHED = "published"
    STAND_IN = "stand-in"
    DRAWN = "drawn at boot"


@dataclass(frozen=True, slots=True)
class TweakConstant:
    """t_bit: 16 bytes, and whether they are a fact of the silicon or the model's."""

    bit: int
    value: bytes
    origin: Origin


def naples_constants() -> tuple[TweakConstant, ...]:
    """The constants of every Naples: the published ones, and stand-ins that repeat a pattern of 4 bytes as they do.

    As found on real parts, t_4 to t_31 are linearly independent (that it is these 28 is MODEL). A pattern has 32 bits,
    so constants for 44 address bits cannot be: some blocks far apart have equal tweaks.
    """
    size = NAPLES_PATTERN_SIZE
    drawn = shake_256(b"Naples tweak stand-ins").digest(size * TWEAK_BITS.stop)
    result = []
    for bit in TWEAK_BITS:
        published = NAPLES_PATTERNS.get(bit)
        pattern = published or drawn[size * bit : size * (bit + 1)]
        origin = Origin.PUBLISHED if published else Origin.STAND_IN
        result.append(TweakConstant(bit, pattern * (BLOCK_SIZE // size), origin))
    return tuple(result)


def boot_constants(seed: bytes) -> tuple[TweakConstant, ...]:
    """The constants that a machine draws from `seed` when it boots, 16 bytes without a pattern, shared by all keys.

    That Milan's tweak is linear and so drawn is unconfirmed (MODEL).
    """
    drawn = shake_256(b"address tweak" + seed).digest(BLOCK_SIZE * len(TWEAK_BITS))
    return tuple(
        TweakConstant(bit, drawn[BLOCK_SIZE * index : BLOCK_SIZE * (index + 1)], Origin.DRAWN)
        for index, bit in enumerate(TWEAK_BITS)
    )
