"""Requests to the hypervisor through the GHCB, one after the other: the loop around VMGEXIT as one operation.

Each request is stored, the processor exits, and the answer is read. The hypervisor finds the first in the page; it may
serve those that follow in the same exit, since each comes as soon as the one before is done. Source: GHCB
specification (the guest's side of an event).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snpbook.hardware import guest_instructions
from snpbook.hardware.core import GuestCore
from snpbook.hardware.dram import Bytes
from snpbook.hardware.intercepts import Stop
from snpbook.hardware.operations import Operation
from snpbook.spec.ghcb import SHARED_BUFFER_OFFSET
from snpbook.spec.msr import Msr
from snpbook.spec.opcodes import CallInstruction
from snpbook.spec.pages import PAGE_SIZE

_LOW = (1 << 32) - 1


@dataclass(slots=True)
class Requests(Operation):
    """`requests` (n, size) in turn in the shared buffer of a GHCB that is otherwise `page`, up to where one exit leads.

    `done` (n, m) is what the first bytes of each become once it is done: one that is answered otherwise is the last.
    """

    address: int
    page: bytes
    requests: Bytes
    done: Bytes
    earlier: Bytes | None = None
    """The answers to all requests but the last that the hypervisor has served."""
    asked: bool = False
    found: tuple[int, bytes] = (0, b"")

    def step(self, core: GuestCore) -> Stop | None:
        if self.asked:
            answer = core.read(self.address, PAGE_SIZE)
            if not isinstance(answer, bytes):
                return answer
            self.found = self._outcome(answer)
            return None
        stop = core.write(self.address, _filled(self.page, self.requests[0]))
        if stop is not None:
            return stop
        core.registers.update(rcx=int(Msr.GHCB), rax=self.address & _LOW, rdx=self.address >> 32)
        return guest_instructions.wrmsr(core) or guest_instructions.vmgexit(core)

    def _outcome(self, last: bytes) -> tuple[int, bytes]:
        """How many were served, up to the first that is not done, and the page as its answer left it."""
        if self.earlier is None:
            return 1, last
        wrong = (self.earlier[:, : self.done.shape[1]] != self.done[: len(self.earlier)]).any(axis=1)
        if wrong.any():
            first = int(np.argmax(wrong))
            return first + 1, _filled(last, self.earlier[first])
        return len(self.earlier) + 1, last

    def emulated(self, core: GuestCore) -> None:
        self.asked = True

    @property
    def finished(self) -> bool:
        return False

    @property
    def code(self) -> bytes:
        return CallInstruction.VMGEXIT.value

    @property
    def value(self) -> tuple[int, bytes]:
        return self.found


def _filled(page: bytes, buffer: Bytes) -> bytes:
    """A GHCB with something else in its shared buffer."""
    return page[:SHARED_BUFFER_OFFSET] + buffer.tobytes() + page[SHARED_BUFFER_OFFSET + len(buffer) :]
