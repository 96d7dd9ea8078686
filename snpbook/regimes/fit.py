"""How many guests fit on a host: they are started, launched, and use their share of memory, until one finds no room.

Small guests may run out of ASIDs before they run out of memory: SEV-ES and SNP share those below the least SEV ASID.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from snpbook.host.refusal import KernelError
from snpbook.regimes.regime import Regime
from snpbook.regimes.workload import share

_NO_ROOM = (errno.ENOMEM, errno.ELOOP, errno.EBUSY)
"""No memory; the same where KVM only logs it, and the guest faults again and again; no ASID."""


@dataclass(frozen=True, slots=True)
class Fit:
    """So many guests run, with so many pages of the host free. `refused` is what the next one met, once it is full."""

    guests: int
    free: int
    refused: str = ""


def filling(
    kind: str, backend: str, *, touched: int, guest: int | str = "16 MiB", installed: int | str = "128 MiB"
) -> Iterator[Fit]:
    """Start guests that use `touched` per cent of the memory behind their firmware; how it stands after each of them.

    A guest converts its pages and takes them into use. The last value tells why no more fit. `ValueError` for a share
    outside of 0 to 100.
    """
    if not 0 <= touched <= 100:
        raise ValueError(f"touched = {touched}: 0 to 100 per cent")
    regime, guests = Regime(kind, backend, memory=guest, installed=installed), 0
    gfns = regime.pages[: share(regime.pages, touched)] if touched else range(0)
    try:
        while True:
            regime.guest.launch()
            if gfns:
                regime.convert(gfns, private=True)
                regime.use(gfns)
            guests += 1
            yield Fit(guests, regime.host.memory.free)
            regime.guest = regime.start()
    except KernelError as error:
        if error.errno not in _NO_ROOM:
            raise
        yield Fit(guests, regime.host.memory.free, str(error))


def guests_that_fit(
    kind: str, backend: str, *, touched: int, guest: int | str = "16 MiB", installed: int | str = "128 MiB"
) -> int:
    """The number of guests at the end of `filling`."""
    *_, last = filling(kind, backend, touched=touched, guest=guest, installed=installed)
    return last.guests
