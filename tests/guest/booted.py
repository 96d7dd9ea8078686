"""Guests that have booted, shared by tests: each gets the system back as it was after the boot."""

from __future__ import annotations

from functools import cache

from snpbook.hardware.snapshot import Snapshot
from snpbook.system import Guest
from tests.machines import booted, launched


@cache
def _booted(era: str, memory: str, vcpus: int, kind: str) -> tuple[Guest, Snapshot]:
    guest = launched(booted(era=era), memory=memory, vcpus=vcpus, kind=kind)
    guest.boot()
    return guest, guest.system.snapshot()


def fresh(era: str = "mainline", *, memory: str = "12 MiB", vcpus: int = 1, kind: str = "snp") -> Guest:
    """A guest that has booted and done nothing since."""
    guest, snapshot = _booted(era, memory, vcpus, kind)
    snapshot.restore()
    return guest
