"""DER, as far as evidence needs it: one element behind the other, each with its tag and the bounds of its content.

Lengths must be minimal and inside what is there; nothing recurses and nothing is computed, so reading costs time in
proportion to the bytes. Source: ITU-T X.690 (distinguished encoding rules).
"""

from __future__ import annotations

from typing import NamedTuple

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID = 0x01, 0x02, 0x03, 0x04, 0x06
IA5_STRING, UTC_TIME, GENERALIZED_TIME = 0x16, 0x17, 0x18
SEQUENCE, CONTEXT_0, CONTEXT_3 = 0x30, 0xA0, 0xA3
LONG_FORM, _MAX_OCTETS, _LONG_TAG = 0x80, 4, 0x1F


class DerError(ValueError):
    """The bytes are no DER; the message says where."""


class Element(NamedTuple):
    """One element: it begins at `start`, its content at `content`, and it ends before `end`."""

    tag: int
    start: int
    content: int
    end: int


def element(data: bytes, at: int = 0, end: int | None = None) -> Element:
    """The element at `at`, which must end at or before `end`."""
    limit = len(data) if end is None else end
    if at + 2 > limit:
        raise DerError(f"an element is cut short at byte {at}")
    tag, length, content = data[at], data[at + 1], at + 2
    if tag & _LONG_TAG == _LONG_TAG:
        raise DerError(f"a tag of several bytes at {at}")
    if length >= LONG_FORM:
        octets = length - LONG_FORM
        content += octets
        if not 1 <= octets <= _MAX_OCTETS or content > limit:
            raise DerError(f"a length of {octets} octets at byte {at}")
        length = int.from_bytes(data[at + 2 : content], "big")
        if length < LONG_FORM or not data[at + 2]:
            raise DerError(f"a length that is not minimal at byte {at}")
    if content + length > limit:
        raise DerError(f"the element at byte {at} ends behind what holds it")
    return Element(tag, at, content, content + length)


def children(data: bytes, parent: Element) -> list[Element]:
    """The elements inside a constructed one."""
    found, at = [], parent.content
    while at < parent.end:
        found.append(element(data, at, parent.end))
        at = found[-1].end
    return found


def integer(data: bytes, at: Element) -> int | None:
    """A non-negative, minimal INTEGER; None for anything else."""
    body = data[at.content : at.end]
    if at.tag != INTEGER or not body or body[0] >= LONG_FORM:
        return None
    if len(body) > 1 and not body[0] and body[1] < LONG_FORM:
        return None
    return int.from_bytes(body, "big")
