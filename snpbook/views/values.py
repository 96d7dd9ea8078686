"""How a single value reads in any view: numbers in hexadecimal with groups, long bytes cut, truth in words."""

import re
from enum import Enum

_SHORT = 12
_LONG_HEX = re.compile(r"\b[0-9a-f]{40,}\b")


def show(value: object) -> str:
    """A value in a word or two; nothing at all for None."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case Enum():
            return value.name
        case int():
            return str(value) if value < 10 else f"{value:#_x}"
        case bytes():
            return value.hex() if len(value) <= _SHORT else f"{value[:_SHORT].hex()}… ({len(value)} bytes)"
        case _:
            return _LONG_HEX.sub(lambda digits: f"{digits[0][: 2 * _SHORT]}…", str(value))
