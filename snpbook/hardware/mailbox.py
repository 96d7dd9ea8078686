"""The mailbox: three registers in the PSP's BAR between the host and the secure processor.

The host writes the buffer's address and then the command; the processor behind it answers with the
status in the command register and leaves error information in the address registers. One command at a time. `repeat`
is the model's short hand for one command issued for page after page. Sources: Linux drivers/crypto/ccp/sev-dev.c;
firmware 1.55.25 (error information).

A command with the interrupt bit raises the device's interrupt when it is done, until the host clears its status; that
the status is set whatever is enabled is the model's choice (MODEL).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from snpbook.hardware.dram import whole
from snpbook.spec.commands import (
    COMMAND_SHIFT,
    INTERRUPT_DONE,
    LOCATION_BITS,
    MAILBOX_COMMAND,
    RESPONSE_DONE,
    STATUS_MASK,
    MailboxRegister,
    PspCapability,
    PspRegister,
)

_LOW_HALF = 2**32 - 1
_COMMAND_LIMIT = MAILBOX_COMMAND.fields["command"].limit
Register = MailboxRegister | PspRegister


class Processor(Protocol):
    """What sits behind the mailbox."""

    def execute(self, command: int, address: int) -> int:
        """Run one command with its buffer at `address`; the status code."""

    def execute_run(self, command: int, address: int, pages: range) -> tuple[int, int]:
        """Run one command for each page of a run, until the first failure: (pages done, status)."""


class Mailbox:
    """The registers, with the processor that `connect` puts behind them."""

    def __init__(self) -> None:
        self._registers: dict[Register, int] = dict.fromkeys((*MailboxRegister, *PspRegister), 0)
        self._processor: Processor | None = None
        self._busy = False

    def __repr__(self) -> str:
        return f"Mailbox({'connected' if self._processor else 'no processor'})"

    def connect(self, processor: Processor) -> None:
        self._processor = processor
        self._registers[PspRegister.FEATURES] = int(PspCapability.SEV)

    @property
    def interrupt(self) -> bool:
        """Whether the device's interrupt is raised: a status that is set, and enabled."""
        return bool(self._registers[PspRegister.INTERRUPT_STATUS] & self._registers[PspRegister.INTERRUPT_ENABLE])

    def read(self, register: Register) -> int:
        """Read a register; `ValueError` for one that is not modelled."""
        return self._registers[_known(register)]

    def write(self, register: Register, value: int) -> None:
        """Write a register; a write of COMMAND with the response bit clear starts the command.

        FEATURES keeps its value, and of INTERRUPT_STATUS the bits that are written as 1 are cleared. `ValueError` for a
        value that no register holds, and while a command runs.
        """
        if not 0 <= whole("value", value) < 1 << 32:
            raise ValueError(f"value = {value:#x}: a mailbox register holds 32 bits")
        self._require_idle()
        match _known(register):
            case PspRegister.FEATURES:
                return
            case PspRegister.INTERRUPT_STATUS:
                self._registers[register] &= ~value
            case _:
                self._registers[register] = value
        if register is MailboxRegister.COMMAND and not value & RESPONSE_DONE and self._processor:
            asked = MAILBOX_COMMAND.unpack(value.to_bytes(4, "little"))
            with self._running() as address:
                status = self._processor.execute(asked.command, address)
            self._answer(status)
            if asked.interrupt:
                self._registers[PspRegister.INTERRUPT_STATUS] |= INTERRUPT_DONE

    def repeat(self, command: int, pages: range) -> int:
        """Issue `command` once for each page of a run, its buffer naming the page; how many succeeded.

        The command register then holds the status of the last one. `ValueError` for a command that the register cannot
        hold, and for pages that are no run.
        """
        if not 0 <= whole("command", command) <= _COMMAND_LIMIT:
            raise ValueError(f"command = {command:#x}: the register holds ids up to {_COMMAND_LIMIT:#x}")
        if not isinstance(pages, range) or not pages or pages.start < 0 or pages.step < 0:
            raise ValueError(f"pages = {pages!r}: a run is an ascending range of at least one page number, from 0 on")
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


def _known(register: Register) -> Register:
    if not isinstance(register, Register):
        names = ", ".join(known.name for known in (*MailboxRegister, *PspRegister))
        raise ValueError(f"register = {register!r}: one of {names}")
    return register
