"""DRAM: what the DIMMs hold, at the address where the memory controller finds it.

Physical address = array index: one private anonymous mapping from 0 to the top of installed memory,
which costs nothing until touched; where the system refuses such a mapping, a dictionary of 2 MB
regions serves the same interface. Private pages are ciphertext here. Views handed out are
read-only: every change goes through `edit`, `write` or `scatter`.
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.contents import Contents, Region
from snpbook.spec.pages import LARGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Pages = range | NDArray[np.uint64]
"""Physical page numbers: a run (`range` with step 1, or 512 for 2 MB pages) or any array of them."""

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python's module from 3.13 on


class Dram:
    """Installed memory of `size` bytes, a multiple of 2 MB. `mapping=False` uses the dictionary.

    Operands are checked before anything changes: `TypeError` or `ValueError` name the argument and the rule.
    """

    def __init__(self, size: int, *, mapping: bool = True) -> None:
        size = whole("size", size)
        if size <= 0 or size % LARGE_PAGE_SIZE:
            raise ValueError(f"size = {size:#x}: DRAM is a positive multiple of {LARGE_PAGE_SIZE:#x} bytes")
        self.size = size
        self._region = _map(size) if mapping else None
        self._flat = None if self._region is None else np.frombuffer(self._region, np.uint8)
        self._regions: dict[int, Bytes] = {}
        self.written = bytearray(size // LARGE_PAGE_SIZE)
        """One flag for each 2 MB: not 0 where something was written since the last snapshot or restoration."""
        self._held = Contents()

    def __repr__(self) -> str:
        return f"Dram({self.size >> 20} MiB, {'dictionary' if self._flat is None else 'mapping'})"

    @property
    def mapped(self) -> bool:
        """Whether the whole of memory is one array."""
        return self._flat is not None

    def _check(self, spa: int, size: int) -> tuple[int, int]:
        spa, size = whole("spa", spa), whole("size", size)
        if spa < 0 or size < 0 or spa + size > self.size:
            raise ValueError(f"spa = {spa:#x}, size = {size:#x}: outside DRAM of {self.size:#x} bytes")
        return spa, size

    def edit(self, spa: int, size: int) -> Iterator[tuple[int, Bytes]]:
        """Writable pieces of a range, each with its offset in the range: one piece in the mapping,
        pieces within 2 MB regions in the dictionary.
        """
        self.mark(spa, size)
        yield from self.writable(spa, size)

    def mark(self, spa: int, size: int) -> None:
        """Note that a range is being written."""
        spa, size = self._check(spa, size)
        if size:
            first, last = spa // LARGE_PAGE_SIZE, (spa + size - 1) // LARGE_PAGE_SIZE
            if first == last:
                self.written[first] = 1
            else:
                self.written[first : last + 1] = b"\1" * (last + 1 - first)

    def writable(self, spa: int, size: int) -> Iterator[tuple[int, Bytes]]:
        """The pieces of `edit` for those who keep them: they call `mark` whenever they write."""
        spa, size = self._check(spa, size)
        if self._flat is not None:
            yield 0, self._flat[spa : spa + size]
            return
        offset = 0
        while offset < size:
            number, start = divmod(spa + offset, LARGE_PAGE_SIZE)
            length = min(size - offset, LARGE_PAGE_SIZE - start)
            yield offset, self._at(number)[start : start + length]
            offset += length

    def pieces(self, spa: int, size: int) -> Iterator[tuple[int, Bytes]]:
        """Read-only views of a range, in the pieces of `edit`."""
        for offset, piece in self.writable(spa, size):
            view = piece.view()
            view.flags.writeable = False
            yield offset, view

    def read(self, spa: int, size: int) -> bytes:
        """A copy of the raw bytes, as a host without the key reads them."""
        return b"".join(piece.tobytes() for _, piece in self.pieces(spa, size))

    def write(self, spa: int, data: bytes | bytearray | memoryview | Bytes) -> None:
        """Store raw bytes."""
        source = np.frombuffer(data, np.uint8)
        pieces = list(self.edit(spa, source.size))
        if len(pieces) > 1:
            source = source.copy()  # it may be a view of DRAM, which an earlier piece would change
        for offset, piece in pieces:
            piece[:] = source[offset : offset + piece.size]

    def zero(self, spa: int, size: int) -> None:
        """Store zeros in whole pages; the mapping gives their memory back to the system."""
        spa, size = self._check(spa, size)
        if spa % PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"spa = {spa:#x}, size = {size:#x}: whole pages are zeroed")
        self.mark(spa, size)
        if self._region is not None and self._flat is not None:
            first, end = -(-spa // mmap.PAGESIZE) * mmap.PAGESIZE, (spa + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < end:
                self._region.madvise(mmap.MADV_DONTNEED, first, end - first)
            self._flat[spa : min(first, spa + size)] = 0  # the system's own pages may be larger
            self._flat[max(end, spa) : spa + size] = 0
            for number in range(-(-spa // LARGE_PAGE_SIZE), (spa + size) // LARGE_PAGE_SIZE):
                self.written[number] = number in self._held.regions  # else a whole region is as empty as it was held
            return
        for number in range(spa // LARGE_PAGE_SIZE, -(-(spa + size) // LARGE_PAGE_SIZE)):
            if number in self._regions:
                start = number * LARGE_PAGE_SIZE
                self._regions[number][max(spa - start, 0) : max(spa + size - start, 0)] = 0

    def gather(self, pages: Pages) -> Bytes:
        """Whole 4 KB pages as an array (n, 4096): a read-only view for a run in the mapping, else a copy."""
        pages = checked_pages("pages", pages, self.size >> PAGE_SHIFT)
        if self._flat is not None:
            table = self._flat.reshape(-1, PAGE_SIZE)
            view = table[as_slice(pages)] if isinstance(pages, range) else table[pages]
            view.flags.writeable = False
            return view
        result = np.empty((len(pages), PAGE_SIZE), np.uint8)
        for where, region, index in self._by_region(page_numbers(pages)):
            result[where] = region[index]
        return result

    def scatter(self, pages: Pages, data: Bytes) -> None:
        """Store whole 4 KB pages from an array (n, 4096). A page named twice keeps the later one."""
        pages = checked_pages("pages", pages, self.size >> PAGE_SHIFT)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(pages), PAGE_SIZE):
            found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else repr(data)
            raise ValueError(f"data = {found}: an array of uint8 ({len(pages)}, {PAGE_SIZE})")
        np.frombuffer(self.written, np.uint8)[_regions(pages)] = 1
        if self._flat is not None:
            index = as_slice(pages) if isinstance(pages, range) else pages
            self._flat.reshape(-1, PAGE_SIZE)[index] = data
            return
        for where, region, index in self._by_region(page_numbers(pages)):
            region[index] = data[where]

    def words(self, addresses: Words) -> Words:
        """The little-endian 64-bit words at 8-byte aligned addresses (any shape), as page walks read them."""
        if self._flat is not None:
            found: Words = self._flat.view("<u8")[addresses >> np.uint64(3)]
            return found
        result = np.empty_like(addresses)
        regions = addresses // np.uint64(LARGE_PAGE_SIZE)
        for number in np.unique(regions):
            where = regions == number
            index = (addresses[where] % np.uint64(LARGE_PAGE_SIZE)) >> np.uint64(3)
            result[where] = self._at(int(number)).view("<u8")[index]
        return result

    def snapshot(self) -> Contents:
        """What memory holds. It costs what was written since the last snapshot or restoration."""
        regions = dict(self._held.regions)
        for number in self._changed():
            region = Region.of(self._piece(number))
            regions[number] = region
            if not len(region.pages):
                del regions[number]
        self._hold(Contents(regions))
        return self._held

    def restore(self, contents: Contents) -> None:
        """Hold a snapshot's contents again. It costs what differs and what was written since."""
        held, wanted = self._held.regions, contents.regions
        differ = {number for number in held.keys() | wanted.keys() if held.get(number) is not wanted.get(number)}
        for number in differ.union(self._changed()):
            if number in wanted:
                wanted[number].fill(self._piece(number))
            else:
                self.zero(number * LARGE_PAGE_SIZE, LARGE_PAGE_SIZE)
        self._hold(contents)

    def _hold(self, contents: Contents) -> None:
        self._held, self.written[:] = contents, bytes(len(self.written))

    def _changed(self) -> list[int]:
        """The numbers of the 2 MB regions that were written."""
        found: list[int] = np.flatnonzero(np.frombuffer(self.written, np.uint8)).tolist()
        return found

    def _piece(self, number: int) -> Bytes:
        """A 2 MB region, writable."""
        ((_, piece),) = self.writable(number * LARGE_PAGE_SIZE, LARGE_PAGE_SIZE)
        return piece

    def _at(self, number: int) -> Bytes:
        if number not in self._regions:
            if number >= self.size // LARGE_PAGE_SIZE:
                raise IndexError(f"address {number * LARGE_PAGE_SIZE:#x}: outside DRAM of {self.size:#x} bytes")
            self._regions[number] = np.zeros(LARGE_PAGE_SIZE, np.uint8)
        return self._regions[number]

    def _by_region(self, pages: Words) -> Iterator[tuple[NDArray[np.bool_], Bytes, Words]]:
        regions = pages // np.uint64(PAGES_PER_LARGE)
        for number in np.unique(regions):
            where = regions == number
            yield where, self._at(int(number)).reshape(-1, PAGE_SIZE), pages[where] % np.uint64(PAGES_PER_LARGE)


def _map(size: int) -> mmap.mmap | None:
    """`size` zero bytes that take memory only where written, or None where the system refuses."""
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        region.madvise(mmap.MADV_NOHUGEPAGE)  # one written byte must not cost 2 MB
    except (OSError, AttributeError):  # strict overcommit, an address-space limit, another system
        return None
    return region


def _regions(pages: Pages) -> slice | Words:
    """The 2 MB regions of some pages, as an index."""
    if isinstance(pages, range):
        return slice(pages[0] // PAGES_PER_LARGE, pages[-1] // PAGES_PER_LARGE + 1) if len(pages) else slice(0)
    return pages // np.uint64(PAGES_PER_LARGE)


def as_slice(pages: range) -> slice:
    """The same run as an index of an array with one row per page."""
    return slice(pages.start, pages.stop, pages.step)


def page_numbers(pages: Pages) -> Words:
    """Page numbers as an array."""
    if isinstance(pages, range):
        return np.arange(pages.start, pages.stop, pages.step, dtype=np.uint64)
    return pages


def checked_pages(name: str, pages: Pages, limit: int | None = None) -> Pages:
    """Page numbers that a user gave: a run as it is, an array of any integer type as uint64.

    `TypeError` where they are no integers, `ValueError` where one is negative or not below `limit`.
    """
    if isinstance(pages, range):
        if pages.step < 1:
            raise ValueError(f"{name} = {pages}: a run goes upwards")
        low, high = (pages[0], pages[-1]) if len(pages) else (0, 0)
    elif isinstance(pages, np.ndarray) and pages.ndim == 1 and pages.dtype.kind in "iu":
        low = int(pages.min()) if pages.dtype.kind == "i" and len(pages) else 0
        high = int(pages.max()) if limit is not None and len(pages) else 0
    else:
        found = f"{pages.dtype} {pages.shape}" if isinstance(pages, np.ndarray) else repr(pages)
        raise TypeError(f"{name} = {found}: a range or an array of integers (n,)")
    if low < 0:
        raise ValueError(f"{name}: {low} is no page number")
    if limit is not None and high >= limit and len(pages):
        raise ValueError(f"{name}: page {high:#x} is beyond the last, {limit - 1:#x}")
    return pages if isinstance(pages, range) else pages.astype(np.uint64, copy=False)


def whole(name: str, value: int) -> int:
    """`value` as an integer; `TypeError` names the argument."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}: an integer") from None


def flag(name: str, value: bool) -> bool:
    """`value` as True or False; `TypeError` names the argument."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} = {value!r}: True or False")
    return bool(value)
