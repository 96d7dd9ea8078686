"""What a call is refused with: the code in RAX, and registers that tell more."""

from __future__ import annotations


class Refused(Exception):
    """A call that its caller got wrong. `registers` are given back all the same, as the sizes that a buffer needs."""

    def __init__(self, code: int, rule: str, **registers: int) -> None:
        super().__init__(rule)
        self.code, self.rule, self.registers = code, rule, registers


def check(condition: bool, code: int, rule: str) -> None:
    """Refuse a call whose condition does not hold."""
    if not condition:
        raise Refused(code, rule)
