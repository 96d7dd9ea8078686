"""Command buffers: how the mailbox reads one, writes its answer back, and makes its page the host's again.

`spec.dispatch` says which command has which kind of buffer. Source: firmware 1.55.25, dispatch (rules 2, 3 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snpbook.firmware.pages import check_address, output_states, release_buffer
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFER_CLASSES, WRITES_COMMAND_BUFFER, BufferClass
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Layout, Record
from snpbook.spec.status import FirmwareRefusal, Status, require

if TYPE_CHECKING:
    from snpbook.firmware.processor import SecureProcessor


class LengthNeeded(FirmwareRefusal):
    """INVALID_LENGTH of a command that tells the length it needs: `answer` is the buffer with that length."""

    def __init__(self, answer: Record, rule: str, expected: object, found: object) -> None:
        super().__init__(Status.INVALID_LENGTH, rule, expected, found)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class CommandBuffer:
    """The buffer of a command that runs: where it is and what stands in it. `stray` are its reserved bytes not 0."""

    command: Command
    spa: int
    record: Record
    stray: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, psp: SecureProcessor, command: Command, layout: Layout, address: int) -> CommandBuffer:
        """Read a buffer; refused are its address and, where the command writes it back, the state of its pages."""
        spa = check_address(psp, address, layout.size, "command buffer", lookup=False)
        if command in WRITES_COMMAND_BUFFER and psp.initialised:
            wrong = output_states(psp, spa, layout.size)
            rule = "the command buffer's pages are Firmware or Default"
            require(not wrong, Status.INVALID_BUFFER_STATE, rule, "FIRMWARE or DEFAULT", wrong, "firmware 1.55.25")
        if BUFFER_CLASSES[command] is BufferClass.OUT:
            return cls(command, spa, layout.record())
        data = psp.machine.memory.read(KeyId.UNENCRYPTED, spa, layout.size)
        stray = layout.reserved_set(data, psp.release.abi.unknown_fields(command))
        return cls(command, spa, layout.unpack(data), stray)

    def answer(self, psp: SecureProcessor, answer: Record) -> None:
        """Write the buffer back; reserved bits keep what the host wrote, but for a buffer that is output alone."""
        size, value = answer.layout.size, int.from_bytes(bytes(answer), "little")
        if BUFFER_CLASSES[self.command] is not BufferClass.OUT:
            held = psp.machine.memory.read(KeyId.UNENCRYPTED, self.spa, size)
            value |= int.from_bytes(held, "little") & answer.layout.reserved_mask
        psp.machine.memory.write(KeyId.UNENCRYPTED, self.spa, value.to_bytes(size, "little"))

    def release(self, psp: SecureProcessor) -> None:
        """The buffer's first page becomes Reclaim, whether the command succeeded or not.

        Quirk: after a plain SNP_SHUTDOWN too, though the state of the page is not tested then.
        """
        if self.command in WRITES_COMMAND_BUFFER and psp.rmp_built:
            release_buffer(psp, self.spa)
