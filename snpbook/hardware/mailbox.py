"""The mailbox: three registers in the PSP's BAR between the host and the secure processor.

The host writes the buffer's address and then the command; the processor behind it answers with the
status in the command register. One command at a time. `repeat` is the model's short hand for one
command issued for page after page. Source: Linux drivers/crypto/ccp/sev-dev.c; spec of the registers.
"""

from __future__ import annotations

from typing import Protocol

from snpbook.hardware.dram import whole
from snpbook.spec.commands import COMMAND_SHIFT, MAILBOX_COMMAND, RESPONSE_DONE, STATUS_MASK, MailboxRegister


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

    def __repr__(self) -> str:
        return f"Mailbox({'connected' if self._processor else 'no processor'})"

    def connect(self, processor: Processor) -> None:
        self._processor = processor

    def read(self, register: MailboxRegister) -> int:
        return self._registers[register]

    def write(self, register: MailboxRegister, value: int) -> None:
        """Write a register; a write of COMMAND with the response bit clear starts the command."""
        if not 0 <= whole("value", value) < 1 << 32:
            raise ValueError(f"value = {value:#x}: a mailbox register holds 32 bits")
        self._registers[register] = value
        if register is MailboxRegister.COMMAND and not value & RESPONSE_DONE and self._processor:
            command = MAILBOX_COMMAND.unpack(value.to_bytes(4, "little")).command
            self._answer(self._processor.execute(command, self._address))

    def repeat(self, command: int, pages: range) -> int:
        """Issue `command` once for each page of a run, its buffer naming the page; how many succeeded.

        The command register then holds the status of the last one.
        """
        self._registers[MailboxRegister.COMMAND] = command << COMMAND_SHIFT
        if self._processor is None:
            return 0
        done, status = self._processor.execute_run(command, self._address, pages)
        self._answer(status)
        return done

    @property
    def _address(self) -> int:
        low, high = self._registers[MailboxRegister.ADDRESS_LOW], self._registers[MailboxRegister.ADDRESS_HIGH]
        return high << 32 | low

    def _answer(self, status: int) -> None:
        self._registers[MailboxRegister.COMMAND] = RESPONSE_DONE | status & STATUS_MASK
