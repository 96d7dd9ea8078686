"""What a relying party found: each check by name, with what it expected, what it met, and where the rule is written.

`NotGenuine` ends a verification at the first failed check and carries all that were made; `MalformedEvidence` means
that there is nothing to judge, because the outer form is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple, TypeVar

from snpbook.spec.refusal import Refusal

Found = TypeVar("Found")


class MalformedEvidence(ValueError):
    """The outer form is broken: wrong length, no hexadecimal, no PEM armour, an outermost DER length that is off."""


class Result(StrEnum):
    """How a check ended; one that nobody asked for is skipped, which is not passed."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Check(NamedTuple):
    """One question put to the evidence, and the answer; a tuple, because every report makes two dozen."""

    name: str
    result: Result
    expected: object = ""
    found: object = ""
    cite: str = ""

    def __repr__(self) -> str:
        return f"<{self.name}: {self.result}>"


class NotGenuine(Refusal):
    """The evidence is not what it claims to be.

    `check` names the check that failed, `checks` holds all that were made, the failed one last.
    """

    def __init__(
        self,
        check: str,
        rule: str,
        expected: object = "",
        found: object = "",
        cite: str = "",
        made: tuple[Check, ...] = (),
    ) -> None:
        super().__init__(rule, expected, found, cite)
        self.check = check
        self.checks = (*made, Check(check, Result.FAILED, expected, found, cite))


class Checklist:
    """The checks of one verification, in the order in which they are made."""

    def __init__(self) -> None:
        self.made: list[Check] = []

    def require(self, name: str, met: bool, rule: str, expected: object, found: object, cite: str) -> None:
        """Note a passed check, or raise `NotGenuine`; `rule` says what failing it means."""
        if not met:
            raise NotGenuine(name, rule, expected, found, cite, tuple(self.made))
        self.made.append(Check(name, Result.PASSED, expected, found, cite))

    def follow(self, judge: Callable[[], tuple[Found, tuple[Check, ...]]]) -> Found:
        """Go on with the checks that somebody else makes, or made before; a refusal then carries all."""
        try:
            found, made = judge()
        except NotGenuine as refusal:
            refusal.checks = (*self.made, *refusal.checks)
            raise
        self.made += made
        return found

    def skip(self, name: str, reason: str, cite: str) -> None:
        """Note a check that could not be made, and why."""
        self.made.append(Check(name, Result.SKIPPED, "", reason, cite))
