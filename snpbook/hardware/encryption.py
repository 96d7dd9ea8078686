"""The memory encryption engine: it stands between every core and DRAM, and holds the keys.

The host's key is drawn when the machine boots; the firmware alone installs and removes the others, each guest's under
its ASID. Which key an access has (`key_choice`) and whether it is allowed is decided before it comes here. Sources:
APM2 15.34; the published Genoa firmware (key ids); SNP ABI, guest policy bit 22; the ciphers in `xex` and `xts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import shake_256

import numpy as np

from snpbook.hardware.cipher import NO_KEY, STEP_PAGES, MemoryKey
from snpbook.hardware.dram import Bytes, Dram, Pages, Words, checked_pages, page_numbers, whole
from snpbook.hardware.tweaks import BLOCK_SIZE, TweakConstant, boot_constants, naples_constants
from snpbook.hardware.xex import Xex
from snpbook.hardware.xts import Xts
from snpbook.spec.encryption import SCHEMES, KeyId
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE


class MissingKeyError(LookupError):
    """An access under a key id that has no key: VMRUN would have failed before."""


class MemoryEncryption:
    """The engine of one machine.

    `scheme` is a product's `encryption`; `seed` draws what the machine draws at boot: the host's key and, from Rome
    on, the address constants of XEX. Key id 0 means unencrypted: its accesses see DRAM as it is, but with `tsme`
    (transparent SME, a BIOS option) they have the host's key. Page numbers and
    addresses are the system's, without C-bit. Operands are checked before anything changes: `TypeError` or
    `ValueError` name the argument and the rule, `MissingKeyError` the key id.
    """

    def __init__(self, dram: Dram, scheme: str, seed: bytes, *, tsme: bool = False) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme = {scheme!r}: one of {', '.join(SCHEMES)}")
        self._cipher = _cipher(scheme, seed)
        if dram.size > self._cipher.address_limit:
            raise ValueError(f"dram = {dram!r}: {scheme} reaches addresses below {self._cipher.address_limit:#x}")
        self.scheme = scheme
        self._dram = dram
        self._keys = {KeyId.UNENCRYPTED.value: NO_KEY}
        self.install(KeyId.HOST, shake_256(b"host memory key" + seed).digest(SCHEMES[scheme].key_size))
        if tsme:
            self._keys[KeyId.UNENCRYPTED] = self._keys[KeyId.HOST]

    def __repr__(self) -> str:
        return f"MemoryEncryption({self.scheme}, {len(self._keys) - 2} keys besides the host's)"

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return self._dram.size

    @property
    def constants(self) -> tuple[TweakConstant, ...]:
        """The constants of a linear tweak, each with its origin; none for XTS."""
        return self._cipher.constants

    def install(self, key_id: int, key: bytes) -> None:
        """Give a key id its key, in place of one that it may have. A guest's key id is its ASID."""
        if not KeyId.UNENCRYPTED < whole("key_id", key_id) <= KeyId.HOST:
            raise ValueError(f"key_id = {key_id}: 1 to {KeyId.HOST}; 0 means unencrypted")
        if len(key) != self._cipher.key_size:
            raise ValueError(f"key: {self.scheme} takes {self._cipher.key_size} bytes, not {len(key)}")
        self._keys[whole("key_id", key_id)] = self._cipher.key(key)

    def remove(self, key_id: int) -> None:
        """Forget a key. What was encrypted under it stays in DRAM, unreadable."""
        if key_id == KeyId.UNENCRYPTED:
            raise ValueError(f"key_id = {key_id}: 1 to {KeyId.HOST}; 0 means unencrypted")
        self.key(key_id)
        del self._keys[key_id]

    def has_key(self, key_id: int) -> bool:
        """Whether an access under the key id is possible."""
        return key_id in self._keys

    def key(self, key_id: int) -> MemoryKey:
        """What the engine does to data under a key id."""
        key = self._keys.get(whole("key_id", key_id))
        if key is None:
            raise MissingKeyError(f"key_id = {key_id}: no memory key is installed; the firmware does so on activation")
        return key

    def snapshot(self) -> Mapping[int, MemoryKey]:
        """All keys by id, for `restore`; equal if the keys are."""
        return dict(self._keys)

    def restore(self, keys: Mapping[int, MemoryKey]) -> None:
        """Hold the keys of a snapshot of this engine again, and no others."""
        self._keys = dict(keys)

    def read_pages(self, key_id: int, pages: Pages) -> Bytes:
        """The plaintext of whole pages (n, 4096): a new array, but for key id 0 the array of `Dram.gather`."""
        key, pages = self.key(key_id), self.checked_pages(pages)
        if key is NO_KEY:
            return self._dram.gather(pages)
        plain = np.empty((len(pages), PAGE_SIZE), np.uint8)
        if isinstance(pages, range):
            self._read(key, pages.start << PAGE_SHIFT, plain.reshape(-1))
        else:
            key.decrypt.pages(pages, self._dram.gather(pages), plain)
        return plain

    def write_pages(self, key_id: int, pages: Pages, data: Bytes) -> None:
        """Store whole pages from their plaintext (n, 4096). A page named twice keeps the later one."""
        key, pages = self.key(key_id), self.checked_pages(pages)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(pages), PAGE_SIZE):
            raise ValueError(f"data = {_shape(data)}: an array of uint8 ({len(pages)}, {PAGE_SIZE})")
        data = np.ascontiguousarray(data)
        if key is NO_KEY:
            self._dram.scatter(pages, data)
        elif isinstance(pages, range):
            self._write(key, pages.start << PAGE_SHIFT, data.reshape(-1))
        else:
            cipher = np.empty_like(data)
            key.encrypt.pages(pages, data, cipher)
            self._dram.scatter(pages, cipher)

    def zero_pages(self, pages: Pages) -> None:
        """Store zeros in whole pages under key id 0; those of a run take no memory of the system any more."""
        pages = self.checked_pages(pages)
        if isinstance(pages, range) and self.key(KeyId.UNENCRYPTED) is NO_KEY:
            self._dram.zero(pages.start << PAGE_SHIFT, len(pages) << PAGE_SHIFT)
        else:
            self.write_pages(KeyId.UNENCRYPTED, pages, np.zeros((len(pages), PAGE_SIZE), np.uint8))

    def encrypt_in_place(self, key_id: int, pages: Pages) -> None:
        """Replace the raw contents of whole pages by their encryption, as a launch does. No page may be named twice."""
        key, pages = self.key(key_id), self.checked_pages(pages)
        if self.key(KeyId.UNENCRYPTED) is not NO_KEY:
            self.write_pages(key_id, pages, self.read_pages(KeyId.UNENCRYPTED, pages))
            return
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

    def read(self, key_id: int, spa: int, size: int) -> bytes:
        """The plaintext of any range of bytes."""
        key, spa, size = self.key(key_id), whole("spa", spa), whole("size", size)
        start, stop = self.blocks(spa, size)
        if not size:
            return b""
        plain = np.empty(stop - start, np.uint8)
        self._read(key, start, plain)
        return plain[spa - start : spa - start + size].tobytes()

    def write(self, key_id: int, spa: int, data: bytes | bytearray | memoryview | Bytes) -> None:
        """Store any range of bytes from its plaintext. Blocks of 16 bytes that it fills in part keep their rest."""
        key, spa, source = self.key(key_id), whole("spa", spa), np.frombuffer(data, np.uint8)
        start, stop = self.blocks(spa, source.size)
        if not source.size:
            return
        plain = np.empty(stop - start, np.uint8)
        if start < spa:
            self._read(key, start, plain[:BLOCK_SIZE])
        if spa + source.size < stop:
            self._read(key, stop - BLOCK_SIZE, plain[-BLOCK_SIZE:])
        plain[spa - start : spa - start + source.size] = source
        self._write(key, start, plain)

    def words(self, key_id: int, addresses: Words) -> Words:
        """The little-endian 64-bit words at 8-byte aligned addresses (any shape), as page walks read them."""
        if self.key(key_id) is NO_KEY:
            return self._dram.words(addresses)
        pages, rows = np.unique(addresses >> np.uint64(PAGE_SHIFT), return_inverse=True)
        inside = (addresses % np.uint64(PAGE_SIZE)) >> np.uint64(3)
        found: Words = self.read_pages(key_id, pages).view("<u8")[rows.reshape(addresses.shape), inside]
        return found

    def checked_pages(self, pages: Pages) -> Pages:
        """Page numbers that exist, an error for others: a run of step 1, which is the fastest, or an array."""
        pages = checked_pages("pages", pages, self.size >> PAGE_SHIFT)
        if len(pages) == 1:
            return range(int(pages[0]), int(pages[0]) + 1)
        return page_numbers(pages) if isinstance(pages, range) and pages.step != 1 else pages

    def blocks(self, spa: int, size: int) -> tuple[int, int]:
        """The bounds of the blocks that hold a range of bytes, an error where it leaves memory."""
        if spa < 0 or size < 0 or spa + size > self._dram.size:
            raise ValueError(f"spa = {spa:#x}, size = {size:#x}: outside DRAM of {self._dram.size:#x} bytes")
        return spa // BLOCK_SIZE * BLOCK_SIZE, -(-(spa + size) // BLOCK_SIZE) * BLOCK_SIZE

    def _read(self, key: MemoryKey, spa: int, plain: Bytes) -> None:
        for offset, piece in self._dram.pieces(spa, plain.size):
            key.decrypt.span(spa + offset, piece, plain[offset : offset + piece.size])

    def _write(self, key: MemoryKey, spa: int, plain: Bytes) -> None:
        pieces = list(self._dram.edit(spa, plain.size))
        if any(np.may_share_memory(plain, piece) for _, piece in pieces):  # a view of DRAM is moved within DRAM
            plain = plain.copy()
        for offset, piece in pieces:
            key.encrypt.span(spa + offset, plain[offset : offset + piece.size], piece)


def _cipher(scheme: str, seed: bytes) -> Xex | Xts:
    if scheme == "xts-aes-256":
        return Xts()
    constants = naples_constants() if SCHEMES[scheme].fixed_tweak else boot_constants(seed)
    return Xex(constants, tweaks_output=SCHEMES[scheme].tweaks_output)


def _shape(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else repr(value)
