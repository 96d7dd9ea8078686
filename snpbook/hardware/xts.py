"""XTS-AES-256, the memory cipher of Genoa: each 4 KB page is one data unit, numbered by its page number.

The j-th block of a page has the tweak E_2(page number) * a**j in GF(2**128). Source: IEEE 1619 / SP 800-38E; that the
data unit is the page and its number the page number is not published (MODEL).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from snpbook.hardware.cipher import PAGE_WORDS, STEP_PAGES, MemoryKey, whiten
from snpbook.hardware.dram import Bytes, Words
from snpbook.hardware.tweaks import BLOCK_SIZE, TweakConstant
from snpbook.spec.pages import PAGE_SIZE

_LIBRARY_PAGES = 64
"""Up to here the library's XTS, one context a page, is faster than making all tweaks at once."""

_REDUCTION_SHIFTS = (1, 2, 7)  # x**128 = x**7 + x**2 + x + 1


class Xts:
    """The cipher of one machine: nothing but the memory in which tweaks are made."""

    key_size = 64
    address_limit = 1 << 64
    constants: tuple[TweakConstant, ...] = ()

    def __init__(self) -> None:
        self.tweak: Words = np.empty(STEP_PAGES * PAGE_WORDS, np.uint64)

    def key(self, key: bytes) -> MemoryKey:
        """The two directions under a 64-byte key: the data key, then the tweak key. Raises `ValueError` if equal."""
        if key[:32] == key[32:]:
            raise ValueError("key: the data key and the tweak key, its two halves, must differ (SP 800-38E)")
        encrypt, decrypt = (_XtsTransform(self, key, encrypting=encrypting) for encrypting in (True, False))
        return MemoryKey(key, encrypt, decrypt, encrypt.tweaks)


class _XtsTransform:
    """XTS in one direction. Tweaks are encrypted in both."""

    def __init__(self, xts: Xts, key: bytes, *, encrypting: bool) -> None:
        self._xts, self._encrypting = xts, encrypting
        self._key = algorithms.AES(key)
        self._data = self._context(Cipher(algorithms.AES(key[:32]), modes.ECB()))
        self._numbers = Cipher(algorithms.AES(key[32:]), modes.ECB()).encryptor()

    def _context(self, cipher: Cipher[modes.ECB] | Cipher[modes.XTS]) -> CipherContext:
        return cipher.encryptor() if self._encrypting else cipher.decryptor()

    def span(self, spa: int, source: Bytes, destination: Bytes) -> None:
        done = 0
        while done < source.size:
            page, first = divmod(spa + done, PAGE_SIZE)
            whole = 0 if first else (source.size - done) // PAGE_SIZE
            if whole > _LIBRARY_PAGES:
                size, rows = whole * PAGE_SIZE, (-1, PAGE_SIZE)
                numbers = np.arange(page, page + whole, dtype=np.uint64)
                part = slice(done, done + size)
                self.pages(numbers, source[part].reshape(rows), destination[part].reshape(rows))
            else:
                size = min(source.size - done, PAGE_SIZE - first)
                self._unit(page, first, source[done : done + size], destination[done : done + size])
            done += size

    def pages(self, pages: Words, source: Bytes, destination: Bytes) -> None:
        if len(pages) <= _LIBRARY_PAGES:
            for page, row, result in zip(pages.tolist(), source, destination, strict=True):
                self._unit(page, 0, row, result)
        else:
            whiten(self._data, self._page_tweaks(pages), source.reshape(-1), destination.reshape(-1))

    def tweaks(self, spa: int, size: int) -> Bytes:
        """The tweaks of a range of whole blocks, (n, 16): those of other keys are others."""
        first, start = divmod(spa, PAGE_SIZE)
        pages = np.arange(first, -(-(spa + size) // PAGE_SIZE), dtype=np.uint64)
        steps = [step.copy() for step in self._page_tweaks(pages)]
        flat = np.concatenate([np.empty(0, np.uint64), *steps]).view(np.uint8)
        return flat[start : start + size].reshape(-1, BLOCK_SIZE)

    def _page_tweaks(self, pages: Words) -> Iterator[Words]:
        for start in range(0, len(pages), STEP_PAGES):
            step = pages[start : start + STEP_PAGES]
            tweak = self._xts.tweak[: len(step) * PAGE_WORDS]
            _fill_tweaks(self._numbers, step, tweak)
            yield tweak

    def _unit(self, page: int, first: int, source: Bytes, destination: Bytes) -> None:
        """Blocks of one page from byte `first`, by the library's XTS, which starts at the page's first block."""
        context = self._context(Cipher(self._key, modes.XTS(page.to_bytes(BLOCK_SIZE, "little"))))
        if first:
            source = np.concatenate([np.zeros(first, np.uint8), source])
            destination[:] = np.frombuffer(context.update(source.data), np.uint8)[first:]
        else:
            context.update_into(source.data, destination.data)


def _fill_tweaks(numbers: CipherContext, pages: Words, tweak: Words) -> None:
    """The tweaks of all blocks of some pages, (n * 512,) words, by doubling.

    Step by step each tweak is followed by itself times a**k, with k from 128 down to 1, so that low and high words
    stay two flat arrays.
    """
    block = np.zeros((len(pages), 2), np.uint64)
    block[:, 0] = pages
    first = np.frombuffer(numbers.update(block.tobytes()), np.uint64)
    low, high = first[0::2], first[1::2]
    for power in (128, 64, 32, 16, 8, 4, 2):
        next_low, next_high = _times(low, high, power)
        low, high = _interleave(low, next_low), _interleave(high, next_high)
    tweak[0::4], tweak[1::4] = low, high
    tweak[2::4], tweak[3::4] = _times(low, high, 1)


def _times(low: Words, high: Words, power: int) -> tuple[Words, Words]:
    """Each element times a**power; at most 32 bits at a time, so that the carry's reduction fits a word."""
    while power > 32:
        low, high = _times(low, high, 32)
        power -= 32
    left, right = np.uint64(power), np.uint64(64 - power)
    carry = high >> right
    high = high << left
    high |= low >> right
    low = low << left
    low ^= carry
    for shift in _REDUCTION_SHIFTS:
        low ^= carry << np.uint64(shift)
    return low, high


def _interleave(even: Words, odd: Words) -> Words:
    result = np.empty(2 * even.size, np.uint64)
    result[0::2], result[1::2] = even, odd
    return result
