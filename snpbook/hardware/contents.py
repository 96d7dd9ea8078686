"""What memory holds at one moment, by regions of 2 MB, of which later moments share those that nobody wrote since.

A region keeps its pages that are not zero. Nothing here changes memory: `Dram` fills and reads these values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_LARGE


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """The pages (n,) of a 2 MB region that hold something, counted from its start, and what they hold (n, 4096)."""

    pages: NDArray[np.intp]
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, region: NDArray[np.uint8]) -> Region:
        """A copy of what the bytes of a region hold."""
        words = region.view(np.uint64).reshape(PAGES_PER_LARGE, -1)
        pages = np.flatnonzero(words.any(axis=1))
        return cls(pages, region.reshape(-1, PAGE_SIZE)[pages])

    def fill(self, region: NDArray[np.uint8]) -> None:
        """Write it into the bytes of a region."""
        region[:] = 0
        region.reshape(-1, PAGE_SIZE)[self.pages] = self.data


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """All regions that hold something, by number. Equal if every byte is."""

    regions: Mapping[int, Region] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Contents({sum(len(region.pages) for region in self.regions.values())} pages)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and not len(self.differences(other))

    __hash__ = None  # type: ignore[assignment]

    def differences(self, other: Contents) -> NDArray[np.uint64]:
        """The numbers of the pages that differ."""
        pages: list[int] = []
        for number in sorted(self.regions.keys() | other.regions.keys()):
            mine, theirs = self.regions.get(number, _EMPTY), other.regions.get(number, _EMPTY)
            if mine is not theirs:
                pages += [number * PAGES_PER_LARGE + int(page) for page in _unlike(mine, theirs)]
        return np.array(pages, np.uint64)

    def page(self, number: int) -> bytes:
        """What a page held."""
        region = self.regions.get(number // PAGES_PER_LARGE, _EMPTY)
        (place,) = np.nonzero(region.pages == number % PAGES_PER_LARGE)
        return region.data[place[0]].tobytes() if len(place) else bytes(1 << PAGE_SHIFT)


_EMPTY = Region(np.zeros(0, np.intp), np.zeros((0, PAGE_SIZE), np.uint8))


def _unlike(mine: Region, theirs: Region) -> NDArray[np.intp]:
    """The pages of two regions that differ: present in one only, or in both and not the same."""
    both, left, right = np.intersect1d(mine.pages, theirs.pages, assume_unique=True, return_indices=True)
    changed = both[(mine.data[left] != theirs.data[right]).any(axis=1)]
    return np.union1d(changed, np.setxor1d(mine.pages, theirs.pages, assume_unique=True))
