"""Sizes as people write them: `512M`, `2G`, `512 MiB`. Units are powers of two, as DIMMs and QEMU count."""

import re

from snpbook.spec.pages import PAGE_SIZE

_SIZE = re.compile(r"\s*(\d+)\s*(?:([KMGT])(?:iB)?)?\s*", re.ASCII | re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """A memory size in bytes, a positive whole number of 4 KB pages; a plain number is bytes.

    Raises `ValueError` that names the size and what would be one.
    """
    match = _SIZE.fullmatch(str(size))
    if match is None:
        raise ValueError(f"{size!r} is no memory size: write it as 512M, 2G or '512 MiB'")
    count = int(match[1]) << 10 * " KMGT".index((match[2] or " ").upper())
    if count == 0 or count % PAGE_SIZE:
        raise ValueError(f"{size!r} is not a positive whole number of {PAGE_SIZE}-byte pages")
    return count


def format_size(size: int) -> str:
    """A number of bytes in the largest unit that divides it: `512 MiB`, `4 KiB`, `100 B`."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << power) == 0:
            return f"{size >> power:,} {unit}"
    return f"{size:,} B"
