"""The exercises: a registry of tasks with checks, hints, reference solutions and known wrong answers.

A check runs the reader's function against cases and names the first case that fails and the rule behind it.
Each exercise is proven by its own reference and wrong answers. The modules of a chapter register what it asks.
"""

from snpbook.exercises import (
    accepted_once,
    attestation,
    first_light,
    guest_launch,
    host_faults,
    host_setup,
    inside_the_guest,
    memory_encryption,
    memory_freshness,
    memory_regimes,
    memory_tweaks,
    page_moves,
    private_memory,
    reverse_map_table,
    secure_pages,
    secure_processor,
    stray_writes,
    vmpl_rights,
)
from snpbook.exercises.desk import check, hint, task
from snpbook.exercises.registry import exercise, exercises

__all__ = [
    "accepted_once",
    "attestation",
    "check",
    "exercise",
    "exercises",
    "first_light",
    "guest_launch",
    "hint",
    "host_faults",
    "host_setup",
    "inside_the_guest",
    "memory_encryption",
    "memory_freshness",
    "memory_regimes",
    "memory_tweaks",
    "page_moves",
    "private_memory",
    "reverse_map_table",
    "secure_pages",
    "secure_processor",
    "stray_writes",
    "task",
    "vmpl_rights",
]
