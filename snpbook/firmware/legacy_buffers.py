"""The memory that legacy commands write, and what SNP asks of it once it is initialised; lengths that do not suffice.

What they write must be Firmware or Default and keeps its state; their own buffers are the business of `buffers`.
Source: firmware 1.55.25, dispatch and legacy commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from snpbook.firmware.pages import check_address, look_up
from snpbook.hardware.rmp import U64
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PageState
from snpbook.spec.status import FirmwareRefusal, Status, require

if TYPE_CHECKING:
    from snpbook.firmware.processor import SecureProcessor

_WRITABLE = (PageState.FIRMWARE, PageState.DEFAULT)


class ShortBuffer(FirmwareRefusal):
    """INVALID_LENGTH of a command that tells the length it needs: `buffer` is what it writes back."""

    def __init__(self, buffer: Record, rule: str, expected: object, found: object) -> None:
        super().__init__(Status.INVALID_LENGTH, rule, expected, found, "SEV")
        self.buffer = buffer


def check_output(psp: SecureProcessor, address: int, size: int, name: str) -> int:
    """Memory that a legacy command writes, at least one byte: its address without the C-bit, if it may."""
    spa = check_address(psp, address, size, name, lookup=psp.initialised)
    require_writable(psp, spa, size, name, Status.INVALID_PAGE_STATE)
    return spa


def require_writable(psp: SecureProcessor, spa: int, size: int, name: str, status: Status) -> None:
    """Once SNP is initialised: each page of a range that `check_address` has passed is Firmware or Default."""
    if psp.initialised:
        _, states = look_up(psp, np.arange(spa >> PAGE_SHIFT, (spa + size - 1 >> PAGE_SHIFT) + 1, dtype=U64))
        wrong = [PageState(state).name for state in np.unique(states[~np.isin(states, _WRITABLE)]).tolist()]
        require(not wrong, status, f"states of {name}", "FIRMWARE or DEFAULT", wrong, "SEV")
