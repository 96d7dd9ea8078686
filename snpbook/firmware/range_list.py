"""RANGE_LIST: the pages that a host names to SNP_INIT_EX and SNP_PAGE_SET_STATE. Source: SNP ABI, RANGE_LIST."""

from __future__ import annotations

from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.platform import RANGE_ENTRY, RANGE_LIST_HEADER


def pages_between(start: int, end: int) -> range:
    """The pages of a range of bytes."""
    return range(start >> PAGE_SHIFT, end >> PAGE_SHIFT)


def pages_of(entry: Record) -> range:
    """The pages that an entry of the list names."""
    first = entry.base >> PAGE_SHIFT
    return range(first, first + entry.page_count)


def read_entries(data: bytes, count: int) -> list[tuple[Record, bool]]:
    """The first `count` entries of a list, each with whether its reserved bytes are zero."""
    starts = [RANGE_LIST_HEADER.size + index * RANGE_ENTRY.size for index in range(count)]
    parts = [data[start : start + RANGE_ENTRY.size] for start in starts]
    return [(RANGE_ENTRY.unpack(part), not RANGE_ENTRY.reserved_set(part)) for part in parts]
