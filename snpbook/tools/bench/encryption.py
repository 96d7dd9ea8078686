"""The encryption engine against bare AES over the same buffers (E1, E2, E5) and against the library's XTS (E6).

A run is a 2 MB page, 512 pages of 4 KB; scattered pages are as many.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from snpbook.hardware.cipher import Transform
from snpbook.hardware.dram import Bytes, Dram, Words
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.hardware.tweaks import boot_constants
from snpbook.hardware.xex import Xex
from snpbook.hardware.xts import Xts
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE
from snpbook.tools.bench.measure import Comparison, Row, Work, at_least, at_most

_XEX_KEY, _XTS_KEY = bytes(range(16)), bytes(range(64))
_FIRST = 3 * PAGES_PER_LARGE


def _buffers() -> tuple[Bytes, Bytes]:
    """2 MB of noise and as much to write to, as rows of pages; both touched."""
    source = np.random.default_rng(1).integers(0, 256, (PAGES_PER_LARGE, PAGE_SIZE), np.uint8)
    return source, np.zeros_like(source)


def _scattered() -> Words:
    """512 different page numbers within 4 GiB."""
    return np.random.default_rng(2).permutation(1 << 20)[:PAGES_PER_LARGE].astype(np.uint64)


def _ecb(source: Bytes) -> Work:
    """Bare AES-128-ECB of rows of pages, into memory of its own (`update_into` asks for 15 bytes more)."""
    encryptor = Cipher(algorithms.AES(_XEX_KEY), modes.ECB()).encryptor()
    result = np.zeros(source.size + 15, np.uint8)
    return lambda: encryptor.update_into(source.reshape(-1).data, result.data)


def _run(direction: str) -> Comparison:
    source, result = _buffers()
    transform: Transform = getattr(Xex(boot_constants(b"bench")).key(_XEX_KEY), direction)
    return Comparison(
        _ecb(source), lambda: transform.span(_FIRST << PAGE_SHIFT, source.reshape(-1), result.reshape(-1))
    )


def _in_place() -> Comparison:
    source, _ = _buffers()
    engine = MemoryEncryption(Dram(4 * LARGE_PAGE_SIZE), "xex-aes-128", b"bench")
    engine.install(1, _XEX_KEY)
    run = range(_FIRST, _FIRST + PAGES_PER_LARGE)
    engine.write_pages(1, run, source)
    return Comparison(_ecb(source), lambda: engine.encrypt_in_place(1, run))


def _scattered_pages(direction: str) -> Comparison:
    source, result = _buffers()
    transform: Transform = getattr(Xex(boot_constants(b"bench")).key(_XEX_KEY), direction)
    pages = _scattered()
    return Comparison(_ecb(source), lambda: transform.pages(pages, source, result))


def _one_page() -> Comparison:
    source, result = _buffers()
    page, target, encrypt = source[:1], result[0], Xex(boot_constants(b"bench")).key(_XEX_KEY).encrypt
    return Comparison(_ecb(page), lambda: encrypt.span(_FIRST << PAGE_SHIFT, page.reshape(-1), target))


def _large() -> Comparison:
    """256 MB, an eighth of a second and more: too few turns to be steady."""
    size = 128 * LARGE_PAGE_SIZE
    source = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    transform, result = Xex(boot_constants(b"bench")).key(_XEX_KEY).encrypt, np.zeros(size + 15, np.uint8)
    encryptor = Cipher(algorithms.AES(_XEX_KEY), modes.ECB()).encryptor()
    return Comparison(
        lambda: encryptor.update_into(source.data, result.data),
        lambda: transform.span(_FIRST << PAGE_SHIFT, source, result[:size]),
    )


def _xts_pages() -> Comparison:
    source, result = _buffers()
    pages, encrypt = _scattered(), Xts().key(_XTS_KEY).encrypt
    library = algorithms.AES(_XTS_KEY)

    def page_by_page() -> None:
        for page, row, target in zip(pages.tolist(), source, result, strict=True):
            tweak = modes.XTS(page.to_bytes(16, "little"))
            Cipher(library, tweak).encryptor().update_into(row.data, target.data)

    return Comparison(page_by_page, lambda: encrypt.pages(pages, source, result))


def _xts_one_page() -> Comparison:
    source, result = _buffers()
    page, target, encrypt = source[0], result[0], Xts().key(_XTS_KEY).encrypt
    library, number = algorithms.AES(_XTS_KEY), _FIRST.to_bytes(16, "little")
    return Comparison(
        lambda: Cipher(library, modes.XTS(number)).encryptor().update_into(page.data, target.data),
        lambda: encrypt.span(_FIRST << PAGE_SHIFT, page, target),
    )


ROWS = [
    Row("E1", "XEX run, encrypt : ECB", at_least(0.38), partial(_run, "encrypt")),
    Row("E1", "XEX run, decrypt : ECB", at_least(0.38), partial(_run, "decrypt")),
    Row("E1", "XEX run, in DRAM : ECB", at_least(0.38), _in_place),
    Row("E2", "XEX scattered, encrypt : ECB", at_least(0.33), partial(_scattered_pages, "encrypt")),
    Row("E2", "XEX scattered, decrypt : ECB", at_least(0.33), partial(_scattered_pages, "decrypt")),
    Row("E4", "XEX 256 MB : ECB", at_least(0.25), _large, only_reported=True),
    Row("E5", "XEX one page : ECB", at_most(9), _one_page),
    Row("E6", "XTS scattered : by page", at_least(1.3), _xts_pages),
    Row("E6", "XTS one page : library", at_most(1.6), _xts_one_page),
]
