"""The exit codes of the command line, and the errors that carry them.

Scripts rely on these numbers. A command raises one of the classes below; `snpbook.cli.main` alone turns it into one
or two lines on standard error and the exit code. Wrong usage is click's own `UsageError` and ends with 64.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    FAILED = 1
    MALFORMED = 2
    NOT_GENUINE = 3
    REFUSED = 4
    USAGE = 64
    INTERRUPTED = 130


class CliError(Exception):
    """A command that ends without its result: `problem` names the file and what is wrong, `remedy` what to do."""

    code = Exit.FAILED

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


class Malformed(CliError):
    """The input cannot be read: missing, wrong length, or its outer form (hex, PEM armour, outermost DER) is broken."""

    code = Exit.MALFORMED


class NotGenuine(CliError):
    """The evidence was read, and it is not what it claims to be."""

    code = Exit.NOT_GENUINE


class RefusedByPolicy(CliError):
    """The evidence is genuine, and the policy does not want it."""

    code = Exit.REFUSED


INPUT_LIMIT = 1 << 30
"""No firmware, kernel, initial RAM disk or report is larger; a device that never ends is."""


def read_input(path: str | Path) -> bytes:
    """The bytes of a file that the user named; `Malformed` where it cannot be read or never ends."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123  pathlib takes as long to load as a firmware to measure
            return read_stream(file, path)
    except OSError as error:
        shown = str(path) or "the empty path"
        raise Malformed(f"{shown}: cannot be read ({error.strerror})", "Check the path and its permissions.") from error


def read_stream(stream: BinaryIO, name: str | Path) -> bytes:
    """The bytes of what is open already, called `name` where it never ends."""
    data = stream.read(INPUT_LIMIT + 1)
    if len(data) > INPUT_LIMIT:
        raise Malformed(f"{name}: more than {INPUT_LIMIT >> 30} GiB", "Name a file, not a device.")
    return data
