"""The private attribute of guest pages: what KVM_SET_MEMORY_ATTRIBUTES keeps, by guest page number.

Attributes outlive and precede memory slots, and a guest may name any page of its address space: what was
never made private costs nothing. Source: UPM v10 (`mem_attr_array`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from snpbook.spec.pages import PAGES_PER_LARGE

Flags = NDArray[np.bool_]


class PrivatePages:
    """Which guest pages are private; shared is the default."""

    def __init__(self) -> None:
        self._chunks: dict[int, Flags] = {}

    def __repr__(self) -> str:
        return f"PrivatePages({sum(int(chunk.sum()) for chunk in self._chunks.values())} pages)"

    def mark(self, gfns: range, private: bool) -> None:
        """Set the attribute of a run of guest pages."""
        for number, inside, _ in _pieces(gfns):
            if private:
                self._chunks.setdefault(number, np.zeros(PAGES_PER_LARGE, bool))[inside] = True
            elif number in self._chunks:
                self._chunks[number][inside] = False

    @property
    def count(self) -> int:
        """How many pages are private."""
        return sum(int(chunk.sum()) for chunk in self._chunks.values())

    def of(self, gfns: range) -> Flags:
        """The attribute of each page of a run."""
        result = np.zeros(len(gfns), bool)
        for number, inside, part in _pieces(gfns):
            if number in self._chunks:
                result[part] = self._chunks[number][inside]
        return result


def _pieces(gfns: range) -> Iterator[tuple[int, slice, slice]]:
    """A run by 2 MB regions: the region's number, the pages inside it, and their places in the run."""
    done = 0
    while done < len(gfns):
        number, first = divmod(gfns[done], PAGES_PER_LARGE)
        count = min(len(gfns) - done, -(-(PAGES_PER_LARGE - first) // gfns.step))
        yield number, slice(first, first + count * gfns.step, gfns.step), slice(done, done + count)
        done += count
