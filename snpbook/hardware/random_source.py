"""The random source of a machine: what silicon draws while it runs, such as the nonces of protected registers.

Every draw follows from the entropy of the boot and from the number of draws before it, so that two machines of one
seed draw alike. How real silicon draws is nobody's business above (MODEL).
"""

from __future__ import annotations

from hashlib import shake_256


class RandomSource:
    """Draws bytes; `drawn` counts the draws since boot."""

    def __init__(self, boot_entropy: bytes) -> None:
        self._seed, self.drawn = bytes(boot_entropy), 0

    def __repr__(self) -> str:
        return f"RandomSource({self.drawn} drawn)"

    def __call__(self, size: int) -> bytes:
        self.drawn += 1
        return shake_256(b"random source" + self._seed + self.drawn.to_bytes(8, "little")).digest(size)
