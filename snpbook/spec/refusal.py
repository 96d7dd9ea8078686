"""Refusals carry their reason: which rule, what it expected, what it found, where it is written.

Whose refusal it is shows in the class: the firmware's, the kernel's, the hardware's, the verifier's
are subclasses beside the numbers that they answer with.
"""

from enum import Enum


class Refusal(Exception):
    """Something said no, and why."""

    def __init__(self, rule: str, expected: object = "", found: object = "", cite: str = "") -> None:
        super().__init__(rule)
        self.rule, self.expected, self.found, self.cite = rule, expected, found, cite

    def __str__(self) -> str:
        values = {"expected": self.expected, "found": self.found}
        told = [f"{word} {_show(value)}" for word, value in values.items() if value != ""]
        return f"{self.rule} ({', '.join(told)})" if told else self.rule

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def explain(self) -> str:
        """The reason in full, with its source: what a notebook shows."""
        return f"{self} [{self.cite}]" if self.cite else str(self)

    def _repr_html_(self) -> str:
        from html import escape  # only notebooks draw tables, and every command imports this module

        rows = [("rule", self.rule), ("expected", self.expected), ("found", self.found), ("source", self.cite)]
        body = "".join(
            f'<tr><th scope="row">{name}</th><td>{escape(_show(value))}</td></tr>'
            for name, value in rows
            if value != ""
        )
        return f"<table><caption>{escape(str(self))}</caption>{body}</table>"


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 24 else f"{value[:16].hex()}..."
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10:
        return f"{value:#x}"
    return str(value)
