"""A write-back cache in front of the encryption engine, for attacks on coherence and on lines not yet written back.

Off unless a machine is given one: memory then always agrees. A line is 64 bytes of plaintext, tagged with the key id
of the access that brought it in. One cache serves all cores, and nothing leaves it of its own accord: it has no
capacity (MODEL). Sources: APM2 7.6 and 15.34.9, CPUID 8000_001F EAX[10]; Linux sev_flush_encrypted_page.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Bytes, Pages, Words, page_numbers, whole
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.spec.encryption import LINE_SIZE, KeyId
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE

LINES = PAGE_SIZE // LINE_SIZE
"""Lines of a page."""
Flags = NDArray[np.bool_]
Rows = NDArray[np.intp]

LINE = np.dtype([("spa", np.uint64), ("key_id", np.uint16), ("dirty", np.bool_)])
"""One line of `Cache.lines`."""


class Domain:
    """The lines under one key id, 64 for each page that it has met: `held` and `dirty` (n, 64), `data` (n, 64, 64)."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self.pages: Words = np.zeros(0, np.uint64)
        self.data: Bytes = np.zeros((0, LINES, LINE_SIZE), np.uint8)
        self.held: Flags = np.zeros((0, LINES), bool)
        self.dirty: Flags = np.zeros((0, LINES), bool)

    def rows(self, pages: Words) -> Rows:
        """The row of each page, made where there is none yet."""
        rows = np.array([self._rows.setdefault(page, len(self._rows)) for page in pages.tolist()], np.intp)
        if len(self._rows) > len(self.pages):
            spare = 2 * len(self._rows) - len(self.pages)
            self.pages, self.data, self.held, self.dirty = (
                np.concatenate([array, np.zeros((spare, *array.shape[1:]), array.dtype)])
                for array in (self.pages, self.data, self.held, self.dirty)
            )
        self.pages[rows] = pages
        return rows

    def find(self, pages: Words, lines: Flags) -> tuple[Rows, Flags]:
        """The rows of those pages that have one, and which of `lines` (n, 64) they hold."""
        rows = np.array([self._rows.get(page, -1) for page in pages.tolist()], np.intp)
        known = rows >= 0
        return rows[known], lines[known] & self.held[rows[known]]

    def everything(self) -> tuple[Words, Flags]:
        """All pages, and the lines that are held of each."""
        count = len(self._rows)
        return self.pages[:count], self.held[:count]

    def forget(self, rows: Rows, lines: Flags) -> None:
        """Lose lines, dirty or not."""
        self.held[rows] &= ~lines
        self.dirty[rows] &= ~lines


class Cache:
    """The cache of one machine.

    `coherent` is HwEnfCacheCoh: an access first writes back and drops what other key ids hold of its lines. Without
    it, the same address may be cached under several key ids at once, each with its own contents, until software
    flushes them. Operands are checked as by `MemoryEncryption`, before anything changes.
    """

    def __init__(self, engine: MemoryEncryption, *, coherent: bool) -> None:
        self._engine, self.coherent = engine, coherent
        self._domains: dict[int, Domain] = {}

    def __repr__(self) -> str:
        lines = self.lines()
        return f"Cache({len(lines)} lines, {int(lines['dirty'].sum())} dirty)"

    @property
    def size(self) -> int:
        """Bytes of memory behind the cache."""
        return self._engine.size

    def lines(self) -> NDArray[np.void]:
        """All lines, an array of `LINE` sorted by address and key id."""
        parts = [np.empty(0, LINE)]
        for key_id, domain in self._domains.items():
            rows, line = np.nonzero(domain.held)
            part = np.empty(len(rows), LINE)
            part["spa"] = (domain.pages[rows] << np.uint64(PAGE_SHIFT)) + line.astype(np.uint64) * np.uint64(LINE_SIZE)
            part["key_id"], part["dirty"] = key_id, domain.dirty[rows, line]
            parts.append(part)
        return np.sort(np.concatenate(parts), order=["spa", "key_id"])

    # Accesses of cores and of the secure processor

    def read(self, key_id: int, spa: int, size: int) -> bytes:
        """Any range of bytes; its lines are cached under the key id."""
        pages, lines, start = self._range(key_id, spa, size)
        if not len(pages):
            return b""
        domain, rows = self._fetch(key_id, pages, lines)
        return domain.data[rows].reshape(-1)[start : start + size].tobytes()

    def write(self, key_id: int, spa: int, data: bytes | bytearray | memoryview | Bytes) -> None:
        """Store any range of bytes in the cache; its lines are dirty until they are written back."""
        source = np.frombuffer(data, np.uint8)
        pages, lines, start = self._range(key_id, spa, source.size)
        if not len(pages):
            return
        domain, rows = self._fetch(key_id, pages, lines)
        content = domain.data[rows]
        content.reshape(-1)[start : start + source.size] = source
        domain.data[rows] = content
        domain.dirty[rows] |= lines

    def read_pages(self, key_id: int, pages: Pages) -> Bytes:
        """Whole pages, a new array (n, 4096)."""
        numbers, places = self._whole_pages(key_id, pages)
        domain, rows = self._fetch(key_id, numbers, _all_lines(numbers))
        return domain.data[rows[places]].reshape(-1, PAGE_SIZE)

    def write_pages(self, key_id: int, pages: Pages, data: Bytes) -> None:
        """Store whole pages (n, 4096) in the cache. A page named twice keeps the later one."""
        numbers, places = self._whole_pages(key_id, pages)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(places), PAGE_SIZE):
            raise ValueError(f"data: an array of uint8 ({len(places)}, {PAGE_SIZE}), one row for each page")
        domain, rows = self._fetch(key_id, numbers, _all_lines(numbers))
        domain.data[rows[places]] = data.reshape(-1, LINES, LINE_SIZE)
        domain.dirty[rows] = True

    def zero_pages(self, pages: Pages) -> None:
        self.write_pages(KeyId.UNENCRYPTED, pages, np.zeros((len(pages), PAGE_SIZE), np.uint8))

    def encrypt_in_place(self, key_id: int, pages: Pages) -> None:
        """Replace what an unencrypted read of whole pages gives by its encryption, as a launch does.

        The secure processor does it through this cache, as a core would (MODEL).
        """
        self._engine.key(key_id)
        self.write_pages(key_id, pages, self.read_pages(KeyId.UNENCRYPTED, pages))

    def words(self, key_id: int, addresses: Words) -> Words:
        """The little-endian 64-bit words at 8-byte aligned addresses (any shape), as page walks read them."""
        self._engine.key(key_id)
        pages, places = np.unique(addresses >> np.uint64(PAGE_SHIFT), return_inverse=True)
        places, inside = places.reshape(addresses.shape), addresses % np.uint64(PAGE_SIZE)
        lines = np.zeros((len(pages), LINES), bool)
        lines[places, inside // np.uint64(LINE_SIZE)] = True
        domain, rows = self._fetch(key_id, pages, lines)
        content = domain.data[rows].reshape(-1, PAGE_SIZE).view("<u8")
        found: Words = content[places, inside >> np.uint64(3)]
        return found

    # Accesses of devices, which the hardware keeps coherent with lines of their own key id only

    def dma_read(self, key_id: int, spa: int, size: int) -> bytes:
        """What a device reads: the lines of its own key id as they are, memory without those of any other."""
        pages, lines, _ = self._range(key_id, spa, size)
        self._write_back(key_id, pages, lines)
        return self._engine.read(key_id, spa, size)

    def dma_write(self, key_id: int, spa: int, data: bytes | bytearray | memoryview | Bytes) -> None:
        """A device's write to memory; dirty lines of another key id will overwrite it when they are written back."""
        pages, lines, _ = self._range(key_id, spa, np.frombuffer(data, np.uint8).size)
        self._flush(key_id, pages, lines)
        self._engine.write(key_id, spa, data)

    # Instructions

    def clflush(self, key_id: int, spa: int, size: int) -> None:
        """CLFLUSH for each line of a range: without coherence it finds the lines of its own key id only."""
        pages, lines, _ = self._range(key_id, spa, size)
        for other in list(self._domains) if self.coherent else [key_id]:
            self._flush(other, pages, lines)

    def wbinvd(self) -> None:
        """WBINVD, executed on all cores."""
        for key_id, domain in self._domains.items():
            self._flush(key_id, *domain.everything())

    def vmpage_flush(self, asid: int, page: int) -> None:
        """A write to the MSR VMPAGE_FLUSH: one page, the lines of one guest. `ValueError` for ASID 0, a #GP."""
        if whole("asid", asid) == KeyId.UNENCRYPTED:
            raise ValueError("asid = 0: VMPAGE_FLUSH takes a guest's ASID")
        pages, _ = self._whole_pages(KeyId.UNENCRYPTED, range(page, page + 1))
        self._flush(asid, pages, _all_lines(pages))

    def invd(self) -> int:
        """INVD: every line is lost, and nothing is written back. Returns how many were dirty."""
        lost = sum(int(domain.dirty.sum()) for domain in self._domains.values())
        self._domains.clear()
        return lost

    # What happens without an instruction

    def evict(self, spa: int, size: int) -> None:
        """The lines of a range, of every key id, are written back and leave, as when others need the room."""
        pages, lines, _ = self._range(KeyId.UNENCRYPTED, spa, size)
        for key_id in self._domains:
            self._flush(key_id, pages, lines)

    def drop(self, spa: int, size: int) -> int:
        """The lines of a range, of every key id, are lost, as by a fault in hardware. Returns how many were dirty."""
        pages, lines, _ = self._range(KeyId.UNENCRYPTED, spa, size)
        lost = 0
        for domain in self._domains.values():
            rows, mine = domain.find(pages, lines)
            lost += int((domain.dirty[rows] & mine).sum())
            domain.forget(rows, mine)
        return lost

    def snapshot(self) -> Mapping[int, Domain]:
        """All lines, for `restore`."""
        return deepcopy(self._domains)

    def restore(self, domains: Mapping[int, Domain]) -> None:
        """Hold the lines of a snapshot again, and no others."""
        self._domains = deepcopy(dict(domains))

    def _fetch(self, key_id: int, pages: Words, lines: Flags) -> tuple[Domain, Rows]:
        """Bring in the lines (n, 64) of pages that differ from each other; where they are then."""
        if self.coherent:
            for other in self._domains:
                if other != key_id:
                    self._flush(other, pages, lines)
        domain = self._domains.setdefault(key_id, Domain())
        rows = domain.rows(pages)
        missing = lines & ~domain.held[rows]
        fetched = missing.any(axis=1)
        content = domain.data[rows[fetched]]
        found = self._engine.read_pages(key_id, pages[fetched]).reshape(-1, LINES, LINE_SIZE)
        content[missing[fetched]] = found[missing[fetched]]
        domain.data[rows[fetched]] = content
        domain.held[rows] |= lines
        return domain, rows

    def _write_back(self, key_id: int, pages: Words, lines: Flags) -> None:
        """Store the dirty ones of some lines in memory; they stay, clean. Where the key is gone they are lost (MODEL).

        Other lines of their pages are read and stored again, which changes nothing: encryption has no freshness.
        """
        domain = self._domains.get(key_id)
        if domain is None:
            return
        rows, mine = domain.find(pages, lines)
        mine &= domain.dirty[rows]
        some = mine.any(axis=1)
        rows, mine = rows[some], mine[some]
        domain.dirty[rows] &= ~mine
        if self._engine.has_key(key_id):
            content = np.array(self._engine.read_pages(key_id, domain.pages[rows])).reshape(-1, LINES, LINE_SIZE)
            content[mine] = domain.data[rows][mine]
            self._engine.write_pages(key_id, domain.pages[rows], content.reshape(-1, PAGE_SIZE))

    def _flush(self, key_id: int, pages: Words, lines: Flags) -> None:
        """Write back lines and invalidate them."""
        self._write_back(key_id, pages, lines)
        if key_id in self._domains:
            self._domains[key_id].forget(*self._domains[key_id].find(pages, lines))

    def _range(self, key_id: int, spa: int, size: int) -> tuple[Words, Flags, int]:
        """The pages and lines (n, 64) of a range of bytes, and where it starts in the first page."""
        self._engine.key(key_id)
        spa, size = whole("spa", spa), whole("size", size)
        self._engine.blocks(spa, size)
        first = spa >> PAGE_SHIFT
        pages = np.arange(first, -(-(spa + size) // PAGE_SIZE) if size else first, dtype=np.uint64)
        lines, start = np.zeros((len(pages), LINES), bool), spa % PAGE_SIZE
        lines.reshape(-1)[start // LINE_SIZE : -(-(start + size) // LINE_SIZE)] = True
        return pages, lines, start

    def _whole_pages(self, key_id: int, pages: Pages) -> tuple[Words, Rows]:
        """Checked page numbers without repetitions, and the place of each of `pages` among them."""
        self._engine.key(key_id)
        return np.unique(page_numbers(self._engine.checked_pages(pages)), return_inverse=True)


def _all_lines(pages: Words) -> Flags:
    return np.ones((len(pages), LINES), bool)
