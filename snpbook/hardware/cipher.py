"""A memory cipher under one key, and the pass that all of them share: XOR the tweak, AES, XOR the tweak.

Ciphertext depends on key, system physical address (without C-bit) and plaintext and on nothing else: there is no
integrity tag and no freshness. Sources: the SEVurity paper (XEX), IEEE 1619 (XTS), SNP ABI guest policy bit 22.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import CipherContext

from snpbook.hardware.dram import Bytes, Words
from snpbook.spec.pages import PAGE_SIZE

BLOCK_SIZE = 16
"""Bytes that AES transforms at once: the smallest unit with a ciphertext of its own."""

PAGE_WORDS = PAGE_SIZE // 8

STEP_PAGES = 128
"""Pages per step of a long transform: their tweaks, 512 KB, stay in or near the second-level cache."""


class Transform(Protocol):
    """One direction, encryption or decryption, under one key.

    Arrays are C-contiguous; `destination` may be `source` itself, but must not overlap it otherwise.
    """

    def span(self, spa: int, source: Bytes, destination: Bytes) -> None:
        """Transform a range of whole blocks at `spa`; both arrays are flat."""

    def pages(self, pages: Words, source: Bytes, destination: Bytes) -> None:
        """Transform any pages, by page number (n,); both arrays are (n, 4096)."""


@dataclass(frozen=True, slots=True)
class MemoryKey:
    """What the memory controller holds for one ASID."""

    encrypt: Transform = field(repr=False)
    decrypt: Transform = field(repr=False)


def whiten(ecb: CipherContext, tweak: Words, source: Bytes, destination: Bytes) -> None:
    """destination = AES(source ^ tweak) ^ tweak, on flat arrays of at least one block and equal length.

    `ecb` is a long-lived ECB context, which keeps nothing between blocks. It works inside `destination`; the last
    block goes apart, since `update_into` asks for a buffer that is 15 bytes longer than what it writes.
    """
    words, buffer = destination.view(np.uint64), destination.data
    np.bitwise_xor(source.view(np.uint64), tweak, out=words)
    last = destination.size - BLOCK_SIZE
    if last:
        ecb.update_into(buffer[:last], buffer)
    buffer[last:] = ecb.update(buffer[last:])
    np.bitwise_xor(words, tweak, out=words)
