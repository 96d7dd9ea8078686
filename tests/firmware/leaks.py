"""What the chip alone may know, and where in memory it shows.

Secrets are collected from the processor's own state and from the contexts that it keeps encrypted; whatever a host can
read without a key is raw DRAM. Any 16 bytes in a row of a secret are a leak.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from snpbook.firmware.keys import Chip, attestation_key, memory_key
from snpbook.hardware.rmp import decode_states
from snpbook.spec.key_derivation import VLEK_LABEL
from snpbook.spec.pages import PageState
from snpbook.spec.policy import Tcb
from tests.firmware.worlds import context_of
from tests.machines import PAGE, Board

WINDOW = 16
DEBUG = 1 << 19
"""The policy bit by which a host reads a guest's memory, and with it the secrets page."""

Image = dict[int, NDArray[np.uint8]]


def secrets(board: Board) -> set[bytes]:
    """What no host may ever read, as it is now."""
    psp, size = board.psp, board.machine.product.memory_key_size
    found = {*_of_chip(psp.chip, psp.current_tcb), psp.chip.hashstick(psp.committed_tcb)}
    if psp.vlek is not None:
        found |= {psp.vlek, *_scalar(psp.vlek)}
    if psp.legacy.identity is not None:
        found |= {getattr(psp.legacy.identity, name) for name in ("oca_key", "pek_key", "pdh_key")}
    for guest in psp.legacy.guests.values():
        found |= {guest.vek_seed, memory_key(guest.vek_seed, size), guest.oek}
        found |= {guest.transport.encryption, guest.transport.integrity}
    rmp = board.machine.rmp
    states = decode_states(rmp.load(range(rmp.entries))) if psp.rmp_built else np.zeros(0, np.uint8)
    for page in np.flatnonzero(states == PageState.CONTEXT).tolist():
        context = context_of(board, page * PAGE)
        found |= {context.vek_seed, memory_key(context.vek_seed, size), context.oek, context.vmrk}
        if not context.policy & DEBUG:
            found |= {context.vmpck0, context.vmpck1, context.vmpck2, context.vmpck3}
    return {secret for secret in found if any(secret)}


@cache
def _of_chip(chip: Chip, tcb: Tcb) -> frozenset[bytes]:
    keys = chip.vcek(tcb), chip.cek
    scalars = [key.private_numbers().private_value.to_bytes(48, order) for key in keys for order in ("little", "big")]
    return frozenset({chip.secret, chip.nv_key, *chip.hashsticks(tcb), *scalars})


@cache
def _scalar(stick: bytes) -> tuple[bytes, bytes]:
    value = attestation_key(stick, VLEK_LABEL).private_numbers().private_value
    return value.to_bytes(48, "little"), value.to_bytes(48, "big")


def image(board: Board) -> Image:
    """All of DRAM that was ever touched, by region of 2 MB."""
    return {number: region.copy() for number, region in board.machine.dram._regions.items()}


def shown(board: Board, before: Image, known: Iterable[bytes]) -> list[tuple[int, bytes]]:
    """Where 16 bytes of a secret stand in memory that has changed since: (address, the bytes)."""
    windows = {bytes(row) for secret in known for row in sliding_window_view(np.frombuffer(secret, np.uint8), WINDOW)}
    windows.discard(bytes(WINDOW))
    heads = np.unique(np.frombuffer(b"".join(window[:8] for window in windows), "<u8"))
    found = {}
    for start in _changed(board, before):
        first = max(start - WINDOW + 1, 0)
        data = board.machine.dram.read(first, min(start + PAGE + WINDOW - 1, board.machine.dram.size) - first)
        words = np.ascontiguousarray(sliding_window_view(np.frombuffer(data, np.uint8), 8)).view("<u8")[:, 0]
        near = np.minimum(np.searchsorted(heads, words), len(heads) - 1)
        for at in np.flatnonzero(heads[near] == words).tolist():
            if data[at : at + WINDOW] in windows:
                found[first + at] = data[at : at + WINDOW]
    return sorted(found.items())


def _changed(board: Board, before: Image) -> Iterator[int]:
    """The addresses of pages that are not as they were."""
    for number, region in list(board.machine.dram._regions.items()):
        old = before.get(number, np.zeros(len(region), np.uint8))
        rows = (region != old).reshape(-1, PAGE).any(axis=1)
        yield from (number * len(region) + row * PAGE for row in np.flatnonzero(rows).tolist())
