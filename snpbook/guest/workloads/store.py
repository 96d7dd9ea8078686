"""A key-value store: buckets of one page each, and an index page that knows how often each was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from snpbook.guest.workloads import guarded
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import PAGE_SIZE

_LENGTH, _VERSION = 2, 8
_INDEX_VERSION = 1
"""The index is never judged by its age: nothing is left that would know it."""
_BUCKETS = guarded.CAPACITY // _VERSION


@dataclass(frozen=True, slots=True)
class KeyValueStore:
    """A store in the private memory `memory` (guest addresses, whole pages): the index, then the buckets.

    Keys and values are bytes; a key is not empty. A store must be created once; every method raises `Corrupted` for a
    page that is not as it was left. `ValueError` for memory that is no store's.
    """

    cpu: GuestCpu
    memory: range

    def __post_init__(self) -> None:
        aligned = self.memory.start % PAGE_SIZE == 0 == self.memory.stop % PAGE_SIZE and self.memory.step == 1
        if not aligned or not 1 <= self.buckets <= _BUCKETS:
            raise ValueError(f"memory = {self.memory}: whole pages, one and 1 to {_BUCKETS} more")

    @property
    def buckets(self) -> int:
        return len(self.memory) // PAGE_SIZE - 1

    async def create(self) -> None:
        """Begin anew, with nothing in it."""
        for number in range(self.buckets):
            await guarded.write(self.cpu, self._page(number), 0, b"")
        await self._index([0] * self.buckets)

    async def put(self, key: bytes, value: bytes) -> None:
        """Store a value under a key. `ValueError` where its bucket is full."""
        if not key:
            raise ValueError("key = b'': a key has a byte at least")
        number, versions = self._bucket(key), await self._versions()
        entries = await self._entries(number, versions[number])
        entries[key] = value
        content = b"".join(part for entry in entries.items() for part in _packed(*entry))
        if len(content) > guarded.CAPACITY:
            raise ValueError(f"the bucket of {key!r} is full: {len(content)} bytes do not fit {guarded.CAPACITY}")
        versions[number] += 1
        await guarded.write(self.cpu, self._page(number), versions[number], content)
        await self._index(versions)

    async def get(self, key: bytes) -> bytes | None:
        """The value under a key, or None."""
        number, versions = self._bucket(key), await self._versions()
        return (await self._entries(number, versions[number])).get(key)

    async def check(self) -> None:
        """Look at every page."""
        for number, version in enumerate(await self._versions()):
            await guarded.read(self.cpu, self._page(number), version)

    def page_of(self, key: bytes) -> int:
        """The guest address of the page that has a key's value, or would have it."""
        return self._page(self._bucket(key))

    def _bucket(self, key: bytes) -> int:
        return int.from_bytes(sha256(key).digest()[:_VERSION], "little") % self.buckets

    def _page(self, number: int) -> int:
        return self.memory.start + (number + 1) * PAGE_SIZE

    async def _entries(self, number: int, version: int) -> dict[bytes, bytes]:
        return dict(_unpacked(await guarded.read(self.cpu, self._page(number), version)))

    async def _versions(self) -> list[int]:
        content = await guarded.read(self.cpu, self.memory.start, _INDEX_VERSION)
        parts = (content[i : i + _VERSION] for i in range(0, self.buckets * _VERSION, _VERSION))
        return [int.from_bytes(part, "little") for part in parts]

    async def _index(self, versions: list[int]) -> None:
        content = b"".join(version.to_bytes(_VERSION, "little") for version in versions)
        await guarded.write(self.cpu, self.memory.start, _INDEX_VERSION, content)


def _packed(key: bytes, value: bytes) -> Iterator[bytes]:
    """Two lengths, key, value."""
    for part in (key, value):
        if len(part) > guarded.CAPACITY:
            raise ValueError(f"{len(part)} bytes: a page holds {guarded.CAPACITY}")
        yield len(part).to_bytes(_LENGTH, "little")
    yield from (key, value)


def _unpacked(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a bucket, up to the first without a key."""
    at = 0
    while (size := int.from_bytes(content[at : at + _LENGTH], "little")) > 0:
        start = at + 2 * _LENGTH
        stop = start + size + int.from_bytes(content[at + _LENGTH : start], "little")
        yield content[start : start + size], content[start + size : stop]
        at = stop
