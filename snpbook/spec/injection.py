"""The #HV doorbell page: how a guest under restricted injection hears of interrupts.

Sources: GHCB specification (through Linux patches and COCONUT-SVSM); the MSR that ends an interrupt is from memory.
"""

from __future__ import annotations

from snpbook.spec.cite import Cite
from snpbook.spec.layout import Layout, bits, uint
from snpbook.spec.pages import PAGE_SIZE

DOORBELL = Layout(
    "HvDoorbellPage",
    PAGE_SIZE,
    Cite("GHCB", "#HV doorbell page"),
    [
        bits("vector", 0, 2, 0, 8, note="the interrupt that is pending; 0 for none"),
        bits("nmi", 0, 2, 8),
        bits("machine_check", 0, 2, 9),
        bits("no_further_signal", 0, 2, 15, note="#HV was injected, and need not be again until the guest has looked"),
        uint("no_eoi_required", 2, 1, note="the guest clears it, in the place of ending the interrupt"),
    ],
)
PENDING_SIZE = 2
"""The word of pending events, which a guest takes in one step."""
FIRST_INTERRUPT = 0x20
"""Vectors below it are those of exceptions."""
SYSTEM_CALL = 0x80
"""int 0x80: Linux's system calls for 32-bit programs."""
EOI_MSR = 0x80B
"""x2APIC: a write ends the interrupt that is in service."""
