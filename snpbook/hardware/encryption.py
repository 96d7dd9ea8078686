"""The memory encryption engine: it stands between every core and DRAM, and knows a key for each ASID.

The firmware alone installs and removes keys. Who may read or write which page with which key is decided before an
access comes here. Sources: APM2 15.34 (keys by ASID); SNP ABI, guest policy bit 22; the ciphers in `xex` and `xts`.
"""

from __future__ import annotations

from operator import index

import numpy as np

from snpbook.hardware.cipher import BLOCK_SIZE, STEP_PAGES, MemoryKey
from snpbook.hardware.dram import Bytes, Dram, Pages
from snpbook.hardware.xex import Xex
from snpbook.hardware.xts import Xts
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE


class MissingKeyError(LookupError):
    """An access under an ASID that has no key: VMRUN would have failed before."""


class MemoryEncryption:
    """The engine of one machine.

    `scheme` is a product's `encryption`; `seed` draws what the machine draws at boot, the address constants of XEX.
    Page numbers and addresses are the system's, without C-bit. Operands are checked before anything changes:
    `TypeError` or `ValueError` name the argument and the rule, `MissingKeyError` the ASID.
    """

    def __init__(self, dram: Dram, scheme: str, seed: bytes) -> None:
        match scheme:
            case "xex-aes-128":
                self._cipher: Xex | Xts = Xex(seed)
            case "xts-aes-256":
                self._cipher = Xts()
            case _:
                raise ValueError(f"scheme = {scheme!r}: one of xex-aes-128, xts-aes-256")
        if dram.size > self._cipher.address_limit:
            raise ValueError(f"dram = {dram!r}: {scheme} reaches addresses below {self._cipher.address_limit:#x}")
        self.scheme = scheme
        self._dram = dram
        self._keys: dict[int, MemoryKey] = {}

    def __repr__(self) -> str:
        return f"MemoryEncryption({self.scheme}, {len(self._keys)} keys)"

    def install(self, asid: int, key: bytes) -> None:
        """Give an ASID its key, in place of one that it may have. ASID 0 is the host's (SME)."""
        asid = _whole("asid", asid)
        if asid < 0:
            raise ValueError(f"asid = {asid}: not negative")
        if len(key) != self._cipher.key_size:
            raise ValueError(f"key: {self.scheme} takes {self._cipher.key_size} bytes, not {len(key)}")
        self._keys[asid] = self._cipher.key(key)

    def remove(self, asid: int) -> None:
        """Forget an ASID's key. What was encrypted under it stays in DRAM, unreadable."""
        self._key(asid)
        del self._keys[asid]

    def has_key(self, asid: int) -> bool:
        """Whether the ASID has a key."""
        return asid in self._keys

    def read_pages(self, asid: int, pages: Pages) -> Bytes:
        """The plaintext of whole pages, a new array (n, 4096)."""
        key, pages = self._key(asid), self._pages(pages)
        plain = np.empty((len(pages), PAGE_SIZE), np.uint8)
        if isinstance(pages, range):
            self._read(key, pages.start << PAGE_SHIFT, plain.reshape(-1))
        else:
            key.decrypt.pages(pages, self._dram.gather(pages), plain)
        return plain

    def write_pages(self, asid: int, pages: Pages, data: Bytes) -> None:
        """Store whole pages from their plaintext (n, 4096). A page named twice keeps the later one."""
        key, pages = self._key(asid), self._pages(pages)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(pages), PAGE_SIZE):
            raise ValueError(f"data = {_shape(data)}: an array of uint8 ({len(pages)}, {PAGE_SIZE})")
        data = np.ascontiguousarray(data)
        if isinstance(pages, range):
            self._write(key, pages.start << PAGE_SHIFT, data.reshape(-1))
        else:
            cipher = np.empty_like(data)
            key.encrypt.pages(pages, data, cipher)
            self._dram.scatter(pages, cipher)

    def encrypt_in_place(self, asid: int, pages: Pages) -> None:
        """Replace the raw contents of whole pages by their encryption, as a launch does. No page may be named twice."""
        key, pages = self._key(asid), self._pages(pages)
        if isinstance(pages, range):
            for offset, piece in self._dram.edit(pages.start << PAGE_SHIFT, len(pages) << PAGE_SHIFT):
                key.encrypt.span((pages.start << PAGE_SHIFT) + offset, piece, piece)
            return
        if len(np.unique(pages)) != len(pages):
            raise ValueError("pages: a page is named twice, and would be encrypted twice")
        for start in range(0, len(pages), STEP_PAGES):
            part = pages[start : start + STEP_PAGES]
            cipher = np.empty((len(part), PAGE_SIZE), np.uint8)
            key.encrypt.pages(part, self._dram.gather(part), cipher)
            self._dram.scatter(part, cipher)

    def read(self, asid: int, spa: int, size: int) -> bytes:
        """The plaintext of any range of bytes."""
        key, spa, size = self._key(asid), _whole("spa", spa), _whole("size", size)
        start, stop = self._blocks(spa, size)
        if not size:
            return b""
        plain = np.empty(stop - start, np.uint8)
        self._read(key, start, plain)
        return plain[spa - start : spa - start + size].tobytes()

    def write(self, asid: int, spa: int, data: bytes | bytearray | memoryview | Bytes) -> None:
        """Store any range of bytes from its plaintext. Blocks of 16 bytes that it fills in part keep their rest."""
        key, spa, source = self._key(asid), _whole("spa", spa), np.frombuffer(data, np.uint8)
        start, stop = self._blocks(spa, source.size)
        if not source.size:
            return
        plain = np.empty(stop - start, np.uint8)
        if start < spa:
            self._read(key, start, plain[:BLOCK_SIZE])
        if spa + source.size < stop:
            self._read(key, stop - BLOCK_SIZE, plain[-BLOCK_SIZE:])
        plain[spa - start : spa - start + source.size] = source
        self._write(key, start, plain)

    def _read(self, key: MemoryKey, spa: int, plain: Bytes) -> None:
        for offset, piece in self._dram.pieces(spa, plain.size):
            key.decrypt.span(spa + offset, piece, plain[offset : offset + piece.size])

    def _write(self, key: MemoryKey, spa: int, plain: Bytes) -> None:
        pieces = list(self._dram.edit(spa, plain.size))
        if any(np.may_share_memory(plain, piece) for _, piece in pieces):  # a view of DRAM is moved within DRAM
            plain = plain.copy()
        for offset, piece in pieces:
            key.encrypt.span(spa + offset, plain[offset : offset + piece.size], piece)

    def _key(self, asid: int) -> MemoryKey:
        key = self._keys.get(_whole("asid", asid))
        if key is None:
            raise MissingKeyError(f"asid = {asid}: no memory key is installed; the firmware does so on activation")
        return key

    def _pages(self, pages: Pages) -> Pages:
        """Checked page numbers; one page in an array becomes a run, which is faster."""
        if isinstance(pages, range):
            if pages.step != 1:
                raise ValueError(f"pages = {pages}: a run has step 1")
            first, last = pages.start, pages.stop - 1
        elif isinstance(pages, np.ndarray) and pages.dtype == np.uint64 and pages.ndim == 1:
            first, last = (int(pages.min()), int(pages.max())) if len(pages) else (0, 0)
        else:
            raise TypeError(f"pages = {_shape(pages)}: a range or an array of uint64 (n,)")
        if len(pages) and not 0 <= first <= last < self._dram.size >> PAGE_SHIFT:
            raise ValueError(f"pages {first:#x} to {last:#x}: DRAM has {self._dram.size >> PAGE_SHIFT:#x} pages")
        return range(first, last + 1) if len(pages) == 1 else pages

    def _blocks(self, spa: int, size: int) -> tuple[int, int]:
        """The bounds of the blocks that hold a range of bytes."""
        if spa < 0 or size < 0 or spa + size > self._dram.size:
            raise ValueError(f"spa = {spa:#x}, size = {size:#x}: outside DRAM of {self._dram.size:#x} bytes")
        return spa // BLOCK_SIZE * BLOCK_SIZE, -(-(spa + size) // BLOCK_SIZE) * BLOCK_SIZE


def _whole(name: str, value: int) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}: an integer") from None


def _shape(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)
