"""A memory cipher under one key, and the pass that all of them share: XOR the tweak, AES, XOR the tweak.

Ciphertext depends on key, system physical address (without C-bit) and plaintext and on nothing else: there is no
integrity tag and no freshness. Sources: the SEVurity paper (XE, XEX), IEEE 1619 (XTS), SNP ABI guest policy bit 22.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import CipherContext

from snpbook.hardware.dram import Bytes, Words
from snpbook.hardware.tweaks import BLOCK_SIZE
from snpbook.spec.pages import PAGE_SIZE

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
    """What the memory controller holds for one key id. Keys are equal if their bytes are.

    `tweaks(spa, size)` gives the tweaks of a range of whole blocks, (n, 16), for those who look into the machine.
    """

    value: bytes = field(repr=False)
    encrypt: Transform = field(repr=False, compare=False)
    decrypt: Transform = field(repr=False, compare=False)
    tweaks: Callable[[int, int], Bytes] = field(repr=False, compare=False)


class _Copy:
    """What happens to an unencrypted access: nothing."""

    def span(self, spa: int, source: Bytes, destination: Bytes) -> None:
        destination[:] = source

    def pages(self, pages: Words, source: Bytes, destination: Bytes) -> None:
        destination[:] = source


def _no_tweaks(spa: int, size: int) -> Bytes:
    return np.zeros((size // BLOCK_SIZE, BLOCK_SIZE), np.uint8)


NO_KEY = MemoryKey(b"", _Copy(), _Copy(), _no_tweaks)
"""Stands for a key where an access is unencrypted."""


def whiten(
    ecb: CipherContext,
    tweaks: Iterable[Words],
    source: Bytes,
    destination: Bytes,
    *,
    before: bool = True,
    after: bool = True,
) -> None:
    """destination = AES(source ^ tweak) ^ tweak on flat arrays of whole blocks, step by step.

    `tweaks` yields each step's tweaks, and may reuse their memory; together they are as long as `source`. `before` and
    `after` say which of the two XORs the cipher has. `ecb` is a long-lived ECB context, which keeps nothing between
    blocks. It works inside `destination`.
    """
    inputs, outputs, buffer = source.view(np.uint64), destination.view(np.uint64), destination.data
    start = 0
    for tweak in tweaks:
        stop = start + tweak.size
        part = outputs[start:stop]
        if before:
            np.bitwise_xor(inputs[start:stop], tweak, out=part)
        else:
            part[:] = inputs[start:stop]
        _in_place(ecb, buffer, 8 * start, 8 * stop)
        if after:
            np.bitwise_xor(part, tweak, out=part)
        start = stop


def _in_place(ecb: CipherContext, buffer: memoryview, start: int, stop: int) -> None:
    """AES on a part of a buffer. `update_into` asks for 15 bytes beyond what it writes: a last block goes apart."""
    room = stop + BLOCK_SIZE - 1
    if room > len(buffer):
        room, stop = stop, stop - BLOCK_SIZE
        buffer[stop:room] = ecb.update(buffer[stop:room])
    ecb.update_into(buffer[start:stop], buffer[start:room])
