"""Physical attacks on DRAM: whoever holds the DIMMs changes bytes without asking the RMP.

Source: what SNP leaves to the attacker with a probe on the memory bus; the launch digest has to catch it.
"""

from __future__ import annotations

from collections.abc import Callable

from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.rmp import RMP_ENTRY
from snpbook.system import System
from snpbook.trace import Event, Instruction


def flip_before_measurement(system: System, offset: int = 0) -> Callable[[], None]:
    """Lie in wait for the first page that a launch assigns, and flip a bit in its byte `offset`.

    The moment is between RMPUPDATE, which locks the host out, and SNP_LAUNCH_UPDATE, which measures.
    The value returned calls the attack off.
    """

    def strike(event: Event) -> None:
        if isinstance(event, Instruction) and event.name == "RMPUPDATE" and _launching(event):
            stop()
            spa = (int(event.pages[0]) << PAGE_SHIFT) + offset
            dram = system.machine.dram
            dram.write(spa, bytes([dram.read(spa, 1)[0] ^ 1]))

    stop = system.trace.subscribe(strike)
    return stop


def _launching(event: Instruction) -> bool:
    """Whether the pages became a guest's and immutable: Pre-Guest."""
    entry = RMP_ENTRY.unpack(event.after[0].tobytes())
    return bool(entry.asid and entry.immutable)
