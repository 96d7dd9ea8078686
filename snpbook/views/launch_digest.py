"""The launch digest as it grows: a row for each page, its PAGE_INFO field by field, and where two launches part."""

from __future__ import annotations

from collections.abc import Sequence

from snpbook.attest.checks import Result
from snpbook.firmware.growth import Link
from snpbook.spec.launch import PAGE_INFO
from snpbook.views.checks import mark
from snpbook.views.static import Static
from snpbook.views.tables import table

_SHORT = 6
"""How many bytes of a digest a row shows."""


def chain(
    links: Sequence[Link], other: Sequence[Link] = (), caption: str = "The launch digest, page by page"
) -> Static:
    """A launch as a table; with `other`, another one, each digest is compared with that of the same row there."""
    rows = []
    for number, link in enumerate(links):
        info = link.info
        row = [str(number + 1), info.page_type.name, f"{info.gpa:#x}", _short(info.contents), _short(link.digest)]
        if other:
            same = number < len(other) and other[number].digest == link.digest
            row.append(mark(Result.PASSED, "the same") if same else mark(Result.FAILED, "another"))
        rows.append(row)
    head = ["page", "type", "GPA", "contents", "digest after it", *["compared"] * bool(other)]
    numbers = ["GPA", "contents", "digest after it"]
    return table("The launch digest, page by page", head, rows, mono=numbers, note=_total(links))


def page_info(link: Link, number: int) -> Static:
    """What is hashed for one page, field by field, and the digest that results."""
    values = dict(link.info)
    rows = [(f"{field.offset:#04x}", name, _value(values[name])) for name, field in PAGE_INFO.fields.items()]
    result = mark(Result.PASSED, "SHA-384 of the above") if link.hashed else mark(Result.FAILED, "not its SHA-384")
    rows.append(("", "the guest's digest now", link.digest.hex()))
    rows.append(("", "which is", result))
    return table(f"PAGE_INFO of page {number}", ["offset", "field", "value"], rows, mono=["value"])


def _total(links: Sequence[Link]) -> str:
    return f"launch digest: {links[-1].digest.hex()}" if links else "no page yet: the launch digest is 48 bytes of zero"


def _short(digest: bytes) -> str:
    return f"{digest[:_SHORT].hex()}\u2026" if any(digest) else "zero"


def _value(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() if any(value) else f"{len(value)} bytes of zero"
    return getattr(value, "name", None) or f"{value:#x}"
