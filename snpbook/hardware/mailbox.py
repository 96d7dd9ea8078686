"""The mailbox: three registers in the PSP's BAR between the host and the secure processor.

The host writes the buffer's address and then the command; the processor behind it answers with the
status in the command register and leaves error information in the address registers. One command at a time. `repeat`
is the model's short hand for one command issued for page after page. Sources: Linux drivers/crypto/ccp/sev-dev.c;
firmware 1.55.25 (error information).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from snpbook.hardware.dram import whole
from snpbook.spec.commands import (
    COMMAND_SHIFT,
    LOCATION_BITS,
    MAILBOX_COMMAND,
    RESPONSE_DONE,
    STATUS_MASK,
    MailboxRegister,
)

_LOW_HALF = 2**32 - 1


class Processor(Protocol):
    """What sits behind the mailbox."""

    def execute(self, command: int, address: int) -> int:
        """Run one command with its buffer at `address`; the status code."""

    def execute_run(self, command: int, address: int, pages: range) -> tuple[int, int]:
        """Run one command for each page of a run, until the first failure: (pages done, status)."""


class Mailbox:
    """The registers, with the processor that `connect` puts behind them."""

    def __init__(self) -> None:
        self._registers = dict.fromkeys(MailboxRegister, 0)
        self._processor: Processor | None = None
        self._busy = False

    def __repr__(self) -> str:
        return f"Mailbox({'connected' if self._processor else 'no processor'})"

    def connect(self, processor: Processor) -> None:
        self._processor = processor

    def read(self, register: MailboxRegister) -> int:
        """Read a register; `ValueError` for one that is not modelled, such as those of interrupts (LIMITATIONS)."""
        return self._registers[_known(register)]

    def write(self, register: MailboxRegister, value: int) -> None:
        """Write a register; a write of COMMAND with the response bit clear starts the command.

        `ValueError` for a value that no register holds, and while a command runs.
        """
        if not 0 <= whole("value", value) < 1 << 32:
            raise ValueError(f"value = {value:#x}: a mailbox register holds 32 bits")
        self._require_idle()
        self._registers[_known(register)] = value
        if register is MailboxRegister.COMMAND and not value & RESPONSE_DONE and self._processor:
            command = MAILBOX_COMMAND.unpack(value.to_bytes(4, "little")).command
            with self._running() as address:
                status = self._processor.execute(command, address)
            self._answer(status)

    def repeat(self, command: int, pages: range) -> int:
        """Issue `command` once for each page of a run, its buffer naming the page; how many succeeded.

        The command register then holds the status of the last one.
        """
        self._require_idle()
        self._registers[MailboxRegister.COMMAND] = command << COMMAND_SHIFT
        if self._processor is None:
            return 0
        with self._running() as address:
            done, status = self._processor.execute_run(command, address, pages)
        self._answer(status)
        return done

    def push(self, location: int) -> None:
        """Push the processor's id of a place in its code onto the address registers, the stack of a command's errors.

        After a command that met none they hold 0.
        """
        low, high = self._address
        stack = (high << 32 | low) << LOCATION_BITS | location
        self._registers[MailboxRegister.ADDRESS_LOW] = stack & _LOW_HALF
        self._registers[MailboxRegister.ADDRESS_HIGH] = stack >> 32 & _LOW_HALF

    @property
    def _address(self) -> tuple[int, int]:
        return self._registers[MailboxRegister.ADDRESS_LOW], self._registers[MailboxRegister.ADDRESS_HIGH]

    def _require_idle(self) -> None:
        if self._busy:
            raise ValueError("the mailbox takes one command at a time, and one is running")

    @contextmanager
    def _running(self) -> Iterator[int]:
        """While a command runs: its buffer's address. The registers that held it are its stack of errors by then."""
        low, high = self._address
        self._registers[MailboxRegister.ADDRESS_LOW] = self._registers[MailboxRegister.ADDRESS_HIGH] = 0
        self._busy = True
        try:
            yield high << 32 | low
        finally:
            self._busy = False

    def _answer(self, status: int) -> None:
        self._registers[MailboxRegister.COMMAND] = RESPONSE_DONE | status & STATUS_MASK


def _known(register: MailboxRegister) -> MailboxRegister:
    if not isinstance(register, MailboxRegister):
        raise ValueError(f"register = {register!r}: one of {', '.join(known.name for known in MailboxRegister)}")
    return register
