"""The machines of the chapter on memory encryption: one for each memory cipher, small, with keys for all its guests.

They are engines with memory behind them and nothing else: no cores, no firmware and no RMP, which come in later
chapters. Memory begins as noise, as a running machine leaves it.
"""

from __future__ import annotations

from hashlib import shake_256

import numpy as np

from snpbook.hardware.cache import Cache
from snpbook.hardware.dram import Dram
from snpbook.hardware.encryption import MemoryEncryption
from snpbook.spec.encryption import SCHEMES
from snpbook.spec.pages import LARGE_PAGE_SIZE
from snpbook.spec.products import product
from snpbook.views.encryption import cache_lines, constants, generations, key_rules
from snpbook.views.microscope import Machine
from snpbook.views.static import Static
from snpbook.widgets.microscope import Microscope

MACHINES = {"naples-xe": "EPYC 7251", "naples": "", "rome": "", "milan": "", "genoa": ""}
"""The machines by name, with the part where it is an exception to its product: the 7251 is a Naples with XE."""


class Lab:
    """Five machines in `machines`, and `microscope` to look into them."""

    def __init__(self, seed: str = "memory encryption") -> None:
        self.products = {name: product(name.removesuffix("-xe")) for name in MACHINES}
        self.machines = {name: self._machine(name, seed) for name in MACHINES}
        self.microscope = Microscope(self.machines, "milan", "attack at dawn", 0x1000)

    def __repr__(self) -> str:
        return f"Lab({', '.join(self.machines)})"

    def cache(self, name: str) -> Cache:
        """A write-back cache in front of a machine's engine, coherent if the product's is."""
        return Cache(self.machines[name].engine, coherent=self.products[name].coherent)

    def lines(self, cache: Cache) -> Static:
        """What the cache holds."""
        return cache_lines(cache.lines())

    def constants(self, name: str) -> Static:
        """The first constants of a machine's tweak."""
        return constants(self.machines[name].engine.constants[:8], self.machines[name].title)

    def generations(self) -> Static:
        """The memory encryption of each product."""
        return generations([self.products[name] for name in MACHINES if not MACHINES[name]])

    def key_rules(self) -> Static:
        """Who decides encryption."""
        return key_rules()

    def _machine(self, name: str, seed: str) -> Machine:
        chip, own = self.products[name], f"{seed} {name}".encode()
        scheme = name if MACHINES[name] else chip.encryption
        dram = Dram(LARGE_PAGE_SIZE)
        dram.write(0, np.frombuffer(shake_256(b"noise" + own).digest(LARGE_PAGE_SIZE), np.uint8))
        engine = MemoryEncryption(dram, scheme, own)
        for asid in range(1, chip.asid_limit + 1):
            engine.install(asid, shake_256(f"ASID {asid}".encode() + own).digest(SCHEMES[scheme].key_size))
        title = f"{MACHINES[name] or chip.title}, {SCHEMES[scheme].title}"
        return Machine(title, engine, chip.asid_limit)
