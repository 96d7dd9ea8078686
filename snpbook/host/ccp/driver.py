"""One command from end to end: its buffer, what SNP asks of a legacy one, its answer.

A refusal of the firmware is EIO with its status; whatever it wrote comes back with it. Source: Linux 6.12
drivers/crypto/ccp/sev-dev.c (__sev_do_cmd_locked).
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

from snpbook.hardware.ports import HostCpu
from snpbook.host.ccp.legacy import ADDRESS_SIZE, OUTPUTS, WRITES_ITS_BUFFER, Lent, Output
from snpbook.host.ccp.mailbox import CommandRefused
from snpbook.host.ccp.pages import FirmwarePages
from snpbook.host.ccp.persistent import CHANGING, PersistentData
from snpbook.host.log import KernelLog
from snpbook.host.memory import PageAllocator
from snpbook.host.refusal import KernelError
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFERS
from snpbook.spec.layout import Record
from snpbook.spec.pages import PAGE_SHIFT, PAGE_SIZE
from snpbook.spec.status import Status


class Driver(FirmwarePages):
    """The commands of one secure processor."""

    def __init__(self, cpu: HostCpu, memory: PageAllocator, log: KernelLog) -> None:
        super().__init__(cpu, memory, log)
        self.persistent: PersistentData | None = None
        """Where INIT_EX keeps what else is in flash."""

    def command(self, command: Command, **fields: Any) -> Record:
        """Issue a command that has a buffer: the buffer as the firmware left it. Errors as of `submit`."""
        layout = BUFFERS[command]
        if layout is None:
            raise ValueError(f"{command.name} has no buffer: submit it")
        return layout.unpack(self.submit(command, layout.pack(**fields)))

    def command_run(self, command: Command, pages: range, **fields: Any) -> None:
        """Issue an SNP command for each page of a run; EIO at the first that is refused."""
        layout = BUFFERS[command]
        assert layout is not None, command
        _, status = self.send_run(command, layout.pack(**fields), pages)
        if status is not Status.SUCCESS:
            raise CommandRefused(command, status)

    def submit(self, command: Command, data: bytes = b"") -> bytes:
        """Issue a command with the bytes of its buffer: the bytes as the firmware left them.

        `CommandRefused` EIO where the firmware refuses, with those bytes as well; ETIMEDOUT, and EBUSY ever after,
        where it does not answer; EFAULT where memory cannot be lent or taken back. A failure before the command leaves
        its command buffer in use for good: after two of them every command with a buffer is EBUSY.
        """
        self.require_alive()
        if not data:
            return self._judge(command, self.send(command, 0), data)
        buffer = self.claim()
        self.cpu.write(buffer, data)
        lent = self._lend(command, buffer, data) if self._legacy(command) else []
        try:
            status = self.send(command, buffer)
        except KernelError:
            for loan in lent:  # nobody can take them back any more
                self.leaks.forget(loan.pages)
            raise
        failure = self._take_buffer_back(command, buffer) if self._legacy(command) else None
        answer = self.cpu.read(buffer, len(data))
        if failure is None:
            self.release()
        for loan in lent:  # also where the buffer is lost (MODEL: Linux leaves them with the firmware then)
            try:
                self._take_loan_back(loan)
            except KernelError as error:
                failure = error
            answer = loan.with_origin(answer, command)
        if failure is not None:
            rule = f"{command.name}: its memory comes back"
            raise KernelError(errno.EFAULT, rule, "hypervisor pages", str(failure), firmware=status) from failure
        return self._judge(command, status, answer)

    def flush(self) -> None:
        """WBINVD on all cores and SNP_DF_FLUSH: dirty ASIDs become clean."""
        self.cpu.wbinvd()
        self.submit(Command.SNP_DF_FLUSH)

    def _judge(self, command: Command, status: Status, answer: bytes) -> bytes:
        if status is not Status.SUCCESS:
            raise CommandRefused(command, status, answer)
        if self.persistent is not None and command in CHANGING:
            self.persistent.store()
        return answer

    def _legacy(self, command: Command) -> bool:
        """Whether SNP changes the rules for this command's memory."""
        return self.snp_initialised and command < Command.SNP_INIT

    # Memory that the firmware owns during one command.

    def _lend(self, command: Command, buffer: int, data: bytes) -> list[Lent]:
        """Make a command's output the firmware's, and the buffer that it writes; EFAULT, with all of it undone."""
        layout = BUFFERS[command]
        assert layout is not None, command
        record, lent = layout.unpack(data), list[Lent]()
        try:
            for output in OUTPUTS.get(command, ()):
                if getattr(record, output.length):
                    lent.append(self._lend_output(output, record))
            for loan in lent:
                if loan.origin is not None:
                    address = loan.pages.start << PAGE_SHIFT
                    self.cpu.write(buffer + layout.offset(loan.field), address.to_bytes(ADDRESS_SIZE, "little"))
            if command in WRITES_ITS_BUFFER:
                self.convert(_page(buffer))
        except KernelError as error:
            for loan in reversed(lent):
                with suppress(KernelError):  # the leak list names what does not come back
                    self._take_loan_back(loan)
            number = errno.EFAULT
            self.log.psp(f"SEV: failed to prepare buffer for legacy command {command:#x}. Error: -{number}")
            raise KernelError(
                number, f"{command.name}: memory for the firmware", "Firmware pages", str(error)
            ) from error
        return lent

    def _lend_output(self, output: Output, record: Record) -> Lent:
        address, size = getattr(record, output.address), getattr(record, output.length)
        count, origin = -(-size // PAGE_SIZE), None if output.guest else address
        if output.guest:
            pages = range(address >> PAGE_SHIFT, (address >> PAGE_SHIFT) + count)
        else:
            try:
                pages = self.memory.allocate(count)
            except KernelError:
                self.log("Failed to allocate bounce buffer for SEV legacy command.")
                raise
        try:
            self.convert(pages)
        except KernelError:
            self.log("Error moving pages to firmware-owned state for SEV legacy command.")
            if not output.guest:
                self.leaks.forget(pages)
            raise
        return Lent(output.address, pages, size, origin)

    def _take_buffer_back(self, command: Command, buffer: int) -> KernelError | None:
        """The command buffer is the host's again; where it is not (the failure), it stays in use for good."""
        if command not in WRITES_ITS_BUFFER:
            return None
        try:
            self.reclaim(_page(buffer))
        except KernelError as error:
            number = errno.EFAULT
            self.log.psp(f"SEV: failed to reclaim buffer for legacy command {command:#x}. Error: -{number}")
            return error
        return None

    def _take_loan_back(self, loan: Lent) -> None:
        try:
            self.reclaim(loan.pages)
        except KernelError:
            self.log("Failed to reclaim firmware-owned pages while issuing SEV legacy command.")
            if loan.origin is not None:
                self.leaks.forget(loan.pages)
            raise
        if loan.origin is not None:
            self.cpu.write(loan.origin, self.cpu.read(loan.pages.start << PAGE_SHIFT, loan.size))
            self.memory.release(loan.pages)


def _page(spa: int) -> range:
    return range(spa >> PAGE_SHIFT, (spa >> PAGE_SHIFT) + 1)
