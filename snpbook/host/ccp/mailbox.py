"""The driver's side of the mailbox: registers, time-outs, and the two command buffers.

Two buffers exist because taking a page back is a command that may nest in the preparation of another. A processor that
does not answer in time is dead for good. Nobody else writes the mailbox. Source: Linux 6.12
drivers/crypto/ccp/sev-dev.c.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from snpbook.hardware.ports import HostCpu
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator
from snpbook.host.refusal import KernelError, check
from snpbook.spec.bring_up import COMMAND_TIMED_OUT
from snpbook.spec.commands import (
    INTERRUPT_DONE,
    MAILBOX_COMMAND,
    RESPONSE_DONE,
    STATUS_MASK,
    Command,
    MailboxRegister,
    PspRegister,
)
from snpbook.spec.pages import PAGE_SHIFT
from snpbook.spec.status import Status

_LOW_HALF = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of the module ccp; time-outs are in seconds."""

    psp_cmd_timeout: int = 100
    psp_probe_timeout: int = 5
    init_ex_path: str = ""
    """The file of persistent data for INIT_EX; none: INIT, and the chip's flash."""
    psp_init_on_probe: bool = True


class CommandRefused(KernelError):
    """EIO: the firmware answered `firmware`. `buffer` is the command buffer as it left it."""

    buffer: bytes

    def __init__(self, command: Command, status: Status, buffer: bytes = b"") -> None:
        super().__init__(errno.EIO, command.name, Status.SUCCESS.name, status.name, "SNP", status)
        self.buffer = buffer


def rc(error: KernelError) -> int:
    """A failure as the log prints it: minus its errno."""
    return -(error.errno or errno.EIO)


def answered(error: KernelError) -> Status | None:
    """What the driver tells of a failed command: the status, 0 for none in time, None where nobody was asked."""
    return Status.SUCCESS if error.errno == errno.ETIMEDOUT else error.firmware


class Mailbox:
    """The mailbox of one secure processor, with its command buffers in host memory."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, log: KernelLog) -> None:
        self.cpu, self.memory, self.log = cpu, memory, log
        self.parameters = Parameters()
        self.timeout = self.parameters.psp_probe_timeout
        """Seconds that the next command may take."""
        self.dead = False
        """A command has timed out."""
        self.polling = False
        """Nobody serves interrupts: the kernel panics."""
        self._buffers = [page << PAGE_SHIFT for page in memory.allocate(2, align=2)]
        self._busy = [False, False]
        cpu.mailbox_write(PspRegister.INTERRUPT_ENABLE, INTERRUPT_DONE)

    def require_alive(self) -> None:
        """EBUSY for every command after one that has timed out."""
        check(not self.dead, errno.EBUSY, "the secure processor answers", "alive", "a command has timed out")

    def claim(self) -> int:
        """Take a command buffer: its address. EBUSY where both are in use."""
        if all(self._busy):
            self.log.psp("SEV: too many firmware commands in progress, no command buffers available.")
            raise KernelError(errno.EBUSY, "a command buffer is free", "one of two", "both in use")
        index = self._busy.index(False)
        self._busy[index] = True
        return self._buffers[index]

    def release(self) -> None:
        """Give the buffer back that was taken last."""
        self._busy[1 if self._busy[1] else 0] = False

    def send(self, command: Command, address: int) -> Status:
        """Issue a command whose buffer is ready, and wait: ETIMEDOUT where no answer comes."""
        self._write_address(address)
        register = MAILBOX_COMMAND.pack(command=command, interrupt=not self.polling)
        self.cpu.mailbox_write(MailboxRegister.COMMAND, int.from_bytes(register, "little"))
        answered = self.polling or self.cpu.mailbox_interrupt
        if answered:
            self.cpu.mailbox_write(PspRegister.INTERRUPT_STATUS, INTERRUPT_DONE)
        return self._answer(command, answered=answered)

    def send_run(self, command: Command, data: bytes, pages: range) -> tuple[int, Status]:
        """Issue a command for each page of a run until one is refused: how many succeeded, and the last status.

        No command of a run asks for an interrupt (MODEL).
        """
        self.require_alive()
        buffer = self.claim()
        self.cpu.write(buffer, data)
        self._write_address(buffer)
        done = self.cpu.mailbox_repeat(command, pages)
        status = self._answer(command)
        self.release()
        return done, status

    def _write_address(self, address: int) -> None:
        self.cpu.mailbox_write(MailboxRegister.ADDRESS_LOW, address & _LOW_HALF)
        self.cpu.mailbox_write(MailboxRegister.ADDRESS_HIGH, address >> 32)

    def _answer(self, command: Command, *, answered: bool = True) -> Status:
        register = self.cpu.mailbox_read(MailboxRegister.COMMAND)
        if not (answered and register & RESPONSE_DONE):
            self.log.psp(COMMAND_TIMED_OUT.format(command=command))
            self.dead = True
            rule = f"{command.name}: the secure processor answers"
            raise KernelError(errno.ETIMEDOUT, rule, f"within {self.timeout} s", "no response")
        self.timeout = self.parameters.psp_cmd_timeout
        return Status(register & STATUS_MASK)
