"""A page that says of itself where it lies and how often it was written, under a digest.

With that a program tells a page that was replayed from one that was moved, and both from noise. It cannot tell that all
of its memory was replayed at once: that takes an integrity that nobody outside can rewind, which is what the RMP gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from snpbook.guest.workloads.corruption import Corrupted, Corruption, Finding
from snpbook.hardware.guest_cpu import GuestCpu
from snpbook.spec.pages import PAGE_SIZE

_WORD = 8
_HEAD = 2 * _WORD
_DIGEST = sha256().digest_size
CAPACITY = PAGE_SIZE - _HEAD - _DIGEST
"""Bytes of content: behind the address and the version, before the digest."""


async def write(cpu: GuestCpu, gpa: int, version: int, content: bytes) -> None:
    """Write a page whole. `ValueError` where the content does not fit."""
    if len(content) > CAPACITY:
        raise ValueError(f"content of {len(content)} bytes: a page holds {CAPACITY}")
    body = gpa.to_bytes(_WORD, "little") + version.to_bytes(_WORD, "little") + content.ljust(CAPACITY, b"\0")
    await cpu.write(gpa, body + sha256(body).digest())


async def read(cpu: GuestCpu, gpa: int, version: int) -> bytes:
    """The content of the page as it was written the `version`th time; `Corrupted` for anything else."""
    page: bytes = await cpu.read(gpa, PAGE_SIZE)
    findings = examine(page, gpa, version)
    if findings:
        raise Corrupted(findings)
    return page[_HEAD:-_DIGEST]


def examine(page: bytes, gpa: int, version: int) -> Sequence[Finding]:
    """What is wrong with a page; nothing where all is well."""
    body = page[:-_DIGEST]
    if sha256(body).digest() != page[-_DIGEST:]:
        found = "zeros" if not any(page) else f"{page[:_HEAD].hex()}... without its digest"
        return [Finding(gpa, Corruption.GARBAGE, found)]
    where, when = (int.from_bytes(body[i : i + _WORD], "little") for i in (0, _WORD))
    if where != gpa:
        return [Finding(gpa, Corruption.SWAPPED, f"page {where:#x}, version {when}")]
    if when != version:
        return [Finding(gpa, Corruption.STALE, f"version {when}, where {version} was written")]
    return []
