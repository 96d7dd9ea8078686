"""QEMU's option syntax: `key=value` with commas between, a doubled comma for one inside a value.

Sources: QEMU util/keyval.c, docs/system/qemu-manpage.rst.
"""

from __future__ import annotations

import re

from snpbook.host.vmm.configuration import VmmError

_PART = re.compile(r"((?:[^,]|,,)*)(?:,(?!,)|$)")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_UNITS = " KMGTPE"
_SIZE = re.compile(r"(\d+)([BKMGTPE]?)", re.ASCII | re.IGNORECASE)


def split(text: str, implied: str = "") -> dict[str, str]:
    """The keys of an option in order; the first part may be a value alone, of the key `implied`.

    A key that comes twice has its last value. `VmmError` in QEMU's words.
    """
    found: dict[str, str] = {}
    for number, part in enumerate(_parts(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if number or not implied:
                raise VmmError(f"Expected '=' after parameter '{part}'")
            key, value = implied, part
        if not _KEY.fullmatch(key):
            raise VmmError(f"Invalid parameter '{key}'")
        found[key] = value.replace(",,", ",")
    return found


def _parts(text: str) -> list[str]:
    parts, at = [], 0
    while at < len(text):
        match = _PART.match(text, at)
        assert match is not None
        parts.append(match[1])
        at = match.end()
    return parts


def join(values: dict[str, str], implied: str = "") -> str:
    """The reverse of `split`."""
    texts = {key: value.replace(",", ",,") for key, value in values.items()}
    return ",".join(value if key == implied else f"{key}={value}" for key, value in texts.items())


def size(key: str, text: str, default_unit: str = "B") -> int:
    """A number of bytes, as `2G` or `512`; a plain number counts `default_unit`s. `VmmError`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise VmmError(f"Parameter '{key}' expects a size value")
    unit = (match[2] or default_unit).upper()
    return int(match[1]) << 10 * max(_UNITS.find(unit), 0)
