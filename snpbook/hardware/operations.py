"""What a guest program awaits: one operation is one instruction, or a run of them that goes on where it stopped.

An operation keeps its own progress and nothing of the machine, so that it can be copied in the middle. Operands and
results of instructions are in the guest's registers, where a #VC handler and, without SEV-ES, the hypervisor
find and put them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from snpbook.hardware import guest_instructions
from snpbook.hardware.core import GuestCore
from snpbook.hardware.exits import GuestException, Npf
from snpbook.hardware.intercepts import Stop
from snpbook.spec.opcodes import Opcode
from snpbook.spec.pages import PAGE_SIZE
from snpbook.spec.vmcb import ExitCode, FaultError, Vector

REGISTER_SIZE = 8
_AT_ONCE = 1 << 16
"""Pages of a run that are translated at once."""


@dataclass(slots=True)
class Operation:
    """One await: `step` does as much as it can on a core; an exception or exit leaves the rest for the next step."""

    def __await__(self) -> Generator[Operation, Any, Any]:
        return (yield self)

    def step(self, core: GuestCore) -> Stop | None:
        """None when done (the result is in `value`), else the exception or exit that came first."""
        raise TypeError(f"{type(self).__name__} has no step")

    def emulated(self, core: GuestCore) -> None:
        """Somebody did the instruction at which `step` stopped: its results are in the registers, go on behind it."""
        raise TypeError(f"{type(self).__name__} cannot be emulated: the handler returns False to have it done again")

    @property
    def code(self) -> bytes:
        """The machine code of the instruction at which it stands; empty where the model has none for it."""
        return b""

    @property
    def finished(self) -> bool:
        """Whether nothing is left of it, known once an instruction was done by somebody else."""
        return True

    @property
    def value(self) -> Any:
        return None


@dataclass(slots=True)
class Execute(Operation):
    """One instruction: `operands` are loaded, `result` reads what it leaves in the registers."""

    instruction: Callable[..., Stop | None]
    operands: Mapping[str, int] = field(default_factory=dict)
    arguments: tuple[int, ...] = ()
    result: Callable[[Mapping[str, int]], Any] | None = None
    opcode: bytes = b""
    done: bool = False
    found: Any = None

    def step(self, core: GuestCore) -> Stop | None:
        if not self.done:
            core.registers.update(self.operands)
            stop = self.instruction(core, *self.arguments)
            if stop is not None:
                return stop
            self.emulated(core)
        return None

    def emulated(self, core: GuestCore) -> None:
        self.done = True
        self.found = None if self.result is None else self.result(core.registers)

    @property
    def code(self) -> bytes:
        return self.opcode

    @property
    def value(self) -> Any:
        return self.found


@dataclass(slots=True)
class Invlpg(Operation):
    """The translations of one page dropped."""

    address: int

    def step(self, core: GuestCore) -> Stop | None:
        return guest_instructions.invlpg(core, self.address)


@dataclass(slots=True)
class Load(Operation):
    """Registers loaded one after the other, each by its own instruction."""

    registers: dict[str, int]
    done: int = 0

    def step(self, core: GuestCore) -> Stop | None:
        for name, value in list(self.registers.items())[self.done :]:
            stop = guest_instructions.load(core, name, value)
            if stop is not None:
                return stop
            self.done += 1
        return None

    def emulated(self, core: GuestCore) -> None:
        self.done += 1

    @property
    def code(self) -> bytes:
        name = [*self.registers][self.done] if not self.finished else ""
        return Opcode.WRITE_DR7.value if name == "dr7" else Opcode.LOAD_CR.value if name.startswith("cr") else b""

    @property
    def finished(self) -> bool:
        return self.done == len(self.registers)


@dataclass(slots=True)
class Look(Operation):
    """Registers as they are."""

    names: tuple[str, ...]
    found: tuple[int, ...] = ()

    def step(self, core: GuestCore) -> None:
        self.found = tuple(core.registers[name] for name in self.names)

    @property
    def value(self) -> tuple[int, ...]:
        return self.found


@dataclass(slots=True)
class Read(Operation):
    """Bytes of memory. One that MMIO answered is a load of RAX, if a register holds it."""

    address: int
    size: int
    data: bytes | None = None

    def step(self, core: GuestCore) -> Stop | None:
        if self.data is None:
            result = core.read(self.address, self.size)
            if not isinstance(result, bytes):
                return result
            self.data = result
        return None

    def emulated(self, core: GuestCore) -> None:
        if self.size > REGISTER_SIZE:
            raise TypeError(f"a read of {self.size} bytes cannot be emulated: at most {REGISTER_SIZE}")
        self.data = core.registers["rax"].to_bytes(REGISTER_SIZE, "little")[: self.size]

    @property
    def code(self) -> bytes:
        return Opcode.of_size("LOAD", self.size)

    @property
    def value(self) -> bytes:
        return self.data or b""


@dataclass(slots=True)
class Touch(Operation):
    """The first and the last byte of each page of a run read and dropped: two loads for each page, in a loop."""

    address: int
    count: int
    done: int = 0

    def step(self, core: GuestCore) -> Stop | None:
        while self.done < self.count:
            touched, fault = core.touch(self.address + self.done * PAGE_SIZE, min(self.count - self.done, _AT_ONCE))
            self.done += touched
            if fault is not None:
                return fault
        return None


@dataclass(slots=True)
class Write(Operation):
    """Bytes to memory. What goes to MMIO is a store of RAX, if a register holds it."""

    address: int
    data: bytes
    done: bool = False

    def step(self, core: GuestCore) -> Stop | None:
        if self.done:
            return None
        stop = core.write(self.address, self.data)
        if _is_mmio(stop) and len(self.data) <= REGISTER_SIZE:
            core.registers["rax"] = int.from_bytes(self.data, "little")
        return stop

    def emulated(self, core: GuestCore) -> None:
        self.done = True

    @property
    def code(self) -> bytes:
        return Opcode.of_size("STORE", len(self.data))


@dataclass(slots=True)
class Exchange(Operation):
    """Bytes of memory replaced in one step, as XCHG does: nobody comes between the old bytes and the new."""

    address: int
    data: bytes
    old: bytes | None = None

    def step(self, core: GuestCore) -> Stop | None:
        if self.old is None:
            result = core.read(self.address, len(self.data))
            if not isinstance(result, bytes):
                return result
            stop = core.write(self.address, self.data)
            if stop is not None:
                return stop
            self.old = result
        return None

    @property
    def value(self) -> bytes:
        return self.old or b""


def _is_mmio(stop: Stop | None) -> bool:
    if isinstance(stop, GuestException):
        return (stop.vector, stop.error) == (Vector.VC, ExitCode.NPF)
    return isinstance(stop, Npf) and bool(stop.error & FaultError.RESERVED)
