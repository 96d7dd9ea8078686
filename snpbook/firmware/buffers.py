"""Command buffers: how the mailbox reads one, writes its answer back, and makes its page the host's again.

`spec.dispatch` says which command has which kind of buffer. Source: firmware 1.55.25, dispatch (rules 2, 3 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snpbook.firmware.legacy_buffers import require_writable
from snpbook.firmware.pages import check_address, release_buffer
from snpbook.spec.commands import Command
from snpbook.spec.dispatch import BUFFER_CLASSES, WRITES_COMMAND_BUFFER, BufferClass
from snpbook.spec.encryption import KeyId
from snpbook.spec.layout import Layout, Record
from snpbook.spec.status import Status

if TYPE_CHECKING:
    from snpbook.firmware.processor import SecureProcessor


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
        if command in WRITES_COMMAND_BUFFER:
            require_writable(psp, spa, layout.size, "the command buffer", Status.INVALID_BUFFER_STATE)
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


def read_input(psp: SecureProcessor, address: int, size: int, name: str) -> bytes:
    """What a command's buffer points to, in a page of any state."""
    spa = check_address(psp, address, size, name, lookup=False)
    return psp.machine.memory.read(KeyId.UNENCRYPTED, spa, size)
