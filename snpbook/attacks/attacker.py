"""One attempt of a hostile host: a class of actions and a seed, and nothing that the host could not know.

An action has its moments, and strikes at some of them. Everything random comes from class and seed, so that an attempt
can be made again. Sources: none; the choice of numbers is MODEL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from snpbook.attacks.ghcb import Moment, Stage
from snpbook.hardware.exits import HostPageFault
from snpbook.spec.ghcb import Nae
from snpbook.spec.pages import PAGE_SIZE

REQUESTS = (Nae.GUEST_REQUEST, Nae.EXTENDED_GUEST_REQUEST)
REGISTERS = ("rax", "rbx", "rcx", "rdx")
_WORD = 1 << 64
_OFTEN = (1.0, 0.5, 0.2, 0.1)


@dataclass(frozen=True, slots=True)
class Tampering:
    """A class of actions: in words, its moments, and one action of it, which says whether it did anything."""

    says: str
    when: Callable[[Moment], bool]
    act: Callable[[Attacker, Moment], bool]


@dataclass(slots=True)
class Attacker:
    """An attempt, to be called at each moment: it strikes at some of its own.

    `private` and `shared` are addresses of guest pages that are worth an attack.
    """

    name: str
    tampering: Tampering
    seed: int
    private: Sequence[int]
    shared: Sequence[int]
    random: Random = field(init=False)
    often: float = field(init=False)
    """How likely it strikes at a moment of its own."""
    strikes: int = 0
    responses: list[bytes] = field(default_factory=list)
    """Pages that the firmware has answered with."""
    changed: list[tuple[int, bytes]] = field(default_factory=list)
    """Shared bytes as they were before they were changed."""
    held: dict[int, int] = field(default_factory=dict)
    """Pages that the guest has validated and that the host has put aside: guest address and frame."""

    def __post_init__(self) -> None:
        self.random = Random(f"{self.name} {self.seed}")
        self.often = self.random.choice(_OFTEN)

    def __call__(self, moment: Moment) -> None:
        if self.tampering.when(moment) and self.random.random() < self.often:
            try:
                self.strikes += self.tampering.act(self, moment)
            except HostPageFault:  # a write to a page of the guest: the processor refuses it
                self.strikes += 1
        if moment.stage is Stage.ENTRY and moment.event in REQUESTS and moment.page:
            self.responses.append(moment.read(moment.page.sw_exit_info_2, PAGE_SIZE))

    def number(self) -> int:
        """A 64-bit number such as attacks are made of: small, huge, negative, or any."""
        edge = 1 << self.random.randrange(_WORD.bit_length() - 1)
        return self.random.choice((0, 1, edge, edge - 1, _WORD - edge, self.random.randrange(_WORD)))

    def flipped(self, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
        """`data` with one bit changed, in a byte from `start` to `stop`."""
        at = self.random.randrange(start, len(data) if stop is None else stop)
        return data[:at] + bytes([data[at] ^ 1 << self.random.randrange(8)]) + data[at + 1 :]
