"""The DIMM microscope: what the engine does to a few blocks, step by step, and who reads what of the result.

Pure computation on an engine's keys: memory is neither read nor written. Sources: those of the ciphers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Bytes
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.tweaks import BLOCK_SIZE
from snpbook.spec.encryption import HIDDEN_BYTE, SCHEMES, KeyId
from snpbook.spec.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class Slide:
    """Blocks on their way to the DIMM, arrays (n, 16).

    AES turns `whitened` into `enciphered`; the XOR with `tweak` makes `whitened` of `plain` and, except in XE, `cipher`
    of `enciphered`. `cipher` is what the DIMM holds. All are the plaintext, and tweaks zero, where it is unencrypted.
    """

    spa: int
    key_id: int
    plain: Bytes
    tweak: Bytes
    whitened: Bytes
    enciphered: Bytes
    cipher: Bytes


def examine(engine: MemoryEncryption, key_id: int, spa: int, plain: bytes | Bytes) -> Slide:
    """Blocks written at `spa`, a multiple of 16, under a key id. `ValueError` unless they are whole blocks."""
    source = _blocks(engine, spa, plain)
    key, cipher = engine.key(key_id), np.empty_like(source)
    key.encrypt.span(spa, source, cipher)
    tweak = key.tweaks(spa, source.size).reshape(-1)
    enciphered = cipher ^ tweak if SCHEMES[engine.scheme].tweaks_output else cipher
    steps = (source, tweak, source ^ tweak, enciphered, cipher)
    return Slide(spa, key_id, *(step.reshape(-1, BLOCK_SIZE) for step in steps))


def look(engine: MemoryEncryption, key_id: int, spa: int, cipher: bytes | Bytes) -> Bytes:
    """What a reader with this key id gets of blocks that the DIMM holds at `spa`, (n, 16).

    The blocks may come from elsewhere, or from earlier: so are moves and replays made.
    """
    source = _blocks(engine, spa, cipher)
    plain = np.empty_like(source)
    engine.key(key_id).decrypt.span(spa, source, plain)
    return plain.reshape(-1, BLOCK_SIZE)


def readers(owner: int, other: int) -> dict[str, int]:
    """Who can ask for a guest's memory, each with the key id of its accesses: guests with the C-bit set."""
    return {
        "owner guest": owner,
        "host": KeyId.UNENCRYPTED,
        "host, C-bit set": KeyId.HOST,
        "other guest": other,
        "device": KeyId.UNENCRYPTED,
    }


def views(
    engine: MemoryEncryption, spa: int, cipher: bytes | Bytes, parties: Mapping[str, int], *, hiding: bool = False
) -> dict[str, Bytes]:
    """What each party reads of the same blocks, (n, 16).

    With `hiding` those without a guest's key, devices too (unconfirmed), read the pattern of ciphertext hiding.
    """
    result = {}
    for name, key_id in parties.items():
        seen = look(engine, key_id, spa, cipher)
        hidden = hiding and key_id in (KeyId.UNENCRYPTED, KeyId.HOST, KeyId.IOMMU)
        result[name] = np.full_like(seen, HIDDEN_BYTE) if hidden else seen
    return result


def move_mask(engine: MemoryEncryption, key_id: int, source: int, destination: int, size: int) -> Bytes:
    """What to XOR on ciphertext moved from `source` to `destination` so that it decrypts to P ^ T(p) ^ T(q), (n, 16).

    T(p) ^ T(q) for XEX; zero for XE, which gives the same without. For XTS it takes the key: no attacker has it.
    """
    key = engine.key(key_id)
    for spa in (source, destination):
        _blocks(engine, spa, np.empty(size, np.uint8))
    mask = key.tweaks(source, size) ^ key.tweaks(destination, size)
    return mask if SCHEMES[engine.scheme].tweaks_output else np.zeros_like(mask)


def repetitions(pages: Bytes) -> NDArray[np.int64]:
    """For each 16-byte block of some pages (n, 4096), how often its value occurs in all of them: (n, 256)."""
    if pages.dtype != np.uint8 or pages.shape != (len(pages), PAGE_SIZE):
        raise ValueError(f"pages = {pages.dtype} {pages.shape}: an array of uint8 (n, {PAGE_SIZE})")
    words = np.ascontiguousarray(pages).view(np.uint64).reshape(-1, 2)
    order = np.lexsort((words[:, 0], words[:, 1]))
    ordered = words[order]
    starts = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))[: len(ordered)])
    counts = np.diff(np.append(starts, len(ordered)))
    result = np.empty(len(ordered), np.int64)
    result[order] = np.repeat(counts, counts)
    return result.reshape(len(pages), PAGE_SIZE // BLOCK_SIZE)


def _blocks(engine: MemoryEncryption, spa: int, data: bytes | Bytes) -> Bytes:
    """Whole blocks as a flat array."""
    flat = np.ascontiguousarray(np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data).reshape(-1)
    if flat.dtype != np.uint8:
        raise TypeError(f"blocks of {flat.dtype}: bytes or an array of uint8")
    if engine.blocks(spa, flat.size) != (spa, spa + flat.size):
        raise ValueError(f"spa = {spa:#x}, {flat.size} bytes: whole blocks of {BLOCK_SIZE} bytes at a multiple of it")
    return flat
