"""The memory that legacy commands read and write, and what SNP asks of it once it is initialised.

A command that writes its own buffer wants its pages Firmware or Default and leaves the first of them to be reclaimed;
other pages that it writes keep their state. Source: firmware 1.55.25, dispatch and legacy commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from snpbook.firmware.pages import check_address, entry_of, look_up, reclaim, without_c_bit
from snpbook.hardware.rmp import U64
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import WRITES_COMMAND_BUFFER
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE, PageState
from snpbook.spec.status import FirmwareRefusal, Status, require

if TYPE_CHECKING:
    from snpbook.firmware.processor import Handler, SecureProcessor

_WRITABLE = (PageState.FIRMWARE, PageState.DEFAULT)


class ShortBuffer(FirmwareRefusal):
    """INVALID_LENGTH of a command that tells the length it needs: `buffer` is what it writes back."""

    def __init__(self, buffer: Record, rule: str, **needed: int) -> None:
        (name, size) = next((name, size) for name, size in needed.items() if getattr(buffer, name) != size)
        super().__init__(Status.INVALID_LENGTH, rule, size, getattr(buffer, name), "SEV")
        self.buffer = buffer.replace(**needed)


def issue(psp: SecureProcessor, command: Command, handler: Handler, buffer: Record, address: int) -> None:
    """Run a command, and write back the buffer that it answers with.

    That the page states come before the command's own checks is inferred. Reserved bytes are written as zero (MODEL).
    """
    held, spa = command in WRITES_COMMAND_BUFFER, without_c_bit(psp, address)
    if held:
        _require_writable(psp, spa, buffer.layout.size, "the command buffer", Status.INVALID_BUFFER_STATE)
    answer: Record | None = None
    try:
        answer = handler(psp, buffer)
    except ShortBuffer as refusal:
        answer = refusal.buffer
        raise
    finally:
        if answer is not None:
            psp.machine.memory.write(KeyId.UNENCRYPTED, spa, bytes(answer))
        if held and psp.rmp_built:  # after SNP_SHUTDOWN too, whatever the state (quirk)
            entry = entry_of(psp, spa)
            if entry.state is not PageState.DEFAULT:
                reclaim(psp, np.array([entry.head], U64))


def read_input(psp: SecureProcessor, address: int, size: int, name: str) -> bytes:
    """What the host hands over."""
    spa = check_address(psp, address, size, name, lookup=False)
    return psp.machine.memory.read(KeyId.UNENCRYPTED, spa, size)


def check_output(psp: SecureProcessor, address: int, size: int, name: str) -> int:
    """Memory that a legacy command writes: its address without the C-bit, if it may."""
    spa = check_address(psp, address, max(size, 1), name, lookup=psp.initialised)
    _require_writable(psp, spa, size, name, Status.INVALID_PAGE_STATE)
    return spa


def _require_writable(psp: SecureProcessor, spa: int, size: int, name: str, status: Status) -> None:
    if psp.initialised:
        pages = np.arange(spa >> PAGE_SHIFT, (spa + max(size, 1) - 1 >> PAGE_SHIFT) + 1, dtype=U64)
        _, states = look_up(psp, pages)
        bad = states[~np.isin(states, _WRITABLE)]
        found = PageState(int(bad[0])).name if len(bad) else ""
        require(not len(bad), status, f"state of {name}", "FIRMWARE or DEFAULT", found, "SEV")


def is_aligned(size: int, *addresses: int) -> bool:
    """Whether all addresses are multiples of `size`."""
    return not any(address % size for address in addresses)


