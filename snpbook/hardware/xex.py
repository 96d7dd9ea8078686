"""XE and XEX with AES-128, the memory ciphers of Naples, Rome and Milan, for the 16-byte block at address p.

XE is C = E(P ^ T(p)), the first Naples parts; XEX is C = E(P ^ T(p)) ^ T(p), all others. T is linear, see `tweaks`.
Form and linearity are published for Naples (SEVurity, table I); that Rome and Milan keep them is unconfirmed (MODEL).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from snpbook.hardware.cipher import PAGE_WORDS, STEP_PAGES, MemoryKey, whiten
from snpbook.hardware.dram import Bytes, Words
from snpbook.hardware.tweaks import BLOCK_SIZE, TWEAK_BITS, TweakConstant
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

_BLOCK_BITS = TWEAK_BITS.start
_WINDOW = STEP_PAGES * PAGE_SIZE  # an aligned range whose tweaks differ from another's by one constant
_WINDOW_BITS = _WINDOW.bit_length() - 1
_TILE_WORDS = 16 * PAGE_WORDS  # a repeated operand is fast from 8192 elements on, the length of NumPy's own steps
_TABLES = 3  # in which page numbers are looked up
_TABLE_BITS = (TWEAK_BITS.stop - PAGE_SHIFT) // _TABLES


class Xex:
    """The cipher of one machine, from the constants of all `TWEAK_BITS`, which all its keys share.

    Without `tweaks_output` it is XE: the tweak enters before the cipher only. Tweaks are 16-byte values in arrays of
    words. To repeat one, arrays are seen as complex numbers, which NumPy copies as fast as it can, bit for bit; pairs
    of words it repeats twenty times slower.
    """

    key_size = 16
    address_limit = 1 << TWEAK_BITS.stop

    def __init__(self, constants: Sequence[TweakConstant], *, tweaks_output: bool = True) -> None:
        if [constant.bit for constant in constants] != list(TWEAK_BITS):
            raise ValueError(f"constants: one for each address bit from {TWEAK_BITS[0]} to {TWEAK_BITS[-1]}, in order")
        self.constants, self.tweaks_output = tuple(constants), tweaks_output
        words = np.frombuffer(b"".join(constant.value for constant in constants), np.uint64).reshape(-1, 2)
        tables = (words[PAGE_SHIFT - _BLOCK_BITS + i * _TABLE_BITS :][:_TABLE_BITS] for i in range(_TABLES))
        self._page_tables = [_sums(table).view(np.complex128).reshape(-1) for table in tables]
        self._window_tweaks = _sums(words[: _WINDOW_BITS - _BLOCK_BITS]).reshape(-1)
        beyond = self.constants[_WINDOW_BITS - _BLOCK_BITS :]
        self._window_constants = [int.from_bytes(constant.value, "little") for constant in beyond]
        self._tweak: Words = np.empty(STEP_PAGES * PAGE_WORDS, np.uint64)
        self._tile: Words = np.empty(_TILE_WORDS, np.uint64)

    def key(self, key: bytes) -> MemoryKey:
        """The two directions under a 16-byte key."""
        cipher = Cipher(algorithms.AES(key), modes.ECB())
        encrypt = _XexTransform(self, cipher.encryptor(), before=True, after=self.tweaks_output)
        decrypt = _XexTransform(self, cipher.decryptor(), before=self.tweaks_output, after=True)
        return MemoryKey(key, encrypt, decrypt, self.tweaks)

    def tweaks(self, spa: int, size: int) -> Bytes:
        """T of a range of whole blocks, (n, 16): the same under every key."""
        steps = [step.copy() for step in self.span_tweaks(spa, size)]
        return np.concatenate([np.empty(0, np.uint64), *steps]).view(np.uint8).reshape(-1, BLOCK_SIZE)

    def span_tweaks(self, spa: int, size: int) -> Iterator[Words]:
        """The tweaks of a range of blocks, window by window.

        T is linear: one constant turns the tweaks of the first window into those of any other, and one more turns
        these into those of the next.
        """
        if not size:
            return
        window, offset = divmod(spa, _WINDOW)
        stop = offset + size
        part = slice(offset // 8, stop // 8) if stop <= _WINDOW else slice(0, _WINDOW // 8)
        tweak = self._tweak[part]
        tweak.view(np.complex128)[:] = self._window_constant(window)
        np.bitwise_xor(tweak, self._window_tweaks[part], out=tweak)
        yield self._tweak[offset // 8 : min(stop, _WINDOW) // 8]
        tiles = self._tweak.reshape(-1, _TILE_WORDS)
        while (stop := stop - _WINDOW) > 0:
            self._tile.view(np.complex128)[:] = self._window_constant(window ^ window + 1)
            np.bitwise_xor(tiles, self._tile, out=tiles)
            window += 1
            yield self._tweak[: min(stop, _WINDOW) // 8]

    def page_tweaks(self, pages: Words) -> Iterator[Words]:
        """The tweaks of any pages. The i-th of a step starts from those of page i of the first window.

        T is linear, so the constant that turns these into the tweaks of page p is T of p ^ i.
        """
        places = np.arange(len(pages), dtype=np.uint64) % np.uint64(STEP_PAGES)
        constants = self._page_constants(pages ^ places)
        for start in range(0, len(pages), STEP_PAGES):
            step = constants[start : start + STEP_PAGES]
            tweak = self._tweak[: len(step) * PAGE_WORDS]
            tweak.view(np.complex128).reshape(len(step), -1)[:] = step
            yield np.bitwise_xor(tweak, self._window_tweaks[: tweak.size], out=tweak)

    def _page_constants(self, pages: Words) -> NDArray[np.complex128]:
        """T of each page's first block, (n, 1), as the bits of complex numbers."""
        numbers, mask = pages.astype(np.int64), (1 << _TABLE_BITS) - 1
        result = np.zeros((len(pages), 2), np.uint64)
        for table in self._page_tables:
            result ^= table.take(numbers & mask).view(np.uint64).reshape(-1, 2)
            numbers >>= _TABLE_BITS
        return result.view(np.complex128)

    def _window_constant(self, window: int) -> NDArray[np.complex128]:
        """T of a window's first block, (1,)."""
        value = 0
        for bit, constant in enumerate(self._window_constants[: window.bit_length()]):
            if window >> bit & 1:
                value ^= constant
        return np.frombuffer(value.to_bytes(BLOCK_SIZE, "little"), np.complex128)


class _XexTransform:
    """AES in one direction, with the tweak before it, after it or both: the tweak is the same in both directions."""

    def __init__(self, xex: Xex, ecb: CipherContext, *, before: bool, after: bool) -> None:
        self._xex, self._ecb, self._before, self._after = xex, ecb, before, after

    def span(self, spa: int, source: Bytes, destination: Bytes) -> None:
        tweaks = self._xex.span_tweaks(spa, source.size)
        whiten(self._ecb, tweaks, source, destination, before=self._before, after=self._after)

    def pages(self, pages: Words, source: Bytes, destination: Bytes) -> None:
        tweaks, flat, result = self._xex.page_tweaks(pages), source.reshape(-1), destination.reshape(-1)
        whiten(self._ecb, tweaks, flat, result, before=self._before, after=self._after)


def _sums(constants: Words) -> Words:
    """For every subset of k constants, numbered by its bits, their XOR: (2**k, 2) words."""
    table = np.zeros((1 << len(constants), 2), np.uint64)
    for bit, constant in enumerate(constants):
        half = 1 << bit
        np.bitwise_xor(table[:half], constant, out=table[half : 2 * half])
    return table
