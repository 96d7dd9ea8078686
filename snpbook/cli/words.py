"""Numbers and byte strings as people write them on a command line: 33, 0x21, or hexadecimal digits."""

from __future__ import annotations

import click


class Word(click.ParamType[int]):
    """A click type: an unsigned integer of so many bits, decimal or with the prefix 0x, 0o or 0b."""

    name = "integer"

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a usage error where it is none or does not fit."""
        try:
            number = int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is no integer: write it as 33 or 0x21", param, ctx)
        if number not in range(1 << self.bits):
            self.fail(f"{value} does not fit {self.bits} bits", param, ctx)
        return number


class Hex(click.ParamType[bytes]):
    """A click type: `size` bytes as hexadecimal digits; empty text stands for none where that is `optional`."""

    name = "hexadecimal digits"

    def __init__(self, size: int, *, optional: bool = False) -> None:
        self.size, self.optional = size, optional

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """The bytes; a usage error where the text is something else."""
        try:
            data = value if isinstance(value, bytes) else bytes.fromhex(value)
        except ValueError:
            self.fail("is not hexadecimal", param, ctx)
        if len(data) != self.size and (data or not self.optional):
            self.fail(f"has {len(data)} bytes instead of {self.size}", param, ctx)
        return data
