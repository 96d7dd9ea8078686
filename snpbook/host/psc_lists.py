"""Lists of page state changes that follow the one in a guest's GHCB, and are served in the same exit.

A guest that has much memory to convert makes one list after the other, each as soon as the one before is done. Serving
them together does what serving them in turn does. Source: GHCB specification, SNP page state change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from snpbook.hardware.dram import Bytes, Words
from snpbook.spec.ghcb import PSC_ENTRIES, PSC_ENTRY, PSC_HEADER, SHARED_BUFFER_SIZE
from snpbook.spec.pages import PAGES_PER_LARGE

Columns = dict[str, NDArray[np.uint64]]
_CUR_PAGE = np.uint64(PSC_ENTRY.fields["cur_page"].limit)
_PLACES = np.arange(PSC_ENTRIES)


def following(buffers: Bytes) -> Words:
    """Of buffers that come next those up to the first that is no list of which nothing is done: words (n, 254)."""
    if buffers.shape[1:] != (SHARED_BUFFER_SIZE,):
        return np.empty((0, 1 + PSC_ENTRIES), np.uint64)
    lists = buffers.view("<u8")
    headers = np.ascontiguousarray(lists[:, 0])
    fresh = headers == _headers(np.zeros(len(lists), np.uint64), _lengths(lists))
    fresh &= _lengths(lists) <= PSC_ENTRIES
    return lists[: len(lists) if fresh.all() else int(np.argmin(fresh))]


def entries(lists: Words) -> Columns:
    """The entries of lists, one list's behind the other's."""
    inside = lists[:, 1:][_lengths(lists)[:, None] > _PLACES]
    return PSC_ENTRY.columns(inside.view(PSC_ENTRY.dtype))


def sizes(columns: Columns) -> NDArray[np.uint64]:
    """The 4 KB pages of each entry."""
    return np.where(columns["page_size"], PAGES_PER_LARGE, 1).astype(np.uint64)


def marked(words: Words) -> Words:
    """Entries as they are once they are done."""
    found: Words = words & ~_CUR_PAGE | sizes(PSC_ENTRY.columns(words.view(PSC_ENTRY.dtype)))
    return found


def served(lists: Words, count: int) -> Words:
    """The lists in which the first `count` entries of all are, with these marked as done, in headers too."""
    stops = np.cumsum(_lengths(lists))
    last = int(np.searchsorted(stops, count))
    lists = lists[: last + 1].copy()
    done = _lengths(lists)
    done[last] -= stops[last] - np.uint64(count)
    inside = done[:, None] > _PLACES
    lists[:, 0] = _headers(done, _lengths(lists))
    lists[:, 1:][inside] = marked(lists[:, 1:][inside])
    return lists


def move_on(now: bytes, buffers: Bytes, count: int, answered: Callable[[Bytes], None]) -> bytes:
    """Beyond the list that is done, `now`, `count` entries of those that follow are: the buffer with the last of them.

    Those before it are `answered`.
    """
    lists = served(following(buffers), count)
    before = np.concatenate([np.frombuffer(now, "<u8").reshape(1, -1), lists[:-1]])
    answered(before.view(np.uint8))
    last: bytes = lists[-1].tobytes()
    return last


def _lengths(lists: Words) -> NDArray[np.uint64]:
    headers = np.ascontiguousarray(lists[:, 0]).view(PSC_HEADER.dtype)
    return headers["end_entry"].astype(np.uint64) + np.uint64(1)


def _headers(done: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> NDArray[np.uint64]:
    headers = np.zeros(len(lengths), PSC_HEADER.dtype)
    headers["cur_entry"], headers["end_entry"] = done, lengths - np.uint64(1)
    return headers.view("<u8")
