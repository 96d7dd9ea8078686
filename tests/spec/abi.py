"""The headers of Linux 6.12, compiled and read back (`abi_linux_6.12.json`), beside which layouts are laid."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from snpbook.spec.layout import Layout

SOURCE = Path(__file__).resolve().parents[2].parent / "shared" / "vectors" / "abi_linux_6.12.json"
needs_headers = pytest.mark.skipif(not SOURCE.exists(), reason=f"{SOURCE.name} is not at hand")


@cache
def headers() -> Any:
    return json.loads(SOURCE.read_text())


def constants() -> dict[str, int]:
    """All constants of the headers, by name."""
    return {name: value for group in headers()["constants"].values() for name, value in group.items()}


class Pair:
    """A layout and its struct. `names` are our fields whose name differs there; None: the kernel has no such field."""

    def __init__(self, layout: Layout, struct: str, *, size: int | None = None, **names: str | None) -> None:
        self.layout, self.struct, self.names = layout, struct, names
        self.size = layout.size if size is None else size
        """Of the kernel's struct, where it describes a part only."""

    def __str__(self) -> str:
        return f"{self.layout.name}-{self.struct}"

    def compare(self) -> None:
        """Every field of ours lies where the kernel has it, apart from those that the kernel does not know."""
        struct = headers()["structs"][self.struct]
        assert struct["size"] == self.size
        assert self.names.keys() <= self.layout.fields.keys()
        for ours, field in self.layout.fields.items():
            theirs = self.names.get(ours, ours)
            if theirs is not None:
                assert theirs in struct["fields"], f"{ours}: give the kernel's name for it, or None"
                assert (field.first_bit, field.width) == place(struct["fields"][theirs]), ours


def place(theirs: list[Any]) -> tuple[int, int]:
    """First bit and width of a field of the header."""
    if len(theirs) == 4:
        byte, _, first, width = theirs
        return byte * 8 + first, width
    return theirs[0] * 8, theirs[1] * 8
