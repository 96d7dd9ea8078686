"""Memory as the agents of a machine reach it: through the encryption engine, or through a cache in front of it.

Cores, page walks, devices and the secure processor name a key id and system addresses; which key an access has is the
business of `key_choice`. `MemoryEncryption` and `Cache` both are a `Memory`.
"""

from __future__ import annotations

from typing import Protocol

from snpbook.hardware.dram import Bytes, Pages, Words


class Memory(Protocol):
    """Reads and writes under a key id; 0 means unencrypted."""

    @property
    def size(self) -> int: ...

    def read(self, key_id: int, spa: int, size: int) -> bytes:
        """Any range of bytes."""

    def write(self, key_id: int, spa: int, data: bytes | bytearray | memoryview | Bytes) -> None:
        """Store any range of bytes."""

    def read_pages(self, key_id: int, pages: Pages) -> Bytes:
        """Whole pages (n, 4096); under key id 0 perhaps a read-only view of DRAM."""

    def write_pages(self, key_id: int, pages: Pages, data: Bytes) -> None:
        """Store whole pages (n, 4096). A page named twice keeps the later one."""

    def zero_pages(self, pages: Pages) -> None:
        """Store zeros in whole pages, unencrypted."""

    def encrypt_in_place(self, key_id: int, pages: Pages) -> None:
        """Replace what an unencrypted read of whole pages gives by its encryption."""

    def words(self, key_id: int, addresses: Words) -> Words:
        """The 64-bit words at 8-byte aligned addresses."""
