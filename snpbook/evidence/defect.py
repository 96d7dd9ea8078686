"""What a defect is: one thing wrong with evidence that is otherwise good, and the verdict that it must meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snpbook.evidence.kit import Kit, Verdict
from snpbook.evidence.maker import Maker

Spoil = Callable[[Maker, Kit], Kit]
"""Takes what makes parts and the good evidence, and answers the spoilt one."""


@dataclass(frozen=True, slots=True)
class Defect:
    """One named defect; `signers` are those under which it can be had."""

    name: str
    tells: str
    verdict: Verdict
    spoil: Spoil
    signers: tuple[str, ...] = ("vcek", "vlek")
